//! `minke chat`: a conversation in the terminal, or over a pipe.
//!
//! With a model that has a chat template, what is typed is a turn of the person and the model answers it; thoughts are
//! shown dim. A base model has no turns: what is typed is appended to a running text, and the model continues it. All of
//! that is [`minke_infer::Assistant`]; here is what a person types and sees.

mod commands;
mod input;
mod settings;

use std::ops::ControlFlow;

use commands::Command;
use input::{Input, Typed};
use minke_cpu::Cpu;
use minke_data::Transcript;
use minke_infer::{Answer, Assistant, AssistantError, EngineError, Piece, Speculated, StopReason};

use super::paint::Painter;
use super::{cache, draft_model, precision, rate, sampling, speculation, think, threads};
use crate::cli::Chat;
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output;

/// Most tokens that a base model goes on with where the user says no number, and at most half of the context.
const BASE_TOKENS: usize = 256;

/// Runs the command.
pub fn run(args: &Chat) -> Result<(), Failure> {
    let mut assistant = Assistant::builder()
        .threads(threads(args.model.threads))
        .precision(precision(args.model.precision))
        .load(&args.model.model)?
        .with_cache(cache(args.cache.cache))?;
    if let Some(draft) = draft_model(&args.speculation, &args.model, &Cpu::detect(assistant.threads()))? {
        assistant = assistant.with_draft(draft)?;
    }
    assistant.set_speculation(speculation(args.speculation.speculate))?;
    for note in assistant.notes() {
        output::note(&format!("note: {note}"));
    }
    let context = assistant.context();
    assistant.settings.sampling = sampling(&args.sampling, assistant.loaded())?;
    assistant.settings.stop.clone_from(&args.sampling.stop);
    assistant.settings.max_tokens = match args.sampling.n {
        Some(n) => Some((n as usize).min(context - 1).max(1)),
        None => assistant.is_base().then(|| BASE_TOKENS.min(context / 2).max(1)),
    };
    if let Some(system) = &args.system {
        assistant.set_system(Some(system))?;
    }
    let mut chat = Running {
        assistant,
        painted: false,
        verbose: args.verbose,
        last: None,
        whole: None,
        name: &args.model.model,
    };
    if let Some(how) = &args.think {
        chat.think(Some(how)).map_err(Failure::user)?;
    }
    if let Some(path) = &args.load {
        chat.load(path).map_err(Failure::user)?;
    }
    let mut input = Input::open(!args.no_history)?;
    chat.painted = input.is_terminal();
    if chat.painted {
        // while somebody types
        chat.assistant.warm_up();
    }
    output::note(&chat.greeting());
    interrupt::install();
    chat.whole = chat.painted.then(Work::begin_and_stay);
    let mut interrupted = false;
    loop {
        match input.read()? {
            Typed::Turn(turn) => {
                interrupted = false;
                if chat.take(&turn)?.is_break() {
                    return Ok(());
                }
            }
            Typed::Nothing if interrupted => return Ok(()),
            Typed::Nothing => {
                interrupted = true;
                output::note("(Ctrl-C again, /exit or Ctrl-D leaves)");
            }
            Typed::End => return Ok(()),
        }
    }
}

/// A conversation.
struct Running<'a> {
    assistant: Assistant,
    /// Whether a person looks at a terminal.
    painted: bool,
    /// Whether figures follow each answer.
    verbose: bool,
    last: Option<Answer>,
    /// With a person at a terminal Ctrl-C never ends the program by itself, not even between an answer and the prompt;
    /// at the prompt the line editor sees it. A program is ended where it gives no answer.
    whole: Option<Work>,
    name: &'a str,
}

impl Running<'_> {
    fn greeting(&self) -> String {
        let so_far =
            match self.assistant.messages().iter().filter(|m| m.role == minke_data::Role::User).count() {
                0 => String::new(),
                1 => " 1 turn was said.".to_owned(),
                n => format!(" {n} turns were said."),
            };
        if self.assistant.is_base() {
            return format!(
                "{} is a base model: it continues the text that you type, it does not answer.\n/help lists the commands.",
                self.name
            );
        }
        format!("Talking to {}.{so_far} /help lists the commands.", self.name)
    }

    /// Takes a turn or a command; a break leaves.
    fn take(&mut self, turn: &str) -> Result<ControlFlow<()>, Failure> {
        let done = match commands::parse(turn) {
            Ok(Some(Command::Exit)) => return Ok(ControlFlow::Break(())),
            Ok(Some(Command::Retry)) => self.answer(None),
            Ok(None) => self.answer(Some(turn)),
            Ok(Some(command)) => {
                self.carry_out(command).map(|said| output::note(&said)).map_err(Trouble::Told)
            }
            Err(reason) => Err(Trouble::Told(reason)),
        };
        match done {
            Ok(()) => Ok(ControlFlow::Continue(())),
            // who only pipes does not see it, and what follows may build on it
            Err(Trouble::Told(reason)) if !self.painted && !turn.trim().is_empty() => {
                Err(Failure::user(reason))
            }
            Err(Trouble::Told(reason)) => {
                output::note(&format!("error: {reason}"));
                Ok(ControlFlow::Continue(()))
            }
            Err(Trouble::Ends(failure)) => Err(failure),
        }
    }

    /// What is to be said of a command.
    fn carry_out(&mut self, command: Command) -> Result<String, String> {
        let told = |error: AssistantError| error.to_string();
        Ok(match command {
            Command::Help => commands::help(self.assistant.is_base()),
            Command::Set(None) => settings::shown(&self.assistant.settings),
            Command::Set(Some((name, value))) => {
                let context = self.assistant.context();
                settings::change(&mut self.assistant.settings, &name, &value, context)?;
                settings::shown(&self.assistant.settings)
            }
            Command::Think(how) => self.think(how.as_deref())?,
            Command::System(None) => match self.assistant.system() {
                Some(text) => format!("instruction: {}", output::printable(text)),
                None => "there is no instruction".to_owned(),
            },
            Command::System(Some(text)) => {
                let text = Some(text).filter(|text| !text.is_empty());
                self.assistant.set_system(text.as_deref()).map_err(told)?;
                let what =
                    if text.is_some() { "set; it holds for the whole conversation" } else { "taken away" };
                format!("the instruction is {what}")
            }
            Command::Reset => {
                self.assistant.reset();
                let base = self.assistant.is_base();
                if base { "the text so far is forgotten" } else { "a new conversation begins" }.to_owned()
            }
            Command::Undo => {
                let said = self.assistant.undo().map_err(told)?;
                let line: String =
                    said.trim().chars().take(60).map(|c| if c == '\n' { ' ' } else { c }).collect();
                format!("forgotten: {}", output::printable(&line))
            }
            Command::Save(path, false) if path.exists() => {
                return Err(format!("{} is there already; /save! replaces it", path.display()));
            }
            Command::Save(path, _) => {
                let base = self.assistant.is_base();
                let transcript = Transcript {
                    model: Some(self.name.to_owned()),
                    messages: self.assistant.messages().to_vec(),
                    text: base.then(|| self.assistant.text()),
                };
                transcript.save(&path).map_err(|error| error.to_string())?;
                let what = if base {
                    "the text".to_owned()
                } else {
                    format!("{} messages", transcript.messages.len())
                };
                format!("{what} written to {}", path.display())
            }
            Command::Load(path) => self.load(&path)?,
            Command::Stats => self.stats(),
            // these are answers, and the end
            Command::Retry | Command::Exit => String::new(),
        })
    }

    fn think(&mut self, how: Option<&str>) -> Result<String, String> {
        if self.assistant.is_base() {
            return Err(AssistantError::NoTemplate.to_string());
        }
        if let Some(how) = how {
            think(&mut self.assistant.settings, how)?;
        }
        Ok(format!("thinking: {}", settings::thinking(&self.assistant.settings)))
    }

    fn load(&mut self, path: &std::path::Path) -> Result<String, String> {
        let transcript = Transcript::load(path).map_err(|error| error.to_string())?;
        let fail = |error: AssistantError| format!("{}: {error}", path.display());
        if let Some(text) = &transcript.text {
            self.assistant.set_text(text).map_err(fail)?;
            return Ok(format!("{} characters read from {}", text.chars().count(), path.display()));
        }
        let n = transcript.messages.len();
        let open = transcript.messages.last().is_some_and(|last| last.role != minke_data::Role::Assistant);
        self.assistant.set_messages(transcript.messages).map_err(fail)?;
        let hint = if open { "; /retry answers the last" } else { "" };
        Ok(format!("{n} messages read from {}{hint}", path.display()))
    }

    /// Answers a turn, or the last one again, and shows the answer as it comes.
    fn answer(&mut self, turn: Option<&str>) -> Result<(), Trouble> {
        let base = self.assistant.is_base();
        let mut painter = Painter::new(self.painted, !base);
        if let Some(turn) = turn.filter(|_| base && self.painted) {
            // the typed text again, so that text and continuation stand together
            output::text(&output::bold(&output::printable(turn)))?;
        }
        let own;
        let work = match &self.whole {
            Some(work) => {
                work.renew();
                work
            }
            None => {
                own = Work::begin();
                &own
            }
        };
        let mut failed = None;
        let mut on = |piece: Piece<'_>| {
            if let Err(failure) = output::text(&painter.paint(piece)) {
                failed = Some(failure);
                return ControlFlow::Break(());
            }
            if work.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let done = match turn {
            Some(turn) => self.assistant.say_until(turn, &mut on),
            None => self.assistant.retry(&mut on),
        };
        if let Some(failure) = failed {
            return Err(Trouble::Ends(failure));
        }
        let answer = done.map_err(|error| self.trouble(error))?;
        let mut end = painter.finish().to_owned();
        if !answer.text.ends_with('\n') {
            end.push('\n');
        }
        output::text(&end)?;
        match &answer.stop {
            StopReason::Cancelled if self.painted => output::note("(stopped)"),
            StopReason::Context => output::note(&format!(
                "(the answer ends here: the model's context of {} tokens is full; /undo or /reset makes room)",
                self.assistant.context()
            )),
            StopReason::MaxTokens if !base => output::note(&format!(
                "(the answer ends here, after {} tokens; /set max_tokens N allows more)",
                answer.tokens
            )),
            _ => {}
        }
        self.last = Some(answer);
        if self.verbose {
            let line = self.stats();
            output::note(&if self.painted { output::dim(&line) } else { line.as_str().into() });
        }
        Ok(())
    }

    /// What a person can mend is told, and the conversation goes on.
    fn trouble(&self, error: AssistantError) -> Trouble {
        match error {
            AssistantError::NothingSaid if self.assistant.is_base() => {
                Trouble::Told("type something for the model to continue".to_owned())
            }
            AssistantError::NothingSaid => Trouble::Told("type something for the model to answer".to_owned()),
            AssistantError::Full { .. } => {
                Trouble::Told(format!("{error}; /undo forgets the last turn, /reset all of them"))
            }
            AssistantError::Engine(EngineError::Token { .. }) => Trouble::Told(format!(
                "{error}: the tokenizer is not this model's, and this turn needs what the model lacks"
            )),
            // nothing that is said helps damaged weights
            AssistantError::Engine(EngineError::NotANumber { .. })
            | AssistantError::Load(_)
            | AssistantError::NoTokenizer { .. } => Trouble::Ends(error.into()),
            other => Trouble::Told(other.to_string()),
        }
    }

    fn stats(&self) -> String {
        let (used, context) = (self.assistant.used(), self.assistant.context());
        let full =
            format!("context {used} of {context} tokens ({})", output::percent(used as f64 / context as f64));
        let Some(last) = &self.last else { return full };
        let read = last.prompt_tokens - last.reused_tokens;
        let drafts = match last.speculated {
            Speculated { drafted: 0, .. } => String::new(),
            drafts => format!(
                " ({} of {} drafts accepted, {:.1} a call)",
                drafts.accepted,
                drafts.drafted,
                drafts.tokens_per_call()
            ),
        };
        format!(
            "{read} tokens read at {:.0}/s and {} from the cache, {} written at {:.1}/s{drafts}; {full}",
            rate(read, last.timing.prefill.as_secs_f64()),
            last.reused_tokens,
            last.tokens,
            rate(last.tokens.saturating_sub(1), last.timing.decode.as_secs_f64()),
        )
    }
}

/// Why a turn was not answered.
enum Trouble {
    /// Something to tell; the conversation goes on.
    Told(String),
    /// The program ends.
    Ends(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Ends(failure)
    }
}
