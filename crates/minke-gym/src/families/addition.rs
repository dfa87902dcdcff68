//! Long addition and subtraction: `457+385`, `812-47`.

use super::shared::{is_whole, read, sorted, with_digits};
use crate::{Care, Draw, Family, Work};

/// See the module.
pub struct Addition;

/// Digits that one line of brief work does at once.
const BRIEF_DIGITS: u32 = 3;

/// Reads `A+B` or `A-B`.
fn parts(key: &str) -> (i64, char, i64) {
    let at = key.find(['+', '-']).expect("a key of this family");
    (read(&key[..at]), key.as_bytes()[at] as char, read(&key[at + 1..]))
}

fn result((a, op, b): (i64, char, i64)) -> i64 {
    if op == '+' { a + b } else { a - b }
}

/// The lines of `a + b` from the right, `digits` at a time: `7+5+0=12` (write 2, carry 1 to the next line's third
/// summand; the last line writes all that it has).
pub fn sum_lines(mut a: i64, mut b: i64, digits: u32) -> String {
    let base = 10_i64.pow(digits);
    let (mut carry, mut lines) = (0, String::new());
    while a > 0 || b > 0 {
        let (x, y) = (a % base, b % base);
        let sum = x + y + carry;
        let written = written(sum, a >= base || b >= base, digits);
        lines += &format!("{x}+{y}+{carry}={written}\n");
        (a, b, carry) = (a / base, b / base, sum / base);
    }
    lines
}

/// The lines of `a - b` for `a >= b` from the right: `12-5-1=6` (ten borrowed, so the next line takes one more away).
fn difference_lines(mut a: i64, mut b: i64, digits: u32) -> String {
    let base = 10_i64.pow(digits);
    let (mut borrow, mut lines) = (0, String::new());
    while a > 0 || b > 0 {
        let (x, y) = (a % base, b % base);
        let borrows = x < y + borrow;
        let x = x + if borrows { base } else { 0 };
        let written = written(x - y - borrow, a >= base, digits);
        lines += &format!("{x}-{y}-{borrow}={written}\n");
        (a, b, borrow) = (a / base, b / base, i64::from(borrows));
    }
    lines
}

/// A line's result, with all its digits where others stand before them.
fn written(value: i64, more: bool, digits: u32) -> String {
    if more { format!("{value:0width$}", width = digits as usize) } else { value.to_string() }
}

impl Family for Addition {
    fn name(&self) -> &'static str {
        "addition"
    }

    fn about(&self) -> &'static str {
        "add or subtract two whole numbers of level + 1 digits"
    }

    fn levels(&self) -> u32 {
        8
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let a = with_digits(level + 1, draw);
        let shorter = u32::from(draw.chance(0.25));
        let b = with_digits(level + 1 - shorter, draw);
        if draw.chance(0.5) {
            let (a, b) = sorted(a, b);
            format!("{a}+{b}")
        } else {
            format!("{}-{}", a.max(b), a.min(b))
        }
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let (a, op, b) = parts(key);
        match draw.below(3) {
            0 => format!("{a}{op}{b}=?"),
            1 => format!("What is {a}{op}{b}?"),
            _ => format!("Compute {a} {op} {b}."),
        }
    }

    fn answer(&self, key: &str) -> String {
        result(parts(key)).to_string()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        is_whole(answer, result(parts(key)))
    }

    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let (a, op, b) = parts(key);
        let lines = |digits| if op == '+' { sum_lines(a, b, digits) } else { difference_lines(a, b, digits) };
        let thought = match care {
            Care::Full => lines(1),
            Care::Brief => lines(BRIEF_DIGITS),
            Care::None => String::new(),
        };
        Some(Work { thought: thought.trim_end().to_owned(), answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thought(key: &str, care: Care) -> String {
        Addition.work(key, care, &mut Draw::new(0, 0)).unwrap().thought
    }

    #[test]
    fn worked_by_hand() {
        assert_eq!(Addition.answer("457+385"), "842");
        assert_eq!(thought("457+385", Care::Full), "7+5+0=12\n5+8+1=14\n4+3+1=8");
        assert_eq!(thought("95+7", Care::Full), "5+7+0=12\n9+0+1=10");
        assert_eq!(thought("5001+999", Care::Brief), "1+999+0=1000\n5+0+1=6");
        assert_eq!(Addition.answer("103-98"), "5");
        assert_eq!(thought("103-98", Care::Full), "13-8-0=5\n10-9-1=0\n1-0-1=0");
        assert_eq!(thought("12005-998", Care::Brief), "1005-998-0=007\n12-0-1=11");
    }

    #[test]
    fn equal_numbers_pass_and_nothing_else() {
        for good in ["842", " 842 ", "842.", "842.0", "+842", "0842"] {
            assert!(Addition.verify("457+385", good), "{good:?}");
        }
        for bad in ["-842", "248", "84", "8420", "842 843", "457+385", "842?", "1684/2", "８４２", "8e2"] {
            assert!(!Addition.verify("457+385", bad), "{bad:?}");
        }
        assert!(!Addition.verify("457+385", &"9".repeat(1 << 20)));
        assert!(Addition.verify("99999999-99999999", "0"));
    }

    #[test]
    fn what_lines_write_is_the_result() {
        for index in 0..400 {
            let draw = &mut Draw::new(9, index);
            let key = Addition.key(1 + (index % 8) as u32, draw);
            for care in [Care::Full, Care::Brief] {
                let digits = if care == Care::Full { 1 } else { BRIEF_DIGITS as usize };
                let lines = thought(&key, care);
                let count = lines.lines().count();
                let written: Vec<String> = lines
                    .lines()
                    .enumerate()
                    .map(|(at, line)| {
                        let result = line.split('=').next_back().unwrap();
                        // all but the last digits are carried on, but for the last line
                        let from = if at + 1 < count { result.len().saturating_sub(digits) } else { 0 };
                        result[from..].to_owned()
                    })
                    .collect();
                let joined: String = written.into_iter().rev().collect();
                assert!(Addition.verify(&key, &joined), "{key}: {joined}");
            }
        }
    }
}
