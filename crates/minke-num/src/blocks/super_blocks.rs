//! Super-blocks: whole-number scales of sub-blocks under one or two f16.
//!
//! Sub-blocks are fitted alone, and their scales rounded to multiples of a common one. Then each sub-block tries the
//! neighbours of its rounded scales, since the best pair is seldom the nearest one, and the common scales are fitted to
//! the codes that were found: in turn, while the error falls.

use half::f16;

use super::encode::{inverse, scale};
use super::search::{Levels, Points, Whole, clamp, steps};

/// Numbers of a super-block.
const SUPER: usize = 256;
/// Rounds of sub-blocks and common scales in turn.
const ROUNDS: usize = 3;

/// `J` sub-blocks of `N` numbers: `scale * scales[j] * code - min * mins[j]`.
pub(super) struct Pairs<const N: usize, const J: usize> {
    pub scale: f16,
    pub min: f16,
    pub scales: [u8; J],
    pub mins: [u8; J],
    pub codes: [u8; SUPER],
}

/// `J` sub-blocks of `N` numbers: `scale * scales[j] * level`.
pub(super) struct Singles<const N: usize, const J: usize> {
    pub scale: f16,
    pub scales: [i16; J],
    pub levels: [f32; SUPER],
}

/// The sub-blocks of a super-block.
#[inline(always)]
fn parts<const N: usize, const J: usize>(p: Points<'_, SUPER>) -> [Points<'_, N>; J] {
    let (x, w) = (p.x.as_chunks::<N>().0, p.w.as_chunks::<N>().0);
    std::array::from_fn(|j| Points { x: &x[j], w: &w[j] })
}

/// `x` in whole steps from `least` to `most`.
#[inline(always)]
fn whole(x: f32, step: f16, least: f32, most: f32) -> f32 {
    clamp(x * inverse(step.to_f32()), least, most).round()
}

impl<const N: usize, const J: usize> Pairs<N, J> {
    /// Codes up to `high`, scales and minima of sub-blocks up to `most`.
    #[inline(always)]
    pub fn find(p: Points<'_, SUPER>, high: f32, most: f32) -> Self {
        let (parts, codes) = (parts::<N, J>(p), Whole { low: 0.0, high });
        let lines = parts.map(|p| p.line(high, 0.0, steps(high - 1.0, 0.25, 12)));
        let largest = |of: fn(&(f32, f32)) -> f32| lines.iter().map(of).fold(0.0, f32::max);
        let common = [scale(largest(|line| line.0) / most), scale(largest(|line| -line.1) / most)];
        let mut best = (
            common,
            lines.map(|(scale, min)| [whole(scale, common[0], 0.0, most), whole(-min, common[1], 0.0, most)]),
        );
        let mut least = f32::INFINITY;
        let mut trial = best;
        for _ in 0..ROUNDS {
            let ([scale, min], of_parts) = (trial.0.map(f16::to_f32), &mut trial.1);
            let mut error = 0.0;
            for (p, of_part) in parts.iter().zip(of_parts) {
                let mut least = f32::INFINITY;
                let at = *of_part;
                for by in 0..9 {
                    let near = [at[0] + (by % 3) as f32 - 1.0, at[1] + (by / 3) as f32 - 1.0];
                    if near.iter().any(|x| !(0.0..=most).contains(x)) {
                        continue;
                    }
                    let error = p.error(codes, scale * near[0], -(min * near[1]));
                    if error < least {
                        (least, *of_part) = (error, near);
                    }
                }
                error += least;
            }
            if error >= least {
                break;
            }
            (least, best) = (error, trial);
            trial.0 = Self::fit(&parts, codes, trial);
        }
        let ([scale, min], of_parts) = best;
        let mut found = Self { scale, min, scales: [0; J], mins: [0; J], codes: [0; SUPER] };
        for (j, (p, out)) in parts.iter().zip(found.codes.as_chunks_mut::<N>().0).enumerate() {
            let [of_scale, of_min] = of_parts[j];
            (found.scales[j], found.mins[j]) = (of_scale as u8, of_min as u8);
            let (scale, min) = (scale.to_f32() * of_scale, min.to_f32() * of_min);
            let inverse = inverse(scale);
            *out = p.x.map(|x| codes.nearest((x + min) * inverse) as u8);
        }
        found
    }

    /// The common scale and minimum of least error for the codes that the present ones give.
    #[inline(always)]
    fn fit(
        parts: &[Points<'_, N>; J],
        codes: Whole,
        (common, of_parts): ([f16; 2], [[f32; 2]; J]),
    ) -> [f16; 2] {
        let [of_scale, of_min] = common.map(f16::to_f32);
        // normal equations of steps from the present ones, as residuals have them
        let (mut aa, mut ab, mut bb, mut ar, mut br) = (0.0f32, 0.0f32, 0.0f32, 0.0f32, 0.0f32);
        for (p, [scales, mins]) in parts.iter().zip(of_parts) {
            let sums = p.moments(codes, of_scale * scales, -(of_min * mins));
            aa += scales * scales * sums.level_level;
            ab -= scales * mins * sums.level;
            bb += mins * mins * sums.weight;
            ar += scales * sums.rest_level;
            br -= mins * sums.rest;
        }
        let determinant = inverse(aa * bb - ab * ab);
        let (of_scale, of_min) = if determinant > 0.0 {
            (of_scale + (ar * bb - br * ab) * determinant, of_min + (br * aa - ar * ab) * determinant)
        } else {
            (of_scale + ar * inverse(aa), of_min)
        };
        [scale(of_scale.max(0.0)), scale(of_min.max(0.0))]
    }
}

impl<const N: usize, const J: usize> Singles<N, J> {
    /// Scales of sub-blocks from `-most` to `most - 1`; `spans` as [`Points::scale`] has them.
    #[inline(always)]
    pub fn find(
        p: Points<'_, SUPER>,
        levels: impl Levels,
        spans: &(impl Iterator<Item = f32> + Clone),
        most: i16,
    ) -> Self {
        let (parts, most) = (parts::<N, J>(p), f32::from(most));
        let fitted = parts.map(|p| p.scale(levels, spans.clone()));
        let largest = fitted.iter().fold(0.0f32, |most, &s| if s.abs() > most.abs() { s } else { most });
        // the lowest scale is one step farther from zero than the highest
        let common = scale(largest / -most);
        let mut best = (common, fitted.map(|scale| whole(scale, common, -most, most - 1.0)));
        let mut least = f32::INFINITY;
        let mut trial = best;
        for _ in 0..ROUNDS {
            let scale = trial.0.to_f32();
            let mut error = 0.0;
            for (p, of_part) in parts.iter().zip(&mut trial.1) {
                let mut least = f32::INFINITY;
                let at = *of_part;
                for by in [0.0, -1.0, 1.0, -2.0, 2.0] {
                    let near = at + by;
                    if !(-most..most).contains(&near) {
                        continue;
                    }
                    let error = p.error(levels, scale * near, 0.0);
                    if error < least {
                        (least, *of_part) = (error, near);
                    }
                }
                error += least;
            }
            if error >= least {
                break;
            }
            (least, best) = (error, trial);
            trial.0 = Self::fit(&parts, levels, trial);
        }
        let (scale, of_parts) = best;
        let mut found = Self { scale, scales: of_parts.map(|s| s as i16), levels: [0.0; SUPER] };
        for (j, (p, out)) in parts.iter().zip(found.levels.as_chunks_mut::<N>().0).enumerate() {
            let inverse = inverse(scale.to_f32() * of_parts[j]);
            *out = p.x.map(|x| levels.nearest(x * inverse));
        }
        found
    }

    /// The common scale of least error for the codes that the present one gives.
    #[inline(always)]
    fn fit(parts: &[Points<'_, N>; J], levels: impl Levels, (common, scales): (f16, [f32; J])) -> f16 {
        let common = common.to_f32();
        let (mut squares, mut rests) = (0.0f32, 0.0f32);
        for (p, of_part) in parts.iter().zip(scales) {
            let sums = p.moments(levels, common * of_part, 0.0);
            squares += of_part * of_part * sums.level_level;
            rests += of_part * sums.rest_level;
        }
        scale(common + rests * inverse(squares))
    }
}
