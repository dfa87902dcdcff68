//! Numbers as people write them, read exactly.

use num_bigint::BigInt;
use num_rational::BigRational;

/// No number is longer, in characters: exact arithmetic on hostile input must stay cheap.
const MOST_CHARACTERS: usize = 400;

/// Reads an integer, decimal, fraction or mixed number (`-3`, `1,234`, `0.75`, `3/4`, `1 1/2`, `75%`), exactly.
///
/// A trailing full stop and a sign before the number are understood; anything else around it is not.
pub fn parse(text: &str) -> Option<BigRational> {
    let text = text.trim().trim_end_matches(['.', '。']).trim_end();
    if text.is_empty() || text.len() > MOST_CHARACTERS {
        return None;
    }
    let (negative, text) = match text.strip_prefix(['-', '−']) {
        Some(rest) => (true, rest.trim_start()),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (text, percent) = match text.strip_suffix('%') {
        Some(rest) => (rest.trim_end(), true),
        None => (text, false),
    };
    let mut value = match text.split_once('/') {
        None => decimal(text)?,
        Some((above, below)) => {
            let below = decimal(below.trim())?;
            let (whole, above) = match above.trim().split_once(' ') {
                Some((whole, above)) => (Some(integer(whole)?), decimal(above.trim())?),
                None => (None, decimal(above.trim())?),
            };
            if *below.numer() == BigInt::ZERO {
                return None;
            }
            let fraction = above / below;
            whole.map_or(fraction.clone(), |whole| fraction + whole)
        }
    };
    if percent {
        value /= BigInt::from(100);
    }
    Some(if negative { -value } else { value })
}

/// Whether a text is a way to write this whole number.
pub fn is(text: &str, number: i64) -> bool {
    parse(text).is_some_and(|got| got == BigRational::from(BigInt::from(number)))
}

fn integer(text: &str) -> Option<BigRational> {
    let grouped = text.contains(',');
    let good = if grouped {
        let mut groups = text.split(',');
        let first = groups.next().unwrap_or_default();
        (1..=3).contains(&first.len()) && groups.all(|group| group.len() == 3)
    } else {
        true
    };
    let digits = text.replace(',', "");
    if !good || digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(BigRational::from(digits.parse::<BigInt>().ok()?))
}

fn decimal(text: &str) -> Option<BigRational> {
    let Some((whole, part)) = text.split_once('.') else { return integer(text) };
    if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let whole = if whole.is_empty() { BigRational::from(BigInt::ZERO) } else { integer(whole)? };
    let scale = BigInt::from(10).pow(part.len() as u32);
    Some(whole + BigRational::new(part.parse().ok()?, scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_numbers_are_equal_however_written() {
        let half = BigRational::new(1.into(), 2.into());
        for text in ["1/2", "0.5", ".5", " 2/4 ", "50%", "0.500.", "+1/2", "1.5/3"] {
            assert_eq!(parse(text), Some(half.clone()), "{text}");
        }
        assert_eq!(parse("-1 1/2"), Some(BigRational::new((-3).into(), 2.into())));
        assert_eq!(parse("1,234,567"), parse("1234567"));
        for text in ["", "1/0", "1,23", "12a", "1 2", "--1", "1/2/3", "0x10", "１", "1e9"] {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse(&"9".repeat(1000)), None);
    }
}
