//! From what a model wrote to the answer that is checked.

/// Opens a thought.
pub const THINK: &str = "<think>";
/// Closes it.
pub const END_THINK: &str = "</think>";

/// A model's text, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts<'t> {
    /// What stands between `<think>` and `</think>`, trimmed; the opening one may have been in the prompt.
    pub thought: Option<&'t str>,
    /// What is answered, trimmed; `None` when there is nothing, or a thought was not closed.
    pub answer: Option<&'t str>,
}

/// Takes a text apart; `thinking` says that the prompt ended within an open `<think>`.
///
/// Where the answer has `\boxed{...}`, the last one is the answer; else an `Answer:` before it is left out.
pub fn split(text: &str, thinking: bool) -> Parts<'_> {
    let opened = text.find(THINK);
    let (thought, rest) = match (opened, thinking) {
        (Some(at), _) => (true, &text[at + THINK.len()..]),
        (None, thinking) => (thinking, text),
    };
    let (thought, answer) = match (thought, rest.rfind(END_THINK)) {
        (true, Some(end)) => (Some(rest[..end].trim()), &rest[end + END_THINK.len()..]),
        (true, None) => return Parts { thought: Some(rest.trim()), answer: None },
        (false, _) => (None, rest),
    };
    let answer = extract(answer);
    Parts { thought, answer: (!answer.is_empty()).then_some(answer) }
}

/// The answer proper.
fn extract(text: &str) -> &str {
    if let Some(at) = text.rfind("\\boxed{") {
        let inner = &text[at + "\\boxed{".len()..];
        let mut depth = 1;
        for (end, c) in inner.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return inner[..end].trim();
            }
        }
    }
    let text = text.trim();
    for lead in ["Answer:", "answer:", "The answer is", "the answer is", "答案:", "答案：", "答案是"]
    {
        if let Some(rest) = text.strip_prefix(lead) {
            return rest.trim();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thought_and_answer_are_told_apart() {
        let parts = |thought, answer| Parts { thought, answer };
        assert_eq!(split("<think>\n1+1\n</think>\n2", false), parts(Some("1+1"), Some("2")));
        assert_eq!(split("1+1</think> 2 ", true), parts(Some("1+1"), Some("2")));
        assert_eq!(split("</think>2", true), parts(Some(""), Some("2")));
        assert_eq!(split("1+1 is 2", true), parts(Some("1+1 is 2"), None));
        assert_eq!(split("<think>1+1", false), parts(Some("1+1"), None));
        assert_eq!(split(" 2\n", false), parts(None, Some("2")));
        assert_eq!(split("</think> ", true), parts(Some(""), None));
    }

    #[test]
    fn the_answer_is_found_in_its_sentence() {
        for text in ["7", "Answer: 7", "The answer is 7", "So \\boxed{3}, no, \\boxed{7}", "答案：7"] {
            assert_eq!(split(text, false).answer, Some("7"), "{text}");
        }
        assert_eq!(split("\\boxed{\\frac{1}{2}}", false).answer, Some("\\frac{1}{2}"));
        assert_eq!(split("\\boxed{7", false).answer, Some("\\boxed{7"));
    }
}
