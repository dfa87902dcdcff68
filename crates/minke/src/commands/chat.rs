//! `minke chat`: a conversation in the terminal, or over a pipe.
//!
//! With a model that has a chat template, what is typed is a turn of the person and the model answers it; thoughts are
//! shown dim. A base model has no turns: what is typed is appended to a running text, and the model continues it. The
//! session keeps the cache, so each turn reads only what is new.

mod settings;
mod thinking;
mod turns;

use std::io::{BufRead, IsTerminal, Read};
use std::ops::ControlFlow;

use minke_cpu::Cpu;
use minke_data::Tokenizer;
use minke_infer::{Engine, Generation, Request, Session, StopReason};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use settings::Settings;
use thinking::Painter;
use turns::Turns;

use super::{open, sampling, threads};
use crate::cli::Chat;
use crate::failure::Failure;
use crate::interrupt::{self, Work};
use crate::output;

/// Most tokens of an answer where the user says no number, and at most half of the context.
const TOKENS: usize = 256;
/// A longer line from a pipe counts as several.
const MAX_LINE_BYTES: u64 = 16 << 20;
const PROMPT: &str = "> ";
const HELP: &str = "\
/help             this list
/set              show the settings
/set NAME=VALUE   change temperature, top_k, top_p, min_p, seed or tokens
/reset            forget the text so far
/exit             leave (also Ctrl-D)
Ctrl-C stops an answer; an empty line lets the model go on.";
const TURNS_HELP: &str = "\
/help             this list
/set              show the settings
/set NAME=VALUE   change temperature, top_k, top_p, min_p, seed or tokens
/reset            begin a new conversation
/exit             leave (also Ctrl-D)
Ctrl-C stops an answer.";

/// What was typed.
enum Typed {
    Line(String),
    /// Ctrl-C at the prompt.
    Nothing,
    End,
}

/// Where lines come from.
enum Input {
    Terminal(Box<DefaultEditor>),
    Pipe(std::io::StdinLock<'static>),
}

impl Input {
    fn open() -> Result<Self, Failure> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() || !std::io::stdout().is_terminal() {
            return Ok(Self::Pipe(stdin.lock()));
        }
        let editor =
            DefaultEditor::new().map_err(|error| Failure::other(format!("the terminal: {error}")))?;
        Ok(Self::Terminal(Box::new(editor)))
    }

    fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    fn read(&mut self) -> Result<Typed, Failure> {
        match self {
            Self::Terminal(editor) => match editor.readline(PROMPT) {
                Ok(line) => {
                    if !line.trim().is_empty() {
                        // a history that is full forgets its oldest line, which is no failure
                        let _ = editor.add_history_entry(&line);
                    }
                    Ok(Typed::Line(line))
                }
                Err(ReadlineError::Interrupted) => Ok(Typed::Nothing),
                Err(ReadlineError::Eof) => Ok(Typed::End),
                Err(error) => Err(Failure::other(format!("cannot read from the terminal: {error}"))),
            },
            Self::Pipe(stdin) => {
                let mut bytes = Vec::new();
                let count = stdin
                    .take(MAX_LINE_BYTES)
                    .read_until(b'\n', &mut bytes)
                    .map_err(|error| Failure::other(format!("cannot read standard input: {error}")))?;
                if count == 0 {
                    return Ok(Typed::End);
                }
                let line = String::from_utf8_lossy(&bytes);
                Ok(Typed::Line(line.trim_end_matches(['\n', '\r']).to_owned()))
            }
        }
    }
}

/// Runs the command.
pub fn run(args: &Chat) -> Result<(), Failure> {
    let cpu = Cpu::detect(threads(args.model.threads));
    let mut loaded = open(&args.model, &cpu)?;
    let sampling = sampling(&args.sampling, &loaded)?;
    let Some(tokenizer) = loaded.tokenizer.clone() else {
        return Err(Failure::user(format!(
            "{} has no tokenizer.json, so it cannot read text",
            loaded.folder.display()
        ))
        .hint("minke score reads token ids"));
    };
    let (bos, mut stop_ids) = (loaded.bos(), loaded.stop_ids());
    let turns = loaded.template()?.map(|template| Turns::new(template, &tokenizer, &mut stop_ids));
    let engine = Engine::new(&mut loaded.model, &cpu, Some(&tokenizer)).without_log_probs();
    let most = engine.context() / 2;
    let tokens = args.sampling.n.map_or(TOKENS.min(most), |n| (n as usize).min(engine.context() - 1)).max(1);
    let mut input = Input::open()?;
    let painted = input.is_terminal();
    if turns.is_none() {
        output::note(&format!(
            "{} is a base model: it continues the text that you type, it does not answer.\n/help lists the commands.",
            args.model.model
        ));
    } else {
        output::note(&format!("Talking to {}. /help lists the commands.", args.model.model));
    }
    interrupt::install();
    let session = [Session::new(engine.model())];
    let mut chat = Running {
        engine,
        tokenizer: &tokenizer,
        session,
        turns,
        text: bos.into_iter().collect(),
        begin: usize::from(bos.is_some()),
        ends_line: true,
        settings: Settings { sampling, tokens },
        stop: args.sampling.stop.clone(),
        stop_ids,
        painted,
    };
    loop {
        let line = match input.read()? {
            Typed::Line(line) => line,
            Typed::Nothing => {
                output::note("(/exit or Ctrl-D leaves)");
                continue;
            }
            Typed::End => return Ok(()),
        };
        match line.trim().split_once(char::is_whitespace).unwrap_or((line.trim(), "")) {
            ("/exit" | "/quit", "") => return Ok(()),
            ("/help", "") => output::note(if chat.turns.is_some() { TURNS_HELP } else { HELP }),
            ("/reset", "") => chat.reset(),
            ("/set", "") => output::note(&chat.settings.to_string()),
            ("/set", change) => match chat.settings.change(change, chat.engine.context()) {
                Ok(()) => output::note(&chat.settings.to_string()),
                Err(reason) => output::note(&format!("error: {reason}")),
            },
            // text may begin with a slash; one plain word after it is a mistyped command
            (word, "")
                if word.len() > 1
                    && word.starts_with('/')
                    && word[1..].chars().all(|c| c.is_ascii_lowercase()) =>
            {
                output::note(&format!("error: unknown command `{word}`; /help lists the commands"));
            }
            _ => chat.turn(&line)?,
        }
    }
}

/// A conversation.
struct Running<'a> {
    engine: Engine<'a>,
    tokenizer: &'a Tokenizer,
    session: [Session; 1],
    /// The conversation, if the model knows turns.
    turns: Option<Turns>,
    /// The running text, if it does not.
    text: Vec<u32>,
    /// Tokens at its beginning that are always kept.
    begin: usize,
    /// Whether the running text ends with a line end, or is empty.
    ends_line: bool,
    settings: Settings,
    stop: Vec<String>,
    stop_ids: Vec<u32>,
    painted: bool,
}

impl Running<'_> {
    fn reset(&mut self) {
        if let Some(turns) = &mut self.turns {
            turns.clear();
            output::note("a new conversation begins");
            return;
        }
        self.text.truncate(self.begin);
        self.ends_line = true;
        output::note("the text so far is forgotten");
    }

    fn turn(&mut self, line: &str) -> Result<(), Failure> {
        let room = self.room();
        let Some(turns) = &mut self.turns else { return self.go_on(line) };
        if line.trim().is_empty() {
            output::note("type something for the model to answer");
            return Ok(());
        }
        let asked = turns.ask(self.tokenizer, line, room)?;
        let mut painter = Painter::answering(self.painted);
        if asked.is_thinking {
            output::text(painter.open())?;
        }
        let generation = self.generate(asked.prompt, painter)?;
        if let Some(turns) = &mut self.turns {
            turns.answered(&generation.text, asked.is_thinking);
        }
        Ok(())
    }

    /// Appends what was typed to the running text, on a line of its own, and lets the model go on.
    fn go_on(&mut self, line: &str) -> Result<(), Failure> {
        if !line.is_empty() {
            let typed = if self.ends_line { line.to_owned() } else { format!("\n{line}") };
            self.text.extend(self.tokenizer.encode(&typed)?);
            self.ends_line = false;
        }
        if self.text.is_empty() {
            output::note("type something for the model to continue");
            return Ok(());
        }
        self.make_room();
        if self.painted {
            // the typed text again, so that text and continuation stand together
            output::text(&format!("\x1b[1m{}\x1b[22m", output::printable(line)))?;
        }
        let generation = self.generate(self.text.clone(), Painter::new(self.painted))?;
        if !generation.text.is_empty() {
            self.ends_line = generation.text.ends_with('\n');
        }
        self.text.extend(&generation.tokens);
        Ok(())
    }

    /// Continues a prompt and shows it as it comes.
    fn generate(&mut self, prompt: Vec<u32>, mut painter: Painter) -> Result<Generation, Failure> {
        let request = Request {
            prompt,
            max_tokens: self.settings.tokens,
            sampling: self.settings.sampling,
            sequence: 0,
            stop: self.stop.clone(),
            stop_ids: self.stop_ids.clone(),
            ..Request::default()
        };
        let work = Work::begin();
        let mut failed = None;
        let mut done =
            self.engine.generate_in(&mut self.session, std::slice::from_ref(&request), &mut |delta| {
                if let Err(failure) = output::text(&painter.paint(delta.text)) {
                    failed = Some(failure);
                    return ControlFlow::Break(());
                }
                if work.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
        if let Some(failure) = failed {
            return Err(failure);
        }
        let generation = done.pop().expect("one result per request");
        let mut end = painter.finish();
        if !generation.text.ends_with('\n') {
            end.push('\n');
        }
        output::text(&end)?;
        if self.painted && generation.stop == StopReason::Cancelled {
            output::note("(stopped)");
        }
        Ok(generation)
    }

    /// Tokens of a prompt that leave room for an answer. A long answer may end at the context's end rather than cost
    /// more than half of it.
    fn room(&self) -> usize {
        let context = self.engine.context();
        context - self.settings.tokens.min(context / 2).max(1)
    }

    /// Forgets the oldest text where text and answer would not fit into the context.
    fn make_room(&mut self) {
        let room = self.room();
        if self.text.len() <= room {
            return;
        }
        // a good deal at once: what is cut off at the front makes the cache worthless
        let keep = (room - room / 4).max(self.begin + 1);
        let from = self.begin.max((self.text.len() + self.begin).saturating_sub(keep));
        output::note(&format!(
            "(the context is full: the oldest {} tokens are forgotten)",
            from - self.begin
        ));
        self.text.drain(self.begin..from);
    }
}
