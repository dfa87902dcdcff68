//! How a template wants calls of tools.
//!
//! APIs give the arguments of a call as text of JSON and a turn that only calls as one whose content is null. Some
//! published templates want that, some want an object and write it as JSON themselves, some want an empty content; told
//! otherwise they refuse, drop the call, or write JSON within JSON. What a template wants is found by asking it.

use serde_json::{Map, Value, json};

use super::{Message, Role};

/// What a template wants of a turn with calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Form {
    /// Arguments as text of JSON rather than an object.
    pub text: bool,
    /// The content null rather than empty, where nothing is said beside the call.
    pub null: bool,
}

impl Form {
    /// All of them; of several that a template takes, the first is used.
    const ALL: [Self; 4] = [
        Self { text: false, null: true },
        Self { text: false, null: false },
        Self { text: true, null: true },
        Self { text: true, null: false },
    ];

    /// The form that a template tells; `render` runs it on messages and tools.
    pub fn of(render: impl Fn(&[Value], &[Value]) -> Option<String>) -> Self {
        let [user, result] = [Message::user("q"), Message::tool("abcdefghi", "probetool", "r")];
        let mut call = Message::new(Role::Assistant, "");
        call.tool_calls.push(super::ToolCall {
            id: "abcdefghi".to_owned(),
            name: "probetool".to_owned(),
            arguments: json!({ "probekey": "probevalue" }),
        });
        let tools = [json!({"type": "function", "function": {"name": "othertool", "description": "d",
            "parameters": {"type": "object", "properties": {}, "required": []}}})];
        let tells = |form: &Self, turns: usize| {
            let messages = [&user, &call, &result].map(|message| form.told(message));
            render(&messages[..turns], &tools).is_some_and(|text| {
                text.contains("probetool") && text.contains("probevalue") && !text.contains("\\\"probekey")
            })
        };
        // a template may refuse a result that it does not know, so the turn is asked for alone as well
        let found = [3, 2].into_iter().find_map(|turns| Self::ALL.iter().find(|form| tells(form, turns)));
        found.copied().unwrap_or(Self::ALL[0])
    }

    /// A message as templates see it.
    pub fn told(self, message: &Message) -> Value {
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
        put("role", message.role.name().into());
        let is_null = self.null && message.content.is_empty() && !message.tool_calls.is_empty();
        put("content", if is_null { Value::Null } else { message.content.as_str().into() });
        if let Some(thought) = &message.reasoning_content {
            put("reasoning_content", thought.as_str().into());
            // the name that gpt-oss has for it
            put("thinking", thought.as_str().into());
        }
        if !message.tool_calls.is_empty() {
            let calls = message.tool_calls.iter().map(|call| {
                let arguments = self.arguments(&call.arguments);
                Value::from(super::ToolCall { arguments, ..call.clone() })
            });
            put("tool_calls", calls.collect());
        }
        if let Some(id) = &message.tool_call_id {
            put("tool_call_id", id.as_str().into());
        }
        if let Some(name) = &message.name {
            put("name", name.as_str().into());
        }
        Value::Object(out)
    }

    fn arguments(self, given: &Value) -> Value {
        match given {
            Value::String(_) if self.text => given.clone(),
            // text that is no JSON object is told as it is
            Value::String(text) => match serde_json::from_str(text) {
                Ok(object @ Value::Object(_)) => object,
                _ => given.clone(),
            },
            other if self.text => super::json::python(other).into(),
            other => other.clone(),
        }
    }
}
