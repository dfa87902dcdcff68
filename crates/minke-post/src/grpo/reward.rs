//! What an answer is worth: the outcome, and a little for its form.

use minke_gym::answer::{END_THINK, THINK};
use minke_gym::{Task, Verdict};
use serde::Serialize;

use crate::eval::{Form, Prompter};

/// What is rewarded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Reward {
    /// For a right answer.
    pub right: f64,
    /// For an answer in the right form, right or wrong: a thought that was closed, an answer behind it, and an end.
    pub format: f64,
    /// Tokens before the longest answer from which on length costs, rising to `overlong` (DAPO's soft punishment).
    pub overlong_buffer: usize,
    /// What the longest answer costs.
    pub overlong: f64,
}

/// A graded answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Grade {
    /// What it is worth; none when the verifier could not say.
    pub reward: Option<f64>,
    /// Whether it is right.
    pub right: bool,
    /// Whether there is an answer at all.
    pub answered: bool,
    /// Whether its form is right.
    pub formed: bool,
    /// What the verifier said.
    pub verdict: Verdict,
}

impl Reward {
    /// Grades a text of `tokens` tokens; `ended` says that the model ended it by itself, `longest` is the most tokens
    /// that it may have.
    pub fn grade(
        &self,
        task: &Task,
        text: &str,
        prompter: &Prompter,
        ended: bool,
        tokens: usize,
        longest: usize,
    ) -> Grade {
        let parts = prompter.split(text);
        let verdict = match parts.answer {
            // an answer that was cut off may be the beginning of another one
            Some(answer) if ended => task.verify(answer),
            _ => Verdict::Wrong,
        };
        let right = verdict == Verdict::Right;
        let tag = |tag: &str| text.matches(tag).count();
        let opens = usize::from(prompter.opens());
        // one thought, opened once and closed once
        let tags = match prompter.form() {
            Form::Chat { .. } => opens + tag(THINK) == tag(END_THINK) && tag(END_THINK) <= 1,
            Form::Plain | Form::Worked { .. } => true,
        };
        let formed = ended && parts.answer.is_some() && tags;
        let over = (tokens + self.overlong_buffer).saturating_sub(longest);
        let late = if self.overlong_buffer == 0 { 0.0 } else { over as f64 / self.overlong_buffer as f64 };
        let worth = self.right * f64::from(u8::from(right)) + self.format * f64::from(u8::from(formed))
            - self.overlong * late.min(1.0);
        let reward = (!matches!(verdict, Verdict::Error(_))).then_some(worth);
        Grade { reward, right, answered: parts.answer.is_some(), formed, verdict }
    }
}

#[cfg(test)]
mod tests {
    use minke_data::Tokenizer;
    use minke_data::template::{ChatTemplate, Thinking};
    use minke_data::tokenizer::TrainOptions;
    use minke_gym::{Split, family, problem};

    use super::*;

    #[test]
    fn outcome_form_and_length_add_up() {
        let tokenizer = Tokenizer::train(
            &["one two three".to_owned()],
            &TrainOptions { vocab_size: 280, ..TrainOptions::default() },
        )
        .unwrap();
        let template = ChatTemplate::named("minke").unwrap();
        let prompter = Prompter::of(Some(&template), Thinking::Default, tokenizer.bos(), &tokenizer).unwrap();
        assert!(prompter.opens());
        let task = Task::of(problem(family("chain").unwrap(), 1, Split::Train, 1, 1));
        let right = task.reference().unwrap();
        let reward = Reward { right: 1.0, format: 0.1, overlong_buffer: 10, overlong: 0.5 };
        let grade = |text: &str, ended, tokens| {
            (100.0 * reward.grade(&task, text, &prompter, ended, tokens, 100).reward.unwrap()).round()
        };
        assert_eq!(grade(&format!("1+1</think>{right}"), true, 50), 110.0);
        assert_eq!(grade(&format!("1+1</think>{right}"), true, 95), 85.0);
        assert_eq!(grade(&format!("</think></think>{right}"), true, 9), 100.0);
        assert_eq!(grade("</think>no", true, 9), 10.0);
        assert_eq!(grade("1+1", false, 100), -50.0);
        assert_eq!(grade(&format!("</think>{right}"), false, 90), 0.0);
    }
}
