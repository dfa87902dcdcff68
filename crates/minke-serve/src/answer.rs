//! Answers on their way: from events of the service to the JSON of this API, whole or in chunks.

use std::time::{SystemTime, UNIX_EPOCH};

use minke_data::Tokenizer;
use minke_infer::{Done, Event, StopReason, Times, Token};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::log::Answered;
use crate::request::Endpoint;
use crate::thinking::{Parts, Thoughts};

/// What all parts of a response have in common.
pub struct Frame {
    endpoint: Endpoint,
    id: String,
    created: u64,
    model: String,
}

impl Frame {
    /// A response of this name; `number` is its own.
    pub fn new(endpoint: Endpoint, model: &str, number: u64) -> Self {
        let prefix = match endpoint {
            Endpoint::Chat => "chatcmpl",
            Endpoint::Text => "cmpl",
        };
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { endpoint, id: format!("{prefix}-{number:016x}"), created, model: model.to_owned() }
    }

    fn object(&self, is_chunk: bool, choices: &[Value]) -> Value {
        let object = match (self.endpoint, is_chunk) {
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Chat, true) => "chat.completion.chunk",
            (Endpoint::Text, _) => "text_completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("minke-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }

    /// A chunk of some choices.
    pub fn chunk(&self, choices: &[Value]) -> Value {
        self.object(true, choices)
    }

    /// The whole response.
    pub fn whole(&self, choices: &[Choice]) -> Value {
        let mut whole = self.object(false, &choices.iter().map(Choice::whole).collect::<Vec<_>>());
        whole["usage"] = usage(choices);
        whole["timings"] = timings(choices);
        whole
    }

    /// The chunk that ends a stream with what it took.
    pub fn last(&self, choices: &[Choice]) -> Value {
        let mut last = self.object(true, &[]);
        last["usage"] = usage(choices);
        last["timings"] = timings(choices);
        last
    }
}

/// What is told of an answer.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Whether it is the first to its prompt, whose tokens are then counted.
    pub counts_prompt: bool,
    /// Whether log-probabilities are told.
    pub log_probs: bool,
    /// Whether it goes out in chunks, as it comes, and nothing of it is kept; or whole.
    pub streams: bool,
}

/// One answer of several.
pub struct Choice {
    index: usize,
    kind: Kind,
    tokenizer: Tokenizer,
    /// In a conversation.
    thoughts: Option<Thoughts>,
    parts: Parts,
    reasoning_tokens: usize,
    entries: Vec<Entry>,
    /// Characters of tokens so far.
    offset: usize,
    done: Option<Done>,
}

/// A token with its log-probabilities.
struct Entry {
    token: Token,
    offset: usize,
}

impl Choice {
    /// An answer; in a conversation thought and content are told apart.
    pub fn new(index: usize, kind: Kind, tokenizer: Tokenizer, thoughts: Option<Thoughts>) -> Self {
        Self {
            index,
            kind,
            tokenizer,
            thoughts,
            parts: Parts::default(),
            reasoning_tokens: 0,
            entries: Vec::new(),
            offset: 0,
            done: None,
        }
    }

    /// Whether all of it is there.
    pub fn is_done(&self) -> bool {
        self.done.is_some()
    }

    /// Whether it ended since nothing that is allowed could come next.
    pub fn is_dead_end(&self) -> bool {
        self.done.as_ref().is_some_and(|done| done.stop == StopReason::DeadEnd)
    }

    /// Whether its time was over before it was taken up.
    pub fn is_unbegun(&self) -> bool {
        self.done.as_ref().is_some_and(|done| done.stop == StopReason::Deadline && !done.begun)
    }

    /// The chunk that begins it, in a conversation.
    pub fn first(&self) -> Option<Value> {
        self.thoughts.as_ref()?;
        let delta = json!({"role": "assistant", "content": ""});
        Some(json!({"index": self.index, "delta": delta, "logprobs": null, "finish_reason": null}))
    }

    /// Takes an event; gives the chunk that it makes, if it makes one and goes out in chunks.
    ///
    /// # Errors
    /// There is no answer.
    pub fn take(&mut self, event: Event) -> Result<Option<Value>, ApiError> {
        match event {
            Event::Accepted => Ok(None),
            Event::Token(token) => {
                let parts = self.split(&token.text);
                if self.thoughts.as_ref().is_some_and(Thoughts::is_thinking) {
                    self.reasoning_tokens += 1;
                }
                let mut log_probs = Value::Null;
                if self.kind.log_probs {
                    let offset = self.offset;
                    self.offset += self.text_of(token.id).chars().count();
                    let entry = Entry { token, offset };
                    if self.kind.streams {
                        log_probs = self.told(std::slice::from_ref(&entry));
                    } else {
                        self.entries.push(entry);
                    }
                }
                let is_empty = parts == Parts::default() && log_probs.is_null();
                Ok((self.kind.streams && !is_empty).then(|| self.delta(&parts, &log_probs, None)))
            }
            Event::Done(done) => {
                if done.stop == StopReason::Cancelled {
                    return Err(ApiError::Stopped);
                }
                let mut parts = self.split(&done.text);
                if let Some(thoughts) = &mut self.thoughts {
                    let rest = thoughts.finish();
                    parts.reasoning.push_str(&rest.reasoning);
                    parts.content.push_str(&rest.content);
                    self.add(&rest);
                }
                if let Some(thought) = done.thought {
                    // without what was written to end it
                    self.reasoning_tokens = thought.tokens;
                }
                let reason = finish_reason(&done.stop);
                self.done = Some(done);
                Ok(self.kind.streams.then(|| self.delta(&parts, &Value::Null, Some(reason))))
            }
            Event::Failed(error) => Err(ApiError::Engine(error)),
        }
    }

    fn split(&mut self, text: &str) -> Parts {
        let parts = match &mut self.thoughts {
            Some(thoughts) => thoughts.push(text),
            None => Parts { content: text.to_owned(), ..Parts::default() },
        };
        self.add(&parts);
        parts
    }

    /// Keeps what the whole answer has.
    fn add(&mut self, parts: &Parts) {
        if self.kind.streams {
            return;
        }
        self.parts.reasoning.push_str(&parts.reasoning);
        self.parts.content.push_str(&parts.content);
    }

    fn delta(&self, parts: &Parts, log_probs: &Value, finish: Option<&str>) -> Value {
        let Parts { reasoning, content } = parts;
        if self.thoughts.is_none() {
            return json!({"index": self.index, "text": content, "logprobs": log_probs, "finish_reason": finish});
        }
        let mut delta = json!({});
        if !reasoning.is_empty() {
            delta["reasoning_content"] = reasoning.as_str().into();
        }
        if !content.is_empty() {
            delta["content"] = content.as_str().into();
        }
        json!({"index": self.index, "delta": delta, "logprobs": log_probs, "finish_reason": finish})
    }

    fn whole(&self) -> Value {
        let reason = self.done.as_ref().map(|done| finish_reason(&done.stop));
        let log_probs = if self.kind.log_probs { self.told(&self.entries) } else { Value::Null };
        let Parts { reasoning, content } = &self.parts;
        if self.thoughts.is_none() {
            return json!({"index": self.index, "text": content, "logprobs": log_probs, "finish_reason": reason});
        }
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !reasoning.is_empty() {
            message["reasoning_content"] = reasoning.as_str().into();
        }
        json!({"index": self.index, "message": message, "logprobs": log_probs, "finish_reason": reason})
    }

    /// The text of a token as it stands within others: where bytes are known, with its space.
    fn text_of(&self, id: u32) -> String {
        if self.tokenizer.has_bytes() {
            String::from_utf8_lossy(&self.tokenizer.token_bytes(id)).into_owned()
        } else {
            self.tokenizer.decode(&[id], false)
        }
    }

    /// Log-probabilities in the form of the endpoint.
    fn told(&self, entries: &[Entry]) -> Value {
        let text = |id: u32| self.text_of(id);
        if self.thoughts.is_none() {
            let likeliest = |entry: &Entry| -> Value {
                let top = entry.token.top_log_probs.iter();
                Value::Object(top.map(|&(id, log_prob)| (text(id), number(log_prob))).collect())
            };
            return json!({
                "tokens": entries.iter().map(|entry| text(entry.token.id)).collect::<Vec<_>>(),
                "token_logprobs": entries.iter().map(|entry| own(&entry.token)).collect::<Vec<_>>(),
                "top_logprobs": entries.iter().map(likeliest).collect::<Vec<_>>(),
                "text_offset": entries.iter().map(|entry| entry.offset).collect::<Vec<_>>(),
            });
        }
        let one = |id: u32, log_prob: Value| {
            let bytes = self.tokenizer.token_bytes(id).to_vec();
            json!({"token": text(id), "logprob": log_prob, "bytes": bytes})
        };
        let all = entries.iter().map(|Entry { token, .. }| {
            let mut entry = one(token.id, own(token));
            let top = token.top_log_probs.iter();
            entry["top_logprobs"] = top.map(|&(id, log_prob)| one(id, number(log_prob))).collect();
            entry
        });
        json!({"content": all.collect::<Vec<_>>(), "refusal": null})
    }
}

fn own(token: &Token) -> Value {
    token.log_prob.map_or(Value::Null, number)
}

/// JSON has no infinity: what cannot come is told as very unlikely, as this API does.
fn number(log_prob: f32) -> Value {
    const NEVER: f64 = -9999.0;
    if log_prob.is_finite() { f64::from(log_prob).into() } else { NEVER.into() }
}

fn finish_reason(stop: &StopReason) -> &'static str {
    match stop {
        StopReason::Token(_) | StopReason::String(_) | StopReason::Complete => "stop",
        StopReason::DeadEnd => "dead_end",
        StopReason::MaxTokens | StopReason::Context | StopReason::Deadline | StopReason::Cancelled => {
            "length"
        }
    }
}

/// What a log is told of answers that are there.
pub fn answered(choices: &[Choice]) -> Option<Answered> {
    let first = choices.first()?.done.as_ref()?;
    let [prompt, cached, written, _] = tokens(choices);
    Some(Answered {
        prompt,
        cached,
        written,
        decode: slowest(choices).decode,
        reason: finish_reason(&first.stop),
    })
}

/// What all answers took together; a prompt counts once.
fn usage(choices: &[Choice]) -> Value {
    let [prompt, cached, completion, reasoning] = tokens(choices);
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    })
}

/// Tokens of prompts, those of them that were read before, those written, and those of them that are thought.
fn tokens(choices: &[Choice]) -> [usize; 4] {
    let [mut prompt, mut cached, mut completion, mut reasoning] = [0; 4];
    for choice in choices {
        let Some(done) = &choice.done else { continue };
        if choice.kind.counts_prompt {
            prompt += done.usage.prompt;
            cached += done.usage.cached;
        }
        completion += done.usage.completion;
        reasoning += choice.reasoning_tokens;
    }
    [prompt, cached, completion, reasoning]
}

/// How long the slowest answer took, and what came of drafts.
fn timings(choices: &[Choice]) -> Value {
    let Times { queued, prefill, decode } = slowest(choices);
    let ms = |time: std::time::Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
    let drafts = || choices.iter().filter_map(|choice| choice.done.as_ref().map(|done| done.speculated));
    json!({
        "queued_ms": ms(queued),
        "prefill_ms": ms(prefill),
        "decode_ms": ms(decode),
        "draft_n": drafts().map(|drafts| drafts.drafted).sum::<usize>(),
        "draft_n_accepted": drafts().map(|drafts| drafts.accepted).sum::<usize>(),
    })
}

fn slowest(choices: &[Choice]) -> Times {
    let all = choices.iter().filter_map(|choice| choice.done.as_ref().map(|done| done.times));
    all.max_by_key(|times: &Times| times.queued + times.prefill + times.decode).unwrap_or_default()
}
