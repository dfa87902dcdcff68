//! Chat templates: from messages to what a model reads.
//!
//! A template is a small program in Jinja that came with a model, so it is hostile: its size, its steps, its depth
//! and what it writes are bounded. (What it builds and throws away is bounded by the steps only.)
//!
//! **A person cannot forge control tokens.** [`ChatTemplate::encode`] does not tokenise the rendered text as it is:
//! while the template runs, every place in a message where a control token could begin is marked by a character
//! that occurs nowhere else, so the `<|user|>` that a person typed is eight characters whatever the template does
//! with it, and `<|user|>` written by the template is the token. Of what an assistant said, `<think>` and `</think>`
//! are tokens too, for it said them as tokens.
//!
//! **What the model wrote** is where a finished conversation goes on from the prompt that the template gives for the
//! same conversation without the answer. [`Encoded::mask`] marks it: thought, end of thought, answer, end-of-turn
//! token, but neither headers nor what a template puts behind the end of a turn. A template may tell the past
//! differently (DeepSeek-R1's forgets earlier thoughts); such a turn is what nobody ever wrote, and is not marked.
//!
//! **Thoughts** are [`Message::reasoning_content`]. A template that does not know that field gets
//! `<think>\n...\n</think>\n\n` in front of the answer. [`ChatTemplate::think_problems`] says what a template does to
//! thoughts that a training run should know.

mod encode;
mod environment;
pub mod thinking;

use std::path::Path;
use std::sync::Arc;

use minijinja::Environment;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files::{read_bounded, write_atomic};
use crate::{Error, Result, Tokenizer};

pub use encode::Encoded;
pub use thinking::Thinking;

/// Published templates stay below 20 kB.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// A `tokenizer_config.json` lists each added token.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Templates that are built in, written for this project: name, source, begin and end of a text.
const BUILTIN: [(&str, &str, [&str; 2]); 6] = [
    ("minke", include_str!("builtin/minke.jinja"), ["<|bos|>", "<|eos|>"]),
    ("minke-one-turn", include_str!("builtin/minke-one-turn.jinja"), ["<|bos|>", "<|eos|>"]),
    (
        "deepseek-r1",
        include_str!("builtin/deepseek-r1.jinja"),
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
    ),
    (
        "deepseek-v3",
        include_str!("builtin/deepseek-v3.jinja"),
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
    ),
    ("chatml", include_str!("builtin/chatml.jinja"), ["", "<|im_end|>"]),
    ("llama3", include_str!("builtin/llama3.jinja"), ["<|begin_of_text|>", "<|eot_id|>"]),
];

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

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; without the thought.
    pub content: String,
    /// What was thought before it was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

impl Message {
    /// A message without a thought.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), reasoning_content: None }
    }

    /// What a person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    /// What the model thought and said.
    pub fn assistant(thought: Option<&str>, content: impl Into<String>) -> Self {
        Self { reasoning_content: thought.map(str::to_owned), ..Self::new(Role::Assistant, content) }
    }
}

/// What is asked of a rendering.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RenderOptions {
    /// Whether the text ends with the beginning of the model's next turn.
    pub add_generation_prompt: bool,
    /// How that turn begins.
    pub thinking: Thinking,
}

impl RenderOptions {
    /// The prompt for the model's next turn.
    pub fn prompt(thinking: Thinking) -> Self {
        Self { add_generation_prompt: true, thinking }
    }
}

/// The texts that stand for special tokens in a template.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
struct Names {
    #[serde(rename = "bos_token")]
    bos: String,
    #[serde(rename = "eos_token")]
    eos: String,
    #[serde(rename = "pad_token")]
    pad: String,
    #[serde(rename = "unk_token")]
    unk: String,
}

/// A chat template, compiled; a clone is cheap.
#[derive(Clone)]
pub struct ChatTemplate {
    place: String,
    source: Arc<str>,
    environment: Arc<Environment<'static>>,
    names: Names,
    /// Whether the template itself knows of thoughts.
    knows_thoughts: bool,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("place", &self.place).finish_non_exhaustive()
    }
}

impl PartialEq for ChatTemplate {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source && self.names == other.names
    }
}

impl ChatTemplate {
    /// Compiles a template; `place` is what messages call it.
    ///
    /// # Errors
    /// It is too long, or no Jinja.
    pub fn new(place: &str, source: &str) -> Result<Self> {
        if source.len() as u64 > MAX_TEMPLATE_BYTES {
            let reason = format!("longer than the {MAX_TEMPLATE_BYTES} bytes that a template may have");
            return Err(Error::template(place, reason));
        }
        let environment = environment::compile(source).map_err(|reason| Error::template(place, reason))?;
        Ok(Self {
            place: place.to_owned(),
            source: source.into(),
            environment: Arc::new(environment),
            names: Names::default(),
            knows_thoughts: source.contains("reasoning_content"),
        })
    }

    /// The template of a model folder: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`, where a
    /// list holds the one named `default`. None where the folder has none.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that is broken.
    pub fn load(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        let folder = folder.as_ref();
        let (own, config) = (folder.join("chat_template.jinja"), folder.join("tokenizer_config.json"));
        let place = config.display().to_string();
        let value: Value = if config.is_file() {
            serde_json::from_slice(&read_bounded(&config, MAX_CONFIG_BYTES)?)
                .map_err(|error| Error::template(&place, format!("not JSON: {error}")))?
        } else {
            Value::Null
        };
        let mut template = if own.is_file() {
            let place = own.display().to_string();
            let source = String::from_utf8(read_bounded(&own, MAX_TEMPLATE_BYTES)?)
                .map_err(|_| Error::template(&place, "not UTF-8"))?;
            Self::new(&place, &source)?
        } else {
            let found = match value.get("chat_template") {
                Some(Value::Array(named)) => {
                    let default = named.iter().find(|entry| entry["name"] == "default").or(named.first());
                    default.and_then(|entry| entry.get("template"))
                }
                other => other,
            };
            let Some(found) = found.filter(|found| !found.is_null()) else { return Ok(None) };
            let source = found
                .as_str()
                .ok_or_else(|| Error::template(&place, "`chat_template` is neither text nor a list"))?;
            Self::new(&place, source)?
        };
        let name = |key: &str| {
            let entry = value.get(key).map(|entry| entry.get("content").unwrap_or(entry));
            entry.and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        template.names = Names {
            bos: name("bos_token"),
            eos: name("eos_token"),
            pad: name("pad_token"),
            unk: name("unk_token"),
        };
        Ok(Some(template))
    }

    /// A built-in template: one of [`ChatTemplate::builtin_names`].
    ///
    /// # Errors
    /// There is none of that name.
    pub fn named(name: &str) -> Result<Self> {
        let Some((place, source, [bos, eos])) = BUILTIN.iter().find(|(known, ..)| *known == name) else {
            let known = Self::builtin_names().join(", ");
            return Err(Error::template(
                format!("`{}`", name.escape_debug()),
                format!("expected one of {known}"),
            ));
        };
        let mut template = Self::new(place, source)?;
        template.names = Names { bos: (*bos).to_owned(), eos: (*eos).to_owned(), ..Names::default() };
        Ok(template)
    }

    /// The names of the built-in templates.
    pub fn builtin_names() -> [&'static str; BUILTIN.len()] {
        BUILTIN.map(|(name, ..)| name)
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Where it came from: a file, or its built-in name.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Writes the template into a model folder: as a file for newer readers, and into its `tokenizer_config.json`, if
    /// it has one, for older ones.
    ///
    /// # Errors
    /// I/O, or a config that is no JSON object.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        write_atomic(&folder.join("chat_template.jinja"), self.source.as_bytes())?;
        let config = folder.join("tokenizer_config.json");
        if !config.is_file() {
            return Ok(());
        }
        let fail = |reason: String| Error::template(config.display().to_string(), reason);
        let mut value: Value = serde_json::from_slice(&read_bounded(&config, MAX_CONFIG_BYTES)?)
            .map_err(|error| fail(format!("not JSON: {error}")))?;
        let object = value.as_object_mut().ok_or_else(|| fail("not an object".to_owned()))?;
        object.insert("chat_template".to_owned(), Value::String(self.source.to_string()));
        let mut text = serde_json::to_vec_pretty(&value).expect("JSON values serialise");
        text.push(b'\n');
        write_atomic(&config, &text)
    }

    /// The text of a conversation. It is for eyes: [`ChatTemplate::encode`] gives tokens, safely.
    ///
    /// # Errors
    /// What the template refuses, and a template that does not end.
    pub fn render(&self, messages: &[Message], options: RenderOptions) -> Result<String> {
        self.render_as(&self.names, &self.prepared(messages), options)
    }

    fn render_as(&self, names: &Names, messages: &[Message], options: RenderOptions) -> Result<String> {
        let text = environment::render(&self.environment, names, messages, options)
            .map_err(|reason| Error::template(&self.place, reason))?;
        Ok(if options.add_generation_prompt { options.thinking.begin(text) } else { text })
    }

    /// The names as a tokenizer has them, where it does not know the template's own.
    fn names_of(&self, tokenizer: &Tokenizer) -> Names {
        let name = |own: &String, id: Option<u32>| {
            let known = !own.is_empty() && tokenizer.id_of(own).is_some();
            let other = if known { None } else { id.and_then(|id| tokenizer.token_of(id)) };
            other.unwrap_or_else(|| own.clone())
        };
        let own = &self.names;
        Names { bos: name(&own.bos, tokenizer.bos()), eos: name(&own.eos, tokenizer.eos()), ..own.clone() }
    }

    /// Thoughts where the template looks for them.
    fn prepared(&self, messages: &[Message]) -> Vec<Message> {
        let prepare = |message: &Message| match (message.role, self.knows_thoughts) {
            (Role::Assistant, true) => thinking::taken_out(message),
            (Role::Assistant, false) => thinking::put_in(message),
            _ => Message { reasoning_content: None, ..message.clone() },
        };
        messages.iter().map(prepare).collect()
    }
}

#[cfg(test)]
mod tests;
