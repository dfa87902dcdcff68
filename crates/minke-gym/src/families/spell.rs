//! The spelling of words: a letter by its place, first and last letters, letters with hyphens.

use super::sort::ordinal;
use super::words::{self, WORDS};
use crate::{Care, Draw, Family, Work};

/// See the module. A key is `nth K STRING`, `dash STRING`, `first WORD...` or `last WORD...`.
pub struct Spell;

/// Letters of the string at each level.
const LENGTHS: [usize; 6] = [3, 4, 5, 6, 8, 10];
/// Words at level 1, for first and last letters; each level adds one.
const FEWEST_WORDS: usize = 3;
/// Letters or words at once with little care.
const AT_ONCE: usize = 3;

/// A key, read.
enum Ask<'k> {
    Nth(usize, &'k str),
    Dash(&'k str),
    First(Vec<&'k str>),
    Last(Vec<&'k str>),
}

impl<'k> Ask<'k> {
    fn read(key: &'k str) -> Self {
        let (kind, rest) = key.split_once(' ').expect("a key of this family");
        match kind {
            "nth" => {
                let (place, string) = rest.split_once(' ').expect("a key of this family");
                Self::Nth(place.parse().expect("a key of this family"), string)
            }
            "dash" => Self::Dash(rest),
            "first" => Self::First(rest.split(' ').collect()),
            _ => Self::Last(rest.split(' ').collect()),
        }
    }

    fn answer(&self) -> String {
        match self {
            Self::Nth(place, string) => string[place - 1..*place].to_owned(),
            Self::Dash(string) => spaced(string, "-"),
            Self::First(words) => words.iter().map(|word| &word[..1]).collect(),
            Self::Last(words) => words.iter().map(|word| &word[word.len() - 1..]).collect(),
        }
    }
}

/// The letters with something between them.
fn spaced(string: &str, between: &str) -> String {
    string.chars().map(String::from).collect::<Vec<_>>().join(between)
}

/// Parts of a text, each after `at_once` letters.
fn parts(string: &str, at_once: usize) -> impl Iterator<Item = String> {
    let letters: Vec<char> = string.chars().collect();
    letters.chunks(at_once).map(|part| part.iter().collect()).collect::<Vec<_>>().into_iter()
}

impl Family for Spell {
    fn name(&self) -> &'static str {
        "spell"
    }

    fn about(&self) -> &'static str {
        "find a letter by its place, take first or last letters, or spell with hyphens"
    }

    fn levels(&self) -> u32 {
        LENGTHS.len() as u32
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let len = LENGTHS[level as usize - 1];
        let kind = draw.below(4);
        if kind < 2 {
            let string = words::letters(len, 26, 0.2, draw);
            return if kind == 0 {
                format!("nth {} {string}", draw.between(1, len as i64))
            } else {
                format!("dash {string}")
            };
        }
        let words: Vec<&str> = (1..FEWEST_WORDS + level as usize).map(|_| *draw.pick(&WORDS)).collect();
        format!("{} {}", if kind == 2 { "first" } else { "last" }, words.join(" "))
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let first = draw.below(2) == 0;
        match Ask::read(key) {
            Ask::Nth(place, string) if first => format!("What is the {} letter of {string}?", ordinal(place)),
            Ask::Nth(place, string) => format!("Give letter {place} of {string}"),
            Ask::Dash(string) if first => format!("Spell {string} with hyphens."),
            Ask::Dash(string) => format!("Put a hyphen between the letters of {string}"),
            Ask::First(words) if first => format!("Join the first letters of: {}", words.join(" ")),
            Ask::First(words) => format!("Which string do the first letters make? {}", words.join(" ")),
            Ask::Last(words) if first => format!("Join the last letters of: {}", words.join(" ")),
            Ask::Last(words) => format!("Which string do the last letters make? {}", words.join(" ")),
        }
    }

    fn answer(&self, key: &str) -> String {
        Ask::read(key).answer()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let ask = Ask::read(key);
        if let Ask::Dash(string) = ask {
            // the hyphens are what was asked for; blanks around them and the case are not
            let answer = answer.trim().trim_end_matches('.');
            return answer.split('-').map(|part| part.trim().to_ascii_lowercase()).eq(parts(string, 1));
        }
        words::joined(answer).is_some_and(|letters| letters == ask.answer())
    }

    /// Letters by place are numbered, first and last letters said behind each word; with little care three at once.
    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let ask = Ask::read(key);
        let answer = ask.answer();
        if care == Care::None {
            return Some(Work { thought: String::new(), answer });
        }
        let at_once = if care == Care::Full { 1 } else { AT_ONCE };
        let thought: Vec<String> = match &ask {
            Ask::Nth(place, string) => parts(string, at_once)
                .enumerate()
                .map(|(at, part)| (at * at_once + part.len(), part))
                .take_while(|(end, part)| end + 1 - part.len() <= *place)
                .map(|(end, part)| format!("{end} {part}"))
                .collect(),
            Ask::Dash(string) => {
                let step = |part: String| format!("{part} {}", spaced(&part, "-"));
                parts(string, at_once).map(step).collect()
            }
            Ask::First(words) | Ask::Last(words) => {
                let pairs = words.chunks(at_once).zip(parts(&answer, at_once));
                pairs.map(|(words, letters)| format!("{} {letters}", words.join(" "))).collect()
            }
        };
        Some(Work { thought: thought.join("\n"), answer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_question_has_its_answer() {
        for (key, right, wrong) in [
            ("nth 2 kqza", ["q", "Q", "\"q\"."], ["k", "kq", "2"]),
            ("dash kqz", ["k-q-z", "K-Q-Z", "k - q - z."], ["kqz", "k-qz", "k q z"]),
            ("first cat owl dog", ["cod", "C-O-D", "c o d"], ["tlg", "cat owl dog", "codd"]),
            ("last cat owl dog", ["tlg", "TLG", "t, l, g"], ["cod", "tl", "tlg1"]),
        ] {
            assert!(right.iter().all(|answer| Spell.verify(key, answer)), "{key}");
            assert!(!wrong.iter().any(|answer| Spell.verify(key, answer)), "{key}");
            assert!(!Spell.verify(key, &"k-".repeat(100_000)), "{key}");
        }
    }

    #[test]
    fn thoughts_are_as_written_here() {
        let thought = |key, care| Spell.work(key, care, &mut Draw::new(0, 0)).unwrap().thought;
        assert_eq!(thought("nth 3 kqzab", Care::Full), "1 k\n2 q\n3 z");
        assert_eq!(thought("nth 4 kqzab", Care::Brief), "3 kqz\n5 ab");
        assert_eq!(thought("nth 3 kqzab", Care::Brief), "3 kqz");
        assert_eq!(thought("dash kqza", Care::Brief), "kqz k-q-z\na a");
        assert_eq!(thought("first cat owl", Care::Full), "cat c\nowl o");
        assert_eq!(thought("last cat owl", Care::Brief), "cat owl tl");
    }
}
