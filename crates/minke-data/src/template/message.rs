//! What is said in a conversation, as files and requests have it.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value, json};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// What holds for the whole conversation.
    System,
    /// The same under its newer name.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// What a tool gave back.
    Tool,
}

impl Role {
    /// The name that templates and files use.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Developer => "developer",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }

    /// The role of a name.
    pub fn of(name: &str) -> Option<Self> {
        [Self::System, Self::Developer, Self::User, Self::Assistant, Self::Tool]
            .into_iter()
            .find(|role| role.name() == name)
    }
}

/// One turn of a conversation, in files as chat APIs have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; without the thought.
    #[serde(default, deserialize_with = "or_nothing")]
    pub content: String,
    /// What was thought before it was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The tools that the model calls.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "or_nothing")]
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// The tool that answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A field that may be null.
fn or_nothing<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Message {
    /// A message without a thought.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        let content = content.into();
        Self {
            role,
            content,
            reasoning_content: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
        }
    }

    /// What holds for the whole conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new(Role::System, content)
    }

    /// What a person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    /// What the model thought and said.
    pub fn assistant(thought: Option<&str>, content: impl Into<String>) -> Self {
        Self { reasoning_content: thought.map(str::to_owned), ..Self::new(Role::Assistant, content) }
    }

    /// What a tool gave back to the call of this id.
    pub fn tool(id: impl Into<String>, name: impl Into<String>, content: impl Into<String>) -> Self {
        Self { tool_call_id: Some(id.into()), name: Some(name.into()), ..Self::new(Role::Tool, content) }
    }

    /// The same message with calls of tools.
    pub fn calling(self, tool_calls: Vec<ToolCall>) -> Self {
        Self { tool_calls, ..self }
    }
}

/// A call of a tool by the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Value", try_from = "Value")]
pub struct ToolCall {
    /// Ties the result to the call; may be empty.
    pub id: String,
    /// The tool.
    pub name: String,
    /// What it is called with: an object, or text of JSON as APIs have it. Templates get what they want.
    pub arguments: Value,
}

impl From<ToolCall> for Value {
    fn from(call: ToolCall) -> Self {
        let mut object = Map::new();
        if !call.id.is_empty() {
            object.insert("id".to_owned(), call.id.into());
        }
        object.insert("type".to_owned(), "function".into());
        object.insert("function".to_owned(), json!({ "name": call.name, "arguments": call.arguments }));
        Self::Object(object)
    }
}

impl TryFrom<Value> for ToolCall {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let function = value.get("function").unwrap_or(&value);
        let name =
            function.get("name").and_then(Value::as_str).ok_or("a tool call has no `name`")?.to_owned();
        let arguments = function.get("arguments").cloned().unwrap_or_else(|| json!({}));
        let id = value.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(Self { id, name, arguments })
    }
}
