//! The base's chat template, run by minijinja with fuel and an output cap.

use serde_json::Value;

use super::TextError;

pub struct ChatTemplate {}

impl ChatTemplate {
    /// `messages` in OpenAI's shape; content parts of type text are joined to a string first.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let _ = (messages, tools, add_generation_prompt);
        todo!("text helper")
    }
}
