//! Thoughts: how a turn begins, where a thought stands, and what a template does to it.

use super::{ChatTemplate, Message, RenderOptions};

/// Begins a thought.
pub const OPEN: &str = "<think>";
/// Ends a thought.
pub const CLOSE: &str = "</think>";
/// The end of a thought with the line ends that templates write around it.
pub const CLOSING: &str = "\n</think>\n\n";

/// How the model's next turn begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Thinking {
    /// As the template has it.
    #[default]
    Default,
    /// With `<think>`: the model goes on with its thought.
    Open,
    /// With an empty thought: the model goes on with its answer.
    Empty,
}

impl Thinking {
    /// A prompt that begins the turn this way, whatever the template wrote at its end.
    pub(super) fn begin(self, mut prompt: String) -> String {
        let body = prompt.trim_end().len();
        let (opened, closed) = (prompt[..body].ends_with(OPEN), prompt[..body].ends_with(CLOSE));
        match self {
            Self::Default => {}
            Self::Open if opened => {}
            Self::Open if closed => {
                // the template wrote an empty thought, or only its end
                let before = prompt[..body - CLOSE.len()].trim_end();
                let keep = before.strip_suffix(OPEN).map_or(body - CLOSE.len(), str::len);
                prompt.truncate(keep);
                prompt.push_str("<think>\n");
            }
            Self::Open => prompt.push_str("<think>\n"),
            Self::Empty if closed => {}
            Self::Empty if opened && body == prompt.len() => prompt.push_str(CLOSE),
            Self::Empty if opened => prompt.push_str(CLOSING),
            Self::Empty => prompt.push_str("<think>\n\n</think>\n\n"),
        }
        prompt
    }
}

/// The thought as a field, for templates that know it: one that stands in the content is taken out.
pub(super) fn taken_out(message: &Message) -> Message {
    let thought = message.reasoning_content.as_deref().unwrap_or_default();
    let inside = message.content.trim_start().strip_prefix(OPEN).and_then(|rest| rest.split_once(CLOSE));
    match inside {
        Some((inside, answer)) if thought.is_empty() => {
            let thought = Some(inside.trim_matches('\n').to_owned());
            let content = answer.trim_start_matches('\n').to_owned();
            Message { content, reasoning_content: thought, ..message.clone() }
        }
        _ => message.clone(),
    }
}

/// The thought as part of the content, for templates that do not know the field.
pub(super) fn put_in(message: &Message) -> Message {
    let content = match message.reasoning_content.as_deref() {
        None | Some("") => message.content.clone(),
        Some(thought) => format!("{OPEN}\n{thought}\n{CLOSE}\n\n{}", message.content),
    };
    Message { content, reasoning_content: None, ..message.clone() }
}

/// What is wrong with the thought of a turn, if anything is.
pub(super) fn fault(turn: &str, thought: &str) -> Option<String> {
    let count = |mark: &str| turn.matches(mark).count();
    if !turn.contains(thought.trim()) {
        return Some("it drops the thought of an answer".to_owned());
    }
    match (count(OPEN), count(CLOSE)) {
        (1, 1) => None,
        (0, _) => Some("it drops the <think> of an answer".to_owned()),
        (_, 0) => Some("it drops the </think> of an answer".to_owned()),
        (opens, closes) => {
            Some(format!("it writes <think> {opens} times and </think> {closes} times in one answer"))
        }
    }
}

impl ChatTemplate {
    /// Whether the template itself writes or looks for the marks of a thought.
    pub fn knows_marks(&self) -> bool {
        [OPEN, CLOSE].iter().any(|mark| self.source().contains(mark))
    }

    /// What stands between a thought and its answer: the mark and the white space that this template has around it;
    /// [`CLOSING`] where it drops thoughts.
    pub fn closing(&self) -> String {
        const THOUGHT: &str = "seven and three";
        const ANSWER: &str = "ten it is";
        let turn = [Message::user("how many?"), Message::assistant(Some(THOUGHT), ANSWER)];
        let whole = self.render(&turn, RenderOptions::default()).unwrap_or_default();
        let between = whole.split_once(THOUGHT).and_then(|(_, rest)| rest.split_once(ANSWER));
        let between = between.map(|(between, _)| between).filter(|between| between.trim() == CLOSE);
        between.unwrap_or(CLOSING).to_owned()
    }

    /// What the template does to thoughts that training should know: drops one, doubles a mark, or begins a turn
    /// otherwise than it tells it. Empty for a template that is fit to train a thinking model.
    pub fn think_problems(&self) -> Vec<String> {
        const THOUGHT: &str = "seven and three make ten";
        const ANSWER: &str = "ten it is";
        let question = [Message::user("seven and three?")];
        let mut problems = Vec::new();
        let prompt = match self.render(&question, RenderOptions::prompt(Thinking::Open)) {
            Ok(prompt) => prompt,
            Err(error) => return vec![error.to_string()],
        };
        if prompt.matches(OPEN).count() != 1 {
            problems.push(format!("its prompt holds <think> {} times", prompt.matches(OPEN).count()));
        }
        let forms = [
            ("as a field", Message::assistant(Some(THOUGHT), ANSWER)),
            ("in the content", Message::assistant(None, format!("{OPEN}\n{THOUGHT}\n{CLOSE}\n\n{ANSWER}"))),
        ];
        for (form, answer) in forms {
            let [user] = question.clone();
            let whole = match self.render(&[user, answer], RenderOptions::default()) {
                Ok(whole) => whole,
                Err(error) => return vec![error.to_string()],
            };
            if let Some(fault) = fault(&whole, THOUGHT) {
                problems.push(format!("{fault} (given {form})"));
            } else if !whole.starts_with(&prompt) {
                problems
                    .push(format!("a finished answer does not go on from its prompt (thought given {form})"));
            }
            if !whole.contains(ANSWER) {
                problems.push(format!("it drops the answer (thought given {form})"));
            }
        }
        problems
    }
}
