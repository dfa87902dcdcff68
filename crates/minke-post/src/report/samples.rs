//! Answers of a model as it learns: from before, from the middle and from after.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use minke_train::report::{cell, longest_run};

use crate::metrics::Sample;

/// Prompts that a report shows.
const MOST_PROMPTS: usize = 3;
/// Characters of an answer that a report shows.
const MOST_CHARS: usize = 1500;

/// A sample, and when it was written.
pub(crate) struct Shown<'a> {
    /// For people.
    pub when: String,
    /// The sample.
    pub sample: &'a Sample,
}

/// Writes samples of the prompts that come up most often: the first, the middle one and the last answer to each.
pub(crate) fn write(text: &mut String, samples: &[Shown<'_>]) -> std::fmt::Result {
    if samples.is_empty() {
        return Ok(());
    }
    let mut by_prompt: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, shown) in samples.iter().enumerate() {
        by_prompt.entry(&shown.sample.prompt).or_default().push(index);
    }
    let mut prompts: Vec<(&str, Vec<usize>)> = by_prompt.into_iter().collect();
    // the most answers first, then the order in which they were asked
    prompts.sort_by_key(|(_, places)| (std::cmp::Reverse(places.len()), places[0]));
    writeln!(text, "## Answers before, halfway and after\n")?;
    for (prompt, places) in prompts.iter().take(MOST_PROMPTS) {
        writeln!(text, "{}\n", fenced(prompt))?;
        let mut picked = vec![places[0], places[places.len() / 2], places[places.len() - 1]];
        picked.dedup();
        for place in picked {
            let Shown { when, sample } = &samples[place];
            let verdict = if sample.verdict.is_empty() {
                String::new()
            } else {
                format!(" ({})", cell(&sample.verdict))
            };
            writeln!(text, "{when}{verdict}:\n\n{}\n", fenced(&sample.text))?;
        }
    }
    Ok(())
}

/// Text of a model as a block that it cannot end.
fn fenced(text: &str) -> String {
    let mut shown: String = text.trim_end().chars().take(MOST_CHARS).collect();
    if shown.len() < text.trim_end().len() {
        shown.push_str(" [...]");
    }
    let fence = "`".repeat(longest_run(&shown, '`').max(2) + 1);
    format!("{fence}text\n{shown}\n{fence}")
}
