//! A conversation of turns, by the model's chat template.

use minke_data::{ChatTemplate, Message, Thinking, Tokenizer};

use crate::failure::Failure;
use crate::output;

/// What was said so far, and how it is told to the model.
pub struct Turns {
    template: ChatTemplate,
    messages: Vec<Message>,
}

/// What the model is to continue.
pub struct Asked {
    /// The conversation up to the model's turn.
    pub prompt: Vec<u32>,
    /// Whether it ends within a thought.
    pub is_thinking: bool,
}

impl Turns {
    /// An empty conversation; the token that ends a turn joins `stop_ids`.
    pub fn new(template: ChatTemplate, tokenizer: &Tokenizer, stop_ids: &mut Vec<u32>) -> Self {
        // a template that refuses the probe has said nothing about how turns end
        if let Ok(Some(end)) = template.end_of_turn(tokenizer)
            && !stop_ids.contains(&end)
        {
            stop_ids.push(end);
        }
        let missing = template.missing_tokens(tokenizer);
        if !missing.is_empty() {
            output::note(&format!(
                "warning: the chat template writes {}, which the tokenizer does not have as tokens",
                missing.join(", ")
            ));
        }
        Self { template, messages: Vec::new() }
    }

    /// Begins anew.
    pub fn clear(&mut self) {
        self.messages.clear();
    }

    /// Adds a turn of the person. The oldest turns are forgotten where the prompt would not fit into `room` tokens.
    pub fn ask(&mut self, tokenizer: &Tokenizer, line: &str, room: usize) -> Result<Asked, Failure> {
        self.messages.push(Message::user(line));
        let mut forgotten = 0;
        let prompt = loop {
            let encoded = self.template.encode_prompt(tokenizer, &self.messages, Thinking::Default);
            let prompt = encoded.inspect_err(|_| {
                self.messages.pop();
            })?;
            // a question and its answer go together
            if prompt.len() <= room || self.messages.len() < 3 {
                break prompt;
            }
            self.messages.drain(..2);
            forgotten += 2;
        };
        if forgotten > 0 {
            output::note(&format!("(the context is full: the oldest {forgotten} turns are forgotten)"));
        }
        let tail = tokenizer.decode(&prompt[prompt.len().saturating_sub(16)..], false);
        Ok(Asked { prompt, is_thinking: tail.trim_end().ends_with("<think>") })
    }

    /// Adds the turn of the model.
    pub fn answered(&mut self, text: &str, is_thinking: bool) {
        let message = if is_thinking {
            // a thought that was cut off is all that there is
            let (thought, answer) = text.split_once("</think>").unwrap_or((text, ""));
            Message::assistant(Some(thought.trim_matches('\n')), answer.trim_start_matches('\n'))
        } else {
            Message::assistant(None, text)
        };
        self.messages.push(message);
    }
}
