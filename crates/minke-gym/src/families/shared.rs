//! What the families of arithmetic share.

use crate::number;

/// A place of a number in an order that says nothing of its size.
///
/// Keys sort commutative operands by it: one key for `a+b` and `b+a`, and the larger one is not always first.
pub fn place(number: i64) -> u64 {
    // odd multipliers permute the integers modulo 2^64, so that no two numbers share a place
    (number as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Two commutative operands in the order of keys.
pub fn sorted(a: i64, b: i64) -> (i64, i64) {
    if place(a) <= place(b) { (a, b) } else { (b, a) }
}

/// A number with exactly this many decimal digits, uniform.
pub fn with_digits(digits: u32, draw: &mut crate::Draw) -> i64 {
    draw.between(10_i64.pow(digits - 1), 10_i64.pow(digits) - 1)
}

/// A part of a key that is a whole number.
pub fn read(word: &str) -> i64 {
    word.parse().expect("a key of this family")
}

/// Whether a text is this whole number, worked out: an open division (`12/4`) is a question, not an answer.
pub fn is_whole(text: &str, number: i64) -> bool {
    !text.contains(['/', '%']) && number::is(text, number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_one_and_says_nothing_of_size() {
        let mut larger_first = 0;
        for a in 0..40 {
            for b in 0..a {
                assert_eq!(sorted(a, b), sorted(b, a));
                larger_first += usize::from(sorted(a, b).0 == a);
            }
        }
        assert!((280..500).contains(&larger_first), "{larger_first} of 780");
    }

    #[test]
    fn only_what_is_worked_out_is_whole() {
        assert!(is_whole("12", 12) && is_whole("12.00", 12) && is_whole("+12.", 12));
        assert!(!is_whole("24/2", 12) && !is_whole("1200%", 12) && !is_whole("12.5", 12));
    }
}
