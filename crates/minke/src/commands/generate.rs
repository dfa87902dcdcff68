//! `minke generate`: continues one text, or answers one question by the model's chat template.

use std::io::{IsTerminal, Read};
use std::ops::ControlFlow;
use std::path::Path;

use minke_cpu::Cpu;
use minke_data::{ChatTemplate, Message};
use minke_infer::{
    Constraint, Engine, Generation, Piece, Request, Settings, Splitter, StopReason, ThinkingBudget, Thought,
    Whole, begins_thought, form_waits, without_thought,
};
use serde::Serialize;

use super::paint::Painter;
use super::{cache, draft_model, open, rate, read_file, sampling, speculation, threads, tokenizer};
use crate::cli::{Generate, SteeringArgs};
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output;

/// Tokens to write where the user says no number.
const TOKENS: usize = 128;
/// No schema or grammar is longer.
const MAX_FORM_BYTES: u64 = 1 << 20;
/// No prompt is longer.
const MAX_PROMPT_BYTES: u64 = 64 << 20;

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    prompt: &'a str,
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    thought: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<&'a str>,
    prompt_tokens: usize,
    tokens: &'a [u32],
    logprobs: &'a [f32],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    top_logprobs: &'a [Vec<(u32, f32)>],
    stop_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    thinking: Option<Thinking>,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    typical_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    seed: u64,
    prefill_tok_s: f64,
    decode_tok_s: f64,
    speculation: Drafts,
    threads: usize,
}

/// What was spent on a thought that has a budget.
#[derive(Serialize)]
struct Thinking {
    tokens: usize,
    forced: usize,
    closed: bool,
}

/// What came of drafts.
#[derive(Serialize)]
struct Drafts {
    drafted: usize,
    accepted: usize,
    calls: usize,
    tokens_per_call: f64,
}

/// A text as it comes: what is shown of it, and of an answer its parts.
struct Shown {
    /// Of an answer.
    splitter: Option<Splitter>,
    painter: Painter,
    whole: Whole,
}

impl Shown {
    fn piece(&mut self, piece: Piece<'_>) -> String {
        self.whole.take(piece);
        self.painter.paint(piece)
    }

    /// What is to be shown of the next piece.
    fn push(&mut self, text: &str) -> String {
        self.split(|splitter, on| splitter.push(text, on)).unwrap_or_else(|| self.piece(Piece::Said(text)))
    }

    /// What was held back.
    fn finish(&mut self) -> String {
        let rest = self.split(Splitter::finish).unwrap_or_default();
        rest + self.painter.finish()
    }

    fn split(&mut self, by: impl FnOnce(&mut Splitter, &mut dyn FnMut(Piece<'_>))) -> Option<String> {
        let mut splitter = self.splitter.take()?;
        let mut shown = String::new();
        by(&mut splitter, &mut |piece| shown.push_str(&self.piece(piece)));
        self.splitter = Some(splitter);
        Some(shown)
    }
}

/// What the text must look like, if the user says so.
fn constraint(args: &SteeringArgs) -> Result<Option<Constraint>, Failure> {
    let text = |path: &Path| -> Result<String, Failure> {
        String::from_utf8(read_file(path, MAX_FORM_BYTES)?)
            .map_err(|_| Failure::user(format!("{}: expected UTF-8", path.display())))
    };
    Ok(if let Some(path) = &args.json_schema {
        let schema = serde_json::from_str(&text(path)?)
            .map_err(|error| Failure::user(format!("{}: not JSON: {error}", path.display())))?;
        Some(Constraint::JsonSchema(schema))
    } else if let Some(path) = &args.grammar {
        Some(Constraint::Grammar(text(path)?))
    } else {
        args.regex.clone().map(Constraint::Regex)
    })
}

/// Runs the command.
pub fn run(args: &Generate) -> Result<(), Failure> {
    let prompt = if args.prompt == "-" { read_stdin()? } else { args.prompt.clone() };
    let cpu = Cpu::detect(threads(args.model.threads));
    let mut loaded = open(&args.model, &cpu)?;
    let sampling = sampling(&args.sampling, &loaded)?;
    let tokenizer = tokenizer(&loaded)?;
    let mut template = None;
    let vocabulary = loaded.model.config.vocab_size;
    if let Some(id) = args.steering.stop_id.iter().find(|id| **id as usize >= vocabulary) {
        return Err(Failure::user(format!(
            "--stop-id: id {id} is outside the vocabulary of {vocabulary} tokens"
        )));
    }
    let mut settings = Settings { sampling, ..Settings::default() };
    let is_asked = args.chat || args.system.is_some() || args.think.is_some();
    let tokens = if is_asked {
        if let Some(how) = &args.think {
            super::think(&mut settings, how).map_err(Failure::user)?;
            if let (Some(_), Some(n)) = (settings.thinking_budget, args.steering.think_budget) {
                let message = format!("--think {how} and --think-budget {n} both bound the thought");
                return Err(Failure::user(message).hint("give one of them"));
            }
        }
        template = loaded.template()?;
        let Some(template) = &template else {
            let message = format!("{} has no chat template: it continues text", loaded.folder.display());
            return Err(Failure::user(message).hint("leave out --chat, --system and --think"));
        };
        let system = args.system.as_deref().map(Message::system);
        let messages: Vec<Message> = system.into_iter().chain([Message::user(prompt.as_str())]).collect();
        template.encode_prompt(&tokenizer, &messages, settings.thinking)?
    } else {
        if !args.raw && loaded.template()?.is_some() {
            output::note(&format!(
                "note: {} has a chat template and the text is continued as it is; --chat asks it as a question, --raw \
                 leaves this note out",
                args.model.model
            ));
        }
        let mut tokens: Vec<u32> = loaded.bos().into_iter().collect();
        tokens.extend(tokenizer.encode(&prompt)?);
        tokens
    };
    let prompt_tokens = tokens.len();
    let context = loaded.model.config.max_position_embeddings;
    // one more than there is room for, so that a text that the context ends is told from one that is long
    let room = (context + 1).saturating_sub(prompt_tokens);
    let usual = if is_asked { room } else { TOKENS };
    let is_thinking = is_asked && begins_thought(&tokenizer, &tokens);
    let mut logit_bias = args.steering.logit_bias.clone();
    if is_asked {
        logit_bias.extend(without_thought(&tokenizer, &tokens));
    }
    let constraint = constraint(&args.steering)?;
    let knows_thoughts = template.as_ref().is_some_and(ChatTemplate::knows_marks);
    let form_waits = constraint.as_ref().map(|form| form_waits(&tokenizer, &tokens, form, knows_thoughts));
    let mut draft = draft_model(&args.speculation, &args.model, &cpu)?;
    let budget = args.steering.think_budget.map(|n| n as usize).or(settings.thinking_budget);
    // without a budget a thought is followed all the same, where a constraint waits for its end
    let thinking = (budget.is_some() || form_waits == Some(true)).then(|| {
        let budget = ThinkingBudget::new(budget.unwrap_or(usize::MAX));
        match loaded.template() {
            Ok(Some(template)) => budget.closed_by(&template.closing()),
            _ => budget,
        }
    });
    let request = Request {
        prompt: tokens,
        max_tokens: args.sampling.n.map_or(usual, |n| n as usize),
        sampling,
        stop: args.sampling.stop.clone(),
        stop_ids: loaded.stop_ids_with(template.as_ref()),
        more_stop_ids: args.steering.stop_id.clone(),
        min_tokens: args.steering.min_tokens as usize,
        logit_bias,
        top_log_probs: args.steering.top_logprobs as usize,
        thinking,
        constraint,
        constrain_answer_only: form_waits == Some(true),
        speculation: speculation(args.speculation.speculate),
        ..Request::default()
    };
    let terminal = std::io::stdout().is_terminal();
    let mut engine =
        Engine::new(&mut loaded.model, &cpu, Some(&tokenizer)).with_cache(cache(args.cache.cache))?;
    if let Some(draft) = &mut draft {
        engine = engine.with_draft(&mut draft.model, draft.tokenizer.as_ref())?;
    }
    interrupt::install();
    let work = Work::begin();
    let mut shown = Shown {
        splitter: is_asked.then(|| match form_waits {
            Some(false) => Splitter::without_thought(),
            _ => Splitter::new(is_thinking),
        }),
        painter: Painter::new(terminal, is_asked),
        whole: Whole::default(),
    };
    // shown with the first piece: before that the request may yet be refused
    let mut begin = if is_thinking {
        shown.piece(Piece::ThoughtBegins)
    } else if terminal && !is_asked {
        // so that text and continuation stand together
        output::dim(&output::printable(&prompt)).into_owned()
    } else {
        String::new()
    };
    let mut failed = None;
    let mut done = engine.generate(std::slice::from_ref(&request), &mut |delta| {
        let piece = std::mem::take(&mut begin) + &shown.push(delta.text);
        if !args.json
            && let Err(failure) = output::text(&piece)
        {
            failed = Some(failure);
            return ControlFlow::Break(());
        }
        if work.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    if let Some(failure) = failed {
        return Err(failure);
    }
    let generation = done.pop().expect("one result per request");
    let formless = formless(&generation, context);
    let mut end = begin + &shown.finish();
    let (thought, answer) = shown.whole.parts();
    let timing = engine.timing();
    let speculated = generation.speculated;
    let decoded = generation.tokens.len().saturating_sub(1);
    let prefill_tok_s = rate(prompt_tokens, timing.prefill.as_secs_f64());
    let decode_tok_s = rate(decoded, timing.decode.as_secs_f64());
    if args.json {
        output::json(&Report {
            model: &args.model.model,
            prompt: &prompt,
            text: &generation.text,
            thought: thought.as_deref(),
            answer: thought.as_ref().map(|_| &*answer),
            prompt_tokens,
            tokens: &generation.tokens,
            logprobs: &generation.log_probs,
            top_logprobs: &generation.top_log_probs,
            stop_reason: generation.stop.name(),
            thinking: generation.thought.map(|Thought { tokens, forced, closed }| Thinking {
                tokens,
                forced,
                closed,
            }),
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            typical_p: sampling.typical_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            seed: sampling.seed,
            prefill_tok_s,
            decode_tok_s,
            speculation: Drafts {
                drafted: speculated.drafted,
                accepted: speculated.accepted,
                calls: speculated.calls,
                tokens_per_call: speculated.tokens_per_call(),
            },
            threads: cpu.threads(),
        })?;
    } else {
        if !is_asked || !answer.ends_with('\n') {
            end.push('\n');
        }
        output::text(&end)?;
        match generation.stop {
            _ if formless.is_some() => {}
            StopReason::DeadEnd => output::note("note: the text ends here: nothing else is allowed"),
            StopReason::Context => output::note(&format!(
                "note: the text ends here: the model's context of {context} tokens is full"
            )),
            StopReason::MaxTokens if is_asked => output::note(&format!(
                "note: the answer ends here, after {} tokens; -n allows more",
                generation.tokens.len()
            )),
            _ => {}
        }
        if terminal {
            output::note(&output::dim(&format!(
                "{prompt_tokens} tokens read at {prefill_tok_s:.0}/s, {} written at {decode_tok_s:.0}/s{}",
                generation.tokens.len(),
                if speculated.accepted > 0 {
                    format!(", {:.1} a call", speculated.tokens_per_call())
                } else {
                    String::new()
                },
            )));
        }
    }
    if args.steering.think_budget.is_some() && generation.thought == Some(Thought::default()) {
        output::note("note: --think-budget had no effect: the text has no thought");
    }
    if work.is_stopped() { Err(Failure::interrupted()) } else { formless.map_or(Ok(()), Err) }
}

/// Why a text does not have its form, unless who asked has ended it.
fn formless(generation: &Generation, context: usize) -> Option<Failure> {
    if generation.has_form != Some(false) {
        return None;
    }
    let n = generation.tokens.len();
    match generation.stop {
        StopReason::DeadEnd => {
            let message =
                "the text cannot go on: of what its form and --logit-bias allow nothing can come next";
            Some(Failure::other(message).hint("check whether any text has this form"))
        }
        StopReason::MaxTokens => {
            let message = format!("the text ends after {n} tokens, before it has its form");
            Some(Failure::other(message).hint("-n allows more"))
        }
        StopReason::Context => {
            let message = format!(
                "the text ends before it has its form: the model's context of {context} tokens is full"
            );
            Some(Failure::other(message))
        }
        _ => None,
    }
}

fn read_stdin() -> Result<String, Failure> {
    let mut bytes = Vec::new();
    std::io::stdin()
        .lock()
        .take(MAX_PROMPT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::other(format!("cannot read standard input: {error}")))?;
    if bytes.len() as u64 > MAX_PROMPT_BYTES {
        let limit = output::bytes(MAX_PROMPT_BYTES as f64);
        return Err(Failure::user(format!("standard input: expected a prompt of at most {limit}")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::user(format!("standard input: expected UTF-8, got other bytes at {at}"))
    })
}
