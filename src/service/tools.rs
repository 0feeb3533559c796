//! `tools` and `tool_choice`: functions that an answer may or must call.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Problem,
    catalogue::Model,
    format::{is_name, strict},
};
pub use crate::text::{Said, ToolReader, ToolStyle};

use crate::text::{Calls, Grammar};

const MAX_TOOLS: usize = 128;

/// OpenAI's `tool_choice`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum ToolChoice {
    Mode(Mode),
    Function(Chosen),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    None,
    Auto,
    Required,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chosen {
    #[serde(rename = "type")]
    kind: Kind,
    function: Name,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Function,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Name {
    name: String,
}

/// What a request's tools come to.
#[derive(Default)]
pub struct Tools {
    /// As the template shows them.
    pub shown: Option<Vec<Value>>,
    /// How calls are read out of the answer; none where nothing is to be called or the model's way is not known.
    pub style: Option<ToolStyle>,
    /// What the answer is held to where it must be a call.
    pub grammar: Option<Grammar>,
}

struct Function {
    name: String,
    parameters: Value,
    is_strict: bool,
}

/// Checks tools against the model's template. `parallel` is whether several calls may stand in one answer.
pub async fn tools(
    model: &Model,
    tools: &[Value],
    choice: Option<&ToolChoice>,
    parallel: Option<bool>,
) -> Result<Tools, Problem> {
    if tools.is_empty() {
        if parallel == Some(false) {
            let message = "parallel_tool_calls needs tools";
            return Err(Problem::invalid("parallel_tool_calls", "invalid_combination", message));
        }
        return match choice {
            None | Some(ToolChoice::Mode(Mode::None | Mode::Auto)) => Ok(Tools::default()),
            Some(_) => Err(Problem::invalid("tool_choice", "invalid_combination", "tool_choice needs tools")),
        };
    }
    if tools.len() > MAX_TOOLS {
        let message = format!("{} tools are above the limit of {MAX_TOOLS}", tools.len());
        return Err(Problem::invalid("tools", "out_of_range", message));
    }
    let functions = tools.iter().enumerate().map(|(i, tool)| function(&format!("tools.{i}"), tool));
    let functions: Vec<Function> = functions.collect::<Result<_, _>>()?;
    let template = model.resident.text.template.as_ref();
    if !template.is_some_and(|template| template.takes_tools()) {
        let message = format!("the chat template of {} has no place for tools", model.resident.base.info.id);
        return Err(Problem::invalid("tools", "tools_unsupported", message));
    }
    let style = template.and_then(|template| template.tool_style());
    let many = parallel.unwrap_or(true);
    let (calls, called) = match choice {
        Some(ToolChoice::Mode(Mode::None)) => return Ok(Tools::default()),
        None | Some(ToolChoice::Mode(Mode::Auto)) => {
            let free = many && !functions.iter().any(|function| function.is_strict);
            (if many { Calls::Any } else { Calls::AtMostOne }, if free { Vec::new() } else { loose(functions) })
        }
        Some(ToolChoice::Mode(Mode::Required)) => (if many { Calls::Several } else { Calls::One }, functions),
        Some(ToolChoice::Function(Chosen { kind: Kind::Function, function })) => {
            let found = functions.into_iter().find(|other| other.name == function.name);
            let found = found.ok_or_else(|| {
                let message = format!("tool_choice names {}, which is not among the tools", function.name);
                Problem::invalid("tool_choice.function.name", "unknown_function", message)
            })?;
            (Calls::One, vec![found])
        }
    };
    let grammar = match (called.is_empty(), style) {
        (true, _) => None,
        (false, Some(style)) => Some(held(model, style, calls, called).await?),
        (false, None) => {
            let message = "how this model writes calls is not known, so its calls cannot be held to anything";
            let param = if choice.is_some() { "tool_choice" } else { "tools" };
            return Err(Problem::invalid(param, "tools_unsupported", message));
        }
    };
    Ok(Tools { shown: Some(tools.to_vec()), style, grammar })
}

/// Only strict functions are held to their parameters where the model is free to call.
fn loose(functions: Vec<Function>) -> Vec<Function> {
    let loosened = |function: Function| match function.is_strict {
        true => function,
        false => Function { parameters: json!({"type": "object"}), ..function },
    };
    functions.into_iter().map(loosened).collect()
}

fn function(path: &str, tool: &Value) -> Result<Function, Problem> {
    let wrong = |param: String, why: &str| Problem::invalid(param.clone(), "invalid_tool", format!("{param} {why}"));
    let (Some(fields), "function") = (tool.as_object(), tool["type"].as_str().unwrap_or_default()) else {
        return Err(wrong(format!("{path}.type"), "is not function"));
    };
    let Some(function) = tool["function"].as_object() else {
        return Err(wrong(format!("{path}.function"), "is not an object"));
    };
    let known = ["name", "description", "parameters", "strict"];
    let unknown = fields.keys().find(|key| !["type", "function"].contains(&key.as_str())).cloned();
    let inner = function.keys().find(|key| !known.contains(&key.as_str())).map(|key| format!("function.{key}"));
    if let Some(key) = unknown.or(inner) {
        let param = format!("{path}.{key}");
        return Err(Problem::invalid(param.clone(), "unknown_parameter", format!("unknown field {param}")));
    }
    let name = function.get("name").and_then(Value::as_str).filter(|name| is_name(name));
    let Some(name) = name else {
        let why = "takes 1 to 64 letters, digits, underscores and dashes";
        return Err(wrong(format!("{path}.function.name"), why));
    };
    let parameters = function.get("parameters").filter(|value| !value.is_null()).cloned();
    let parameters = parameters.unwrap_or_else(|| json!({"type": "object", "properties": {}}));
    if !parameters.is_object() {
        return Err(wrong(format!("{path}.function.parameters"), "is not an object"));
    }
    let is_strict = function.get("strict").is_some_and(|value| *value == true);
    if is_strict {
        strict(&parameters, &format!("{path}.function.parameters"))?;
    }
    Ok(Function { name: name.to_owned(), parameters, is_strict })
}

/// What an answer is held to that calls these functions.
async fn held(model: &Model, style: ToolStyle, calls: Calls, functions: Vec<Function>) -> Result<Grammar, Problem> {
    let functions: Vec<_> = functions.into_iter().map(|function| (function.name, function.parameters)).collect();
    let text = model.resident.text.clone();
    let compile = move || text.grammars()?.calls(style, calls, &functions);
    let compiled = tokio::task::spawn_blocking(compile).await.map_err(Problem::internal)?;
    compiled
        .map_err(|error| Problem::invalid("tools", "invalid_json_schema", format!("the parameters of a tool: {error}")))
}
