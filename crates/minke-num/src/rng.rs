//! Counter-based random numbers: Philox4x32-10.
//!
//! A generator with state must be saved, restored, split and advanced in the same order everywhere; a counter-based
//! one is a hash. Each draw names itself: the seed of the run, a stream (a parameter, a sequence) and a counter (an
//! element, a position). Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 4.

/// One Philox4x32-10 block: four independent 32-bit words for a key (seed) and a counter (stream, counter).
#[inline]
pub fn philox(seed: u64, stream: u64, counter: u64) -> [u32; 4] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
    let mut c = [counter as u32, (counter >> 32) as u32, stream as u32, (stream >> 32) as u32];
    for _ in 0..10 {
        let (p0, p1) = (M0 * u64::from(c[0]), M1 * u64::from(c[2]));
        c = [(p1 >> 32) as u32 ^ c[1] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k1, p0 as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    c
}

/// A uniform draw in [0, 1) with 24 random bits.
#[inline]
pub fn uniform(seed: u64, stream: u64, counter: u64) -> f32 {
    unit(philox(seed, stream, counter)[0])
}

/// A uniform draw in [0, 1) with 53 random bits.
#[inline]
pub fn uniform_f64(seed: u64, stream: u64, counter: u64) -> f64 {
    let [a, b, ..] = philox(seed, stream, counter);
    ((u64::from(a) << 32 | u64::from(b)) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// A uniform integer in `0..n`, without modulo bias worth measuring (64 random bits).
///
/// # Panics
/// When `n` is 0.
#[inline]
pub fn below(seed: u64, stream: u64, counter: u64, n: u64) -> u64 {
    assert!(n > 0, "below: n must be positive");
    let [a, b, ..] = philox(seed, stream, counter);
    ((u128::from(u64::from(a) << 32 | u64::from(b)) * u128::from(n)) >> 64) as u64
}

/// Fills `out` with draws of a normal distribution of mean 0 and standard deviation `std` (Box-Muller, in f64).
pub fn fill_normal(seed: u64, stream: u64, std: f32, out: &mut [f32]) {
    for (i, chunk) in out.chunks_mut(2).enumerate() {
        let [a, b, c, d] = philox(seed, stream, i as u64);
        // (0, 1]: the logarithm must be finite
        let u = (((u64::from(a) << 32 | u64::from(b)) >> 11) + 1) as f64 * (1.0 / (1u64 << 53) as f64);
        let v = ((u64::from(c) << 32 | u64::from(d)) >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
        let radius = (-2.0 * u.ln()).sqrt() * f64::from(std);
        let angle = v * std::f64::consts::TAU;
        for (x, value) in chunk.iter_mut().zip([radius * angle.cos(), radius * angle.sin()]) {
            *x = value as f32;
        }
    }
}

#[inline]
fn unit(bits: u32) -> f32 {
    (bits >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the reference implementation (Random123, kat_vectors).
    #[test]
    fn known_answers() {
        assert_eq!(philox(0, 0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = u64::MAX;
        assert_eq!(philox(ones, ones, ones), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn normal_has_its_moments() {
        let mut x = vec![0.0; 100_001];
        fill_normal(7, 3, 2.0, &mut x);
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / x.len() as f64;
        let var = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
        assert!(mean.abs() < 0.03, "mean {mean}");
        assert!((var - 4.0).abs() < 0.1, "variance {var}");
    }

    #[test]
    fn uniform_stays_in_range() {
        for i in 0..10_000 {
            let u = uniform(1, 2, i);
            assert!((0.0..1.0).contains(&u));
            assert!(below(1, 2, i, 7) < 7);
        }
    }
}
