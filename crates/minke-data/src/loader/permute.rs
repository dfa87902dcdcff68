//! A permutation of 0..n that is computed, not stored.
//!
//! A Feistel network permutes the numbers of an even count of bits: the halves (a, b) become (b, a xor f(b)),
//! which can be undone whatever f is. The smallest such range that holds n is less than 4n; a number that
//! lands outside 0..n is sent through again until it is inside, which keeps the map one-to-one and takes
//! fewer than four rounds on average (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

use super::round_bits;

const ROUNDS: u64 = 6;

/// Where `at` goes in the order of an epoch; `n` must be above `at`.
pub(super) fn permute(at: u64, n: u64, seed: u64, epoch: u64) -> u64 {
    debug_assert!(at < n, "{at} of {n}");
    let bits = u64::BITS - (n - 1).leading_zeros();
    let half_bits = bits.div_ceil(2).max(1);
    let mask = (1u64 << half_bits) - 1;
    let mut value = at;
    loop {
        let (mut a, mut b) = (value >> half_bits, value & mask);
        for round in 0..ROUNDS {
            (a, b) = (b, a ^ (round_bits(seed, epoch, round, b) & mask));
        }
        value = (a << half_bits) | b;
        if value < n {
            return value;
        }
    }
}
