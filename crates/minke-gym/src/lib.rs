//! Tasks that can be checked: where a reward for the outcome comes from.
//!
//! A [`Family`] makes problems of one kind, from a seed, at difficulty levels, and checks answers by doing the
//! arithmetic or running the rules. A problem is its **key**: a canonical text from which it can be checked and by
//! which it falls to training or to the held-out split, so the two share no problem whatever the seeds. What a person
//! reads, the prompt, is drawn around the key.
//!
//! The way of a reward:
//!
//! ```text
//! Suite -> Task { prompt, check } -> a model's text -> answer::split -> Task::verify -> Verdict
//! ```
//!
//! A family may also show its work, in three degrees of [`Care`]: that is the text that small models are pretrained
//! on. Every line of it is right; what differs is how much each line does at once.

#![expect(
    clippy::format_push_string,
    reason = "prompts and thoughts are short, and format! reads better than write! and its result"
)]

pub mod answer;
mod draw;
mod families;
mod family;
pub mod number;
mod suite;
pub mod tasks;
pub mod verifier;

pub use draw::Draw;
pub use families::{families, family};
pub use family::{Care, Family, Problem, Split, Work, problem};
pub use suite::{CORE, CORE_LEVELS, Check, Loaded, Part, Suite, SuiteError, Task, Verdict};
