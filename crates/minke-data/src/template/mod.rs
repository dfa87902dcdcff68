//! Chat templates: from messages to what a model reads.
//!
//! A template is a small program in Jinja that came with a model, so it is hostile: its size, its steps, its depth,
//! what it builds and what it writes are bounded.
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

mod bounds;
mod calls;
mod clock;
mod encode;
mod environment;
mod filters;
mod json;
mod message;
mod python;
pub mod thinking;
mod transcript;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use calls::Form;
use minijinja::Environment;
use serde_json::{Map, Value};

use crate::files::{read_bounded, write_atomic};
use crate::{Error, Result, Tokenizer};

pub use encode::Encoded;
pub use message::{Message, Role, ToolCall};
pub use thinking::Thinking;
pub use transcript::Transcript;

/// Published templates stay below 20 kB.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
/// A `tokenizer_config.json` lists each added token.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Where a folder has the template for conversations with tools.
const TOOL_USE_FILE: &str = "additional_chat_templates/tool_use.jinja";

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

/// What is asked of a rendering.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RenderOptions<'a> {
    /// Whether the text ends with the beginning of the model's next turn.
    pub add_generation_prompt: bool,
    /// How that turn begins.
    pub thinking: Thinking,
    /// The tools that the model may call, each a JSON schema `{"type": "function", "function": {...}}`.
    pub tools: &'a [Value],
    /// Other variables that the template knows, such as `date_string`.
    pub variables: Option<&'a Map<String, Value>>,
}

impl RenderOptions<'_> {
    /// The prompt for the model's next turn.
    pub fn prompt(thinking: Thinking) -> Self {
        Self { add_generation_prompt: true, thinking, ..Self::default() }
    }
}

/// The texts that stand for special tokens in a template.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Names {
    bos: String,
    eos: String,
    /// Others by the names of their variables, such as `pad_token`.
    others: Vec<(String, String)>,
}

/// A chat template, compiled; a clone is cheap.
#[derive(Clone)]
pub struct ChatTemplate {
    place: String,
    source: Arc<str>,
    /// The template for conversations with tools, where it is another.
    tool_use: Option<Arc<str>>,
    environment: Arc<Environment<'static>>,
    names: Names,
    /// Whether the template itself knows of thoughts.
    knows_thoughts: bool,
    /// How it wants calls, once it has been asked.
    form: Arc<OnceLock<Form>>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("place", &self.place).finish_non_exhaustive()
    }
}

impl PartialEq for ChatTemplate {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source && self.tool_use == other.tool_use && self.names == other.names
    }
}

impl ChatTemplate {
    /// Compiles a template; `place` is what messages call it.
    ///
    /// # Errors
    /// It is too long, or no Jinja.
    pub fn new(place: &str, source: &str) -> Result<Self> {
        Self::compiled(place, source, None)
    }

    /// [`ChatTemplate::new`] with another template for conversations with tools.
    pub(crate) fn compiled(place: &str, source: &str, tool_use: Option<&str>) -> Result<Self> {
        let mut sources = vec![(environment::CHAT, source)];
        sources.extend(tool_use.map(|source| (environment::TOOL_USE, source)));
        if sources.iter().any(|(_, source)| source.len() as u64 > MAX_TEMPLATE_BYTES) {
            let reason = format!("longer than the {MAX_TEMPLATE_BYTES} bytes that a template may have");
            return Err(Error::template(place, reason));
        }
        let environment = environment::compile(&sources).map_err(|reason| Error::template(place, reason))?;
        let knows = ["reasoning_content", "message.thinking", "message['thinking']", "message[\"thinking\"]"];
        Ok(Self {
            place: place.to_owned(),
            source: source.into(),
            tool_use: tool_use.map(Arc::from),
            environment: Arc::new(environment),
            names: Names::default(),
            knows_thoughts: knows.iter().any(|name| source.contains(name)),
            form: Arc::default(),
        })
    }

    /// The template of a model folder: `chat_template.jinja`, with another for conversations with tools in
    /// `additional_chat_templates/tool_use.jinja` if there is one, or `chat_template` in `tokenizer_config.json`, where a
    /// list holds the one named `default` and may hold one named `tool_use`. None where the folder has none.
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
        let read = |path: &Path| {
            let bytes = read_bounded(path, MAX_TEMPLATE_BYTES)?;
            String::from_utf8(bytes).map_err(|_| Error::template(path.display().to_string(), "not UTF-8"))
        };
        let template = if own.is_file() {
            let tool_use = folder.join(TOOL_USE_FILE);
            let tool_use = if tool_use.is_file() { Some(read(&tool_use)?) } else { None };
            Self::compiled(&own.display().to_string(), &read(&own)?, tool_use.as_deref())?
        } else {
            let text = |value: &Value| {
                let fault = || Error::template(&place, "`chat_template` is neither text nor a list");
                value.as_str().map(str::to_owned).ok_or_else(fault)
            };
            match value.get("chat_template") {
                None | Some(Value::Null) => return Ok(None),
                Some(Value::Array(named)) => {
                    let of = |name: &str| named.iter().find(|entry| entry["name"] == name);
                    let Some(default) = of("default").or(named.first()) else { return Ok(None) };
                    let tool_use = of("tool_use").map(|entry| text(&entry["template"])).transpose()?;
                    Self::compiled(&place, &text(&default["template"])?, tool_use.as_deref())?
                }
                Some(other) => Self::new(&place, &text(other)?)?,
            }
        };
        Ok(Some(template.with_names(&value)))
    }

    /// The template with the special tokens that a `tokenizer_config.json` names: its fields `bos_token`, `eos_token`
    /// and others that end in `_token`, texts or objects with a `content`.
    #[must_use]
    pub fn with_names(mut self, config: &Value) -> Self {
        let mut names = Names::default();
        for (key, entry) in
            config.as_object().into_iter().flatten().filter(|(key, _)| key.ends_with("_token"))
        {
            let Some(text) = entry.get("content").unwrap_or(entry).as_str() else { continue };
            match key.as_str() {
                "bos_token" => text.clone_into(&mut names.bos),
                "eos_token" => text.clone_into(&mut names.eos),
                _ => names.others.push((key.clone(), text.to_owned())),
            }
        }
        self.names = names;
        self
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
        template.names = Names { bos: (*bos).to_owned(), eos: (*eos).to_owned(), others: Vec::new() };
        Ok(template)
    }

    /// The names of the built-in templates.
    pub fn builtin_names() -> [&'static str; BUILTIN.len()] {
        BUILTIN.map(|(name, ..)| name)
    }

    /// Says how special tokens are written in this template.
    pub(crate) fn set_names(&mut self, bos: String, eos: String, pad: String, unk: String) {
        let others = [("pad_token", pad), ("unk_token", unk)];
        let others = others.into_iter().filter(|(_, text)| !text.is_empty());
        let others = others.map(|(name, text)| (name.to_owned(), text)).collect();
        self.names = Names { bos, eos, others };
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of the template for conversations with tools, where it is another.
    pub fn tool_use(&self) -> Option<&str> {
        self.tool_use.as_deref()
    }

    /// Where it came from: a file, or its built-in name.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Writes the template into a model folder: as a file for newer readers, or two where there is one for conversations
    /// with tools, and into its `tokenizer_config.json`, if it has one, for older ones.
    ///
    /// # Errors
    /// I/O, or a config that is no JSON object.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        write_atomic(&folder.join("chat_template.jinja"), self.source.as_bytes())?;
        let with_tools = folder.join(TOOL_USE_FILE);
        match (&self.tool_use, with_tools.parent()) {
            (Some(source), Some(parent)) => {
                std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
                write_atomic(&with_tools, source.as_bytes())?;
            }
            _ if with_tools.is_file() => {
                std::fs::remove_file(&with_tools).map_err(Error::io("remove", &with_tools))?;
            }
            _ => {}
        }
        let config = folder.join("tokenizer_config.json");
        if !config.is_file() {
            return Ok(());
        }
        let fail = |reason: String| Error::template(config.display().to_string(), reason);
        let mut value: Value = serde_json::from_slice(&read_bounded(&config, MAX_CONFIG_BYTES)?)
            .map_err(|error| fail(format!("not JSON: {error}")))?;
        let object = value.as_object_mut().ok_or_else(|| fail("not an object".to_owned()))?;
        let told = match self.tool_use() {
            None => self.source().into(),
            Some(tool_use) => serde_json::json!([
                {"name": "default", "template": self.source()},
                {"name": "tool_use", "template": tool_use},
            ]),
        };
        object.insert("chat_template".to_owned(), told);
        let mut text = serde_json::to_vec_pretty(&value).expect("JSON values serialise");
        text.push(b'\n');
        write_atomic(&config, &text)
    }

    /// The text of a conversation. It is for eyes: [`ChatTemplate::encode`] gives tokens, safely.
    ///
    /// # Errors
    /// What the template refuses, and a template that does not end.
    pub fn render(&self, messages: &[Message], options: RenderOptions<'_>) -> Result<String> {
        self.render_as(&self.names, &self.prepared(messages), options)
    }

    /// The text of messages of any form, as transformers renders it: `messages` and `tools` are what the template gets,
    /// as they are, and `variables` stand beside them (`add_generation_prompt`, `enable_thinking` and the like).
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_values(
        &self,
        messages: &[Value],
        tools: &[Value],
        variables: &Map<String, Value>,
    ) -> Result<String> {
        let messages: Vec<Value> = messages.iter().map(with_aliases).collect();
        self.run(&self.names, &messages, tools, variables)
            .map_err(|reason| Error::template(&self.place, reason))
    }

    fn render_as(&self, names: &Names, messages: &[Message], options: RenderOptions<'_>) -> Result<String> {
        let form = self.form(messages);
        let messages: Vec<Value> = messages.iter().map(|message| form.told(message)).collect();
        let mut variables = options.variables.cloned().unwrap_or_default();
        variables.insert("add_generation_prompt".to_owned(), options.add_generation_prompt.into());
        if options.thinking != Thinking::Default {
            // the names that published templates use for this
            for name in ["enable_thinking", "thinking"] {
                variables.insert(name.to_owned(), (options.thinking == Thinking::Open).into());
            }
        }
        let text = self
            .run(names, &messages, options.tools, &variables)
            .map_err(|reason| Error::template(&self.place, reason))?;
        Ok(if options.add_generation_prompt { options.thinking.begin(text) } else { text })
    }

    fn run(
        &self,
        names: &Names,
        messages: &[Value],
        tools: &[Value],
        variables: &Map<String, Value>,
    ) -> std::result::Result<String, String> {
        let mut all: Map<String, Value> = Map::new();
        all.insert("bos_token".to_owned(), names.bos.as_str().into());
        all.insert("eos_token".to_owned(), names.eos.as_str().into());
        all.extend(names.others.iter().map(|(name, text)| (name.clone(), text.as_str().into())));
        all.insert("add_generation_prompt".to_owned(), false.into());
        all.extend(variables.iter().map(|(name, value)| (name.clone(), value.clone())));
        all.insert("messages".to_owned(), messages.into());
        // there and empty-handed, as transformers tells it
        all.insert("tools".to_owned(), if tools.is_empty() { Value::Null } else { tools.into() });
        all.entry("documents").or_insert(Value::Null);
        let with_tools = self.tool_use.is_some() && !tools.is_empty();
        let name = if with_tools { environment::TOOL_USE } else { environment::CHAT };
        let given: usize = all.values().map(bytes_of).sum();
        environment::render(&self.environment, name, &all, given + self.source.len())
    }

    /// How the template wants calls; it is asked once, when there are some.
    fn form(&self, messages: &[Message]) -> Form {
        if messages.iter().all(|message| message.tool_calls.is_empty()) {
            return Form { text: false, null: false };
        }
        let ask =
            |messages: &[Value], tools: &[Value]| self.run(&self.names, messages, tools, &Map::new()).ok();
        *self.form.get_or_init(|| Form::of(ask))
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

/// Bytes of text in JSON, and of what holds it.
fn bytes_of(value: &Value) -> usize {
    16 + match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(bytes_of).sum(),
        Value::Object(fields) => fields.iter().map(|(key, value)| key.len() + bytes_of(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

/// A message whose thought has each of the names that templates read, whichever it was given under.
fn with_aliases(message: &Value) -> Value {
    let names = ["reasoning_content", "thinking", "reasoning"];
    let thought = names.iter().find_map(|name| message.get(name).filter(|thought| !thought.is_null()));
    let (Some(thought), Some(fields)) = (thought, message.as_object()) else { return message.clone() };
    let mut out = fields.clone();
    out.insert("reasoning_content".to_owned(), thought.clone());
    out.entry("thinking").or_insert_with(|| thought.clone());
    Value::Object(out)
}

#[cfg(test)]
mod tests;
