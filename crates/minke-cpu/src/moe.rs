//! Tokens to experts and back: the permutation by expert, and the sums over a token's experts.
//!
//! A slot is one (token, expert) pair. Slots are ordered by expert, tokens ascending within one, so that every
//! expert's rows lie together for a grouped product. No token is dropped.

use crate::Cpu;
use crate::cpu::SharedMut;
use crate::rows::{self, SharedView, kernel, lanes, load, store};
use crate::view::{View, ViewMut};

/// Where the (token, expert) pairs of a batch lie when they are ordered by expert.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permutation {
    /// Expert i has slots `offsets[i]..offsets[i + 1]`: [e + 1].
    pub offsets: Vec<u32>,
    /// The token of a slot, ascending within an expert: [n k].
    pub token_of_slot: Vec<u32>,
    /// The slot of a token's j-th expert: [n, k].
    pub slot_of: Vec<u32>,
}

impl Permutation {
    /// Orders the pairs of `experts`: [n, k], each below `e`, by expert; memory is used again.
    ///
    /// # Panics
    /// When sizes do not fit, an expert is not below e, or there are 2^32 pairs.
    pub fn build(&mut self, experts: &[u32], n: usize, k: usize, e: usize) {
        rows::expect_len("Permutation::build", "experts", experts.len(), n * k);
        assert!(u32::try_from(n * k).is_ok(), "Permutation::build: {n} tokens of {k} experts");
        self.offsets.clear();
        self.offsets.resize(e + 1, 0);
        for &expert in experts {
            assert!((expert as usize) < e, "Permutation::build: expert {expert} of {e}");
            self.offsets[expert as usize + 1] += 1;
        }
        for i in 0..e {
            self.offsets[i + 1] += self.offsets[i];
        }
        self.token_of_slot.resize(n * k, 0);
        self.slot_of.resize(n * k, 0);
        // offsets[i] serves as expert i's cursor and ends as offsets[i + 1]: shifted back afterwards
        for (pair, (&expert, slot_of)) in experts.iter().zip(&mut self.slot_of).enumerate() {
            let cursor = &mut self.offsets[expert as usize];
            *slot_of = *cursor;
            self.token_of_slot[*cursor as usize] = (pair / k) as u32;
            *cursor += 1;
        }
        self.offsets.copy_within(0..e, 1);
        self.offsets[0] = 0;
    }

    /// n k, all pairs.
    pub fn slots(&self) -> usize {
        self.slot_of.len()
    }
}

kernel! {
    Combine<'a>(
        s: S, y: View<'a>, slot_of: &'a [u32], weights: Option<&'a [f32]>, k: usize, d: usize, add: Option<View<'a>>,
        out: ViewMut<'a>,
    ) {
        let mut out = out;
        for (token, slots) in slot_of.chunks(k).enumerate() {
            lanes!(d, |i, n| {
                let mut acc = s.zero();
                for (j, &slot) in slots.iter().enumerate() {
                    let y = load(s, y, slot as usize * d + i, n);
                    acc = match weights {
                        Some(weights) => s.fma(s.splat(weights[token * k + j]), y, acc),
                        None => s.add(acc, y),
                    };
                }
                if let Some(add) = add {
                    acc = s.add(acc, load(s, add, token * d + i, n));
                }
                store(s, acc, &mut out, token * d + i, n);
            });
        }
    }
}

fn run(
    cpu: &Cpu,
    op: &str,
    y: View<'_>,
    perm: &Permutation,
    weights: Option<&[f32]>,
    k: usize,
    add: Option<View<'_>>,
    out: ViewMut<'_>,
) {
    let tokens = rows::count(op, perm.slots(), k);
    if tokens == 0 {
        rows::expect_len(op, "out", out.len(), 0);
        return;
    }
    let d = rows::count(op, out.len(), tokens);
    rows::expect_len(op, "the input by slot", y.len(), perm.slots() * d);
    rows::expect_len(op, "weights", weights.map_or(perm.slots(), <[f32]>::len), perm.slots());
    rows::expect_len(op, "what is added", add.map_or(tokens * d, |add| add.len()), tokens * d);
    let out = SharedView::new(out);
    rows::over_tiles(cpu, tokens, d * (k + 1), |from, to| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { out.slice(from * d, (to - from) * d) };
        cpu.dispatch(Combine {
            y,
            slot_of: &perm.slot_of[from * k..to * k],
            weights: weights.map(|weights| &weights[from * k..to * k]),
            k,
            d,
            add: add.map(|add| add.slice(from * d, to * d)),
            out,
        });
    });
}

/// `out[t] = sum over j of weights[t, j] y[slot_of[t, j]] + shared[t]`, experts ascending, the shared expert last.
///
/// y: [n k, d] by slot, weights: [n, k], shared, out: [n, d]. One chain of fused multiply-adds in f32, rounded once.
///
/// # Panics
/// When sizes do not fit.
pub fn combine(
    cpu: &Cpu,
    y: View<'_>,
    perm: &Permutation,
    weights: &[f32],
    k: usize,
    shared: Option<View<'_>>,
    out: ViewMut<'_>,
) {
    run(cpu, "combine", y, perm, Some(weights), k, shared, out);
}

/// `out[t] = sum over j of d_x_slots[slot_of[t, j]] + add[t]`, experts ascending: the gradient of gathering rows by
/// slot, plus what else reaches the tokens.
///
/// `d_x_slots`: [n k, d], add, out: [n, d].
///
/// # Panics
/// When sizes do not fit.
pub fn combine_dx(
    cpu: &Cpu,
    d_x_slots: View<'_>,
    perm: &Permutation,
    k: usize,
    add: Option<View<'_>>,
    out: ViewMut<'_>,
) {
    run(cpu, "combine_dx", d_x_slots, perm, None, k, add, out);
}

/// `out[slot] = x[token_of_slot[slot]]`, x: [n, d], out: [n k, d].
///
/// # Panics
/// When sizes do not fit.
pub fn expand(cpu: &Cpu, x: View<'_>, perm: &Permutation, d: usize, out: ViewMut<'_>) {
    crate::copy::take_rows(cpu, x, d, &perm.token_of_slot, out);
}

/// `out[slot_of[t, j]] = weights[t, j]`: values by pair in the order of slots; weights: [n, k], out: [n k].
///
/// # Panics
/// When sizes do not fit.
pub fn weights_by_slot(perm: &Permutation, weights: &[f32], out: &mut [f32]) {
    rows::expect_len("weights_by_slot", "weights", weights.len(), perm.slots());
    rows::expect_len("weights_by_slot", "out", out.len(), perm.slots());
    for (&slot, &weight) in perm.slot_of.iter().zip(weights) {
        out[slot as usize] = weight;
    }
}

/// `out[t, j] = by_slot[slot_of[t, j]]`: the way back, for gradients of weights; `by_slot`: [n k], out: [n, k].
///
/// # Panics
/// When sizes do not fit.
pub fn weights_by_token(cpu: &Cpu, perm: &Permutation, by_slot: &[f32], out: &mut [f32]) {
    rows::expect_len("weights_by_token", "by_slot", by_slot.len(), perm.slots());
    rows::expect_len("weights_by_token", "out", out.len(), perm.slots());
    let out = SharedMut::new(out);
    rows::over_blocks(cpu, perm.slots(), rows::FLAT_TILE, |from, to| {
        // SAFETY: tasks own disjoint ranges.
        let out = unsafe { out.slice(from, to - from) };
        for (out, &slot) in out.iter_mut().zip(&perm.slot_of[from..to]) {
            *out = by_slot[slot as usize];
        }
    });
}

#[cfg(test)]
mod tests {
    use minke_num::tolerance::Tolerance;
    use minke_num::{bf16, rng};

    use super::*;
    use crate::testing::{AWKWARD, dot, everywhere, halve, normal, wide, wide_view, widen};

    /// k distinct experts per token, ascending; expert 1 is never chosen.
    fn choices(n: usize, k: usize, e: usize) -> Vec<u32> {
        let mut experts = Vec::new();
        for token in 0..n {
            let mut order: Vec<u32> = (0..e as u32).filter(|&i| i != 1).collect();
            order.sort_by_key(|&i| rng::philox(5, token as u64, u64::from(i))[0]);
            order.truncate(k);
            order.sort_unstable();
            experts.extend(order);
        }
        experts
    }

    #[test]
    fn permutation_is_one_and_ordered() {
        let mut perm = Permutation::default();
        for (n, k, e) in [(0, 2, 4), (1, 1, 2), (100, 4, 16), (7, 3, 5), (300, 2, 64)] {
            let experts = choices(n, k, e);
            perm.build(&experts, n, k, e);
            assert_eq!((perm.offsets.len(), perm.slots()), (e + 1, n * k));
            assert_eq!((perm.offsets[0], perm.offsets[e] as usize), (0, n * k));
            assert_eq!(perm.offsets[1], perm.offsets[2], "expert 1 has no tokens");
            let mut seen = vec![false; n * k];
            for (pair, &slot) in perm.slot_of.iter().enumerate() {
                assert!(!std::mem::replace(&mut seen[slot as usize], true));
                assert_eq!(perm.token_of_slot[slot as usize] as usize, pair / k);
                let expert = experts[pair] as usize;
                assert!((perm.offsets[expert]..perm.offsets[expert + 1]).contains(&slot));
            }
            for span in perm.offsets.windows(2) {
                let tokens = &perm.token_of_slot[span[0] as usize..span[1] as usize];
                assert!(tokens.is_sorted_by(|a, b| a < b));
            }
        }
    }

    #[test]
    fn sums_match_f64_and_are_transposes() {
        for d in AWKWARD {
            for (n, k, e) in [(1, 1, 3), (5, 2, 4), (90, 4, 16)] {
                let mut perm = Permutation::default();
                perm.build(&choices(n, k, e), n, k, e);
                let (y, weights, shared) = (normal(1, n * k * d), normal(2, n * k), normal(3, n * d));
                let (y_half, shared_half) = (halve(&y), halve(&shared));
                for (y, add) in [
                    (View::F32(&y), None),
                    (View::F32(&y), Some(View::F32(&shared))),
                    (View::Bf16(&y_half), Some(View::Bf16(&shared_half))),
                ] {
                    let got = everywhere("combine", |cpu| {
                        let (mut out, mut dx) = (vec![9.0; n * d], vec![9.0; n * d]);
                        let mut half = vec![bf16::ZERO; n * d];
                        combine(cpu, y, &perm, &weights, k, add, ViewMut::F32(&mut out));
                        combine(cpu, y, &perm, &weights, k, add, ViewMut::Bf16(&mut half));
                        assert_eq!(widen(&half), widen(&halve(&out)));
                        combine_dx(cpu, y, &perm, k, add, ViewMut::F32(&mut dx));
                        [out, dx].concat()
                    });
                    let (y, add) = (wide_view(y), add.map(wide_view));
                    let mut expected = Vec::new();
                    for weighted in [true, false] {
                        for i in 0..n * d {
                            let (token, column) = (i / d, i % d);
                            let mut sum = add.as_ref().map_or(0.0, |add| add[i]);
                            for j in token * k..(token + 1) * k {
                                let w = if weighted { f64::from(weights[j]) } else { 1.0 };
                                sum += w * y[perm.slot_of[j] as usize * d + column];
                            }
                            expected.push(sum);
                        }
                    }
                    Tolerance::f32_sum(k + 1, 4.0).check("combine", &got, &expected).unwrap();
                }
                let x = normal(4, n * d);
                let spread = everywhere("expand", |cpu| {
                    let mut out = vec![0.0; n * k * d];
                    expand(cpu, View::F32(&x), &perm, d, ViewMut::F32(&mut out));
                    out
                });
                let mut gathered = vec![0.0; n * d];
                combine_dx(&Cpu::detect(1), View::F32(&y), &perm, k, None, ViewMut::F32(&mut gathered));
                let (there, back) = (dot(&wide(&spread), &wide(&y)), dot(&wide(&x), &wide(&gathered)));
                assert!((there - back).abs() < 1e-3, "expand and combine_dx: {there} and {back}");

                let (mut by_slot, mut back) = (vec![0.0; n * k], vec![0.0; n * k]);
                weights_by_slot(&perm, &weights, &mut by_slot);
                weights_by_token(&Cpu::detect(2), &perm, &by_slot, &mut back);
                assert_eq!(back, weights);
                assert_eq!(by_slot[perm.slot_of[0] as usize], weights[0]);
            }
        }
    }
}
