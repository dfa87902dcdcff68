//! `c_h = a_h b_h`: a product for each head, where heads lie side by side in rows of tokens.

use std::ops::Range;

use super::Packed;
use super::engine::{Engine, Words};
use super::tile::PANEL;
use crate::cpu::Cpu;
use crate::rows::{self, SharedView};
use crate::scratch;
use crate::simd::{Kernel, LANES, Simd};
use crate::view::{View, ViewMut};

/// Tokens of a task. A thread takes all heads of the same tokens one after the other, so what they write side by side is few
/// pages; the right operand of all heads comes from the second-level cache.
const MANY: usize = 32;

/// Columns of each head in rows of tokens: [tokens, heads, width], of which columns from `at` on are meant.
#[derive(Clone, Copy)]
pub struct HeadColumns {
    /// Columns of a head.
    pub width: usize,
    /// The first that is read, or written.
    pub at: usize,
}

/// `c[t, h] = a[t, h] b_h` for every token t and head h: a [tokens, heads, k], b packed [heads, k, n], c [tokens, heads, n],
/// where a and c are columns of wider heads; other columns of c stay as they are.
///
/// Bits are those of [`matmul`](super::matmul) with a group for each head.
///
/// # Panics
/// When shapes do not fit.
pub fn matmul_heads(
    cpu: &Cpu,
    (a, a_columns): (View<'_>, HeadColumns),
    b: &Packed,
    (c, c_columns): (ViewMut<'_>, HeadColumns),
) {
    b.check(cpu);
    let heads = b.groups;
    let tokens = rows::count("matmul_heads", a.len(), heads * a_columns.width);
    rows::expect_len("matmul_heads", "c", c.len(), tokens * heads * c_columns.width);
    assert!(
        a_columns.at + b.k <= a_columns.width && c_columns.at + b.n <= c_columns.width,
        "matmul_heads: {} columns to {} in heads of {} and {}",
        b.k,
        b.n,
        a_columns.width,
        c_columns.width
    );
    let c = SharedView::new(c);
    // heads one after the other for the same tokens: what they write lies side by side
    cpu.run(tokens.div_ceil(MANY) * heads, |i| {
        let (first, head) = (i / heads * MANY, i % heads);
        let tokens = first..tokens.min(first + MANY);
        cpu.level().dispatch_product(Task { a, a_columns, b, c, c_columns, head, tokens });
    });
}

/// One head of some tokens.
struct Task<'a> {
    a: View<'a>,
    a_columns: HeadColumns,
    b: &'a Packed,
    c: SharedView,
    c_columns: HeadColumns,
    head: usize,
    tokens: Range<usize>,
}

impl Kernel for Task<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { a, a_columns, b, c, c_columns, head, tokens } = self;
        let (engine, count) = (Engine::new(s, b.compute), tokens.len());
        let (vecs, steps) = (b.n.div_ceil(LANES), b.steps);
        let mut packed = scratch::take::<u32>(count * steps);
        let mut sums = scratch::take::<f32>(count * vecs * LANES);
        let at = |columns: HeadColumns, t: usize| (t * b.groups + head) * columns.width + columns.at;
        for (t, out) in tokens.clone().zip(packed.chunks_exact_mut(steps)) {
            let at = at(a_columns, t);
            engine.pack_row(a.slice(at, at + b.k), out);
        }
        let words = Words {
            steps,
            a: packed.as_ptr(),
            a_row: steps,
            a_step: 1,
            b: b.panels(head).as_ptr(),
            c: sums.as_mut_ptr(),
            c_row: vecs * LANES,
            ..Words::NOWHERE
        };
        // SAFETY: all rows of the left operand, all panels of the head and the sums are there.
        unsafe { engine.product(words, count, vecs, steps * PANEL) };
        for (t, sums) in tokens.zip(sums.chunks_exact(vecs * LANES)) {
            // SAFETY: these columns of this head are this task's.
            let mut out = unsafe { c.slice(at(c_columns, t), b.n) };
            rows::copy(s, View::F32(sums), 0, &mut out, 0, b.n);
        }
    }
}

#[cfg(test)]
mod tests {
    use minke_num::tolerance::assert_same_bits;

    use super::*;
    use crate::gemm::{Compute, Operand, matmul};
    use crate::simd::Level;
    use crate::testing::{halve, normal, widen};

    /// Each head by itself, through a product of one group.
    fn one_by_one(cpu: &Cpu, a: &[f32], w: &[f32], [heads, k, n]: [usize; 3], compute: Compute) -> Vec<f32> {
        let tokens = a.len() / (heads * k);
        let mut out = vec![0.0; tokens * heads * n];
        for head in 0..heads {
            let rows: Vec<f32> =
                (0..tokens).flat_map(|t| &a[(t * heads + head) * k..][..k]).copied().collect();
            let mut packed = Packed::empty();
            packed.pack_nn(cpu, View::F32(&w[head * k * n..][..k * n]), 1, k, n, compute);
            let mut part = vec![0.0; tokens * n];
            let x = Operand::new(View::F32(&rows), k);
            matmul(cpu, x, &[0, tokens as u32], &packed, ViewMut::F32(&mut part), false);
            for (t, row) in part.chunks(n).enumerate() {
                out[(t * heads + head) * n..][..n].copy_from_slice(row);
            }
        }
        out
    }

    #[test]
    fn heads_side_by_side_are_products_one_by_one() {
        for (heads, k, n) in [(3, 5, 7), (2, 64, 33), (5, 33, 64), (1, 17, 130), (4, 96, 16)] {
            let w = widen(&halve(&normal(1, heads * k * n)));
            for tokens in [0, 1, 2, 17, 33, 131] {
                let a = widen(&halve(&normal(2, tokens * heads * k)));
                let (left, right) = (3, 2);
                let mut wide = vec![9.0; tokens * heads * (left + k + right)];
                for (x, row) in a.chunks(k).zip(wide.chunks_mut(left + k + right)) {
                    row[left..left + k].copy_from_slice(x);
                }
                let half = halve(&wide);
                for (level, compute) in
                    Level::available().into_iter().flat_map(|l| [(l, Compute::F32), (l, Compute::Bf16)])
                {
                    let expected = one_by_one(&Cpu::with_level(level, 1), &a, &w, [heads, k, n], compute);
                    for threads in [1, 3] {
                        let cpu = Cpu::with_level(level, threads);
                        let mut packed = Packed::empty();
                        packed.pack_nn(&cpu, View::F32(&w), heads, k, n, compute);
                        for a in [View::F32(&wide), View::Bf16(&half)] {
                            let mut out = vec![7.0; tokens * heads * (n + 4)];
                            let from = HeadColumns { width: left + k + right, at: left };
                            let to = HeadColumns { width: n + 4, at: 1 };
                            matmul_heads(&cpu, (a, from), &packed, (ViewMut::F32(&mut out), to));
                            let what = format!("{} {heads} {k} {n} x {tokens} {compute:?}", level.name());
                            let got: Vec<f32> =
                                out.chunks(n + 4).flat_map(|row| &row[1..=n]).copied().collect();
                            assert_same_bits(&what, &got, &expected);
                            let beside =
                                |row: &[f32]| row[0] == 7.0 && row[n + 1..].iter().all(|&x| x == 7.0);
                            assert!(out.chunks(n + 4).all(beside), "{what}: other columns");
                        }
                    }
                }
            }
        }
    }
}
