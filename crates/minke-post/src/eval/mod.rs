//! How good a model is: answers to tasks, counted.
//!
//! ```text
//! tasks -> Prompter::prompt -> minke_infer::Engine, in waves -> text -> Prompter::split -> Task::verify
//!       -> Answer (one line of the log) -> EvalReport
//! ```
//!
//! An answer is a function of weights, prompt, settings, the task's id and the sample's number: neither the other tasks
//! of a run nor where it was interrupted show in it. A verifier that fails makes no answer wrong: such samples are left
//! out of every rate, and counted.

mod divergence;
mod log;
mod perplexity;
mod prompt;
mod report;
mod statistics;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ops::ControlFlow;

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_gym::{Task, Verdict};
use minke_infer::{Engine, Generation, Request, Sampling, without_thought};
use minke_model::Model;
use serde::{Deserialize, Serialize};

pub use divergence::{Divergence, divergence};
pub use log::AnswerLog;
pub use perplexity::{TextReport, perplexity};
pub use prompt::{Form, Prompter};
pub use report::{AtK, EvalReport, Rate, Row};
pub use statistics::{interval, majority_at_k, pass_at_k};

use crate::error::{PostError, Result};

/// Tokens of one wave, prompts and answers together, at most: bounds the memory of caches.
const TOKENS_PER_WAVE: usize = 1 << 17;

/// How answers are asked for.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvalSettings {
    /// Answers to each task.
    pub samples: usize,
    /// Spread of the choice; 0 takes the likeliest token.
    pub temperature: f32,
    /// Choose among the likeliest tokens that reach this share together.
    pub top_p: f32,
    /// Most tokens of an answer, its thought included.
    pub max_tokens: usize,
    /// Names the random numbers.
    pub seed: u64,
    /// The k of pass@k and majority@k; those above `samples` are left out.
    pub k: Vec<usize>,
    /// Answers that are written at once, at most.
    #[serde(skip)]
    pub concurrency: usize,
    /// Tokens that end an answer.
    pub stop_ids: Vec<u32>,
}

impl Default for EvalSettings {
    fn default() -> Self {
        Self {
            samples: 1,
            temperature: 0.0,
            top_p: 1.0,
            max_tokens: 512,
            seed: 0,
            k: vec![1],
            concurrency: 128,
            stop_ids: Vec::new(),
        }
    }
}

/// What came of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// It is right.
    Right,
    /// It is wrong.
    Wrong,
    /// There is none, such as when a thought did not end; counts as wrong.
    NoAnswer,
    /// The prompt does not fit into the context; counts as wrong.
    TooLong,
    /// The verifier could not say, for this reason; counts as nothing.
    Error(String),
}

/// One answer to one task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The task's id.
    pub task: String,
    /// Which of its samples, from 0.
    pub sample: usize,
    /// Names the prompt's tokens.
    pub prompt: String,
    /// All that the model wrote.
    pub text: String,
    /// Tokens that it wrote.
    pub tokens: usize,
    /// How many of them are thought.
    pub thought_tokens: usize,
    /// Why it ended.
    pub stop: String,
    /// The answer proper.
    pub answer: Option<String>,
    /// What came of it.
    pub grade: Grade,
}

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Answers that are finished.
    pub done: usize,
    /// All answers.
    pub total: usize,
    /// Answers that are right, of those finished.
    pub right: usize,
    /// Tokens written by this call so far.
    pub tokens: usize,
}

/// Asks a model all tasks and counts what it answers; `on_progress` may end it, and then the report says so.
///
/// # Errors
/// Settings that cannot be, a prompt that cannot be encoded, weights that give no numbers.
pub fn evaluate(
    model: &mut Model,
    cpu: &Cpu,
    tokenizer: &Tokenizer,
    prompter: &Prompter,
    tasks: &[Task],
    settings: &EvalSettings,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<EvalReport> {
    evaluate_logged(model, cpu, tokenizer, prompter, tasks, settings, None, on_progress)
}

/// As [`evaluate`], with answers that a log holds already taken from it and new ones appended.
///
/// # Errors
/// As [`evaluate`], and a log that cannot be written.
pub fn evaluate_logged(
    model: &mut Model,
    cpu: &Cpu,
    tokenizer: &Tokenizer,
    prompter: &Prompter,
    tasks: &[Task],
    settings: &EvalSettings,
    mut log: Option<&mut AnswerLog>,
    on_progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<EvalReport> {
    let exam = Exam { tokenizer, prompter, tasks, settings, close: tokenizer.id_of("</think>") };
    let mut engine = Engine::new(model, cpu, Some(tokenizer)).without_log_probs();
    let prompts: Vec<Vec<u32>> =
        tasks.iter().map(|task| prompter.prompt(tokenizer, task)).collect::<Result<_>>()?;
    let names: Vec<String> = prompts.iter().map(|prompt| prompt_name(prompt)).collect();
    let mut answers: HashMap<(usize, usize), Answer> = HashMap::new();
    let mut waiting = Vec::new();
    for (task, prompt) in prompts.iter().enumerate() {
        for sample in 0..settings.samples {
            let known = log.as_ref().and_then(|log| log.get(&tasks[task].id, sample, &names[task]));
            if let Some(answer) = known {
                answers.insert((task, sample), answer.clone());
            } else if prompt.len() >= engine.context() {
                answers.insert((task, sample), exam.too_long(task, sample, &names[task]));
            } else {
                waiting.push((task, sample));
            }
        }
    }
    let mut progress = Progress {
        done: answers.len(),
        total: tasks.len() * settings.samples,
        right: answers.values().filter(|answer| answer.grade == Grade::Right).count(),
        tokens: 0,
    };
    let mut complete = on_progress(progress).is_continue();
    let longest = waiting.iter().map(|(task, _)| prompts[*task].len()).max().unwrap_or(0);
    let each = (longest + settings.max_tokens).min(engine.context()).max(1);
    let wave = (TOKENS_PER_WAVE / each).clamp(1, settings.concurrency.max(1));
    for wave in waiting.chunks(wave) {
        if !complete {
            break;
        }
        let requests: Vec<Request> =
            wave.iter().map(|&(task, sample)| exam.request(task, sample, &prompts[task])).collect();
        let generations = engine.generate(&requests, &mut |delta| {
            progress.tokens += usize::from(delta.tokens > 0);
            let flow = on_progress(progress);
            complete &= flow.is_continue();
            flow
        })?;
        let finished: Vec<(usize, usize, Generation)> = wave
            .iter()
            .zip(generations)
            .filter(|(_, generation)| generation.stop != minke_infer::StopReason::Cancelled)
            .map(|(&(task, sample), generation)| (task, sample, generation))
            .collect();
        for ((task, sample), answer) in exam.grade_all(&finished, &names, cpu.threads()) {
            if let Some(log) = &mut log {
                log.append(&answer)?;
            }
            progress.done += 1;
            progress.right += usize::from(answer.grade == Grade::Right);
            answers.insert((task, sample), answer);
        }
        complete &= on_progress(progress).is_continue();
    }
    let complete = answers.len() == progress.total;
    let by_task: Vec<(&Task, Vec<Answer>)> = tasks
        .iter()
        .enumerate()
        .map(|(at, task)| {
            let samples = (0..settings.samples).filter_map(|sample| answers.remove(&(at, sample)));
            (task, samples.collect())
        })
        .collect();
    Ok(EvalReport::of(settings, prompter, complete, by_task))
}

/// What all answers of an evaluation share.
struct Exam<'a> {
    tokenizer: &'a Tokenizer,
    prompter: &'a Prompter,
    tasks: &'a [Task],
    settings: &'a EvalSettings,
    /// The token that ends a thought, where there is one.
    close: Option<u32>,
}

impl Exam<'_> {
    fn request(&self, task: usize, sample: usize, prompt: &[u32]) -> Request {
        let EvalSettings { temperature, top_p, max_tokens, seed, stop_ids, .. } = self.settings;
        Request {
            prompt: prompt.to_vec(),
            max_tokens: *max_tokens,
            sampling: Sampling {
                temperature: *temperature,
                top_p: *top_p,
                seed: *seed,
                ..Sampling::default()
            },
            sequence: sequence(&self.tasks[task].id, sample),
            stop: self.prompter.stop(),
            stop_ids: stop_ids.clone(),
            logit_bias: match self.prompter.form() {
                Form::Chat { .. } => without_thought(self.tokenizer, prompt),
                Form::Plain | Form::Worked { .. } => Vec::new(),
            },
            ..Request::default()
        }
    }

    fn too_long(&self, task: usize, sample: usize, prompt: &str) -> Answer {
        Answer {
            task: self.tasks[task].id.clone(),
            sample,
            prompt: prompt.to_owned(),
            text: String::new(),
            tokens: 0,
            thought_tokens: 0,
            stop: "context".to_owned(),
            answer: None,
            grade: Grade::TooLong,
        }
    }

    /// Grades a wave; where programs check, several at once.
    fn grade_all(
        &self,
        finished: &[(usize, usize, Generation)],
        names: &[String],
        threads: usize,
    ) -> Vec<((usize, usize), Answer)> {
        let slow = finished.iter().any(|(task, ..)| self.tasks[*task].program().is_some());
        let workers = if slow { threads.max(1) } else { 1 };
        let grade = |part: &[(usize, usize, Generation)]| -> Vec<((usize, usize), Answer)> {
            let one = |(task, sample, generation): &(usize, usize, Generation)| {
                ((*task, *sample), self.grade(*task, *sample, &names[*task], generation))
            };
            part.iter().map(one).collect()
        };
        if workers == 1 {
            return grade(finished);
        }
        std::thread::scope(|scope| {
            let parts = finished.chunks(finished.len().div_ceil(workers).max(1));
            let handles: Vec<_> = parts.map(|part| scope.spawn(|| grade(part))).collect();
            let join = |handle: std::thread::ScopedJoinHandle<'_, Vec<_>>| {
                handle.join().expect("verifiers do not panic: they give errors")
            };
            handles.into_iter().flat_map(join).collect()
        })
    }

    fn grade(&self, task: usize, sample: usize, prompt: &str, generation: &Generation) -> Answer {
        // with control tokens: the marks of a thought may be among them
        let mut text = self.tokenizer.decode(&generation.tokens, false);
        if let minke_infer::StopReason::String(stop) = &generation.stop
            && let Some(at) = text.rfind(stop.as_str())
        {
            text.truncate(at);
        }
        let parts = self.prompter.split(&text);
        let grade = match parts.answer {
            None => Grade::NoAnswer,
            Some(answer) => match self.tasks[task].verify(answer) {
                Verdict::Right => Grade::Right,
                Verdict::Wrong => Grade::Wrong,
                Verdict::Error(reason) => Grade::Error(reason),
            },
        };
        let tokens = &generation.tokens;
        let thought_tokens = match (parts.thought, tokens.iter().position(|id| Some(*id) == self.close)) {
            (None, _) => 0,
            (Some(_), Some(end)) => end,
            (Some(_), None) if parts.answer.is_none() => tokens.len(),
            (Some(thought), None) => self.tokenizer.encode(thought).map_or(0, |ids| ids.len()),
        };
        Answer {
            task: self.tasks[task].id.clone(),
            sample,
            prompt: prompt.to_owned(),
            tokens: tokens.len(),
            thought_tokens,
            stop: generation.stop.name().to_owned(),
            answer: parts.answer.map(str::to_owned),
            grade,
            text,
        }
    }
}

/// Names the draws of a sample: a function of the task and the sample's number alone.
fn sequence(task: &str, sample: usize) -> u64 {
    let hash = blake3::hash(format!("{sample}\n{task}").as_bytes());
    let bytes: [u8; 8] = hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes");
    u64::from_le_bytes(bytes)
}

fn prompt_name(prompt: &[u32]) -> String {
    let bytes: Vec<u8> = prompt.iter().flat_map(|id| id.to_le_bytes()).collect();
    blake3::hash(&bytes).to_hex()[..12].to_owned()
}

/// Names weights and architecture: equal models have equal names, wherever they lie.
pub fn model_name(model: &Model) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(model.config.to_json().to_string().as_bytes());
    let params = &model.params;
    for (id, group) in params.ids().flat_map(|id| (0..params.groups(id)).map(move |group| (id, group))) {
        for part in params.numbers(id, group).chunks(1 << 14) {
            let bytes: Vec<u8> = part.iter().flat_map(|x| x.to_le_bytes()).collect();
            hasher.update(&bytes);
        }
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// Refuses settings that mean nothing.
///
/// # Errors
/// No samples, no k, or one above the number of samples.
pub fn check_settings(settings: &EvalSettings) -> Result<()> {
    if settings.samples == 0 || settings.max_tokens == 0 {
        return Err(PostError::unsuitable("settings", "expected at least one sample of at least one token"));
    }
    match settings.k.iter().find(|k| **k == 0 || **k > settings.samples) {
        Some(k) => Err(PostError::unsuitable(
            "k",
            format!("expected 1 to {}, the number of samples, got {k}", settings.samples),
        )),
        None => Ok(()),
    }
}
