//! FP8 in the E4M3 form, and the scales that go with it.
//!
//! One sign bit, four of exponent (bias 7), three of fraction; no infinities: the largest number is 448, and the two
//! codes with all other bits set are NaN. Every value is exact in bf16. Micikevicius et al., "FP8 Formats for Deep
//! Learning" (2022), table 1.

/// The largest number.
pub const E4M3_MAX: f32 = 448.0;

/// Numbers along a row of an activation, and the side of a square of a weight, that share a scale: DeepSeek-V3 report,
/// section 3.3.2.
pub const BLOCK: usize = 128;

/// The number that `code` stands for.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let sign = u32::from(code & 0x80) << 24;
    if code & 0x7f == 0x7f {
        return f32::from_bits(f32::NAN.to_bits() | sign);
    }
    // exponent and fraction moved to where f32 has them; the factor mends the bias, and makes subnormals normal
    let magnitude = f32::from_bits(u32::from(code & 0x7f) << 20) * f32::from_bits(0x7b80_0000);
    f32::from_bits(magnitude.to_bits() | sign)
}

/// The code of the number nearest to `x`, ties to even; beyond the largest number that number; NaN stays NaN.
pub fn e4m3_from_f32(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    if x.is_nan() {
        return sign | 0x7f;
    }
    let x = x.abs().min(E4M3_MAX);
    let code = if x < 0.015_625 {
        // subnormal: multiples of 2^-9, which is the last place of f32 from 2^14 on
        ((x + 16384.0).to_bits() & 0xf) as u8
    } else {
        let bits = x.to_bits();
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        ((rounded >> 20) - (120 << 3)) as u8
    };
    sign | code
}

/// What codes are multiplied by so that the largest magnitude of a block, `amax`, becomes [`E4M3_MAX`]: `amax / 448`, or
/// 1 for a block of zeros. With `power_of_two` the next power of two above ("round scales", UE8M0 of DeepSeek-V3.1).
/// NaN stays NaN, infinity is infinity: what is not finite is seen in every product with the block.
pub fn scale(amax: f32, power_of_two: bool) -> f32 {
    if amax == 0.0 {
        return 1.0;
    }
    // below this the reciprocal would not be finite
    let scale = if amax.is_nan() { amax } else { (amax / E4M3_MAX).max(1.2e-38) };
    if power_of_two && scale.is_finite() {
        let bits = scale.to_bits();
        f32::from_bits((bits + 0x7f_ffff) & 0x7f80_0000)
    } else {
        scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back_and_numbers_go_to_the_nearest() {
        let all: Vec<f32> = (0..=0x7e).map(e4m3_to_f32).collect();
        assert!(all.windows(2).all(|w| w[0] < w[1]) && all[0] == 0.0 && all[0x7e] == E4M3_MAX);
        assert_eq!((all[1], all[7], all[8], all[0x38]), (2f32.powi(-9), 7.0 / 512.0, 1.0 / 64.0, 1.0));
        for code in 0..=255u8 {
            let x = e4m3_to_f32(code);
            assert_eq!(x.is_nan(), code & 0x7f == 0x7f);
            assert_eq!(e4m3_from_f32(x), code, "{x}");
        }
        for (low, pair) in all.windows(2).enumerate() {
            let middle = f32::midpoint(pair[0], pair[1]);
            let even = low + low % 2;
            assert_eq!(usize::from(e4m3_from_f32(middle)), even, "{middle}");
            assert_eq!(usize::from(e4m3_from_f32(middle.next_down())), low);
            assert_eq!(usize::from(e4m3_from_f32(-middle.next_up())), 0x80 | (low + 1));
        }
        for far in [449.0, 1e30, f32::INFINITY] {
            assert_eq!((e4m3_from_f32(far), e4m3_from_f32(-far)), (0x7e, 0xfe));
        }
    }

    #[test]
    fn scales_fit_their_block() {
        for amax in [1e-30f32, 0.3, 1.0, 448.0, 449.0, 3e38] {
            let (exact, power) = (scale(amax, false), scale(amax, true));
            assert!(
                power >= exact && power < 2.0 * exact && power.to_bits() & 0x7f_ffff == 0,
                "{amax} {power}"
            );
            assert!((amax / exact - E4M3_MAX).abs() < 1e-3 && amax / power <= E4M3_MAX);
        }
        assert_eq!((scale(0.0, true), scale(448.0, true), scale(448.0, false)), (1.0, 1.0, 1.0));
        assert!(scale(f32::NAN, true).is_nan() && scale(f32::INFINITY, true).is_infinite());
        assert!(scale(1e-45, true) > 0.0);
    }
}
