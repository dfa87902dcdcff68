//! Conversations in files: `{"messages": [...]}` as chat APIs and fine-tuning have them, or `{"text": "..."}` of a base
//! model.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Message, Role};
use crate::files::{read_bounded, write_atomic};
use crate::{Error, Result};

/// Longer than any context.
const MAX_BYTES: u64 = 64 << 20;
/// As many turns as nobody takes.
const MAX_MESSAGES: usize = 100_000;

/// What was said, and with whom.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transcript {
    /// The model's name, where the file says it.
    pub model: Option<String>,
    /// The turns.
    pub messages: Vec<Message>,
    /// The running text of a base model.
    pub text: Option<String>,
}

impl Transcript {
    /// Reads a file: an object with `messages` or `text`, or a list of messages.
    ///
    /// # Errors
    /// It cannot be read, is too large, or is no such thing; the text says where.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(&read_bounded(path, MAX_BYTES)?)
            .map_err(|reason| Error::Transcript { path: path.to_owned(), reason })
    }

    /// Writes a file, or leaves the one that is there.
    ///
    /// # Errors
    /// I/O.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut out = Map::new();
        if let Some(model) = &self.model {
            out.insert("model".to_owned(), model.as_str().into());
        }
        match &self.text {
            Some(text) => out.insert("text".to_owned(), text.as_str().into()),
            None => out.insert("messages".to_owned(), json!(self.messages)),
        };
        let mut bytes = serde_json::to_vec_pretty(&out).expect("JSON values serialise");
        bytes.push(b'\n');
        write_atomic(path.as_ref(), &bytes)
    }

    /// Reads the bytes of a file; an error is text.
    ///
    /// # Errors
    /// As [`Transcript::load`].
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let value: Value =
            serde_json::from_slice(bytes).map_err(|error| format!("expected JSON, got {error}"))?;
        let model = value.get("model").and_then(Value::as_str).map(str::to_owned);
        if let Some(text) = value.get("text") {
            let text = text.as_str().ok_or_else(|| format!("`text`: expected a text, got {}", kind(text)))?;
            return Ok(Self { model, messages: Vec::new(), text: Some(text.to_owned()) });
        }
        let list = match (&value, value.get("messages")) {
            (Value::Array(list), _) | (_, Some(Value::Array(list))) => list,
            (Value::Object(_), None) => return Err("expected `messages`, got an object without".to_owned()),
            (_, Some(other)) => return Err(format!("`messages`: expected a list, got {}", kind(other))),
            (other, None) => return Err(format!("expected an object with `messages`, got {}", kind(other))),
        };
        if list.len() > MAX_MESSAGES {
            return Err(format!("expected at most {MAX_MESSAGES} messages, got {}", list.len()));
        }
        let messages =
            list.iter().enumerate().map(|(at, value)| message(at, value)).collect::<Result<Vec<_>, _>>()?;
        order(&messages)?;
        Ok(Self { model, messages, text: None })
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn message(at: usize, value: &Value) -> Result<Message, String> {
    let place = |name: &str| format!("`messages[{at}].{name}`");
    let Some(fields) = value.as_object() else {
        return Err(format!("`messages[{at}]`: expected an object, got {}", kind(value)));
    };
    let role = fields.get("role").unwrap_or(&Value::Null);
    let Some(role) = role.as_str().and_then(Role::of) else {
        let got: String = role.to_string().chars().take(40).collect();
        return Err(format!("{}: expected system, user, assistant or tool, got {got}", place("role")));
    };
    for name in ["content", "reasoning_content", "tool_call_id", "name"] {
        match fields.get(name) {
            Some(Value::String(_) | Value::Null) => {}
            None if name != "content" || fields.contains_key("tool_calls") => {}
            other => {
                let got = other.map_or("nothing", kind);
                return Err(format!("{}: expected a text, got {got}", place(name)));
            }
        }
    }
    let mut message: Message =
        serde_json::from_value(value.clone()).map_err(|error| format!("`messages[{at}]`: {error}"))?;
    message.role = role;
    Ok(message)
}

/// Instructions come first, and answers follow questions.
fn order(messages: &[Message]) -> Result<(), String> {
    let mut said = None;
    for (at, message) in messages.iter().enumerate() {
        let fits = match message.role {
            Role::System | Role::Developer => said.is_none(),
            Role::User => said != Some(Role::User),
            Role::Assistant => matches!(said, Some(Role::User | Role::Tool)),
            Role::Tool => matches!(said, Some(Role::Assistant | Role::Tool)),
        };
        if !fits {
            let before = said.map_or("nothing", Role::name);
            return Err(format!(
                "`messages[{at}]`: a turn of {} cannot follow {before}",
                message.role.name()
            ));
        }
        if !matches!(message.role, Role::System | Role::Developer) {
            said = Some(message.role);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ToolCall;

    #[test]
    fn what_is_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let call = ToolCall { id: "x".into(), name: "depth".into(), arguments: json!({"animal": "鯨"}) };
        let whole = Transcript {
            model: Some("m".into()),
            messages: vec![
                Message::system("be brief"),
                Message::user("how deep?\n🐋"),
                Message::assistant(Some("look"), "").calling(vec![call]),
                Message::tool("x", "depth", "3 km"),
                Message::assistant(None, "3 km"),
            ],
            text: None,
        };
        whole.save(&path).unwrap();
        assert_eq!(Transcript::load(&path).unwrap(), whole);
        let text = Transcript { text: Some("the whale\n".into()), ..Transcript::default() };
        text.save(&path).unwrap();
        assert_eq!(Transcript::load(&path).unwrap(), text);
        let list = br#"[{"role": "user", "content": "q"}]"#;
        assert_eq!(Transcript::parse(list).unwrap().messages, [Message::user("q")]);
        let error = Transcript::load(folder.path().join("none.json")).unwrap_err().to_string();
        assert!(error.contains("none.json"), "{error}");
    }

    #[test]
    fn what_is_no_conversation_is_refused() {
        for (text, why) in [
            ("{", "expected JSON, got EOF"),
            ("3", "expected an object with `messages`, got a number"),
            ("{}", "expected `messages`"),
            (r#"{"messages": 3}"#, "`messages`: expected a list, got a number"),
            (r#"{"text": []}"#, "`text`: expected a text, got a list"),
            (r"[3]", "`messages[0]`: expected an object, got a number"),
            (
                r#"[{"content": "x"}]"#,
                "`messages[0].role`: expected system, user, assistant or tool, got null",
            ),
            (r#"[{"role": "king", "content": "x"}]"#, "got \"king\""),
            (r#"[{"role": "user"}]"#, "`messages[0].content`: expected a text, got nothing"),
            (r#"[{"role": "user", "content": [1]}]"#, "expected a text, got a list"),
            (
                r#"[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]"#,
                "`messages[1]`: a turn of user cannot follow user",
            ),
            (r#"[{"role": "assistant", "content": "a"}]"#, "a turn of assistant cannot follow nothing"),
            (
                r#"[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]"#,
                "a turn of system cannot follow user",
            ),
            (
                r#"[{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]}]"#,
                "`messages[1]`: a tool call has no `name`",
            ),
        ] {
            let error = Transcript::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
