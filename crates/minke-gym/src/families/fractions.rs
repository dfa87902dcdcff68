//! Sums, differences and products of fractions, exactly: `1/6+3/4`.

use num_bigint::BigInt;
use num_rational::{BigRational, Ratio};

use super::shared::{place, read};
use crate::{Care, Draw, Family, Work, number};

/// See the module.
pub struct Fractions;

/// Numerator (its sign is the term's) and denominator.
type Fraction = (i64, i64);

/// Reads `+N/D +N/D -N/D` or `*N/D *N/D`: whether it is a product, and its terms.
fn parts(key: &str) -> (bool, Vec<Fraction>) {
    let term = |word: &str| {
        let (above, below) = word[1..].split_once('/').expect("a key of this family");
        let sign = if word.starts_with('-') { -1 } else { 1 };
        (sign * read(above), read(below))
    };
    (key.starts_with('*'), key.split(' ').map(term).collect())
}

fn result(key: &str) -> Ratio<i64> {
    let (product, terms) = parts(key);
    let terms = terms.into_iter().map(|(above, below)| Ratio::new(above, below));
    if product { terms.product() } else { terms.sum() }
}

/// As people write it; a key's first term is positive.
fn shown(key: &str) -> String {
    key[1..].replace(' ', "")
}

/// A proper fraction in lowest terms.
fn proper(below: i64, draw: &mut Draw) -> Fraction {
    loop {
        let above = draw.between(1, below - 1);
        if gcd(above, below) == 1 {
            return (above, below);
        }
    }
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// How `above/below` is brought to lowest terms: Euclid's remainders, then what is left.
fn reduce(above: i64, below: i64) -> String {
    let (mut a, mut b) = (above.abs().max(below), above.abs().min(below));
    if b == 0 {
        return format!("{above}/{below}=0\n");
    }
    let mut line = format!("gcd {a},{b}:");
    while b != 0 {
        line += &format!(" {a}%{b}={}", a % b);
        (a, b) = (b, a % b);
    }
    // where nothing can be taken out, the fraction stands as it is
    if a > 1 { format!("{line}\n{above}/{below}={}\n", Ratio::new(above, below)) } else { line + "\n" }
}

/// The sum of two fractions over a common denominator, not reduced.
fn add((above, below): Fraction, (other, under): Fraction) -> Fraction {
    if below == under { (above + other, below) } else { (above * under + other * below, below * under) }
}

/// A second operand with the sign before it.
fn signed(value: i64) -> String {
    format!("{value:+}")
}

fn sum_lines(terms: &[Fraction]) -> (Fraction, String) {
    let (mut total, mut lines) = (terms[0], String::new());
    for &(other, under) in &terms[1..] {
        let (above, below) = total;
        let (mut left, mut right) = (above, other);
        if below != under {
            (left, right) = (above * under, other * below);
            let common = below * under;
            lines += &format!("{above}/{below}={left}/{common}\n{other}/{under}={right}/{common}\n");
        }
        total = add(total, (other, under));
        lines += &format!("{left}{}={}\n", signed(right), total.0);
        lines += &format!("{}/{}\n", total.0, total.1);
    }
    (total, lines)
}

impl Family for Fractions {
    fn name(&self) -> &'static str {
        "fractions"
    }

    fn about(&self) -> &'static str {
        "add, subtract and multiply fractions; any equal form is right"
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let below = draw.between(3, 15);
        let (product, mut terms) = match level {
            1 => (false, vec![proper(below, draw), proper(below, draw)]),
            2 => (true, (0..2).map(|_| proper(draw.between(2, 9), draw)).collect()),
            3 => (false, (0..2).map(|_| proper(draw.between(2, 9), draw)).collect()),
            4 => (draw.chance(0.5), (0..2).map(|_| proper(draw.between(4, 19), draw)).collect::<Vec<_>>()),
            _ => (false, (0..3).map(|_| proper(draw.between(2, 9), draw)).collect()),
        };
        if !product {
            for (above, _) in &mut terms[1..] {
                *above *= if draw.chance(0.5) { -1 } else { 1 };
            }
        }
        terms.sort_by_key(|&(above, below)| (above < 0, place(above.abs() * 100 + below)));
        let word = |&(above, below): &Fraction| match (product, above < 0) {
            (true, _) => format!("*{above}/{below}"),
            (_, true) => format!("{above}/{below}"),
            (_, false) => format!("+{above}/{below}"),
        };
        terms.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let shown = shown(key);
        match draw.below(3) {
            0 => format!("{shown}=?"),
            1 => format!("What is {shown}, as a fraction?"),
            _ => format!("Compute {shown}."),
        }
    }

    fn answer(&self, key: &str) -> String {
        result(key).to_string()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let result = result(key);
        let wanted = BigRational::new(BigInt::from(*result.numer()), BigInt::from(*result.denom()));
        number::parse(answer).is_some_and(|got| got == wanted)
    }

    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let (product, terms) = parts(key);
        let thought = match (care, product) {
            (Care::None, _) => String::new(),
            (Care::Full, true) => {
                let ((a, b), (c, d)) = (terms[0], terms[1]);
                let (above, below) = (a * c, b * d);
                format!("{a}*{c}={above}\n{b}*{d}={below}\n{above}/{below}\n{}", reduce(above, below))
            }
            (Care::Full, false) => {
                let ((above, below), lines) = sum_lines(&terms);
                lines + &reduce(above, below)
            }
            (Care::Brief, _) => {
                let (above, below) = if product {
                    (terms[0].0 * terms[1].0, terms[0].1 * terms[1].1)
                } else {
                    sum_lines(&terms).0
                };
                format!("{}={above}/{below}\n={}", shown(key), result(key))
            }
        };
        Some(Work { thought: thought.trim_end().to_owned(), answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thought(key: &str, care: Care) -> String {
        Fractions.work(key, care, &mut Draw::new(0, 0)).unwrap().thought
    }

    #[test]
    fn worked_by_hand() {
        assert_eq!(Fractions.answer("+1/6 +3/4"), "11/12");
        let full = "1/6=4/24\n3/4=18/24\n4+18=22\n22/24\ngcd 24,22: 24%22=2 22%2=0\n22/24=11/12";
        assert_eq!(thought("+1/6 +3/4", Care::Full), full);
        assert_eq!(thought("+1/6 +3/4", Care::Brief), "1/6+3/4=22/24\n=11/12");
        assert_eq!(thought("+1/7 -3/7", Care::Full), "1-3=-2\n-2/7\ngcd 7,2: 7%2=1 2%1=0");
        assert_eq!(thought("*3/4 *4/9", Care::Full), "3*4=12\n4*9=36\n12/36\ngcd 36,12: 36%12=0\n12/36=1/3");
        assert_eq!(thought("+1/4 -1/4", Care::Full), "1-1=0\n0/4\n0/4=0");
        assert_eq!(Fractions.answer("+1/2 +1/3 -1/6"), "2/3");
    }

    #[test]
    fn equal_forms_pass_and_nothing_else() {
        for good in ["1/2", "2/4", "0.5", " 3 / 6 ", "50%", ".5"] {
            assert!(Fractions.verify("+1/4 +1/4", good), "{good:?}");
        }
        assert!(Fractions.verify("+3/4 +3/4", "1 1/2") && Fractions.verify("+1/7 -3/7", "-2/7"));
        for bad in ["1/4+1/4", "2/8+2/8", "2/1", "0.49", "1/2/1", "1/0", "0/0", "-1/2"] {
            assert!(!Fractions.verify("+1/4 +1/4", bad), "{bad:?}");
        }
        assert!(!Fractions.verify("+1/3 -1/4", "0.0833333") && Fractions.verify("+1/3 -1/4", "2/24"));
    }
}
