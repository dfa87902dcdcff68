//! Division with remainder: `517/4` is `129 r 1`.

use super::shared::{is_whole, read, with_digits};
use crate::{Care, Draw, Family, Work};

/// See the module.
pub struct Division;

/// What may stand between quotient and remainder.
const BETWEEN: [&str; 10] = ["remainder", "Remainder", "rem", "r", "R", "余数", "余", "……", "...", ","];
/// No answer is longer, in bytes.
const MOST_BYTES: usize = 100;

/// Reads `A/B`.
fn parts(key: &str) -> (i64, i64) {
    let (a, b) = key.split_once('/').expect("a key of this family");
    (read(a), read(b))
}

/// The lines of `a / b` from the left, one digit each: `37: 4*9=36 r1`. The digits after `*` are the quotient.
pub fn lines(a: i64, b: i64) -> String {
    let (mut rest, mut lines) = (0, String::new());
    for digit in a.to_string().bytes() {
        let part = rest * 10 + i64::from(digit - b'0');
        let times = part / b;
        rest = part % b;
        lines += &format!("{part}: {b}*{times}={} r{rest}\n", b * times);
    }
    lines
}

/// The same, two digits a line: `307/4=76 r3`.
fn brief_lines(a: i64, b: i64) -> String {
    let (mut rest, mut lines) = (0, String::new());
    let digits = a.to_string();
    for (index, pair) in digits.as_bytes().chunks(2).enumerate() {
        let part = pair.iter().fold(rest, |value, digit| value * 10 + i64::from(digit - b'0'));
        rest = part % b;
        // digits of a quotient have their place: all but the first are filled up with zeros
        let width = if index == 0 { 1 } else { pair.len() };
        lines += &format!("{part}/{b}={:0width$} r{rest}\n", part / b);
    }
    lines
}

impl Family for Division {
    fn name(&self) -> &'static str {
        "division"
    }

    fn about(&self) -> &'static str {
        "divide with remainder, from two digits by one to five by two"
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let (above, below) = match level {
            1..=3 => (level + 1, 1),
            _ => (level, 2),
        };
        let a = with_digits(above, draw);
        let b = if below == 1 { draw.between(2, 9) } else { draw.between(11, 99) };
        format!("{a}/{b}")
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let (a, b) = parts(key);
        match draw.below(3) {
            0 => format!("{a}/{b}=? As: q r R"),
            1 => format!("Divide {a} by {b} (quotient r remainder)."),
            _ => format!("What is {a}/{b}, as `q r R`?"),
        }
    }

    fn answer(&self, key: &str) -> String {
        let (a, b) = parts(key);
        format!("{} r {}", a / b, a % b)
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let (a, b) = parts(key);
        let (quotient, remainder) = (a / b, a % b);
        let text = answer.trim();
        if text.len() > MOST_BYTES {
            return false;
        }
        (remainder == 0 && is_whole(text, quotient))
            || BETWEEN.iter().any(|between| {
                text.rsplit_once(between).is_some_and(|(left, right)| {
                    is_whole(left.trim().trim_end_matches(','), quotient) && is_whole(right, remainder)
                })
            })
    }

    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let (a, b) = parts(key);
        let thought = match care {
            Care::Full => lines(a, b),
            Care::Brief => brief_lines(a, b),
            Care::None => String::new(),
        };
        Some(Work { thought: thought.trim_end().to_owned(), answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thought(key: &str, care: Care) -> String {
        Division.work(key, care, &mut Draw::new(0, 0)).unwrap().thought
    }

    #[test]
    fn worked_by_hand() {
        assert_eq!(Division.answer("517/4"), "129 r 1");
        assert_eq!(thought("517/4", Care::Full), "5: 4*1=4 r1\n11: 4*2=8 r3\n37: 4*9=36 r1");
        assert_eq!(thought("5101/25", Care::Brief), "51/25=2 r1\n101/25=04 r1");
        assert_eq!(thought("517/4", Care::Brief), "51/4=12 r3\n37/4=9 r1");
    }

    #[test]
    fn equivalent_forms_pass_and_nothing_else() {
        for good in [
            "129 r 1",
            "129 r1",
            "129r1",
            "129 R 1",
            "129 remainder 1",
            "129, remainder 1",
            "129, 1",
            "129,1",
            "129 rem 1.",
            "129……1",
            "129...1",
            "129 余 1",
        ] {
            assert!(Division.verify("517/4", good), "{good:?}");
        }
        for bad in [
            "129",
            "1 r 129",
            "128 r 5",
            "129.25",
            "129 1/4",
            "517/4",
            "129 r",
            "r 1",
            "129 r 1 r 1",
            "129 1",
        ] {
            assert!(!Division.verify("517/4", bad), "{bad:?}");
        }
        assert!(!Division.verify("516/4", "516/4") && !Division.verify("516/4", "516/4 r 0"));
        assert!(Division.verify("516/4", "129") && Division.verify("516/4", "129 r 0"));
        assert!(Division.verify("4938/4", "1,234 r 2") && Division.verify("4938/4", "1,234, 2"));
        assert!(!Division.verify("517/4", &"r".repeat(1 << 20)));
    }

    #[test]
    fn lines_spell_the_quotient() {
        for index in 0..200 {
            let key = Division.key(1 + (index % 5) as u32, &mut Draw::new(4, index));
            for (care, before) in [(Care::Full, '*'), (Care::Brief, '=')] {
                let thought = thought(&key, care);
                let digits: String = thought
                    .lines()
                    .map(|line| line[line.find(before).unwrap() + 1..].split(['=', ' ']).next().unwrap())
                    .collect();
                let rest = thought.rsplit('r').next().unwrap();
                assert!(Division.verify(&key, &format!("{digits} r {rest}")), "{key}: {thought}");
            }
        }
    }
}
