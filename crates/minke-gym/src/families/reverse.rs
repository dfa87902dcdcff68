//! Strings backwards: `kqza` is `azqk`.

use super::words;
use crate::{Care, Draw, Family, Work};

/// See the module. A key is the string.
pub struct Reverse;

/// Letters at each level.
const LENGTHS: [usize; 8] = [4, 6, 8, 10, 12, 15, 18, 22];
/// Letters at once with little care.
const AT_ONCE: usize = 3;

impl Family for Reverse {
    fn name(&self) -> &'static str {
        "reverse"
    }

    fn about(&self) -> &'static str {
        "write a string of letters backwards"
    }

    fn levels(&self) -> u32 {
        LENGTHS.len() as u32
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        words::letters(LENGTHS[level as usize - 1], 26, 0.1, draw)
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        match draw.below(3) {
            0 => format!("Reverse {key}"),
            1 => format!("Write {key} backwards."),
            _ => format!("What is {key} from back to front?"),
        }
    }

    fn answer(&self, key: &str) -> String {
        key.chars().rev().collect()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        words::joined(answer).is_some_and(|letters| letters == self.answer(key))
    }

    /// With care the letters are numbered, then read from the last number to the first; without, each three letters
    /// are turned at once.
    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let letters: Vec<char> = key.chars().collect();
        let thought = match care {
            Care::Full => {
                let numbered: Vec<String> =
                    letters.iter().enumerate().map(|(at, letter)| format!("{}{letter}", at + 1)).collect();
                let back: Vec<&str> = numbered.iter().rev().map(String::as_str).collect();
                format!("{}\n{}", numbered.join(" "), back.join(" "))
            }
            Care::Brief => {
                let turned = |part: &[char]| {
                    let (there, back): (String, String) =
                        (part.iter().collect(), part.iter().rev().collect());
                    format!("{there} {back}")
                };
                letters.chunks(AT_ONCE).map(turned).collect::<Vec<_>>().join("\n")
            }
            Care::None => String::new(),
        };
        Some(Work { thought, answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_count_and_their_dress_does_not() {
        for answer in ["azqk", "AZQK", "a-z-q-k", "a z q k", "\"azqk\"."] {
            assert!(Reverse.verify("kqza", answer), "{answer}");
        }
        for answer in ["kqza", "azqkk", "azq", "az qk!", "azqk is it", "k", "azqк"] {
            assert!(!Reverse.verify("kqza", answer), "{answer}");
        }
        assert!(!Reverse.verify("kqza", &"a".repeat(100_000)));
    }

    #[test]
    fn thoughts_are_as_written_here() {
        let thought = |care| Reverse.work("kqza", care, &mut Draw::new(0, 0)).unwrap().thought;
        assert_eq!(thought(Care::Full), "1k 2q 3z 4a\n4a 3z 2q 1k");
        assert_eq!(thought(Care::Brief), "kqz zqk\na a");
    }
}
