//! Long multiplication: `347*26`.

use super::addition::sum_lines;
use super::shared::{is_whole, read, sorted, with_digits};
use crate::{Care, Draw, Family, Work};

/// See the module.
pub struct Multiplication;

/// Reads `A*B`.
fn parts(key: &str) -> (i64, i64) {
    let (a, b) = key.split_once('*').expect("a key of this family");
    (read(a), read(b))
}

/// The lines of a number times one digit, from the right: `7*6+0=42 w2 c4` (write 2, carry 4).
fn digit_lines(mut number: i64, digit: i64) -> String {
    let (mut carry, mut lines) = (0, String::new());
    while number > 0 {
        let product = number % 10 * digit + carry;
        lines += &format!("{}*{digit}+{carry}={product} w{} c{}\n", number % 10, product % 10, product / 10);
        (number, carry) = (number / 10, product / 10);
    }
    if carry > 0 {
        lines += &format!("w{carry}\n");
    }
    lines
}

impl Family for Multiplication {
    fn name(&self) -> &'static str {
        "multiplication"
    }

    fn about(&self) -> &'static str {
        "multiply two whole numbers, from one digit by one to three by two"
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let (a, b) = match level {
            // the table alone has too few problems for two splits
            1 => (draw.between(2, 9), draw.between(2, 29)),
            2 => (draw.between(2, 9), with_digits(2, draw)),
            3 => (draw.between(2, 9), with_digits(3, draw)),
            4 => (with_digits(2, draw), with_digits(2, draw)),
            _ => (with_digits(2, draw), with_digits(3, draw)),
        };
        let (a, b) = sorted(a, b);
        format!("{a}*{b}")
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let (a, b) = parts(key);
        match draw.below(3) {
            0 => format!("{a}*{b}=?"),
            1 => format!("What is {a}*{b}?"),
            _ => format!("Multiply {a} by {b}."),
        }
    }

    fn answer(&self, key: &str) -> String {
        let (a, b) = parts(key);
        (a * b).to_string()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let (a, b) = parts(key);
        is_whole(answer, a * b)
    }

    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let (a, b) = parts(key);
        let (long, short) = (a.max(b), a.min(b));
        let (mut thought, mut total) = (String::new(), 0);
        let digits = short.to_string().len();
        for shift in 0..digits {
            let unit = 10_i64.pow(shift as u32);
            let digit = short / unit % 10;
            if care == Care::None || digit == 0 {
                continue;
            }
            let part = long * digit * unit;
            thought += &if care == Care::Full {
                format!(
                    "{long}*{}\n{}{}={part}\n",
                    digit * unit,
                    "w0\n".repeat(shift),
                    digit_lines(long, digit)
                )
            } else {
                format!("{long}*{}={part}\n", digit * unit)
            };
            if total > 0 {
                let sum = total + part;
                thought += &if care == Care::Full {
                    format!("{total}+{part}\n{}={sum}\n", sum_lines(total, part, 1))
                } else {
                    format!("{total}+{part}={sum}\n")
                };
            }
            total += part;
        }
        Some(Work { thought: thought.trim_end().to_owned(), answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thought(key: &str, care: Care) -> String {
        Multiplication.work(key, care, &mut Draw::new(0, 0)).unwrap().thought
    }

    #[test]
    fn worked_by_hand() {
        assert_eq!(Multiplication.answer("347*26"), "9022");
        assert_eq!(thought("26*347", Care::Brief), "347*6=2082\n347*20=6940\n2082+6940=9022");
        let full = "347*6\n7*6+0=42 w2 c4\n4*6+4=28 w8 c2\n3*6+2=20 w0 c2\nw2\n=2082\n\
                    347*20\nw0\n7*2+0=14 w4 c1\n4*2+1=9 w9 c0\n3*2+0=6 w6 c0\n=6940\n\
                    2082+6940\n2+0+0=2\n8+4+0=12\n0+9+1=10\n2+6+1=9\n=9022";
        assert_eq!(thought("347*26", Care::Full), full);
        assert_eq!(thought("30*41", Care::Brief), "41*30=1230");
        assert_eq!(thought("7*8", Care::Full), "8*7\n8*7+0=56 w6 c5\nw5\n=56");
    }

    #[test]
    fn equal_numbers_pass_and_nothing_else() {
        for good in ["9022", "9,022", "9022.00", " 9022."] {
            assert!(Multiplication.verify("347*26", good), "{good:?}");
        }
        for bad in ["347*26", "90,22", "9 022", "-9022", "9021.999", "18044/2", "902200%"] {
            assert!(!Multiplication.verify("347*26", bad), "{bad:?}");
        }
    }
}
