//! Powers and logarithms to base 2.

use crate::simd::{Simd, WHOLE};

/// The polynomial's coefficient of degree 1: what minimises the error, which is not ln 2 itself.
#[expect(clippy::approx_constant, reason = "a coefficient near ln 2, not ln 2")]
const NEAR_LN_2: f32 = 0.693_147;

/// `2^x` for `x` up to 127, with a relative error below 3e-7; exactly 1 at 0, and 2^-126 for all below that (never 0:
/// who masks must mask the result). NaN stays NaN.
///
/// `2^x = 2^n 2^f`, n the nearest whole number; `2^f` on [-1/2, 1/2] by a polynomial of degree 5 that is 1 at 0 and
/// minimises the largest relative error (1.1e-7 with these f32 coefficients).
#[inline(always)]
pub fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    // in this order NaN passes through
    let x = s.max(s.splat(-126.0), x);
    let whole = s.splat(WHOLE);
    let t = s.add(x, whole);
    let f = s.sub(x, s.sub(t, whole));
    let mut p = s.splat(0.001_326_472_7);
    for c in [0.009_671_513, 0.055_507_336, 0.240_222_42, NEAR_LN_2, 1.0] {
        p = s.fma(p, f, s.splat(c));
    }
    // the sum keeps NaN of any kind
    s.fma(f, s.zero(), s.times_power(p, t))
}

/// `log2(x)` for normal `x`; NaN and infinity stay what they are.
///
/// `log2(2^e m) = e + 2/ln 2 * atanh((m - 1) / (m + 1))`, m in [sqrt(1/2), sqrt(2)). Plain operations: any libm, any
/// level, the same bits.
#[inline(always)]
pub fn log2(x: f32) -> f32 {
    let bits = x.to_bits();
    let mut e = (bits >> 23) as i32 - 127;
    let mut m = f32::from_bits(bits & 0x007f_ffff | 0x3f80_0000);
    if m > std::f32::consts::SQRT_2 {
        m *= 0.5;
        e += 1;
    }
    let f = (m - 1.0) / (m + 1.0);
    let g = f * f;
    let series = 1.0 + g * (1.0 / 3.0 + g * (1.0 / 5.0 + g * (1.0 / 7.0 + g * (1.0 / 9.0))));
    let y = e as f32 + f * (2.0 * std::f32::consts::LOG2_E) * series;
    if x < f32::INFINITY { y } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, LANES, Level};

    struct Exp2([f32; LANES]);
    impl Kernel for Exp2 {
        type Out = [f32; LANES];
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; LANES] {
            let mut y = [0.0; LANES];
            s.store(exp2(s, s.load(&self.0)), &mut y);
            y
        }
    }

    #[test]
    fn powers_are_accurate_and_equal_on_all_levels() {
        let mut worst = 0.0f64;
        for i in 0..12_000 {
            let x: [f32; LANES] =
                std::array::from_fn(|j| -126.0 + (i * LANES + j) as f32 * (134.0 / 192_000.0));
            let y = Level::SCALAR.dispatch(Exp2(x));
            for level in Level::available() {
                assert_eq!(
                    level.dispatch(Exp2(x)).map(f32::to_bits),
                    y.map(f32::to_bits),
                    "{}",
                    level.name()
                );
            }
            for (x, y) in x.into_iter().zip(y) {
                let e = f64::from(x).exp2();
                worst = worst.max((f64::from(y) - e).abs() / e);
            }
        }
        assert!(worst < 3e-7, "worst relative error {worst:e}");
        for level in Level::available() {
            assert_eq!(level.dispatch(Exp2([0.0; LANES])), [1.0; LANES]);
            assert_eq!(level.dispatch(Exp2([f32::NEG_INFINITY; LANES])), [f32::MIN_POSITIVE; LANES]);
            assert!(level.dispatch(Exp2([f32::NAN; LANES])).iter().all(|x| x.is_nan()));
        }
    }

    #[test]
    fn logarithms_are_accurate() {
        for i in 0..100_000 {
            let x = 1.0 + (i as f32) * 0.37;
            let e = f64::from(x).log2();
            assert!(
                (f64::from(log2(x)) - e).abs() < 2e-7 * (1.0 + e),
                "log2({x}) = {}, expected {e}",
                log2(x)
            );
        }
        assert_eq!(log2(1.0), 0.0);
        assert_eq!(log2(f32::INFINITY), f32::INFINITY);
        assert!(log2(f32::NAN).is_nan());
    }
}
