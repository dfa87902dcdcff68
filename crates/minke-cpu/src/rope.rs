//! Rotary position embedding, and the keys and values of multi-head latent attention.
//!
//! A pair of columns (a, b) of a head turns by an angle that grows with the position:
//! `(a cos - b sin, b cos + a sin)`. Pairs are neighbours (interleaved: 2i and 2i + 1, as in DeepSeek-V2) or halves
//! (i and i + r/2). Interleaved pairs stay where they are; where transformers moves them into halves, it does so for
//! queries and keys alike, which leaves their products as they are.
//!
//! Su et al., "Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2.2; DeepSeek-V2 (2024), section 2.1.3.

use crate::Cpu;
use crate::rows::{self, SharedView, kernel, lanes, load, load_f32, store, store_f32};
use crate::scratch::with_scratch;
use crate::simd::{LANES, Simd};
use crate::view::{View, ViewMut};

/// The tables of [`rope`]: `cos(pos inv_freq[i]) scale` and `sin(pos inv_freq[i]) scale`, both [`max_pos`, r/2].
///
/// The angle is the f32 product of the two, as in transformers; its cosine and sine are taken in f64 and rounded.
pub fn cos_sin(inv_freq: &[f32], max_pos: usize, scale: f32) -> (Vec<f32>, Vec<f32>) {
    let angles = || (0..max_pos).flat_map(|pos| inv_freq.iter().map(move |f| f64::from(pos as f32 * f)));
    (angles().map(|a| a.cos() as f32 * scale).collect(), angles().map(|a| a.sin() as f32 * scale).collect())
}

/// Rotates `r` elements from `x[from..]` (in place where x is absent) to `out[to..]`.
#[inline(always)]
fn rotate<S: Simd>(
    s: S,
    x: Option<(View<'_>, usize)>,
    out: &mut ViewMut<'_>,
    to: usize,
    turn: &Turn<'_>,
    interleaved: bool,
) {
    let half = turn.cos.len();
    let sign = s.splat(if turn.inverse { -1.0 } else { 1.0 });
    if interleaved {
        lanes!(2 * half, |i, n| {
            let pairs = match x {
                Some((x, from)) => load(s, x, from + i, n),
                None => load(s, out.as_view(), to + i, n),
            };
            let (mut x, mut cos, mut sin) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
            s.store(pairs, &mut x);
            s.store(load_f32(s, turn.cos, i / 2, n / 2), &mut cos);
            s.store(s.mul(load_f32(s, turn.sin, i / 2, n / 2), sign), &mut sin);
            let mut y = [0.0; LANES];
            for p in 0..LANES / 2 {
                let (a, b) = (x[2 * p], x[2 * p + 1]);
                y[2 * p] = a * cos[p] - b * sin[p];
                y[2 * p + 1] = b * cos[p] + a * sin[p];
            }
            store(s, s.load(&y), out, to + i, n);
        });
    } else {
        lanes!(half, |i, n| {
            let (a, b) = match x {
                Some((x, from)) => (load(s, x, from + i, n), load(s, x, from + half + i, n)),
                None => (load(s, out.as_view(), to + i, n), load(s, out.as_view(), to + half + i, n)),
            };
            let cos = load_f32(s, turn.cos, i, n);
            let sin = s.mul(load_f32(s, turn.sin, i, n), sign);
            store(s, s.sub(s.mul(a, cos), s.mul(b, sin)), out, to + i, n);
            store(s, s.add(s.mul(b, cos), s.mul(a, sin)), out, to + half + i, n);
        });
    }
}

/// One position's row of the tables, and the direction.
struct Turn<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    inverse: bool,
}

impl<'a> Turn<'a> {
    #[inline(always)]
    fn at(position: u32, r: usize, cos: &'a [f32], sin: &'a [f32], inverse: bool) -> Self {
        let row = position as usize * (r / 2)..(position as usize + 1) * (r / 2);
        Self { cos: &cos[row.clone()], sin: &sin[row], inverse }
    }
}

#[track_caller]
fn check_tables(op: &str, r: usize, positions: &[u32], cos: &[f32], sin: &[f32]) {
    assert_eq!(r % 2, 0, "{op}: the rotary width {r} is odd");
    rows::expect_len(op, "sin", sin.len(), cos.len());
    let rows = rows::count(op, cos.len(), r / 2);
    if let Some(position) = positions.iter().find(|&&position| r > 0 && position as usize >= rows) {
        panic!("{op}: position {position} in tables of {rows}");
    }
}

kernel! {
    Rope<'a>(
        s: S, x: Option<View<'a>>, heads: usize, width: usize, offset: usize, r: usize, positions: &'a [u32],
        cos: &'a [f32], sin: &'a [f32], interleaved: bool, inverse: bool, out: ViewMut<'a>,
    ) {
        let mut out = out;
        for (token, &position) in positions.iter().enumerate() {
            let turn = Turn::at(position, r, cos, sin, inverse);
            for head in token * heads..(token + 1) * heads {
                let at = head * width;
                if let Some(x) = x {
                    rows::copy(s, x, at, &mut out, at, offset);
                    rows::copy(s, x, at + offset + r, &mut out, at + offset + r, width - offset - r);
                }
                rotate(s, x.map(|x| (x, at + offset)), &mut out, at + offset, &turn, interleaved);
            }
        }
    }
}

fn run(
    cpu: &Cpu,
    x: Option<View<'_>>,
    heads: usize,
    width: usize,
    offset: usize,
    r: usize,
    positions: &[u32],
    cos: &[f32],
    sin: &[f32],
    interleaved: bool,
    inverse: bool,
    out: ViewMut<'_>,
) {
    let (n, row) = (positions.len(), heads * width);
    check_tables("rope", r, positions, cos, sin);
    assert!(offset + r <= width, "rope: columns {offset}+{r} of {width}");
    rows::expect_len("rope", "x", x.map_or(n * row, |x| x.len()), n * row);
    rows::expect_len("rope", "out", out.len(), n * row);
    let shared = SharedView::new(out);
    rows::over_tiles(cpu, n, row, |from, to| {
        // SAFETY: tasks own disjoint rows.
        let out = unsafe { shared.slice(from * row, (to - from) * row) };
        let x = x.map(|x| x.slice(from * row, to * row));
        let positions = &positions[from..to];
        cpu.dispatch(Rope { x, heads, width, offset, r, positions, cos, sin, interleaved, inverse, out });
    });
}

/// Rotates columns `offset..offset + r` of every head by its token's position and copies the others.
///
/// x, out: [n, heads, width], positions: [n], cos, sin: [`max_pos`, r/2] of [`cos_sin`]. Pairs are columns 2i, 2i + 1
/// when `interleaved`, else i, i + r/2. `inverse` turns back: the gradient. Products and sums are rounded one by one,
/// the result once more to the dtype of `out`.
///
/// # Panics
/// When sizes do not fit or a position is beyond the tables.
pub fn rope(
    cpu: &Cpu,
    x: View<'_>,
    heads: usize,
    width: usize,
    offset: usize,
    r: usize,
    positions: &[u32],
    cos: &[f32],
    sin: &[f32],
    interleaved: bool,
    inverse: bool,
    out: ViewMut<'_>,
) {
    run(cpu, Some(x), heads, width, offset, r, positions, cos, sin, interleaved, inverse, out);
}

/// [`rope`] in place.
///
/// # Panics
/// As [`rope`].
pub fn rope_inplace(
    cpu: &Cpu,
    x: ViewMut<'_>,
    heads: usize,
    width: usize,
    offset: usize,
    r: usize,
    positions: &[u32],
    cos: &[f32],
    sin: &[f32],
    interleaved: bool,
    inverse: bool,
) {
    run(cpu, None, heads, width, offset, r, positions, cos, sin, interleaved, inverse, x);
}

/// Sizes of expanded latent attention: h heads, p columns of a key without position, v of a value, r rotary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MlaShape {
    /// h
    pub heads: usize,
    /// p, `qk_nope_head_dim`
    pub nope: usize,
    /// v, `v_head_dim`
    pub value: usize,
    /// r, `qk_rope_head_dim`
    pub rotary: usize,
    /// Whether rotary pairs are neighbours.
    pub interleaved: bool,
}

impl MlaShape {
    /// Elements of a token's key, value, and key without position beside value: h(p+r), hv, h(p+v).
    fn rows(&self) -> (usize, usize, usize) {
        let Self { heads, nope, value, rotary, .. } = *self;
        (heads * (nope + rotary), heads * value, heads * (nope + value))
    }
}

kernel! {
    MlaKeys<'a>(
        s: S, shape: MlaShape, kv: View<'a>, rotary: View<'a>, stride: usize, offset: usize, positions: &'a [u32],
        cos: &'a [f32], sin: &'a [f32], turned: &'a mut [f32], k: ViewMut<'a>, v: ViewMut<'a>,
    ) {
        let MlaShape { heads, nope, value, rotary: r, interleaved } = shape;
        let (mut k, mut v) = (k, v);
        for (token, &position) in positions.iter().enumerate() {
            let turn = Turn::at(position, r, cos, sin, false);
            let mut once = ViewMut::F32(&mut *turned);
            rotate(s, Some((rotary, token * stride + offset)), &mut once, 0, &turn, interleaved);
            for head in token * heads..(token + 1) * heads {
                let from = head * (nope + value);
                rows::copy(s, kv, from, &mut k, head * (nope + r), nope);
                rows::copy(s, View::F32(turned), 0, &mut k, head * (nope + r) + nope, r);
                rows::copy(s, kv, from + nope, &mut v, head * value, value);
            }
        }
    }
}

/// Keys and values of expanded latent attention: every head's key is its own p columns and the one rotated key that
/// all heads share; its value is the rest of its columns.
///
/// kv: [n, h, p + v] (`kv_b_proj`'s output); the shared key, not yet rotated, is columns `offset..offset + r` of
/// `k_rope`: [n, stride] (`kv_a_proj_with_mqa`'s output, where the offset is the latent's width); positions: [n];
/// k: [n, h, p + r]; v: [n, h, v]. The rotation is [`rope`]'s, rounded once.
///
/// # Panics
/// When sizes do not fit or a position is beyond the tables.
///
/// DeepSeek-V2 (2024), eq. 12-17.
pub fn mla_keys(
    cpu: &Cpu,
    shape: MlaShape,
    kv: View<'_>,
    k_rope: View<'_>,
    stride: usize,
    offset: usize,
    positions: &[u32],
    cos: &[f32],
    sin: &[f32],
    k: ViewMut<'_>,
    v: ViewMut<'_>,
) {
    const OP: &str = "mla_keys";
    let (n, r) = (positions.len(), shape.rotary);
    let (k_row, v_row, kv_row) = shape.rows();
    check_tables(OP, r, positions, cos, sin);
    assert!(offset + r <= stride, "{OP}: columns {offset}+{r} of {stride}");
    rows::expect_len(OP, "kv", kv.len(), n * kv_row);
    rows::expect_len(OP, "k_rope", k_rope.len(), n * stride);
    rows::expect_len(OP, "k", k.len(), n * k_row);
    rows::expect_len(OP, "v", v.len(), n * v_row);
    let (k, v) = (SharedView::new(k), SharedView::new(v));
    rows::over_tiles(cpu, n, kv_row + k_row, |from, to| {
        let count = to - from;
        // SAFETY: tasks own disjoint rows.
        let (k, v) = unsafe { (k.slice(from * k_row, count * k_row), v.slice(from * v_row, count * v_row)) };
        let (kv, rotary) = (kv.slice(from * kv_row, to * kv_row), k_rope.slice(from * stride, to * stride));
        let positions = &positions[from..to];
        with_scratch(r, |turned: &mut [f32]| {
            cpu.dispatch(MlaKeys { shape, kv, rotary, stride, offset, positions, cos, sin, turned, k, v });
        });
    });
}

kernel! {
    MlaKeysBackward<'a>(
        s: S, shape: MlaShape, d_k: View<'a>, d_v: View<'a>, positions: &'a [u32], cos: &'a [f32], sin: &'a [f32],
        sum: &'a mut [f32], d_kv: ViewMut<'a>, d_rotary: ViewMut<'a>, stride: usize, offset: usize,
    ) {
        let MlaShape { heads, nope, value, rotary: r, interleaved } = shape;
        let (mut d_kv, mut d_rotary) = (d_kv, d_rotary);
        for (token, &position) in positions.iter().enumerate() {
            sum.fill(0.0);
            for head in token * heads..(token + 1) * heads {
                let (from, to) = (head * (nope + r), head * (nope + value));
                rows::copy(s, d_k, from, &mut d_kv, to, nope);
                rows::copy(s, d_v, head * value, &mut d_kv, to + nope, value);
                lanes!(r, |i, n| {
                    let share = load(s, d_k, from + nope + i, n);
                    store_f32(s, s.add(load_f32(s, sum, i, n), share), sum, i, n);
                });
            }
            let turn = Turn::at(position, r, cos, sin, true);
            let at = token * stride + offset;
            rotate(s, Some((View::F32(sum), 0)), &mut d_rotary, at, &turn, interleaved);
        }
    }
}

/// Gradient of [`mla_keys`]: `d_kv` gathers the columns of `d_k` and `d_v`; the shared key's is the sum over heads,
/// ascending, turned back, written to columns `offset..offset + r` of `d_k_rope`, whose others stay as they are.
///
/// `d_k`: [n, h, p + r], `d_v`: [n, h, v], positions: [n], `d_kv`: [n, h, p + v], `d_k_rope`: [n, stride].
///
/// # Panics
/// When sizes do not fit or a position is beyond the tables.
pub fn mla_keys_backward(
    cpu: &Cpu,
    shape: MlaShape,
    d_k: View<'_>,
    d_v: View<'_>,
    positions: &[u32],
    cos: &[f32],
    sin: &[f32],
    d_kv: ViewMut<'_>,
    d_k_rope: ViewMut<'_>,
    stride: usize,
    offset: usize,
) {
    const OP: &str = "mla_keys_backward";
    let (n, r) = (positions.len(), shape.rotary);
    let (k_row, v_row, kv_row) = shape.rows();
    check_tables(OP, r, positions, cos, sin);
    assert!(offset + r <= stride, "{OP}: columns {offset}+{r} of {stride}");
    rows::expect_len(OP, "d_k", d_k.len(), n * k_row);
    rows::expect_len(OP, "d_v", d_v.len(), n * v_row);
    rows::expect_len(OP, "d_kv", d_kv.len(), n * kv_row);
    rows::expect_len(OP, "d_k_rope", d_k_rope.len(), n * stride);
    let (d_kv, d_rotary) = (SharedView::new(d_kv), SharedView::new(d_k_rope));
    rows::over_tiles(cpu, n, kv_row + k_row, |from, to| {
        let count = to - from;
        // SAFETY: tasks own disjoint rows.
        let (d_kv, d_rotary) = unsafe {
            (d_kv.slice(from * kv_row, count * kv_row), d_rotary.slice(from * stride, count * stride))
        };
        let (d_k, d_v) = (d_k.slice(from * k_row, to * k_row), d_v.slice(from * v_row, to * v_row));
        let positions = &positions[from..to];
        with_scratch(r, |sum: &mut [f32]| {
            cpu.dispatch(MlaKeysBackward {
                shape,
                d_k,
                d_v,
                positions,
                cos,
                sin,
                sum,
                d_kv,
                d_rotary,
                stride,
                offset,
            });
        });
    });
}

#[cfg(test)]
mod tests {
    use minke_num::bf16;
    use minke_num::tolerance::{Tolerance, assert_same_bits};

    use super::*;
    use crate::testing::{assert_gradient, dot, everywhere, halve, normal, wide, widen};

    fn frequencies(r: usize) -> Vec<f32> {
        (0..r / 2).map(|i| 10000f32.powf(-2.0 * i as f32 / r as f32)).collect()
    }

    fn positions(n: usize) -> Vec<u32> {
        (0..n).map(|i| (i * 37 % 101) as u32).collect()
    }

    /// Complex numbers times `e^(i angle)`.
    fn rotate_ref(x: &mut [f64], position: u32, interleaved: bool, inverse: bool) {
        let half = x.len() / 2;
        for (i, f) in frequencies(x.len()).into_iter().enumerate() {
            let angle = f64::from(position as f32 * f) * if inverse { -1.0 } else { 1.0 };
            let (re, im) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            (x[re], x[im]) =
                (x[re] * angle.cos() - x[im] * angle.sin(), x[re] * angle.sin() + x[im] * angle.cos());
        }
    }

    #[test]
    fn forward_matches_complex_products() {
        for (n, heads, width, offset, r) in
            [(1, 1, 2, 0, 2), (5, 3, 48, 32, 16), (70, 2, 40, 3, 34), (9, 4, 64, 0, 64), (3, 1, 7, 1, 6)]
        {
            let x = normal(1, n * heads * width);
            let (cos, sin) = cos_sin(&frequencies(r), 101, 1.0);
            let at = positions(n);
            for (interleaved, inverse) in [(true, false), (true, true), (false, false), (false, true)] {
                let got = everywhere("rope", |cpu| {
                    let mut y = vec![0.0; x.len()];
                    let out = ViewMut::F32(&mut y);
                    let view = View::F32(&x);
                    rope(cpu, view, heads, width, offset, r, &at, &cos, &sin, interleaved, inverse, out);
                    let mut z = x.clone();
                    let both = ViewMut::F32(&mut z);
                    rope_inplace(cpu, both, heads, width, offset, r, &at, &cos, &sin, interleaved, inverse);
                    assert_same_bits("in place", &z, &y);
                    let mut half = vec![bf16::ZERO; x.len()];
                    let out = ViewMut::Bf16(&mut half);
                    rope(cpu, view, heads, width, offset, r, &at, &cos, &sin, interleaved, inverse, out);
                    assert_same_bits("bf16", &widen(&half), &widen(&halve(&y)));
                    y
                });
                let mut expected = wide(&x);
                for (token, row) in expected.chunks_mut(heads * width).enumerate() {
                    for head in row.chunks_mut(width) {
                        rotate_ref(&mut head[offset..offset + r], at[token], interleaved, inverse);
                    }
                }
                Tolerance::new(2e-6, 1e-6).check("rope", &got, &expected).unwrap();
            }
        }
    }

    #[test]
    fn tables_scale_and_panics_name_the_position() {
        let (cos, sin) = cos_sin(&[1.0, 0.5], 3, 2.0);
        assert_eq!(cos[..2], [2.0, 2.0]);
        assert_eq!(sin[3], f64::from(0.5f32).sin() as f32 * 2.0);
        let caught = std::panic::catch_unwind(|| {
            let (x, out) = (View::F32(&[0.0; 4]), &mut [0.0; 4]);
            rope(&Cpu::detect(1), x, 1, 4, 0, 4, &[3], &cos, &sin, true, false, ViewMut::F32(out));
        });
        let message = *caught.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(message, "rope: position 3 in tables of 3");
    }

    fn mla_ref(shape: MlaShape, kv: &[f64], k_rope: &[f64], at: &[u32]) -> Vec<f64> {
        let MlaShape { heads, nope, value, rotary, interleaved } = shape;
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for (token, &position) in at.iter().enumerate() {
            let mut turned = k_rope[token * rotary..(token + 1) * rotary].to_vec();
            rotate_ref(&mut turned, position, interleaved, false);
            for head in kv[token * heads * (nope + value)..][..heads * (nope + value)].chunks(nope + value) {
                k.extend_from_slice(&head[..nope]);
                k.extend_from_slice(&turned);
                v.extend_from_slice(&head[nope..]);
            }
        }
        k.extend(v);
        k
    }

    #[test]
    fn mla_keys_and_gradient() {
        for (n, heads, nope, value, rotary) in [(1, 1, 1, 1, 2), (3, 2, 5, 3, 6), (70, 3, 32, 17, 16)] {
            for interleaved in [true, false] {
                let shape = MlaShape { heads, nope, value, rotary, interleaved };
                let (latent, at) = (5, positions(n));
                let stride = latent + rotary;
                let (cos, sin) = cos_sin(&frequencies(rotary), 101, 1.0);
                let (kv, a) = (normal(1, n * heads * (nope + value)), normal(2, n * stride));
                let (nk, nv) = (n * heads * (nope + rotary), n * heads * value);
                let got = everywhere("mla_keys", |cpu| {
                    let (mut k, mut v) = (vec![0.0; nk], vec![0.0; nv]);
                    let (k_out, v_out) = (ViewMut::F32(&mut k), ViewMut::F32(&mut v));
                    let (kv, a) = (View::F32(&kv), View::F32(&a));
                    mla_keys(cpu, shape, kv, a, stride, latent, &at, &cos, &sin, k_out, v_out);
                    [k, v].concat()
                });
                let k_rope: Vec<f64> =
                    a.chunks(stride).flat_map(|row| row[latent..].iter().map(|&x| f64::from(x))).collect();
                let expected = mla_ref(shape, &wide(&kv), &k_rope, &at);
                Tolerance::new(2e-6, 1e-6).check("mla_keys", &got, &expected).unwrap();

                let d = normal(3, nk + nv);
                let got = everywhere("mla_keys_backward", |cpu| {
                    let (mut d_kv, mut d_a) = (vec![0.0; kv.len()], vec![9.0; a.len()]);
                    let (out, rope_out) = (ViewMut::F32(&mut d_kv), ViewMut::F32(&mut d_a));
                    let (d_k, d_v) = (View::F32(&d[..nk]), View::F32(&d[nk..]));
                    mla_keys_backward(cpu, shape, d_k, d_v, &at, &cos, &sin, out, rope_out, stride, latent);
                    [d_kv, d_a].concat()
                });
                assert!(got[kv.len()..].chunks(stride).all(|row| row[..latent].iter().all(|&x| x == 9.0)));
                // the op is linear: its gradient is its transpose, row by row of the identity
                let d = wide(&d);
                let d_kv = wide(&got[..kv.len()]);
                let d_rope: Vec<f64> =
                    got[kv.len()..].chunks(stride).flat_map(|row| wide(&row[latent..])).collect();
                if n > 3 {
                    let (kv, zero) = (wide(&kv), vec![0.0; k_rope.len()]);
                    let through = dot(&mla_ref(shape, &kv, &zero, &at), &d);
                    assert!((dot(&kv, &d_kv) - through).abs() < 1e-3);
                    let through = dot(&mla_ref(shape, &vec![0.0; kv.len()], &k_rope, &at), &d);
                    assert!((dot(&k_rope, &d_rope) - through).abs() < 1e-3);
                    continue;
                }
                let by_units = |x: &[f64], f: &dyn Fn(&[f64]) -> f64| -> Vec<f64> {
                    (0..x.len())
                        .map(|i| {
                            let mut unit = vec![0.0; x.len()];
                            unit[i] = 1.0;
                            f(&unit)
                        })
                        .collect()
                };
                let zero = vec![0.0; k_rope.len()];
                let by_kv = |kv: &[f64]| dot(&mla_ref(shape, kv, &zero, &at), &d);
                let exact = by_units(&wide(&kv), &by_kv);
                assert_gradient("d_kv", by_kv, &wide(&kv), &exact);
                Tolerance::new(1e-6, 1e-6).check("d_kv", &got[..kv.len()], &exact).unwrap();
                let zero = vec![0.0; kv.len()];
                let by_rope = |k_rope: &[f64]| dot(&mla_ref(shape, &zero, k_rope, &at), &d);
                let exact = by_units(&k_rope, &by_rope);
                let d_rope: Vec<f32> = d_rope.iter().map(|&x| x as f32).collect();
                Tolerance::new(2e-6, 2e-6).check("d_k_rope", &d_rope, &exact).unwrap();
            }
        }
    }
}
