//! Expressions of whole numbers, `+ - * /` and brackets, evaluated exactly.

use std::iter::Peekable;
use std::str::Chars;

use num_bigint::BigInt;
use num_rational::BigRational;

use crate::number;

/// No expression is longer, in bytes.
const MOST_BYTES: usize = 200;
/// Brackets within brackets.
const MOST_DEPTH: u32 = 32;
/// No number in it has more digits.
const MOST_DIGITS: usize = 9;

/// Whether a text is an expression of this value that uses the given numbers, each at most as often as given.
///
/// `expression = target` passes as well; a sign before a number or bracket is no operation of the game.
pub fn reaches(text: &str, target: i64, given: &[i64]) -> bool {
    let text = text.trim().trim_end_matches(['.', '。']);
    if text.len() > MOST_BYTES {
        return false;
    }
    let text = match text.split_once('=') {
        Some((left, right)) if number::is(right, target) => left,
        Some(_) => return false,
        None => text,
    };
    let mut reader = Reader { rest: text.chars().peekable(), left: given.to_vec() };
    let value = reader.sum(0);
    value.is_some_and(|value| value == BigRational::from(BigInt::from(target))) && reader.ahead().is_none()
}

/// What is not read yet, and the given numbers that are not used yet.
struct Reader<'t> {
    rest: Peekable<Chars<'t>>,
    left: Vec<i64>,
}

impl Reader<'_> {
    /// The next character that is no blank, and stays.
    fn ahead(&mut self) -> Option<char> {
        while self.rest.next_if(|c| c.is_whitespace()).is_some() {}
        self.rest.peek().copied()
    }

    fn sum(&mut self, depth: u32) -> Option<BigRational> {
        let mut value = self.product(depth)?;
        while let Some(op @ ('+' | '-' | '−')) = self.ahead() {
            self.rest.next();
            let other = self.product(depth)?;
            value = if op == '+' { value + other } else { value - other };
        }
        Some(value)
    }

    fn product(&mut self, depth: u32) -> Option<BigRational> {
        let mut value = self.operand(depth)?;
        while let Some(op @ ('*' | '×' | '/' | '÷')) = self.ahead() {
            self.rest.next();
            let other = self.operand(depth)?;
            if matches!(op, '*' | '×') {
                value *= other;
            } else if *other.numer() == BigInt::ZERO {
                return None;
            } else {
                value /= other;
            }
        }
        Some(value)
    }

    fn operand(&mut self, depth: u32) -> Option<BigRational> {
        match self.ahead()? {
            '(' if depth < MOST_DEPTH => {
                self.rest.next();
                let value = self.sum(depth + 1)?;
                (self.ahead()? == ')').then(|| self.rest.next())?;
                Some(value)
            }
            c if c.is_ascii_digit() => {
                let mut digits = String::new();
                while let Some(digit) = self.rest.next_if(char::is_ascii_digit) {
                    digits.push(digit);
                }
                if digits.len() > MOST_DIGITS {
                    return None;
                }
                let number: i64 = digits.parse().ok()?;
                let at = self.left.iter().position(|&other| other == number)?;
                self.left.swap_remove(at);
                Some(BigRational::from(BigInt::from(number)))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_worked_out_by_the_rules() {
        for good in [
            "2*(12-5)",
            "(12-5)*2",
            " ( ( 12 - 5 ) ) × 2 ",
            "12*2-5*2",
            "12*2-2*5=14",
            "12×2−10",
            "2*(12-5) = 14.",
            "12/(5/10)-5*2",
            "(2/5)/(2/5)*12+2",
        ] {
            assert!(reaches(good, 14, &[2, 2, 2, 5, 5, 10, 12]), "{good:?}");
        }
        // fractions on the way are exact
        assert!(reaches("8/(3-8/3)", 24, &[3, 3, 8, 8]));
    }

    #[test]
    fn hostile_and_wrong_ones_do_not_pass() {
        let deep = format!("{}14{}", "(".repeat(90), ")".repeat(90));
        let long = "(".repeat(1 << 20);
        for bad in [
            "14",
            "7*2",
            "12-5*2",
            "2*12-5-5",
            "12 - 5) * 2",
            "(12-5*2",
            "2(12-5)",
            "1 2+2",
            "12+2/1",
            "2*(12-5)=15",
            "14=2*(12-5)",
            "-5+12*2-5",
            "12+5/(5-5)",
            "2**3+12",
            "2*(12-5)2",
            "12+2.0",
            "99999999999999999999",
            "",
            "=14",
            &deep,
            &long,
        ] {
            assert!(!reaches(bad, 14, &[2, 5, 12]), "{bad:?}");
        }
        assert!(!reaches(&deep, 14, &[14]));
        assert!(reaches("((14))", 14, &[14]));
    }
}
