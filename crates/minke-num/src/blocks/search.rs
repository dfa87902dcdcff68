//! Scales of least weighted error.
//!
//! Numbers x with weights w are coded as `scale * level` or `scale * code + minimum`, and what is looked for is the scale
//! (and minimum) of least `sum of w (x - coded)^2`. For given codes that is a linear least-squares problem; for a given
//! scale the best codes are the nearest. Neither says where to begin: a few spans of the codes over the range of numbers
//! are tried, each is fitted, and from the best the two steps alternate until nothing is gained.
//!
//! Sums are over residuals of the trial, not over x: at 8 bits a difference of two large sums would be rounding errors.

use super::IQ4_LEVELS;

/// Adding and subtracting it rounds to a whole number, ties to even.
const TO_WHOLE: f32 = 12_582_912.0;
/// Sums are made in so many parts, so that compilers see vectors.
const LANES: usize = 8;
/// Rounds of codes and scale in turn.
const ROUNDS: usize = 4;

/// Numbers and what an error of each weighs.
#[derive(Clone, Copy)]
pub(super) struct Points<'a, const N: usize> {
    pub x: &'a [f32; N],
    pub w: &'a [f32; N],
}

/// What codes stand for before the scale.
pub(super) trait Levels: Copy {
    /// The level nearest to `y`.
    fn nearest(self, y: f32) -> f32;
}

/// Weighted sums over numbers, their levels and what those leave.
pub(super) struct Moments {
    pub weight: f32,
    pub level: f32,
    pub level_level: f32,
    pub rest: f32,
    pub rest_level: f32,
    pub rest_rest: f32,
}

/// Whole numbers of a range.
#[derive(Clone, Copy)]
pub(super) struct Whole {
    pub low: f32,
    pub high: f32,
}

impl Levels for Whole {
    #[inline(always)]
    fn nearest(self, y: f32) -> f32 {
        clamp(y, self.low, self.high) + TO_WHOLE - TO_WHOLE
    }
}

/// The sixteen levels of IQ4_NL and IQ4_XS.
#[derive(Clone, Copy)]
pub(super) struct Iq4;

/// The nearest level by twice the number, counted from the lowest level on: all that are in the middle between two levels
/// are multiples of a half.
static NEAREST_IQ4: [f32; 512] = {
    let (mut nearest, mut i, mut level) = ([0.0; 512], 0, 0);
    while i < nearest.len() {
        // twice twice the middle of a bucket
        let y = 4 * IQ4_LEVELS[0] as i32 + 2 * i as i32 + 1;
        while level < 15 && y > 2 * (IQ4_LEVELS[level] as i32 + IQ4_LEVELS[level + 1] as i32) {
            level += 1;
        }
        nearest[i] = IQ4_LEVELS[level] as f32;
        i += 1;
    }
    nearest
};

impl Levels for Iq4 {
    #[inline(always)]
    fn nearest(self, y: f32) -> f32 {
        let low = f32::from(IQ4_LEVELS[0]);
        // (from 2^23 on the last place is one)
        let bucket = 2.0 * (clamp(y, low + 1.0, 113.0) - low) - 0.5 + 8_388_608.0;
        NEAREST_IQ4[(bucket.to_bits() & 511) as usize]
    }
}

/// Without a word on NaN, so that it is two instructions.
#[inline(always)]
pub(super) fn clamp(y: f32, low: f32, high: f32) -> f32 {
    let y = if y > low { y } else { low };
    if y < high { y } else { high }
}

/// Sums over numbers of what `of` makes of each.
#[expect(
    clippy::needless_range_loop,
    reason = "with iterators compilers see no vectors here: a third of the speed"
)]
#[inline(always)]
fn sums<const N: usize, const K: usize>(of: impl Fn(usize) -> [f32; K]) -> [f32; K] {
    let mut lanes = [[0.0; LANES]; K];
    for first in (0..N).step_by(LANES) {
        let mut terms = [[0.0; LANES]; K];
        for lane in 0..LANES {
            let of = of(first + lane);
            for k in 0..K {
                terms[k][lane] = of[k];
            }
        }
        for k in 0..K {
            for lane in 0..LANES {
                lanes[k][lane] += terms[k][lane];
            }
        }
    }
    lanes.map(|lanes| lanes.iter().sum())
}

/// The reciprocal, or 0 where there is none.
#[inline(always)]
fn reciprocal(x: f32) -> f32 {
    let inverse = 1.0 / x;
    if inverse.is_finite() { inverse } else { 0.0 }
}

impl<const N: usize> Points<'_, N> {
    /// The error of the nearest codes under a scale and a minimum.
    #[inline(always)]
    pub fn error(self, levels: impl Levels, scale: f32, min: f32) -> f32 {
        let inverse = reciprocal(scale);
        let [error] = sums::<N, 1>(|i| {
            let level = levels.nearest((self.x[i] - min) * inverse);
            let rest = self.x[i] - (scale * level + min);
            [self.w[i] * (rest * rest)]
        });
        error
    }

    /// Sums under the nearest levels for a scale and a minimum.
    #[inline(always)]
    pub fn moments(self, levels: impl Levels, scale: f32, min: f32) -> Moments {
        let inverse = reciprocal(scale);
        let [weight, level, level_level, rest, rest_level, rest_rest] = sums::<N, 6>(|i| {
            let level = levels.nearest((self.x[i] - min) * inverse);
            let rest = self.x[i] - (scale * level + min);
            let (w_level, w_rest) = (self.w[i] * level, self.w[i] * rest);
            [self.w[i], w_level, w_level * level, w_rest, w_rest * level, w_rest * rest]
        });
        Moments { weight, level, level_level, rest, rest_level, rest_rest }
    }

    /// The scale of least error for the nearest codes under `scale`: (that scale, its error).
    #[inline(always)]
    fn fit_scale(self, levels: impl Levels, scale: f32) -> (f32, f32) {
        let sums = self.moments(levels, scale, 0.0);
        let step = sums.rest_level * reciprocal(sums.level_level);
        (scale + step, sums.rest_rest - step * sums.rest_level)
    }

    /// The scale of levels. `spans` are the levels at which the number of largest magnitude is tried.
    #[inline(always)]
    pub fn scale(self, levels: impl Levels, spans: impl Iterator<Item = f32>) -> f32 {
        let largest = self.x.iter().fold(0.0f32, |most, &x| if x.abs() > most.abs() { x } else { most });
        let mut best = (0.0, f32::INFINITY);
        for span in spans {
            let trial = self.fit_scale(levels, largest / span);
            if trial.1 < best.1 {
                best = trial;
            }
        }
        for _ in 0..ROUNDS {
            let trial = self.fit_scale(levels, best.0);
            if trial.1 >= best.1 {
                break;
            }
            best = trial;
        }
        best.0
    }

    /// As [`Self::fit_scale`], for a scale and a minimum, which is not `above`.
    #[inline(always)]
    fn fit_line(self, codes: Whole, (scale, min): (f32, f32), above: f32) -> ((f32, f32), f32) {
        let sums = self.moments(codes, scale, min);
        let Moments { weight, level, level_level, rest, rest_level, rest_rest } = sums;
        let determinant = reciprocal(weight * level_level - level * level);
        let step = (weight * rest_level - level * rest) * determinant;
        let raise = (level_level * rest - level * rest_level) * determinant;
        if min + raise > above {
            // the best line has its minimum at the border
            let raise = above - min;
            let step = (rest_level - raise * level) * reciprocal(level_level);
            let lost = step * (2.0 * rest_level - step * level_level - 2.0 * raise * level)
                + raise * (2.0 * rest - raise * weight);
            return ((scale + step, above), rest_rest - lost);
        }
        ((scale + step, min + raise), rest_rest - step * rest_level - raise * rest)
    }

    /// The scale and the minimum of codes from 0 to `high`; the minimum is not `above`. `spans` are lengths of the range, in
    /// steps, that are tried.
    #[inline(always)]
    pub fn line(self, high: f32, above: f32, spans: impl Iterator<Item = f32> + Clone) -> (f32, f32) {
        let codes = Whole { low: 0.0, high };
        let (low, top) = self.x.iter().fold((above, f32::NEG_INFINITY), |(low, top), &x| {
            (if x < low { x } else { low }, if x > top { x } else { top })
        });
        if top <= low {
            return (0.0, low);
        }
        let mut best = ((0.0, low), f32::INFINITY);
        // what does not fit is cut off above, or below
        let cut_above = spans.clone().map(|span| ((top - low) / span, low));
        let cut_below = spans.filter(|span| *span > high).map(|span| {
            let scale = (top - low) / span;
            (scale, clamp(top - high * scale, low, above))
        });
        for start in cut_above.chain(cut_below) {
            let trial = self.fit_line(codes, start, above);
            if trial.1 < best.1 {
                best = trial;
            }
        }
        for _ in 0..ROUNDS {
            let trial = self.fit_line(codes, best.0, above);
            if trial.1 >= best.1 {
                break;
            }
            best = trial;
        }
        best.0
    }
}

/// From `first` on, `count` values in equal steps.
#[inline(always)]
pub(super) fn steps(first: f32, step: f32, count: usize) -> impl Iterator<Item = f32> + Clone {
    (0..count).map(move |i| first + step * i as f32)
}
