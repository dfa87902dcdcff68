//! How long a model may think: its thought is followed in the stream of tokens, and closed where its budget ends.

use std::sync::Arc;

use minke_data::Tokenizer;
use minke_data::template::thinking::{CLOSE, CLOSING, OPEN};

use crate::EngineError;
use crate::constrain::Constraint;
use crate::guide::BAN;

/// Tokens of a prompt's end that are looked at for the beginning of a thought.
const LOOK_BACK: usize = 32;
/// No marker is longer.
const MAX_MARKER_BYTES: usize = 4096;

/// A bound on the tokens of a thought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinkingBudget {
    /// Begins a thought: a prompt that ends with it (and white space) has begun one.
    pub open: String,
    /// What is written to end a thought: the marker that the model itself would write, in white space as its template
    /// has it.
    pub close: String,
    /// Tokens that a thought may have, all thoughts of an answer together; the forced end does not count.
    pub max_tokens: usize,
}

impl ThinkingBudget {
    /// A budget for a model that thinks between `<think>` and `</think>`.
    pub fn new(max_tokens: usize) -> Self {
        Self { open: OPEN.to_owned(), close: CLOSING.to_owned(), max_tokens }
    }

    /// The same for a model whose template ends thoughts so ([`minke_data::ChatTemplate::closing`]).
    #[must_use]
    pub fn closed_by(self, close: &str) -> Self {
        Self { close: close.to_owned(), ..self }
    }
}

/// Whether a prompt ends within a thought that it has begun.
pub fn begins_thought(tokenizer: &Tokenizer, prompt: &[u32]) -> bool {
    ends_with(tokenizer, prompt, OPEN.as_bytes())
}

/// Whether the form of an answer waits for the end of a thought ([`Request::constrain_answer_only`](crate::Request)): its
/// prompt has begun one, or the template knows thoughts and the answer may begin with one of its own. It may where the
/// prompt has neither begun nor closed one, the tokenizer has the mark as a token, and the form does not name it. An
/// answer whose form does not wait is all of it an answer, marks and all.
pub fn form_waits(tokenizer: &Tokenizer, prompt: &[u32], form: &Constraint, knows_thoughts: bool) -> bool {
    let may_open = || opening(tokenizer, prompt, OPEN, CLOSE).is_some() && !form.names(OPEN);
    begins_thought(tokenizer, prompt) || knows_thoughts && may_open()
}

/// The token that begins a thought, where a prompt has neither begun nor closed one.
fn opening(tokenizer: &Tokenizer, prompt: &[u32], open: &str, close: &str) -> Option<u32> {
    let is_decided = [open, close].iter().any(|mark| ends_with(tokenizer, prompt, mark.as_bytes()));
    tokenizer.id_of(open).filter(|_| !is_decided)
}

/// Forbids the marks of a thought to an answer whose prompt has closed one, as it does where thinking is switched off: a
/// model that always thinks would write its thought into the answer, and close it again. Without such a prompt, or where
/// the tokenizer has the marks as no tokens, nothing is forbidden.
pub fn without_thought(tokenizer: &Tokenizer, prompt: &[u32]) -> Vec<(u32, f32)> {
    if !ends_with(tokenizer, prompt, CLOSE.as_bytes()) {
        return Vec::new();
    }
    marks(tokenizer, OPEN, CLOSE).map(|id| (id, BAN)).collect()
}

/// Those of two marks that are tokens.
fn marks(tokenizer: &Tokenizer, open: &str, close: &str) -> impl Iterator<Item = u32> {
    [open, close].map(|mark| tokenizer.id_of(mark)).into_iter().flatten()
}

/// Whether a prompt ends with a mark and white space.
fn ends_with(tokenizer: &Tokenizer, prompt: &[u32], mark: &[u8]) -> bool {
    let end = &prompt[prompt.len().saturating_sub(LOOK_BACK)..];
    let end: Vec<u8> = end.iter().flat_map(|&id| tokenizer.token_bytes(id).into_owned()).collect();
    end.trim_ascii_end().ends_with(mark)
}

/// What an answer spent on thinking.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Thought {
    /// Tokens between the markers.
    pub tokens: usize,
    /// Tokens that were written to end it, none of them chosen by the model.
    pub forced: usize,
    /// Whether it came to an end.
    pub closed: bool,
}

/// The markers of a request as ids.
#[derive(Debug)]
struct Markers {
    open: Vec<u8>,
    close: Vec<u8>,
    /// All of [`ThinkingBudget::close`].
    closing: Vec<u32>,
    /// What follows its marker.
    rest: Vec<u32>,
    /// Both, where they are tokens.
    marks: Vec<u32>,
    /// The first, where it is a token and an answer may begin with it.
    opening: Option<u32>,
    max_tokens: usize,
    /// Whether white space behind a marker that the model wrote itself is written for it, because a grammar follows.
    then_rest: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No thought is open.
    Outside,
    Inside,
    /// Writing the closing ids, this one next.
    Closing(usize),
    /// Writing what follows a marker, this id next.
    Rest(usize),
}

/// Where a sequence stands with its thoughts.
#[derive(Debug, Clone)]
pub(crate) struct Thinking {
    markers: Arc<Markers>,
    phase: Phase,
    /// The last bytes of the answer, as many as a marker has.
    tail: Vec<u8>,
    thought: Thought,
    /// Whether a thought was ended for the model.
    cut: bool,
}

impl Thinking {
    /// A sequence that has its prompt only; `then_rest` where a grammar follows the thought.
    ///
    /// # Errors
    /// No tokenizer, or markers that are empty, too long, or cannot be written.
    pub fn new(
        budget: &ThinkingBudget,
        tokenizer: Option<&Tokenizer>,
        prompt: &[u32],
        then_rest: bool,
    ) -> Result<Self, EngineError> {
        let tokenizer = tokenizer.ok_or(EngineError::ThinkingNeedsTokenizer)?;
        let (open, close) = (budget.open.trim(), budget.close.trim());
        for marker in [open, close] {
            if marker.is_empty() || budget.close.len().max(budget.open.len()) > MAX_MARKER_BYTES {
                return Err(EngineError::ThinkingMarker { marker: marker.chars().take(80).collect() });
            }
        }
        let ids = |text: &str| {
            tokenizer
                .encode_behind(text)
                .map_err(|_| EngineError::ThinkingMarker { marker: close.to_owned() })
        };
        let closing = ids(&budget.close)?;
        if closing.is_empty() {
            return Err(EngineError::ThinkingMarker { marker: close.to_owned() });
        }
        let behind = budget.close.trim_start()[close.len()..].to_owned();
        let markers = Markers {
            open: open.as_bytes().to_vec(),
            close: close.as_bytes().to_vec(),
            closing,
            rest: ids(&behind)?,
            marks: marks(tokenizer, open, close).collect(),
            opening: opening(tokenizer, prompt, open, close),
            max_tokens: budget.max_tokens,
            then_rest,
        };
        let is_open = ends_with(tokenizer, prompt, &markers.open);
        let mut thinking = Self {
            markers: Arc::new(markers),
            phase: if is_open { Phase::Inside } else { Phase::Outside },
            tail: Vec::new(),
            thought: Thought::default(),
            cut: false,
        };
        thinking.check();
        Ok(thinking)
    }

    /// Whether a thought is open, or its end being written.
    pub fn is_open(&self) -> bool {
        self.phase != Phase::Outside
    }

    /// The token with which an answer may begin a thought, if its prompt has neither begun nor closed one.
    pub fn opening(&self) -> Option<u32> {
        self.markers.opening
    }

    /// The token that must come next, if it is not the model that chooses.
    pub fn forced(&self) -> Option<u32> {
        self.forced_ahead().first().copied()
    }

    /// All tokens that must come next.
    pub fn forced_ahead(&self) -> &[u32] {
        match self.phase {
            Phase::Outside | Phase::Inside => &[],
            Phase::Closing(at) => &self.markers.closing[at..],
            Phase::Rest(at) => &self.markers.rest[at..],
        }
    }

    /// Tokens that may not come behind a thought that was ended for the model, which may not know that it is over: its
    /// marks, as in [`without_thought`].
    pub fn marks(&self) -> &[u32] {
        &self.markers.marks
    }

    /// Whether they may not come now.
    pub fn forbids_marks(&self) -> bool {
        self.cut && !self.is_open()
    }

    /// What was spent so far.
    pub fn thought(&self) -> Thought {
        self.thought
    }

    /// Takes a token of the answer.
    pub fn push(&mut self, id: u32, tokenizer: &Tokenizer) {
        match self.phase {
            Phase::Closing(at) => {
                self.thought.forced += 1;
                self.go_on(Phase::Closing(at + 1), at + 1 == self.markers.closing.len());
            }
            Phase::Rest(at) => {
                self.thought.forced += 1;
                self.go_on(Phase::Rest(at + 1), at + 1 == self.markers.rest.len());
            }
            Phase::Outside => {
                let markers = self.markers.clone();
                if self.completes(id, &markers.open, tokenizer).is_some() {
                    (self.phase, self.thought.closed) = (Phase::Inside, false);
                    self.check();
                }
            }
            Phase::Inside => {
                let markers = self.markers.clone();
                match self.completes(id, &markers.close, tokenizer) {
                    Some(behind) => {
                        self.thought.closed = true;
                        let write = markers.then_rest && behind == 0 && !markers.rest.is_empty();
                        self.go_on(Phase::Rest(0), !write);
                    }
                    None => {
                        self.thought.tokens += 1;
                        self.check();
                    }
                }
            }
        }
    }

    fn go_on(&mut self, phase: Phase, over: bool) {
        self.phase = if over { Phase::Outside } else { phase };
        self.thought.closed |= over;
    }

    /// Ends a thought that has spent all.
    fn check(&mut self) {
        if self.phase == Phase::Inside && self.thought.tokens >= self.markers.max_tokens {
            self.tail.clear();
            self.phase = Phase::Closing(0);
            self.cut = true;
        }
    }

    /// Whether a marker is complete with this token, and how many bytes are behind it.
    fn completes(&mut self, id: u32, marker: &[u8], tokenizer: &Tokenizer) -> Option<usize> {
        self.tail.extend_from_slice(&tokenizer.token_bytes(id));
        let found = self.tail.windows(marker.len()).position(|window| window == marker);
        if let Some(at) = found {
            let behind = self.tail.len() - at - marker.len();
            self.tail.clear();
            return Some(behind);
        }
        let keep = self.tail.len().min(marker.len() - 1);
        self.tail.drain(..self.tail.len() - keep);
        None
    }
}

#[cfg(test)]
mod tests {
    use minke_data::TrainOptions;

    use super::*;

    /// `<think>` and `</think>` are a token each.
    fn tokenizer() -> Tokenizer {
        let sample = vec!["the whale thinks and the whale sings\n".repeat(20)];
        Tokenizer::train(&sample, &TrainOptions { vocab_size: 300, ..TrainOptions::default() }).unwrap()
    }

    fn thinking(budget: &ThinkingBudget, prompt: &str, then_rest: bool) -> Thinking {
        let tokenizer = tokenizer();
        let prompt = tokenizer.encode_with_special(prompt).unwrap();
        Thinking::new(budget, Some(&tokenizer), &prompt, then_rest).unwrap()
    }

    /// Lets the model say `text`, and gives what was forced where.
    fn say(thinking: &mut Thinking, text: &str) -> Vec<(usize, u32)> {
        let tokenizer = tokenizer();
        let mut forced = Vec::new();
        let mut said = tokenizer.encode_with_special(text).unwrap().into_iter();
        for at in 0.. {
            let id = match thinking.forced() {
                Some(id) => {
                    forced.push((at, id));
                    id
                }
                None => match said.next() {
                    Some(id) => id,
                    None => break,
                },
            };
            thinking.push(id, &tokenizer);
        }
        forced
    }

    #[test]
    fn a_thought_is_closed_where_its_budget_ends() {
        let ids = tokenizer().encode_with_special(CLOSING).unwrap();
        for begun in [true, false] {
            let prompt = if begun { "sing<think>\n" } else { "sing" };
            let mut thinking = thinking(&ThinkingBudget::new(3), prompt, false);
            assert_eq!(thinking.is_open(), begun);
            let forced = say(&mut thinking, if begun { "0123456" } else { "<think>0123456" });
            let from = if begun { 3 } else { 4 };
            let expected: Vec<(usize, u32)> = (from..).zip(ids.iter().copied()).collect();
            assert_eq!(forced, expected);
            assert_eq!(thinking.thought(), Thought { tokens: 3, forced: ids.len(), closed: true });
        }
        // nothing at all, and a second thought that has nothing left
        let mut none = thinking(&ThinkingBudget::new(0), "sing<think>", false);
        assert!(!none.forbids_marks(), "its end is a mark");
        assert_eq!(say(&mut none, "").len(), ids.len());
        assert!(none.forbids_marks());
        assert_eq!(say(&mut none, "so <think>").len(), ids.len());
        assert_eq!(none.thought(), Thought { tokens: 0, forced: 2 * ids.len(), closed: true });
    }

    #[test]
    fn a_thought_that_ends_by_itself_is_left_alone() {
        let mut thinking_ = thinking(&ThinkingBudget::new(100), "sing<think>", false);
        assert!(say(&mut thinking_, "012</think>9").is_empty());
        assert_eq!(thinking_.thought(), Thought { tokens: 3, forced: 0, closed: true });
        assert!(!thinking_.forbids_marks());
        // a grammar follows: what the template has behind the marker is written
        let mut then = thinking(&ThinkingBudget::new(100), "sing<think>", true);
        let rest = tokenizer().encode("\n\n").unwrap();
        let expected: Vec<(usize, u32)> = (4..).zip(rest).collect();
        assert_eq!(say(&mut then, "012</think>9"), expected);
        assert!(!then.is_open());
    }

    #[test]
    fn markers_of_several_tokens_are_found_in_the_text() {
        let budget = ThinkingBudget { open: "[[why]]".into(), close: "\n[[so]] ".into(), max_tokens: 20 };
        let mut thinking = thinking(&budget, "sing [[why]]", false);
        assert!(say(&mut thinking, "01[[so]]2").is_empty());
        assert!(thinking.thought().closed);
        // the tokens of the marker but its last
        assert!((2..=10).contains(&thinking.thought().tokens), "{:?}", thinking.thought());
        let far =
            "[[why]] and then many other words that are no thought, for it is over, is it not, so it is over";
        let tokenizer = tokenizer();
        let prompt = tokenizer.encode(far).unwrap();
        assert!(!Thinking::new(&budget, Some(&tokenizer), &prompt, false).unwrap().is_open());
    }

    #[test]
    fn marks_are_forbidden_behind_a_thought_that_is_over() {
        let tokenizer = tokenizer();
        let forbidden = |prompt: &str| {
            let prompt = tokenizer.encode_with_special(prompt).unwrap();
            (begins_thought(&tokenizer, &prompt), without_thought(&tokenizer, &prompt))
        };
        let marks = [OPEN, CLOSE].map(|mark| (tokenizer.id_of(mark).unwrap(), BAN));
        assert_eq!(forbidden("sing<think></think>\n\n"), (false, marks.to_vec()));
        assert_eq!(forbidden("</think>"), (false, marks.to_vec()));
        assert_eq!(forbidden("sing<think>\n"), (true, Vec::new()));
        assert_eq!(forbidden("<think></think>sing"), (false, Vec::new()));
    }

    #[test]
    fn markers_are_checked() {
        let tokenizer = tokenizer();
        for (open, close) in [("", "</t>"), ("<t>", " \n"), ("<t>", &"x".repeat(5000))] {
            let budget = ThinkingBudget { open: open.into(), close: close.into(), max_tokens: 1 };
            let error = Thinking::new(&budget, Some(&tokenizer), &[], false).unwrap_err();
            assert!(matches!(error, EngineError::ThinkingMarker { .. }), "{error}");
        }
        let error = Thinking::new(&ThinkingBudget::new(1), None, &[], false).unwrap_err();
        assert_eq!(error, EngineError::ThinkingNeedsTokenizer);
    }
}
