//! Which of a teacher's answers become lessons.

use std::collections::HashSet;

use minke_gym::Task;
use minke_gym::answer::{END_THINK, Parts, THINK};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::recipe::{Keep, Which};
use crate::eval::{Answer, Grade};

/// One lesson: a question, a thought and an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lesson {
    /// The question.
    pub prompt: String,
    /// The thought; `None` where the model does not think.
    pub thought: Option<String>,
    /// All that was said after it.
    pub content: String,
}

impl Lesson {
    /// What an answer teaches, its question not yet filled in; `None` when nothing is said, or a tag of thinking stands
    /// where none belongs.
    ///
    /// A chat keeps all that was said after the thought (`whole`), other forms the answer alone.
    pub fn of(parts: &Parts<'_>, text: &str, whole: bool) -> Option<Self> {
        let answer = parts.answer?;
        let content = if whole { text.rsplit(END_THINK).next().unwrap_or(text).trim() } else { answer };
        let thought = parts.thought.map(|thought| thought.trim().to_owned());
        let tagged = |text: &str| text.contains(THINK) || text.contains(END_THINK);
        if tagged(content) || thought.as_deref().is_some_and(tagged) {
            return None;
        }
        Some(Self { prompt: String::new(), thought, content: content.to_owned() })
    }

    /// A line of `answers.jsonl`, without what ends it.
    pub fn line(&self) -> String {
        let mut assistant = json!({ "role": "assistant", "content": self.content });
        if let Some(thought) = &self.thought {
            assistant["reasoning_content"] = json!(thought);
        }
        json!({ "messages": [{ "role": "user", "content": self.prompt }, assistant] }).to_string()
    }
}

/// How many of what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Tasks.
    pub tasks: usize,
    /// Answers to them.
    pub samples: usize,
    /// Answers that are right.
    pub right: usize,
    /// Samples without an answer.
    pub no_answer: usize,
    /// Samples whose prompt did not fit into the context.
    pub too_long: usize,
    /// Samples that a verifier could not judge.
    pub verifier_errors: usize,
    /// Tasks with at least one right answer.
    pub solved: usize,
    /// Right answers that are no lessons, such as with a thought that was closed twice.
    pub malformed: usize,
    /// Right answers that another one of the same task equals to the letter.
    pub duplicates: usize,
    /// Lessons.
    pub kept: usize,
}

impl Counts {
    /// Rows for people.
    pub fn facts(&self) -> Vec<(String, String)> {
        let Self { tasks, samples, right, no_answer, too_long, verifier_errors, solved, .. } = *self;
        let Self { malformed, duplicates, kept, .. } = *self;
        let share = |part: usize, of: usize| {
            if of == 0 {
                part.to_string()
            } else {
                format!("{part} ({:.1} %)", 100.0 * part as f64 / of as f64)
            }
        };
        let mut rows = vec![
            ("tasks", tasks.to_string()),
            ("samples", samples.to_string()),
            ("right", share(right, samples)),
            ("tasks solved", share(solved, tasks)),
            ("duplicates", duplicates.to_string()),
            ("kept", kept.to_string()),
        ];
        for (name, number) in [
            ("without an answer", no_answer),
            ("too long", too_long),
            ("verifier errors", verifier_errors),
            ("malformed", malformed),
        ] {
            if number > 0 {
                rows.push((name, share(number, samples)));
            }
        }
        rows.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Chooses lessons among answers, task by task in the order of the tasks, each with its task's place.
///
/// `lesson` takes an answer apart. Equal lessons of a task count once, and which are kept is decided after that.
pub fn choose(
    tasks: &[Task],
    answers: &[Answer],
    keep: Keep,
    lesson: impl Fn(&Answer) -> Option<Lesson>,
) -> (Vec<(usize, Lesson)>, Counts) {
    let mut counts = Counts { tasks: tasks.len(), samples: answers.len(), ..Counts::default() };
    for answer in answers {
        match answer.grade {
            Grade::Right => counts.right += 1,
            Grade::Wrong => {}
            Grade::NoAnswer => counts.no_answer += 1,
            Grade::TooLong => counts.too_long += 1,
            Grade::Error(_) => counts.verifier_errors += 1,
        }
    }
    let mut by_task: std::collections::HashMap<&str, Vec<&Answer>> = std::collections::HashMap::new();
    for answer in answers.iter().filter(|answer| answer.grade == Grade::Right) {
        by_task.entry(&answer.task).or_default().push(answer);
    }
    let mut lessons = Vec::new();
    for (place, task) in tasks.iter().enumerate() {
        let Some(mut right) = by_task.remove(&task.id[..]) else { continue };
        counts.solved += 1;
        right.sort_by_key(|answer| answer.sample);
        let mut seen = HashSet::new();
        let mut different = Vec::new();
        for answer in right {
            let Some(lesson) = lesson(answer) else {
                counts.malformed += 1;
                continue;
            };
            if seen.insert((lesson.thought.clone(), lesson.content.clone())) {
                different.push((answer.tokens, Lesson { prompt: task.prompt.clone(), ..lesson }));
            } else {
                counts.duplicates += 1;
            }
        }
        match keep.which {
            // stable: of equally short ones the first
            Which::Shortest => different.sort_by_key(|(tokens, _)| *tokens),
            Which::First | Which::All => {}
        }
        lessons.extend(different.into_iter().take(keep.per_task).map(|(_, lesson)| (place, lesson)));
    }
    counts.kept = lessons.len();
    (lessons, counts)
}
