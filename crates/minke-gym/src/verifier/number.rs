//! Answers that are numbers, compared exactly or within a tolerance.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{Signed, ToPrimitive, Zero};

use super::options::{OptionError, Options};
use crate::number::parse;

/// Powers of ten go no further: `1e999999999` must stay cheap.
const MOST_EXPONENT: u32 = 400;

/// See the module.
#[derive(Debug)]
pub struct Number {
    expected: Vec<BigRational>,
    absolute: BigRational,
    relative: BigRational,
    /// The longest first, so that `km` is not read as `k` and `m`.
    units: Vec<String>,
}

impl Number {
    pub fn read(options: &mut Options, expected: &[String]) -> Result<Self, OptionError> {
        let mut tolerance = |name| -> Result<BigRational, OptionError> {
            let x = options.number(name, 0.0, f64::MAX)?.unwrap_or(0.0);
            Ok(BigRational::from_float(x).expect("a number within bounds is finite"))
        };
        let (absolute, relative) = (tolerance("tolerance")?, tolerance("relative")?);
        let mut units = options.texts("units")?.unwrap_or_default();
        if units.iter().any(|unit| unit.trim().is_empty()) {
            return Err(OptionError::new("`units`: a unit is empty"));
        }
        units.sort_by_key(|unit| std::cmp::Reverse(unit.len()));
        let mut number = Self { expected: Vec::new(), absolute, relative, units };
        if expected.is_empty() {
            return Err(OptionError::new("`number` needs an `answer`"));
        }
        for text in expected {
            let value = number
                .value(text)
                .ok_or_else(|| OptionError::new(format!("`answer`: expected a number, got {text:?}")))?;
            number.expected.push(value);
        }
        Ok(number)
    }

    fn value(&self, text: &str) -> Option<BigRational> {
        let text = text.trim().trim_end_matches(['.', '。']).trim_end();
        let bare = self
            .units
            .iter()
            .find_map(|unit| text.strip_suffix(unit.as_str()).or_else(|| text.strip_prefix(unit.as_str())));
        value(bare.unwrap_or(text))
    }

    pub fn fits(&self, answer: &str) -> bool {
        let Some(got) = self.value(answer) else { return false };
        self.expected.iter().any(|expected| {
            let distance = (&got - expected).abs();
            let relative = &self.relative * expected.abs();
            distance <= self.absolute || distance <= relative
        })
    }

    pub fn canonical(&self, answer: &str) -> String {
        self.value(answer).map_or_else(|| answer.to_owned(), |value| value.to_string())
    }
}

/// Reads a number as models write it: what [`parse`] knows, powers of ten, and LaTeX's fractions and dollars.
pub fn value(text: &str) -> Option<BigRational> {
    let text = text.trim().trim_end_matches(['.', '。']).trim_end();
    let text = text.strip_prefix('$').and_then(|text| text.strip_suffix('$')).unwrap_or(text).trim();
    if let Some(number) = parse(text) {
        return Some(number);
    }
    for command in ["\\frac{", "\\dfrac{", "\\tfrac{"] {
        let Some((sign, rest)) = text.split_once(command) else { continue };
        let (above, below) = rest.strip_suffix('}')?.split_once("}{")?;
        let (above, below) = (parse(above)?, parse(below)?);
        if below.is_zero() {
            return None;
        }
        return match sign.trim() {
            "" => Some(above / below),
            "-" => Some(-(above / below)),
            _ => None,
        };
    }
    let (mantissa, exponent) = text.split_once(['e', 'E'])?;
    let exponent: i32 = exponent.parse().ok()?;
    if exponent.unsigned_abs() > MOST_EXPONENT {
        return None;
    }
    // `1/2e3` and `5%e3` are no numbers
    if mantissa.contains(['/', '%', ' ']) {
        return None;
    }
    let scale = BigRational::from(BigInt::from(10).pow(exponent.unsigned_abs().to_u32()?));
    let mantissa = parse(mantissa)?;
    Some(if exponent < 0 { mantissa / scale } else { mantissa * scale })
}
