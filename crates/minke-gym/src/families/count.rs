//! How often a letter is in a string: `a` in `banana` is 3.

use super::words;
use crate::{Care, Draw, Family, Work, number};

/// See the module. A key is `LETTER STRING`.
pub struct Count;

/// Letters of the string at each level.
const LENGTHS: [usize; 8] = [3, 4, 5, 6, 8, 10, 13, 16];
/// Letters at once with little care.
const AT_ONCE: usize = 4;

/// A key, read: the letter and the string.
fn read(key: &str) -> (char, &str) {
    let (letter, string) = key.split_once(' ').expect("a key of this family");
    (letter.chars().next().expect("a key of this family"), string)
}

fn count(letter: char, string: &str) -> i64 {
    string.chars().filter(|&c| c == letter).count() as i64
}

impl Family for Count {
    fn name(&self) -> &'static str {
        "count"
    }

    fn about(&self) -> &'static str {
        "count a letter in a word or string"
    }

    fn levels(&self) -> u32 {
        LENGTHS.len() as u32
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let len = LENGTHS[level as usize - 1];
        let string = words::letters(len, 2 + len / 4, 0.2, draw);
        let letter = draw.pick(string.as_bytes());
        // one letter in ten is not likely to be there
        let letter = if draw.chance(0.1) { b'a' + draw.below(26) as u8 } else { *letter };
        format!("{} {string}", char::from(letter))
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let (letter, string) = read(key);
        match draw.below(3) {
            0 => format!("How many {letter} are in {string}?"),
            1 => format!("Count the letter {letter} in {string}"),
            _ => format!("How often does {letter} occur in {string}?"),
        }
    }

    fn answer(&self, key: &str) -> String {
        let (letter, string) = read(key);
        count(letter, string).to_string()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let (letter, string) = read(key);
        let answer = answer.trim().trim_end_matches('.');
        let answer = answer.strip_suffix(" times").or_else(|| answer.strip_suffix(" time")).unwrap_or(answer);
        number::is(answer, count(letter, string))
    }

    /// With care each letter is followed by the count so far; without, each four are.
    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let (letter, string) = read(key);
        let at_once = match care {
            Care::Full => 1,
            Care::Brief => AT_ONCE,
            Care::None => return Some(Work { thought: String::new(), answer: self.answer(key) }),
        };
        let letters: Vec<char> = string.chars().collect();
        let mut so_far = 0;
        let step = |part: &[char]| {
            let part: String = part.iter().collect();
            so_far += count(letter, &part);
            // one letter beside the one that is sought, or a few at once without it
            let sought = if at_once == 1 { letter.to_string() } else { " ".to_owned() };
            format!("{part}{sought}{so_far}")
        };
        let steps: Vec<String> = letters.chunks(at_once).map(step).collect();
        Some(Work { thought: steps.join(" "), answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_numbers() {
        for answer in ["3", "3 times", "03", "3.0", "6/2", "3."] {
            assert!(Count.verify("a banana", answer), "{answer}");
        }
        for answer in ["2", "33", "three thousand", "a", "3 a", "times", " times", "-3", "aaa"] {
            assert!(!Count.verify("a banana", answer), "{answer}");
        }
        assert_eq!(Count.answer("x banana"), "0");
        assert!(!Count.verify("a banana", &"3".repeat(100_000)));
    }

    #[test]
    fn thoughts_are_as_written_here() {
        let thought = |care| Count.work("a banana", care, &mut Draw::new(0, 0)).unwrap().thought;
        assert_eq!(thought(Care::Full), "ba0 aa1 na1 aa2 na2 aa3");
        assert_eq!(thought(Care::Brief), "bana 2 na 3");
    }
}
