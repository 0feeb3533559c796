//! `tools` and `tool_choice`: functions that an answer may or must call.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Problem,
    catalogue::Model,
    format::{is_name, strict},
};
pub use crate::text::{Said, ToolCall, ToolReader, ToolStyle};

use crate::text::Grammar;

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

/// Checks tools against the model's template.
pub async fn tools(model: &Model, tools: &[Value], choice: Option<&ToolChoice>) -> Result<Tools, Problem> {
    if tools.is_empty() {
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
    let forced: Vec<&Function> = match choice {
        Some(ToolChoice::Mode(Mode::None)) => return Ok(Tools::default()),
        None | Some(ToolChoice::Mode(Mode::Auto)) => Vec::new(),
        Some(ToolChoice::Mode(Mode::Required)) => functions.iter().collect(),
        Some(ToolChoice::Function(Chosen { kind: Kind::Function, function })) => {
            let found = functions.iter().find(|other| other.name == function.name);
            vec![found.ok_or_else(|| {
                let message = format!("tool_choice names {}, which is not among the tools", function.name);
                Problem::invalid("tool_choice.function.name", "unknown_function", message)
            })?]
        }
    };
    let grammar = match (forced.as_slice(), style) {
        ([], _) => {
            if let Some(i) = functions.iter().position(|function| function.is_strict) {
                let param = format!("tools.{i}.function.strict");
                let message = format!("{param}: only a call that tool_choice asks for can be held to its schema");
                return Err(Problem::invalid(param, "unsupported_parameter", message));
            }
            None
        }
        (_, None) => {
            let message = "how this model writes calls is not known, so it cannot be made to write one";
            return Err(Problem::invalid("tool_choice", "tools_unsupported", message));
        }
        (forced, Some(style)) => Some(calls(model, style, forced).await?),
    };
    Ok(Tools { shown: Some(tools.to_vec()), style, grammar })
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

/// One call of one of these functions and nothing else.
async fn calls(model: &Model, style: ToolStyle, functions: &[&Function]) -> Result<Grammar, Problem> {
    let one = |function: &&Function| {
        json!({"type": "object", "additionalProperties": false, "required": ["name", style.arguments()],
               "properties": {"name": {"const": function.name}, style.arguments(): function.parameters}})
    };
    let schema = json!({"anyOf": functions.iter().map(one).collect::<Vec<_>>()});
    let text = model.resident.text.clone();
    let (before, after) = style.around();
    let compile = move || text.grammars()?.json_between(before, &schema, after);
    let compiled = tokio::task::spawn_blocking(compile).await.map_err(Problem::internal)?;
    compiled
        .map_err(|error| Problem::invalid("tools", "invalid_json_schema", format!("the parameters of a tool: {error}")))
}
