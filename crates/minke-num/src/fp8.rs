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
#[inline]
pub fn scale(amax: f32, power_of_two: bool) -> f32 {
    if amax == 0.0 {
        return 1.0;
    }
    let scale = if amax.is_nan() { amax } else { (amax / E4M3_MAX).max(SMALLEST_SCALE) };
    if power_of_two { next_power_of_two(scale) } else { scale }
}

/// Below this the reciprocal of a scale would not be finite.
pub const SMALLEST_SCALE: f32 = 1.2e-38;

/// The power of two that is `scale` or the next above, of a positive normal number; what is not finite stays.
#[inline]
pub fn next_power_of_two(scale: f32) -> f32 {
    if scale.is_finite() { f32::from_bits((scale.to_bits() + 0x7f_ffff) & 0x7f80_0000) } else { scale }
}

/// The shape of the scales of a matrix: one for each square of [`BLOCK`] by [`BLOCK`], the last ones may be cut short.
pub fn scale_shape(rows: usize, cols: usize) -> [usize; 2] {
    [rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)]
}

/// Numbers from the codes of a matrix with rows of `cols` and the scales of its squares, [`scale_shape`] of them:
/// `out = code * scale` in f32, one rounding, and none where scales are powers of two (but for what underflows).
///
/// # Panics
/// When the lengths do not fit each other.
pub fn dequantize(codes: &[u8], scales: &[f32], cols: usize, out: &mut [f32]) {
    assert_eq!(codes.len(), out.len(), "codes and numbers");
    if codes.is_empty() {
        return;
    }
    let [scale_rows, scale_cols] = scale_shape(codes.len() / cols, cols);
    assert_eq!(scales.len(), scale_rows * scale_cols, "scales of {} codes in rows of {cols}", codes.len());
    let numbers: [f32; 256] = std::array::from_fn(|code| e4m3_to_f32(code as u8));
    for (row, (codes, out)) in codes.chunks_exact(cols).zip(out.chunks_exact_mut(cols)).enumerate() {
        let scales = &scales[row / BLOCK * scale_cols..][..scale_cols];
        for ((codes, out), scale) in codes.chunks(BLOCK).zip(out.chunks_mut(BLOCK)).zip(scales) {
            for (x, &code) in out.iter_mut().zip(codes) {
                *x = numbers[usize::from(code)] * scale;
            }
        }
    }
}

/// A matrix in E4M3, with a scale for each square of [`BLOCK`] by [`BLOCK`]: DeepSeek-V3 report, section 3.3.2.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// Codes [rows, cols].
    pub codes: Vec<u8>,
    /// Scales, [`scale_shape`] of them: a number is its code's number times the scale of its square.
    pub scales: Vec<f32>,
    /// Rows (outputs).
    pub rows: usize,
    /// Columns (inputs).
    pub cols: usize,
}

impl Quantized {
    /// The nearest codes of `w` [rows, cols] under [`scale`] of each square's largest magnitude:
    /// `code = e4m3(w / scale)`.
    ///
    /// What is on such a grid already comes back as the same numbers, bit for bit:
    ///
    /// - With `power_of_two`, numbers that are codes times any powers of two (from 2^-125 on, so that nothing
    ///   underflows). The scale may come back smaller, with larger codes: where the largest code of a square is 224 or
    ///   below, half the scale holds its numbers as well.
    /// - Without, numbers that are codes times any scales where the largest code of each square is 448, as it is when
    ///   the scale was chosen by such a rule. From the largest number alone a scale that is not quite `amax / 448` may
    ///   be missed by its last place (`448 s` and its 448th part are both rounded); its neighbours are then tried, and
    ///   one that gives every number of the square back is taken.
    ///
    /// A square with NaN or infinity has a scale that is not finite.
    ///
    /// # Panics
    /// When `w` has another length.
    pub fn quantize(w: &[f32], rows: usize, cols: usize, power_of_two: bool) -> Self {
        assert_eq!(w.len(), rows * cols, "numbers of a matrix [{rows}, {cols}]");
        let [scale_rows, scale_cols] = scale_shape(rows, cols);
        let mut codes = vec![0; w.len()];
        let mut scales = Vec::with_capacity(scale_rows * scale_cols);
        for row in (0..rows).step_by(BLOCK) {
            for col in (0..cols).step_by(BLOCK) {
                let width = BLOCK.min(cols - col);
                let starts = || (row..rows.min(row + BLOCK)).map(|row| row * cols + col);
                let square = || starts().flat_map(|start| &w[start..start + width]);
                let amax = square().fold(
                    0.0f32,
                    |amax, x| {
                        if x.abs() > amax || x.is_nan() { x.abs() } else { amax }
                    },
                );
                let mut scale = scale(amax, power_of_two);
                if !power_of_two && scale.is_finite() {
                    let exact =
                        |scale: &f32| square().all(|&x| e4m3_to_f32(e4m3_from_f32(x / scale)) * scale == x);
                    let near = [scale, scale.next_down(), scale.next_up()];
                    scale = near.into_iter().find(exact).unwrap_or(scale);
                }
                for start in starts() {
                    for (code, x) in codes[start..start + width].iter_mut().zip(&w[start..start + width]) {
                        *code = e4m3_from_f32(x / scale);
                    }
                }
                scales.push(scale);
            }
        }
        Self { codes, scales, rows, cols }
    }

    /// The numbers [rows, cols]; see [`dequantize`].
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.codes.len()];
        dequantize(&self.codes, &self.scales, self.cols, &mut out);
        out
    }

    /// Whether every scale is a power of two.
    pub fn has_power_of_two_scales(&self) -> bool {
        self.scales.iter().all(|&scale| is_power_of_two(scale))
    }
}

/// Whether `scale` is a positive power of two that f32 holds without a fraction (UE8M0 from 2^-126 on).
pub fn is_power_of_two(scale: f32) -> bool {
    scale.is_normal() && scale > 0.0 && scale.to_bits().trailing_zeros() >= 23
}

/// The scale that a UE8M0 code stands for, `2^(code - 127)`; 255 is NaN.
pub fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x40_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
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
            assert!(power >= exact && power < 2.0 * exact && is_power_of_two(power), "{amax} {power}");
            assert!((amax / exact - E4M3_MAX).abs() < 1e-3 && amax / power <= E4M3_MAX);
        }
        assert_eq!((scale(0.0, true), scale(448.0, true), scale(448.0, false)), (1.0, 1.0, 1.0));
        assert!(scale(f32::NAN, true).is_nan() && scale(f32::INFINITY, true).is_infinite());
        assert!(scale(1e-45, true) > 0.0);
    }

    /// Drawn numbers of very different sizes.
    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut w = vec![0.0; count];
        crate::rng::fill_normal(seed, 1, 0.02, &mut w);
        for (i, x) in w.iter_mut().enumerate() {
            *x *= if i % 97 == 0 { 1e-4 } else { 1.0 };
        }
        w
    }

    #[test]
    fn squares_at_the_border_are_cut_short() {
        assert_eq!((scale_shape(130, 257), scale_shape(128, 1)), ([2, 3], [1, 1]));
        let (rows, cols) = (130, 257);
        let w = numbers(rows * cols, 3);
        for power_of_two in [false, true] {
            let q = Quantized::quantize(&w, rows, cols, power_of_two);
            assert_eq!((q.scales.len(), q.has_power_of_two_scales()), (6, power_of_two));
            let back = q.dequantize();
            for (i, (&x, &y)) in w.iter().zip(&back).enumerate() {
                let (row, col) = (i / cols, i % cols);
                let scale = q.scales[row / BLOCK * 3 + col / BLOCK];
                // half a place of three bits, or half the smallest number
                assert!(
                    (x - y).abs() <= (x.abs() / 16.0).max(scale * 2f32.powi(-10)) * 1.000_001,
                    "{row} {col}"
                );
                assert_eq!(y, e4m3_to_f32(e4m3_from_f32(x / scale)) * scale);
            }
            // each square by its own largest number, also where it is one column wide
            for (square, scale) in q.scales.iter().enumerate() {
                let within = |i: usize| i / cols / BLOCK == square / 3 && i % cols / BLOCK == square % 3;
                let amax = (0..w.len()).filter(|&i| within(i)).fold(0.0f32, |amax, i| amax.max(w[i].abs()));
                let expected = super::scale(amax, power_of_two);
                assert!((scale / expected - 1.0).abs() < 3e-7, "{square}");
            }
        }
    }

    #[test]
    fn numbers_on_the_grid_come_back_exactly() {
        let (rows, cols) = (200, 130);
        for seed in 0..40 {
            let w = numbers(rows * cols, 100 + seed);
            for power_of_two in [false, true] {
                let once = Quantized::quantize(&w, rows, cols, power_of_two);
                let twice = Quantized::quantize(&once.dequantize(), rows, cols, power_of_two);
                crate::tolerance::assert_same_bits("twice", &twice.dequantize(), &once.dequantize());
                if !power_of_two {
                    assert_eq!(twice.codes, once.codes);
                }
                // from the second time on nothing moves at all
                let thrice = Quantized::quantize(&twice.dequantize(), rows, cols, power_of_two);
                assert_eq!(thrice, twice);
            }
        }
    }

    #[test]
    fn a_scale_is_found_again_or_a_smaller_power_of_two() {
        // every last place of a scale, with the largest code and others
        let codes = [0x7e, 0x01, 0x87, 0x38, 0xfd, 0x80];
        for step in 0..2000u32 {
            let scale = f32::from_bits(0x3a80_0000 + step * 4_194_301 % 0x80_0000);
            let q = Quantized { codes: codes.to_vec(), scales: vec![scale], rows: 1, cols: codes.len() };
            let again = Quantized::quantize(&q.dequantize(), 1, codes.len(), false);
            assert_eq!(again.codes, codes, "{scale:e}");
            crate::tolerance::assert_same_bits("again", &again.dequantize(), &q.dequantize());
        }
        // 224 of a scale are 448 of its half
        let q =
            Quantized { codes: vec![e4m3_from_f32(224.0), 0x01, 0x80], scales: vec![0.25], rows: 1, cols: 3 };
        let again = Quantized::quantize(&q.dequantize(), 1, 3, true);
        assert_eq!((&again.codes[..], &again.scales[..]), (&[0x7e, 0x02, 0x80][..], &[0.125][..]));
        assert_eq!(again.dequantize(), q.dequantize());
        // 225 to 448 fill their binade: the same codes and scale
        let q = Quantized { codes: vec![e4m3_from_f32(240.0), 0x01], scales: vec![0.25], rows: 1, cols: 2 };
        assert_eq!(Quantized::quantize(&q.dequantize(), 1, 2, true), q);
    }

    #[test]
    fn what_is_not_finite_stays_seen() {
        for bad in [f32::NAN, f32::INFINITY] {
            for power_of_two in [false, true] {
                let q = Quantized::quantize(&[1.0, bad, 2.0], 1, 3, power_of_two);
                assert!(!q.scales[0].is_finite());
            }
        }
        assert_eq!(Quantized::quantize(&[0.0, -0.0], 2, 1, true).scales, [1.0]);
        assert_eq!(Quantized::quantize(&[], 0, 5, true).dequantize(), [0.0; 0]);
    }

    #[test]
    fn scales_of_eight_bits() {
        let all: Vec<f32> = (0..=254).map(e8m0_to_f32).collect();
        assert!(all.windows(2).all(|pair| pair[1] == 2.0 * pair[0]));
        assert_eq!((all[127], all[0], e8m0_to_f32(255).is_nan()), (1.0, 2f32.powi(-127), true));
        assert!(all[1..].iter().all(|&scale| is_power_of_two(scale)));
        assert!([0.0, -1.0, 3.0, f32::INFINITY, f32::NAN].iter().all(|&scale| !is_power_of_two(scale)));
    }
}
