//! A model to talk to: the whole way from a folder to an answer in a few lines.
//!
//! [`Assistant`] holds a model, its tokenizer and chat template, the conversation, and the cache of what the model has
//! read of it, so that each turn reads only what is new. A base model has no turns: what is given to it is appended to a
//! running text, and it goes on with it.
//!
//! Nothing is ever forgotten silently: a conversation that does not fit into the model's context is an error that says
//! both lengths, and leaves the conversation as it was.

mod error;
mod pieces;
mod settings;

use std::ops::ControlFlow;

use minke_cpu::Cpu;
use minke_data::template::thinking::CLOSING;
use minke_data::{ChatTemplate, Message, RenderOptions, Role, Tokenizer};
use minke_model::{CacheKind, Precision, Purpose};

use crate::engine::check_vocabularies;
use crate::speculate::Costs;
use crate::{
    Engine, EngineError, Generation, Loaded, Request, Session, Speculated, Speculation, StopReason,
    ThinkingBudget, Timing, begins_thought, can_draft, load_model, without_thought,
};

pub use error::AssistantError;
pub use pieces::{Piece, Splitter, Whole};
pub use settings::{Settings, TEMPERATURE};

/// What came of a turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// What was thought, if anything was.
    pub thought: Option<String>,
    /// What was said.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that had been read before.
    pub reused_tokens: usize,
    /// Tokens of the answer, thought included.
    pub tokens: usize,
    /// What came of drafts.
    pub speculated: Speculated,
    /// How long reading and writing took.
    pub timing: Timing,
}

/// How to load an [`Assistant`].
#[derive(Debug, Default)]
pub struct Builder {
    threads: usize,
    precision: Option<Precision>,
    template: Option<ChatTemplate>,
    system: Option<String>,
}

impl Builder {
    /// Computes with so many threads; all cores where it is 0.
    #[must_use]
    pub fn threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }

    /// Computes in this type instead of the one that the weights are stored in.
    #[must_use]
    pub fn precision(self, precision: Option<Precision>) -> Self {
        Self { precision, ..self }
    }

    /// Talks by this template instead of the model's own.
    #[must_use]
    pub fn template(self, template: ChatTemplate) -> Self {
        Self { template: Some(template), ..self }
    }

    /// Begins conversations with this instruction.
    #[must_use]
    pub fn system(self, text: impl Into<String>) -> Self {
        Self { system: Some(text.into()), ..self }
    }

    /// Loads a model: a folder, a run, a GGUF file, or a hub id in the local cache.
    ///
    /// # Errors
    /// It is not there, or a file of it is missing, inconsistent or hostile; it has no tokenizer; the template refuses
    /// the instruction.
    pub fn load(self, model: &str) -> Result<Assistant, AssistantError> {
        let cpu = Cpu::detect(self.threads);
        let loaded = load_model(model, self.precision, Purpose::Run(&cpu))?;
        let template = match self.template {
            Some(template) => Some(template),
            None => loaded.template()?,
        };
        let mut assistant = Assistant::new(cpu, loaded, template)?;
        if let Some(system) = &self.system {
            assistant.set_system(Some(system))?;
        }
        Ok(assistant)
    }
}

/// A turn of a base model's text.
#[derive(Debug, Clone, Copy)]
struct Turn {
    /// Tokens before what was given.
    before: usize,
    /// Tokens before what the model wrote.
    given: usize,
    /// Whether the text before ended with a line end, or was empty.
    ended_line: bool,
}

/// A model to talk to; see the module.
///
/// ```no_run
/// # fn main() -> Result<(), minke_infer::AssistantError> {
/// let mut whale = minke_infer::Assistant::load("runs/tiny-r1")?;
/// whale.settings.sampling.temperature = 0.6;
/// let answer = whale.say("What is 56365+18356?", |piece| print!("{piece}"))?;
/// println!("\n{} tokens; it said {}", answer.tokens, answer.text);
/// # Ok(())
/// # }
/// ```
pub struct Assistant {
    /// How answers are made.
    pub settings: Settings,
    cpu: Cpu,
    loaded: Loaded,
    /// A smaller model that drafts.
    draft: Option<Loaded>,
    /// What calls cost, as measured so far.
    costs: Costs,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    /// What the template has between a thought and its answer.
    closing: String,
    session: Session,
    stop_ids: Vec<u32>,
    messages: Vec<Message>,
    /// The running text of a base model.
    text: Vec<u32>,
    ends_line: bool,
    turns: Vec<Turn>,
    /// Names the draws of an answer that is asked for again.
    attempt: u64,
    notes: Vec<String>,
}

impl Assistant {
    /// Loads a model: a folder, a run, a GGUF file, or a hub id in the local cache.
    ///
    /// # Errors
    /// As [`Builder::load`].
    pub fn load(model: &str) -> Result<Self, AssistantError> {
        Self::builder().load(model)
    }

    /// Loads a model with choices of one's own.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// An assistant of a model that is loaded; without a template it is a base model.
    ///
    /// # Errors
    /// The model has no tokenizer.
    pub fn new(cpu: Cpu, loaded: Loaded, template: Option<ChatTemplate>) -> Result<Self, AssistantError> {
        let Some(tokenizer) = loaded.tokenizer.clone() else {
            return Err(AssistantError::NoTokenizer { folder: loaded.folder });
        };
        let stop_ids = loaded.stop_ids_with(template.as_ref());
        let mut notes = loaded.notes.clone();
        let closing = template.as_ref().map_or_else(|| CLOSING.to_owned(), ChatTemplate::closing);
        if let Some(template) = &template {
            let missing = template.missing_tokens(&tokenizer);
            if !missing.is_empty() {
                let missing = missing.join(", ");
                notes.push(format!(
                    "the chat template writes {missing}, which the tokenizer does not have as tokens"
                ));
            }
        }
        let text = loaded.bos().into_iter().collect();
        Ok(Self {
            settings: Settings::suggested(&loaded.generation),
            session: Session::new(&loaded.model),
            cpu,
            draft: None,
            costs: Costs::default(),
            tokenizer,
            template,
            closing,
            stop_ids,
            messages: Vec::new(),
            text,
            ends_line: true,
            turns: Vec::new(),
            attempt: 0,
            notes,
            loaded,
        })
    }

    /// Keeps something else of the conversation than the model's own keys and values.
    ///
    /// # Errors
    /// Latents of a model that has none.
    pub fn with_cache(self, cache: CacheKind) -> Result<Self, AssistantError> {
        let session = Session::of_kind(&self.loaded.model, cache).ok_or(EngineError::NoLatent)?;
        Ok(Self { session, ..self })
    }

    /// Drafts with a smaller model, where [`Settings::speculation`] says so.
    ///
    /// # Errors
    /// Its vocabulary is another.
    pub fn with_draft(self, draft: Loaded) -> Result<Self, AssistantError> {
        check_vocabularies(Some(&self.tokenizer), draft.tokenizer.as_ref())?;
        Ok(Self { draft: Some(draft), ..self })
    }

    /// Sets where drafts come from.
    ///
    /// # Errors
    /// There is nothing to draft with.
    pub fn set_speculation(&mut self, speculation: Speculation) -> Result<(), AssistantError> {
        can_draft(&self.loaded.model, self.draft.is_some(), speculation)?;
        self.settings.speculation = speculation;
        Ok(())
    }

    /// Begins at once with what makes a model that is used for long faster, instead of after a while: for who has a moment
    /// before the first question.
    pub fn warm_up(&mut self) {
        self.loaded.model.copy_mapped_weights_now(&self.cpu);
    }

    /// Whether the model only continues text: it has no chat template.
    pub fn is_base(&self) -> bool {
        self.template.is_none()
    }

    /// What the user should know of the model.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The model and what its folder says.
    pub fn loaded(&self) -> &Loaded {
        &self.loaded
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.cpu.threads()
    }

    /// Tokens that fit into the model's context.
    pub fn context(&self) -> usize {
        self.loaded.model.config.max_position_embeddings
    }

    /// Tokens of it that are in use: those in the cache.
    pub fn used(&self) -> usize {
        self.session.len()
    }

    /// The conversation so far; nothing with a base model.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The running text of a base model.
    pub fn text(&self) -> String {
        self.tokenizer.decode(&self.text, true)
    }

    /// Says something and gives the answer; `on` gets the answer piece by piece as it comes.
    ///
    /// With a base model the text is appended to the running text on a line of its own, and what is given is its
    /// continuation; an empty text lets it go on.
    ///
    /// # Errors
    /// Nothing was said, or the conversation does not fit into the context, or the template refuses it; the
    /// conversation is as before then.
    pub fn say(&mut self, text: &str, mut on: impl FnMut(Piece<'_>)) -> Result<Answer, AssistantError> {
        self.say_until(text, &mut |piece| {
            on(piece);
            ControlFlow::Continue(())
        })
    }

    /// Says something and gives the answer at once.
    ///
    /// # Errors
    /// As [`Assistant::say`].
    pub fn ask(&mut self, text: &str) -> Result<Answer, AssistantError> {
        self.say(text, |_| {})
    }

    /// As [`Assistant::say`]; `on` may end the answer, and is asked between any two tokens, with an empty piece where
    /// there is nothing to show.
    ///
    /// # Errors
    /// As [`Assistant::say`].
    pub fn say_until(
        &mut self,
        text: &str,
        on: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<Answer, AssistantError> {
        if self.template.is_none() {
            return self.go_on(text, on);
        }
        if text.trim().is_empty() {
            return Err(AssistantError::NothingSaid);
        }
        self.messages.push(Message::user(text));
        self.attempt = 0;
        let answer = self.answer(on);
        if answer.is_err() {
            self.messages.pop();
        }
        answer
    }

    /// Answers the last message again, by other draws.
    ///
    /// # Errors
    /// There is nothing to answer, or as [`Assistant::say`].
    pub fn retry(
        &mut self,
        on: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<Answer, AssistantError> {
        self.attempt += 1;
        if self.template.is_none() {
            let turn = *self.turns.last().ok_or(AssistantError::NothingToRetry)?;
            let written = self.text.split_off(turn.given);
            let done = self.write(on);
            if done.is_err() {
                self.text.extend(written);
            }
            return done;
        }
        let asked = self.messages.iter().rposition(|message| message.role != Role::Assistant);
        let asked = asked.filter(|&at| self.messages[at].role != Role::System);
        let old = self.messages.split_off(asked.ok_or(AssistantError::NothingToRetry)? + 1);
        let done = self.answer(on);
        if done.is_err() {
            self.messages.extend(old);
        }
        done
    }

    /// Forgets the last turn and its answer; gives what was said.
    ///
    /// # Errors
    /// There is none.
    pub fn undo(&mut self) -> Result<String, AssistantError> {
        if self.template.is_none() {
            let turn = self.turns.pop().ok_or(AssistantError::NothingToUndo)?;
            let given = self.tokenizer.decode(&self.text[turn.before..turn.given], true);
            self.text.truncate(turn.before);
            self.ends_line = turn.ended_line;
            return Ok(given);
        }
        let asked = self.messages.iter().rposition(|message| message.role == Role::User);
        let forgotten = self.messages.split_off(asked.ok_or(AssistantError::NothingToUndo)?);
        Ok(forgotten.into_iter().next().map(|message| message.content).unwrap_or_default())
    }

    /// Begins anew; the instruction stays.
    pub fn reset(&mut self) {
        let is_instruction = |message: &Message| matches!(message.role, Role::System | Role::Developer);
        let keep = self.messages.iter().take_while(|message| is_instruction(message)).count();
        self.messages.truncate(keep);
        let begin = self.turns.first().map_or(self.text.len(), |turn| turn.before);
        self.text.truncate(begin);
        self.turns.clear();
        self.ends_line = true;
    }

    /// The instruction that holds for the whole conversation.
    pub fn system(&self) -> Option<&str> {
        self.messages.first().filter(|message| message.role == Role::System).map(|message| &*message.content)
    }

    /// Sets the instruction, or takes it away.
    ///
    /// # Errors
    /// A base model has none, and some templates refuse one.
    pub fn set_system(&mut self, text: Option<&str>) -> Result<(), AssistantError> {
        let template = self.template.as_ref().ok_or(AssistantError::NoTemplate)?;
        if let Some(text) = text {
            // told now rather than when something is asked
            template.render(&[Message::system(text), Message::user("?")], RenderOptions::default())?;
        }
        if self.system().is_some() {
            self.messages.remove(0);
        }
        if let Some(text) = text {
            self.messages.insert(0, Message::system(text));
        }
        Ok(())
    }

    /// Takes up another conversation.
    ///
    /// # Errors
    /// A base model has none, the template refuses it, or it does not fit into the context; the old one stays then.
    pub fn set_messages(&mut self, messages: Vec<Message>) -> Result<(), AssistantError> {
        let template = self.template.as_ref().ok_or(AssistantError::NoTemplate)?;
        let tokens = template.encode_prompt_with(&self.tokenizer, &messages, RenderOptions::default())?.len();
        if tokens >= self.context() {
            return Err(AssistantError::Full { tokens, context: self.context() });
        }
        self.messages = messages;
        Ok(())
    }

    /// Takes up another running text of a base model.
    ///
    /// # Errors
    /// The model is none, or the text does not fit into the context; the old one stays then.
    pub fn set_text(&mut self, text: &str) -> Result<(), AssistantError> {
        if self.template.is_some() {
            return Err(AssistantError::NotBase);
        }
        let ids = self.tokenizer.encode(text)?;
        let begin = self.turns.first().map_or(self.text.len(), |turn| turn.before);
        if begin + ids.len() >= self.context() {
            return Err(AssistantError::Full { tokens: begin + ids.len(), context: self.context() });
        }
        self.reset();
        let turn = Turn { before: begin, given: begin + ids.len(), ended_line: true };
        self.text.extend(ids);
        self.turns.push(turn);
        self.ends_line = text.is_empty() || text.ends_with('\n');
        Ok(())
    }

    /// Answers the conversation as it stands.
    fn answer(&mut self, on: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>) -> Result<Answer, AssistantError> {
        let template = self.template.as_ref().ok_or(AssistantError::NoTemplate)?;
        let prompt = template.encode_prompt(&self.tokenizer, &self.messages, self.settings.thinking)?;
        let is_thinking = begins_thought(&self.tokenizer, &prompt);
        let logit_bias = without_thought(&self.tokenizer, &prompt);
        let (_, answer) = self.generate(prompt, is_thinking, logit_bias, on)?;
        self.messages.push(Message::assistant(answer.thought.as_deref(), answer.text.clone()));
        Ok(answer)
    }

    /// Appends what is given to the running text, on a line of its own, and lets the model go on.
    fn go_on(
        &mut self,
        given: &str,
        on: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<Answer, AssistantError> {
        let turn = Turn { before: self.text.len(), given: self.text.len(), ended_line: self.ends_line };
        if !given.is_empty() {
            let given = if self.ends_line { given.to_owned() } else { format!("\n{given}") };
            self.text.extend(self.tokenizer.encode(&given)?);
            self.ends_line = false;
        }
        if self.text.is_empty() {
            return Err(AssistantError::NothingSaid);
        }
        self.attempt = 0;
        self.turns.push(Turn { given: self.text.len(), ..turn });
        let done = self.write(on);
        if done.is_err() {
            self.text.truncate(turn.before);
            self.ends_line = turn.ended_line;
            self.turns.pop();
        }
        done
    }

    /// Lets a base model go on with its text.
    fn write(&mut self, on: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>) -> Result<Answer, AssistantError> {
        let (generation, answer) = self.generate(self.text.clone(), false, Vec::new(), on)?;
        if !generation.text.is_empty() {
            self.ends_line = generation.text.ends_with('\n');
        }
        self.text.extend(&generation.tokens);
        Ok(answer)
    }

    fn generate(
        &mut self,
        prompt: Vec<u32>,
        is_thinking: bool,
        logit_bias: Vec<(u32, f32)>,
        on: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<(Generation, Answer), AssistantError> {
        let context = self.context();
        if prompt.len() >= context {
            return Err(AssistantError::Full { tokens: prompt.len(), context });
        }
        let room = context - prompt.len();
        let prompt_tokens = prompt.len();
        let request = Request {
            prompt,
            // one more than there is room for, so that an answer that the context ends is told from one that is long
            max_tokens: self.settings.max_tokens.map_or(room + 1, |most| most.min(room + 1)),
            sampling: self.settings.sampling,
            sequence: self.attempt,
            stop: self.settings.stop.clone(),
            stop_ids: self.stop_ids.clone(),
            logit_bias,
            thinking: self
                .settings
                .thinking_budget
                .map(|most| ThinkingBudget::new(most).closed_by(&self.closing)),
            speculation: self.settings.speculation,
            ..Request::default()
        };
        let mut engine =
            Engine::new(&mut self.loaded.model, &self.cpu, Some(&self.tokenizer)).without_log_probs();
        engine.costs = self.costs.clone();
        // (vocabularies were compared when it came)
        engine.other = self.draft.as_mut().map(|draft| &mut draft.model);
        let (mut splitter, mut whole) = (Splitter::new(is_thinking), Whole::default());
        let mut give = |piece: Piece<'_>| {
            whole.take(piece);
            on(piece)
        };
        let mut flow = if is_thinking { give(Piece::ThoughtBegins) } else { ControlFlow::Continue(()) };
        let session = std::slice::from_mut(&mut self.session);
        let mut done = engine.generate_in(session, std::slice::from_ref(&request), &mut |delta| {
            let mut gave = false;
            splitter.push(delta.text, &mut |piece| {
                gave = true;
                if give(piece).is_break() {
                    flow = ControlFlow::Break(());
                }
            });
            if !gave && give(Piece::Said("")).is_break() {
                flow = ControlFlow::Break(());
            }
            flow
        })?;
        let timing = engine.timing();
        self.costs = engine.costs.clone();
        let generation = done.pop().expect("one result per request");
        splitter.finish(&mut |piece| {
            // the answer is over: there is nothing left to end
            let _ = give(piece);
        });
        let (thought, text) = whole.parts();
        let answer = Answer {
            thought,
            text,
            stop: generation.stop.clone(),
            prompt_tokens,
            reused_tokens: generation.reused,
            tokens: generation.tokens.len(),
            speculated: generation.speculated,
            timing,
        };
        Ok((generation, answer))
    }
}
