//! The body of a request: what may stand in it, and what it asks of the engine.

use std::collections::BTreeMap;

use minke_data::{Message, Thinking};
use minke_infer::{Constraint, Request, Sampling, ThinkingBudget};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// Answers to one request.
const MAX_CHOICES: usize = 64;
/// Likeliest tokens at each place.
const MAX_TOP: usize = 20;
/// Tokens of a continuation where nobody says how many, as this API has it.
const DEFAULT_TOKENS: usize = 16;
/// Strings that end an answer, and tokens that do.
const MAX_STOPS: usize = 16;
/// The kinds of a form.
const FORMS: [&str; 5] = ["json", "json_object", "regex", "choice", "grammar"];
/// All texts of a choice, as the grammar that they become.
const MAX_CHOICE_BYTES: usize = 256 << 10;
/// Length of a string that ends one.
const MAX_STOP_BYTES: usize = 4096;

/// Which endpoint a body came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// All fields of either endpoint; one that nobody knows is an error.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Body {
    /// The model by name.
    pub model: Option<String>,
    messages: Option<Vec<Value>>,
    prompt: Option<Value>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    min_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    seed: Option<i64>,
    n: Option<usize>,
    stop: Option<Value>,
    stop_token_ids: Option<Vec<u32>>,
    /// Whether the answer comes as it is written.
    pub stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    logprobs: Option<LogProbs>,
    top_logprobs: Option<usize>,
    logit_bias: Option<BTreeMap<String, f32>>,
    response_format: Option<Value>,
    structured_outputs: Option<Map<String, Value>>,
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    reasoning_effort: Option<String>,
    thinking_budget: Option<usize>,
    chat_template_kwargs: Option<Map<String, Value>>,
    priority: Option<i32>,
    echo: Option<bool>,
    suffix: Option<Value>,
    best_of: Option<usize>,
    // what a server without accounts has no use for
    user: IgnoredAny,
    metadata: IgnoredAny,
    store: IgnoredAny,
    service_tier: IgnoredAny,
    safety_identifier: IgnoredAny,
    prompt_cache_key: IgnoredAny,
    parallel_tool_calls: IgnoredAny,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum LogProbs {
    Wanted(bool),
    Top(usize),
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// What is to be continued.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A conversation, with its template's tools and variables.
    Chat {
        /// What was said.
        messages: Vec<Message>,
        /// What may be called.
        tools: Vec<Value>,
        /// How the answer begins.
        thinking: Thinking,
        /// Other variables of the template.
        variables: Map<String, Value>,
    },
    /// A text.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<u32>),
}

/// What a body asks for, checked as far as that goes without the model.
#[derive(Debug)]
pub struct Asked {
    /// What is to be continued, each `n` times.
    pub prompts: Vec<Prompt>,
    /// Answers to each.
    pub n: usize,
    /// The most tokens of an answer; none for all that fit.
    pub max_tokens: Option<usize>,
    /// Everything else, without prompt and number of tokens.
    pub request: Request,
    /// Whether log-probabilities are told.
    pub log_probs: bool,
    /// How urgent it is.
    pub priority: i32,
    /// Whether it comes as a stream.
    pub stream: bool,
    /// Whether the stream ends with what it took.
    pub include_usage: bool,
}

impl Body {
    /// Reads a body.
    ///
    /// # Errors
    /// It is no JSON, or has a field that nobody knows or of another type.
    pub fn read(bytes: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(bytes).map_err(|error| {
            let text = error.to_string();
            // the list of all fields is for a manual
            match text.split_once(", expected one of") {
                Some((unknown, _)) => {
                    let name =
                        unknown.strip_prefix("unknown field `").and_then(|rest| rest.strip_suffix('`'));
                    let message = format!("the body has an {unknown}");
                    ApiError::Invalid { message, param: name.map(str::to_owned) }
                }
                None => ApiError::body(format!("expected a JSON object of this endpoint, got: {text}")),
            }
        })
    }

    /// Checks fields and turns them into a request; `defaults` and `seed` stand for what is not said.
    ///
    /// # Errors
    /// A field that is out of its bounds, belongs to the other endpoint, or asks for what there is not.
    pub fn asked(self, endpoint: Endpoint, defaults: Sampling, seed: u64) -> Result<Asked, ApiError> {
        self.check(endpoint)?;
        let prompts = match endpoint {
            Endpoint::Chat => vec![self.conversation()?],
            Endpoint::Text => texts(self.prompt.as_ref())?,
        };
        let n = self.n.unwrap_or(1);
        let answers = n.saturating_mul(prompts.len());
        if answers == 0 || answers > MAX_CHOICES {
            let reason = format!("expected 1 to {MAX_CHOICES} answers in all, got {answers}");
            return Err(ApiError::field("n", reason));
        }
        let (log_probs, top_log_probs) = self.log_probs(endpoint)?;
        let max_tokens = self.max_completion_tokens.or(self.max_tokens);
        let request = Request {
            sampling: self.sampling(defaults, seed)?,
            stop: self.stops()?,
            more_stop_ids: self.stop_ids()?,
            min_tokens: self.min_tokens.unwrap_or(0),
            logit_bias: self.bias()?,
            top_log_probs,
            thinking: self.thinking_budget.map(ThinkingBudget::new),
            constraint: self.constraint()?,
            ..Request::default()
        };
        Ok(Asked {
            prompts,
            n,
            max_tokens: max_tokens.or((endpoint == Endpoint::Text).then_some(DEFAULT_TOKENS)),
            request,
            log_probs,
            priority: self.priority.unwrap_or(0),
            stream: self.stream.unwrap_or(false),
            include_usage: self.stream_options.and_then(|options| options.include_usage).unwrap_or(false),
        })
    }

    /// Fields of the other endpoint, and those that ask for what there is not.
    fn check(&self, endpoint: Endpoint) -> Result<(), ApiError> {
        let of_text = [
            ("prompt", self.prompt.is_some()),
            ("echo", self.echo.is_some()),
            ("suffix", self.suffix.is_some()),
            ("best_of", self.best_of.is_some()),
        ];
        let of_chat = [
            ("messages", self.messages.is_some()),
            ("tools", self.tools.is_some()),
            ("tool_choice", self.tool_choice.is_some()),
            ("top_logprobs", self.top_logprobs.is_some()),
            ("max_completion_tokens", self.max_completion_tokens.is_some()),
            ("reasoning_effort", self.reasoning_effort.is_some()),
            ("thinking_budget", self.thinking_budget.is_some()),
            ("chat_template_kwargs", self.chat_template_kwargs.is_some()),
        ];
        let (others, path) = match endpoint {
            Endpoint::Chat => (&of_text[..], "/v1/completions"),
            Endpoint::Text => (&of_chat[..], "/v1/chat/completions"),
        };
        if let Some((name, _)) = others.iter().find(|(_, is_there)| *is_there) {
            return Err(ApiError::field(*name, format!("is a field of {path}")));
        }
        let unsupported = |name: &str| Err(ApiError::field(name, "is not supported yet"));
        if self.echo == Some(true) {
            return unsupported("echo");
        }
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_null()) {
            return unsupported("suffix");
        }
        if self.best_of.is_some_and(|best| Some(best) != self.n.or(Some(1))) {
            return unsupported("best_of");
        }
        match self.tool_choice.as_ref() {
            None => Ok(()),
            Some(Value::String(word)) if word == "auto" || word == "none" => Ok(()),
            Some(_) => Err(ApiError::field("tool_choice", "only auto and none are supported yet")),
        }
    }

    fn conversation(&self) -> Result<Prompt, ApiError> {
        let Some(messages) = self.messages.as_ref().filter(|messages| !messages.is_empty()) else {
            return Err(ApiError::field("messages", "expected at least one message"));
        };
        let messages =
            messages.iter().enumerate().map(|(at, value)| message(at, value)).collect::<Result<_, _>>()?;
        let mut variables = self.chat_template_kwargs.clone().unwrap_or_default();
        let mut thinking = match variables.get("enable_thinking").or_else(|| variables.get("thinking")) {
            None => Thinking::Default,
            Some(Value::Bool(true)) => Thinking::Open,
            Some(Value::Bool(false)) => Thinking::Empty,
            Some(_) => {
                return Err(ApiError::field(
                    "chat_template_kwargs.enable_thinking",
                    "expected true or false",
                ));
            }
        };
        match self.reasoning_effort.as_deref() {
            None => {}
            Some("none") => thinking = Thinking::Empty,
            Some(effort @ ("minimal" | "low" | "medium" | "high" | "xhigh")) => {
                variables.insert("reasoning_effort".to_owned(), effort.into());
            }
            Some(_) => {
                let expected = "expected none, minimal, low, medium, high or xhigh";
                return Err(ApiError::field("reasoning_effort", expected));
            }
        }
        let called = self.tool_choice.as_ref().and_then(Value::as_str) != Some("none");
        let tools = if called { self.tools.clone().unwrap_or_default() } else { Vec::new() };
        Ok(Prompt::Chat { messages, tools, thinking, variables })
    }

    fn sampling(&self, defaults: Sampling, seed: u64) -> Result<Sampling, ApiError> {
        let top_k = match self.top_k {
            None => defaults.top_k,
            // both stand for all of them
            Some(-1 | 0) => 0,
            Some(k) => usize::try_from(k)
                .map_err(|_| ApiError::field("top_k", format!("expected -1 or more, got {k}")))?,
        };
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k,
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            typical_p: self.typical_p.unwrap_or(defaults.typical_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            seed: self.seed.map_or(seed, |seed| seed as u64),
        };
        sampling.validate().map_err(|error| {
            let name = error.name.replace(['-', ' '], "_");
            ApiError::field(name, format!("expected {}, got {}", error.expected, error.got))
        })?;
        Ok(sampling)
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let fail = || ApiError::field("stop", "expected a string or a list of strings");
        let one = |stop: &Value| stop.as_str().map(str::to_owned).ok_or_else(fail);
        let stops = match &self.stop {
            None => Vec::new(),
            Some(Value::Array(stops)) => stops.iter().map(one).collect::<Result<_, _>>()?,
            Some(stop) => vec![one(stop)?],
        };
        if stops.len() > MAX_STOPS || stops.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES)
        {
            let expected = format!("expected at most {MAX_STOPS} strings of 1 to {MAX_STOP_BYTES} bytes");
            return Err(ApiError::field("stop", expected));
        }
        Ok(stops)
    }

    fn stop_ids(&self) -> Result<Vec<u32>, ApiError> {
        let ids = self.stop_token_ids.clone().unwrap_or_default();
        if ids.len() > MAX_STOPS {
            return Err(ApiError::field("stop_token_ids", format!("expected at most {MAX_STOPS} token ids")));
        }
        Ok(ids)
    }

    fn bias(&self) -> Result<Vec<(u32, f32)>, ApiError> {
        let bias = self.logit_bias.iter().flatten().map(|(id, &bias)| match id.parse() {
            Ok(id) if (-100.0..=100.0).contains(&bias) => Ok((id, bias)),
            _ => Err(ApiError::field("logit_bias", "expected token ids with numbers from -100 to 100")),
        });
        bias.collect()
    }

    fn constraint(&self) -> Result<Option<Constraint>, ApiError> {
        match (self.format()?, self.structure()?) {
            (Some(_), Some(_)) => Err(ApiError::field(
                "structured_outputs",
                "is given beside `response_format`; expected one of them",
            )),
            (format, structure) => Ok(format.or(structure)),
        }
    }

    fn structure(&self) -> Result<Option<Constraint>, ApiError> {
        let Some(fields) = &self.structured_outputs else { return Ok(None) };
        let fail = |reason: String| ApiError::field("structured_outputs", reason);
        let expected = format!("expected one of {}", FORMS.join(", "));
        if let Some(unknown) = fields.keys().find(|key| !FORMS.contains(&key.as_str())) {
            let unknown: String = unknown.chars().take(40).collect();
            return Err(fail(format!("{expected}, got the unknown field `{unknown}`")));
        }
        let mut given = fields.iter().filter(|(_, value)| !value.is_null());
        let (Some((kind, value)), None) = (given.next(), given.next()) else { return Err(fail(expected)) };
        let text = || value.as_str().map(str::to_owned);
        let constraint = match kind.as_str() {
            "json" => Some(Constraint::JsonSchema(match value {
                // a schema may come as its text
                Value::String(text) => serde_json::from_str(text).map_err(|error| {
                    fail(format!("json: expected a schema, got a text that is no JSON: {error}"))
                })?,
                schema => schema.clone(),
            })),
            "json_object" => (*value == true).then_some(Constraint::JsonObject),
            "regex" => text().map(Constraint::Regex),
            "grammar" => text().map(Constraint::Grammar),
            _ => {
                let texts =
                    value.as_array().filter(|texts| !texts.is_empty() && texts.iter().all(Value::is_string));
                let grammar = texts.map(|texts| either(texts));
                if let Some(got) = grammar.as_ref().map(String::len).filter(|got| *got > MAX_CHOICE_BYTES) {
                    let reason =
                        format!("choice: expected texts of at most {MAX_CHOICE_BYTES} bytes, got {got}");
                    return Err(fail(reason));
                }
                grammar.map(Constraint::Grammar)
            }
        };
        constraint.map(Some).ok_or_else(|| {
            let expected = "expected a schema in json, true in json_object, a text in regex and grammar, a list of texts \
                            in choice";
            fail(expected.to_owned())
        })
    }

    fn format(&self) -> Result<Option<Constraint>, ApiError> {
        let Some(format) = &self.response_format else { return Ok(None) };
        match format["type"].as_str() {
            Some("text") => Ok(None),
            Some("json_object") => Ok(Some(Constraint::JsonObject)),
            Some("json_schema") => match format["json_schema"].get("schema") {
                Some(schema) => Ok(Some(Constraint::JsonSchema(schema.clone()))),
                None => Err(ApiError::field("response_format.json_schema.schema", "expected a JSON schema")),
            },
            _ => Err(ApiError::field("response_format.type", "expected text, json_object or json_schema")),
        }
    }

    /// Whether log-probabilities are told, and how many of the likeliest.
    fn log_probs(&self, endpoint: Endpoint) -> Result<(bool, usize), ApiError> {
        let (wanted, top, field) = match (endpoint, self.logprobs) {
            (Endpoint::Chat, Some(LogProbs::Top(_))) => {
                return Err(ApiError::field("logprobs", "expected true or false"));
            }
            (Endpoint::Chat, wanted) => {
                let wanted = matches!(wanted, Some(LogProbs::Wanted(true)));
                if !wanted && self.top_logprobs.is_some_and(|top| top > 0) {
                    return Err(ApiError::field("top_logprobs", "needs `logprobs` to be true"));
                }
                (wanted, self.top_logprobs.unwrap_or(0), "top_logprobs")
            }
            (Endpoint::Text, Some(LogProbs::Wanted(wanted))) => (wanted, 0, "logprobs"),
            (Endpoint::Text, Some(LogProbs::Top(top))) => (true, top, "logprobs"),
            (Endpoint::Text, None) => (false, 0, "logprobs"),
        };
        if top > MAX_TOP {
            return Err(ApiError::field(field, format!("expected at most {MAX_TOP}, got {top}")));
        }
        Ok((wanted, top))
    }
}

/// The grammar of one of some texts.
fn either(texts: &[Value]) -> String {
    // JSON's strings are those of a grammar, which takes no DEL as it is
    let text = |text: &Value| text.to_string().replace('\u{7f}', "\\u007f");
    format!("start: {}", texts.iter().map(text).collect::<Vec<_>>().join(" | "))
}

/// A message; the parts of its content, if it has some, become one text, each on a line of its own.
fn message(at: usize, value: &Value) -> Result<Message, ApiError> {
    let fail = |reason: &str| ApiError::field(format!("messages[{at}]"), reason);
    let mut value = value.clone();
    let object = value.as_object_mut().ok_or_else(|| fail("expected an object"))?;
    if let Some(Value::Array(parts)) = object.get("content") {
        let mut texts = Vec::with_capacity(parts.len());
        for part in parts {
            match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(piece)) => texts.push(piece),
                (kind, _) => {
                    let kind: String = kind.unwrap_or("?").chars().take(40).collect();
                    return Err(fail(&format!("content of type `{kind}` is not supported yet, only text")));
                }
            }
        }
        let text = texts.join("\n");
        object.insert("content".to_owned(), text.into());
    }
    serde_json::from_value(value).map_err(|error| fail(&error.to_string()))
}

/// The prompts of a continuation: a text, tokens, or a list of either.
fn texts(prompt: Option<&Value>) -> Result<Vec<Prompt>, ApiError> {
    let fail = || ApiError::field("prompt", "expected a text, token ids, or a list of either");
    let tokens = |ids: &Vec<Value>| -> Option<Prompt> {
        let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
        ids.iter().map(id).collect::<Option<_>>().map(Prompt::Tokens)
    };
    let one = |value: &Value| match value {
        Value::String(text) => Some(Prompt::Text(text.clone())),
        Value::Array(ids) => tokens(ids),
        _ => None,
    };
    let prompts = match prompt.ok_or_else(fail)? {
        Value::Array(items) if items.is_empty() => return Err(fail()),
        Value::Array(items) if items[0].is_number() => vec![tokens(items).ok_or_else(fail)?],
        Value::Array(items) => items.iter().map(one).collect::<Option<_>>().ok_or_else(fail)?,
        other => vec![one(other).ok_or_else(fail)?],
    };
    Ok(prompts)
}
