//! Numbers from one base to another: `2 101101 10`.

use super::shared::read;
use crate::{Care, Draw, Family, Work};

/// See the module.
pub struct Base;

/// No answer is longer, in bytes.
const MOST_BYTES: usize = 64;

/// A key, read: `FROM DIGITS TO`.
struct Task<'k> {
    from: i64,
    digits: &'k str,
    to: i64,
    value: i64,
}

impl<'k> Task<'k> {
    fn read(key: &'k str) -> Self {
        let words: Vec<&str> = key.split(' ').collect();
        let (from, digits, to) = (read(words[0]), words[1], read(words[2]));
        let value = i64::from_str_radix(digits, from as u32).expect("a key of this family");
        Self { from, digits, to, value }
    }
}

/// A number's digits in a base up to 16, small letters above 9.
fn digits_of(mut value: i64, base: i64) -> String {
    let mut digits = Vec::new();
    while value > 0 || digits.is_empty() {
        digits.push(digit(value % base));
        value /= base;
    }
    digits.into_iter().rev().collect()
}

fn digit(value: i64) -> char {
    char::from_digit(value as u32, 16).expect("a digit is less than its base")
}

/// Horner's rule from the left, `group` digits a line: `5*2+1=11`.
fn to_ten(task: &Task<'_>, group: usize) -> String {
    let values: Vec<i64> =
        task.digits.chars().map(|c| i64::from(c.to_digit(16).expect("a key of this family"))).collect();
    let (mut value, mut lines) = (values[0], String::new());
    for digits in values[1..].chunks(group) {
        let mut line = value.to_string();
        for (index, digit) in digits.iter().enumerate() {
            line = if index == 0 { line } else { format!("({line})") };
            line += &format!("*{}+{digit}", task.from);
            value = value * task.from + digit;
        }
        lines += &format!("{line}={value}\n");
    }
    lines
}

/// Division by the base until nothing is left, `group` digits a line: `37/2=18 r1`. Read from below, the remainders
/// are the digits.
fn from_ten(task: &Task<'_>, group: usize) -> String {
    let (mut value, mut lines) = (task.value, String::new());
    while value > 0 {
        let (mut line, mut rest) = (value.to_string(), String::new());
        for _ in 0..group {
            if value > 0 {
                line += &format!("/{}", task.to);
                rest += &format!(" r{}", value % task.to);
                if value % task.to > 9 {
                    rest += &format!("={}", digit(value % task.to));
                }
                value /= task.to;
            }
        }
        lines += &format!("{line}={value}{rest}\n");
    }
    lines
}

impl Family for Base {
    fn name(&self) -> &'static str {
        "base"
    }

    fn about(&self) -> &'static str {
        "write a number in another base, from 2 to 16"
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let (least, most) = match level {
            1 => (8, 127),
            2 => (20, 255),
            3 => (100, 999),
            4 => (100, 4095),
            _ => (4096, 65535),
        };
        let value = draw.between(least, most);
        let base = match level {
            1 => 2,
            2 => draw.between(2, 9),
            _ => *draw.pick(&[2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16]),
        };
        let other = if level < 4 { 10 } else { (base - 1 + draw.between(1, 14) - 1) % 15 + 2 };
        let (from, to) = if draw.chance(0.5) { (base, other) } else { (other, base) };
        format!("{from} {} {to}", digits_of(value, from))
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let Task { from, digits, to, .. } = Task::read(key);
        match draw.below(3) {
            0 => format!("{digits} base {from} = ? base {to}"),
            1 => format!("Write {digits} (base {from}) in base {to}."),
            _ => format!("Convert {digits} from base {from} to base {to}."),
        }
    }

    fn answer(&self, key: &str) -> String {
        let task = Task::read(key);
        digits_of(task.value, task.to)
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let task = Task::read(key);
        let text = answer.trim().trim_end_matches(['.', '。']);
        if text.len() > MOST_BYTES {
            return false;
        }
        let suffix = format!("base {}", task.to);
        let text = match text.trim_end_matches(')').strip_suffix(&suffix) {
            Some(rest) => rest.trim_end().trim_end_matches(['(', ',']).trim_end(),
            None => text.strip_suffix(&format!("_{}", task.to)).unwrap_or(text),
        };
        let prefix = match task.to {
            2 => "0b",
            8 => "0o",
            16 => "0x",
            _ => "",
        };
        // the standard reader takes a sign
        let is = |digits: &str| {
            digits.bytes().all(|b| b.is_ascii_alphanumeric())
                && i64::from_str_radix(digits, task.to as u32) == Ok(task.value)
        };
        is(text) || (!prefix.is_empty() && text.strip_prefix(prefix).is_some_and(is))
    }

    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let task = Task::read(key);
        let group = if care == Care::Full { 1 } else { 2 };
        let mut thought = String::new();
        if care != Care::None && task.from != 10 {
            thought += &to_ten(&task, group);
        }
        if care != Care::None && task.to != 10 {
            thought += &from_ten(&task, group);
        }
        Some(Work { thought: thought.trim_end().to_owned(), answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thought(key: &str, care: Care) -> String {
        Base.work(key, care, &mut Draw::new(0, 0)).unwrap().thought
    }

    #[test]
    fn worked_by_hand() {
        assert_eq!(Base.answer("10 37 2"), "100101");
        assert_eq!(Base.answer("16 ff 8"), "377");
        assert_eq!(thought("2 1011 10", Care::Full), "1*2+0=2\n2*2+1=5\n5*2+1=11");
        assert_eq!(thought("2 1011 10", Care::Brief), "(1*2+0)*2+1=5\n5*2+1=11");
        assert_eq!(thought("10 44 16", Care::Full), "44/16=2 r12=c\n2/16=0 r2");
        assert_eq!(thought("10 9 2", Care::Brief), "9/2/2=2 r1 r0\n2/2/2=0 r0 r1");
        assert_eq!(thought("16 1f 2", Care::Full).lines().next(), Some("1*16+15=31"));
    }

    #[test]
    fn equal_forms_pass_and_nothing_else() {
        for good in ["ff", "FF", "0xff", "00ff", "ff.", "ff_16", "ff (base 16)", "ff base 16"] {
            assert!(Base.verify("10 255 16", good), "{good:?}");
        }
        for bad in
            ["255", "0bff", "-ff", "+ff", "f f", "ff_10", "ff base 10", "0x", "fff", "0x0xff", "", "base 16"]
        {
            assert!(!Base.verify("10 255 16", bad), "{bad:?}");
        }
        assert!(Base.verify("10 5 2", "0b101") && !Base.verify("10 5 2", "5"));
        assert!(!Base.verify("10 5 2", &"1".repeat(1 << 20)));
    }

    #[test]
    fn bases_differ_and_numbers_come_back() {
        for index in 0..500 {
            let key = Base.key(1 + (index % 5) as u32, &mut Draw::new(3, index));
            let task = Task::read(&key);
            assert_ne!(task.from, task.to, "{key}");
            assert!((2..=16).contains(&task.to) && (2..=16).contains(&task.from), "{key}");
            assert_eq!(i64::from_str_radix(&Base.answer(&key), task.to as u32), Ok(task.value));
        }
    }
}
