//! Attention against the f64 reference, and the bit contract.

use minke_num::tolerance::{Tolerance, assert_same_bits};
use minke_num::{bf16, rng};
use proptest::prelude::*;

use super::reference::{backward_ref, forward_ref};
use super::*;
use crate::simd::Level;
use crate::view::DType;

const LENGTHS: [usize; 14] = [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 200];
/// heads, kv heads, qk, v
const DIMS: [(usize, usize, usize, usize); 6] =
    [(3, 3, 48, 32), (2, 1, 20, 12), (4, 2, 64, 64), (1, 1, 192, 128), (6, 2, 48, 48), (5, 1, 7, 3)];

fn shape((heads, kv_heads, qk_dim, v_dim): (usize, usize, usize, usize)) -> AttentionShape {
    let scale = 1.0 / (qk_dim as f32).sqrt();
    AttentionShape { heads, kv_heads, qk_dim, v_dim, scale, window: None, softcap: None }
}

/// Windows and soft caps that are tried together; windows around a block and within a tile.
const LOOKS: [(Option<usize>, Option<f32>); 10] = [
    (None, None),
    (Some(1), None),
    (Some(5), Some(1.5)),
    (Some(31), None),
    (Some(63), None),
    (Some(64), Some(3.0)),
    (Some(65), None),
    (Some(100), None),
    (Some(1 << 40), None),
    (None, Some(0.7)),
];

/// A tensor in its dtype.
#[derive(Clone, PartialEq)]
enum Tensor {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Tensor {
    fn from(x: &[f32], dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32(x.to_vec()),
            DType::Bf16 => Self::Bf16(x.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }
    fn filled(len: usize, value: f32, dtype: DType) -> Self {
        Self::from(&vec![value; len], dtype)
    }
    fn random(stream: u64, len: usize, std: f32, dtype: DType) -> Self {
        let mut x = vec![0.0; len];
        rng::fill_normal(7, stream, std, &mut x);
        Self::from(&x, dtype)
    }
    fn view(&self) -> View<'_> {
        match self {
            Self::F32(x) => View::F32(x),
            Self::Bf16(x) => View::Bf16(x),
        }
    }
    fn part(&mut self, start: usize, end: usize) -> ViewMut<'_> {
        match self {
            Self::F32(x) => ViewMut::F32(&mut x[start..end]),
            Self::Bf16(x) => ViewMut::Bf16(&mut x[start..end]),
        }
    }
    fn f32(&self) -> Vec<f32> {
        match self {
            Self::F32(x) => x.clone(),
            Self::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }
    fn f64(&self) -> Vec<f64> {
        self.f32().into_iter().map(f64::from).collect()
    }
}

/// Random inputs of some sequences.
#[derive(Clone)]
struct Case {
    shape: AttentionShape,
    segments: Vec<Segment>,
    dtype: DType,
    tokens: usize,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
}

/// All that forward and backward give.
struct Results {
    out: Tensor,
    lse: Vec<f32>,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
}

impl Case {
    fn new(dims: (usize, usize, usize, usize), lengths: &[usize], dtype: DType, seed: u64) -> Self {
        let x = shape(dims);
        let mut segments = Vec::new();
        let mut tokens = 0;
        for &len in lengths {
            segments.push(Segment { start: tokens, len });
            tokens += len;
        }
        let random = |i, width| Tensor::random(seed * 10 + i, tokens * width, 1.0, dtype);
        let q = random(0, x.heads * x.qk_dim);
        let (k, v) = (random(1, x.kv_heads * x.qk_dim), random(2, x.kv_heads * x.v_dim));
        let d_out = random(3, x.heads * x.v_dim);
        Self { shape: x, segments, dtype, tokens, q, k, v, d_out }
    }

    fn looking(mut self, (window, softcap): (Option<usize>, Option<f32>)) -> Self {
        (self.shape.window, self.shape.softcap) = (window, softcap);
        self
    }

    fn forward(&self, cpu: &Cpu) -> (Tensor, Vec<f32>) {
        let x = &self.shape;
        let mut out = Tensor::filled(self.tokens * x.heads * x.v_dim, 5.0, self.dtype);
        let mut lse = vec![5.0; self.tokens * x.heads];
        let len = out.view().len();
        let (q, k, v) = (self.q.view(), self.k.view(), self.v.view());
        forward(cpu, x, q, k, v, &self.segments, out.part(0, len), &mut lse);
        (out, lse)
    }

    fn run(&self, cpu: &Cpu) -> Results {
        let (out, lse) = self.forward(cpu);
        let [mut d_q, mut d_k, mut d_v] =
            [&self.q, &self.k, &self.v].map(|x| Tensor::filled(x.view().len(), 5.0, self.dtype));
        let (nq, nk, nv) = (d_q.view().len(), d_k.view().len(), d_v.view().len());
        backward(
            cpu,
            &self.shape,
            self.q.view(),
            self.k.view(),
            self.v.view(),
            out.view(),
            &lse,
            self.d_out.view(),
            &self.segments,
            d_q.part(0, nq),
            d_k.part(0, nk),
            d_v.part(0, nv),
        );
        Results { out, lse, d_q, d_k, d_v }
    }

    /// The rows of sequence `i` alone.
    fn alone(&self, i: usize) -> Self {
        let Segment { start, len } = self.segments[i];
        let part = |x: &Tensor| {
            let width = x.view().len() / self.tokens;
            Tensor::from(&x.f32()[start * width..(start + len) * width], self.dtype)
        };
        Self {
            shape: self.shape,
            segments: vec![Segment { start: 0, len }],
            dtype: self.dtype,
            tokens: len,
            q: part(&self.q),
            k: part(&self.k),
            v: part(&self.v),
            d_out: part(&self.d_out),
        }
    }
}

fn same(what: &str, a: &Results, b: &Results) {
    assert_same_bits(&format!("{what} out"), &a.out.f32(), &b.out.f32());
    assert_same_bits(&format!("{what} lse"), &a.lse, &b.lse);
    assert_same_bits(&format!("{what} d_q"), &a.d_q.f32(), &b.d_q.f32());
    assert_same_bits(&format!("{what} d_k"), &a.d_k.f32(), &b.d_k.f32());
    assert_same_bits(&format!("{what} d_v"), &a.d_v.f32(), &b.d_v.f32());
}

/// f32 sums, plus what rounding inputs of the backward and outputs to bf16 costs.
fn bound(dtype: DType, depth: usize, scale: f64) -> Tolerance {
    let Tolerance { absolute, relative } = Tolerance::f32_sum(depth, scale);
    match dtype {
        DType::F32 => Tolerance::new(4.0 * absolute, 4.0 * relative),
        // half a unit in the last place of 8 bits; `delta` is made from rounded outputs
        DType::Bf16 => Tolerance::new(4.0 * absolute + scale / 256.0, 1.0 / 256.0),
    }
}

#[test]
fn gradients_of_the_reference_are_right() {
    for look in [(None, None), (Some(4), None), (None, Some(0.8)), (Some(3), Some(1.2))] {
        reference_gradients(&Case::new((4, 2, 5, 3), &[1, 6, 9], DType::F32, 1).looking(look));
    }
}

fn reference_gradients(case: &Case) {
    let x = &case.shape;
    let inputs = [case.q.f64(), case.k.f64(), case.v.f64()];
    let d_out = case.d_out.f64();
    let g = backward_ref(x, &inputs[0], &inputs[1], &inputs[2], &d_out, &case.segments);
    let loss = |inputs: &[Vec<f64>; 3]| {
        let (out, _) = forward_ref(x, &inputs[0], &inputs[1], &inputs[2], &case.segments);
        out.iter().zip(&d_out).map(|(a, b)| a * b).sum::<f64>()
    };
    for (which, d) in [&g.d_q, &g.d_k, &g.d_v].into_iter().enumerate() {
        for i in 0..d.len() {
            let mut moved = inputs.clone();
            let step = 1e-5;
            moved[which][i] += step;
            let up = loss(&moved);
            moved[which][i] -= 2.0 * step;
            let difference = (up - loss(&moved)) / (2.0 * step);
            assert!((difference - d[i]).abs() < 1e-8, "input {which}[{i}]: {} but {difference}", d[i]);
        }
    }
}

#[test]
fn agrees_with_the_reference() {
    let batches: [&[usize]; 4] = [&LENGTHS[..8], &LENGTHS[8..12], &[129], &[200, 0, 5]];
    for (i, dims) in DIMS.into_iter().enumerate() {
        for (j, lengths) in batches.into_iter().enumerate() {
            for (look, dtype) in
                [(0, DType::F32), (0, DType::Bf16), (1 + i * 4 + j, DType::F32), (2 + i * 4 + j, DType::Bf16)]
            {
                let look = LOOKS[look % LOOKS.len()];
                let case = Case::new(dims, lengths, dtype, (i * 4 + j) as u64).looking(look);
                let (q, k, v) = (case.q.f64(), case.k.f64(), case.v.f64());
                let (out, lse) = forward_ref(&case.shape, &q, &k, &v, &case.segments);
                let g = backward_ref(&case.shape, &q, &k, &v, &case.d_out.f64(), &case.segments);
                let mut first: Option<Results> = None;
                for level in Level::available() {
                    let what = format!("{} {dims:?} {lengths:?} {dtype:?} {look:?}", level.name());
                    let r = case.run(&Cpu::with_level(level, 2));
                    let check = |name: &str, t: Tolerance, got: &[f32], expected: &[f64]| {
                        t.check(&format!("{what} {name}"), got, expected).unwrap();
                    };
                    check("out", bound(dtype, dims.2, 1.0), &r.out.f32(), &out);
                    check("lse", bound(DType::F32, dims.2, 4.0), &r.lse, &lse);
                    let depth = dims.2 * dims.0 / dims.1;
                    check("d_q", bound(dtype, depth, 4.0), &r.d_q.f32(), &g.d_q);
                    check("d_k", bound(dtype, depth, 4.0), &r.d_k.f32(), &g.d_k);
                    check("d_v", bound(dtype, depth, 4.0), &r.d_v.f32(), &g.d_v);
                    // plain f32 arithmetic in one order: the levels do not merely come close
                    if dtype == DType::Bf16 && level.has_bf16_dot() {
                        continue;
                    }
                    match &first {
                        None => first = Some(r),
                        Some(first) => same(&what, &r, first),
                    }
                }
            }
        }
    }
}

#[test]
fn any_thread_count_and_any_batch_give_the_same_bits() {
    for (i, dims) in DIMS.into_iter().enumerate() {
        for level in Level::available() {
            let dtype = [DType::F32, DType::Bf16][i % 2];
            let case = Case::new(dims, &[65, 1, 130, 17, 64], dtype, 100 + i as u64)
                .looking([(None, None), (Some(9), None), (Some(70), Some(2.0))][i % 3]);
            let one = case.run(&Cpu::with_level(level, 1));
            for threads in [2, 3] {
                let many = case.run(&Cpu::with_level(level, threads));
                same(&format!("{} {dims:?} {threads} threads", level.name()), &many, &one);
            }
            for j in 0..case.segments.len() {
                let alone = case.alone(j).run(&Cpu::with_level(level, 1));
                let part = |x: &Tensor| {
                    let (x, width) = (x.f32(), x.view().len() / case.tokens);
                    let Segment { start, len } = case.segments[j];
                    Tensor::from(&x[start * width..(start + len) * width], dtype)
                };
                let batch = Results {
                    out: part(&one.out),
                    lse: part_f32(&one.lse, &case, j),
                    d_q: part(&one.d_q),
                    d_k: part(&one.d_k),
                    d_v: part(&one.d_v),
                };
                same(&format!("{} {dims:?} sequence {j} alone", level.name()), &alone, &batch);
            }
        }
    }
}

fn part_f32(x: &[f32], case: &Case, j: usize) -> Vec<f32> {
    let Segment { start, len } = case.segments[j];
    x[start * case.shape.heads..(start + len) * case.shape.heads].to_vec()
}

/// Sequences long enough to be cut into several tasks.
#[test]
fn long_sequences_are_cut_without_a_trace() {
    for (dims, look) in [
        ((1, 1, 16, 16), (None, None)),
        ((4, 1, 8, 8), (None, None)),
        ((4, 1, 8, 8), (Some(200), None)),
        ((1, 1, 16, 16), (Some(33), Some(2.0))),
    ] {
        let case = Case::new(dims, &[1500, 3, 700], DType::F32, 50).looking(look);
        let cpu = Cpu::detect(1);
        let one = case.run(&cpu);
        same("threads", &case.run(&Cpu::detect(3)), &one);
        let (q, k, v) = (case.q.f64(), case.k.f64(), case.v.f64());
        let (out, _) = forward_ref(&case.shape, &q, &k, &v, &case.segments);
        bound(DType::F32, 16, 1.0).check("out", &one.out.f32(), &out).unwrap();
        // a prefix of a sequence is a sequence
        let mut prefix = case.alone(0);
        prefix.segments[0].len = 641;
        let (out, lse) = prefix.forward(&cpu);
        let (rows, heads) = (641 * case.shape.heads, case.shape.heads);
        assert_same_bits("prefix", &out.f32()[..rows * dims.3], &one.out.f32()[..rows * dims.3]);
        assert_same_bits("prefix lse", &lse[..641 * heads], &one.lse[..641 * heads]);
    }
}

#[test]
fn writes_its_own_rows_only() {
    for dtype in [DType::F32, DType::Bf16] {
        for level in Level::available() {
            let mut case = Case::new((4, 2, 20, 12), &[5, 70, 2, 33, 4], dtype, 3);
            let all = case.segments.clone();
            case.segments = vec![all[1], all[3]];
            let r = case.run(&Cpu::with_level(level, 2));
            let untouched = |what: &str, x: &[f32]| {
                let width = x.len() / case.tokens;
                for (row, x) in x.chunks(width).enumerate() {
                    let inside = case.segments.iter().any(|s| (s.start..s.start + s.len).contains(&row));
                    assert_eq!(x.contains(&5.0), !inside, "{what} row {row}");
                    assert!(inside || x.iter().all(|&x| x == 5.0), "{what} row {row}");
                }
            };
            untouched("out", &r.out.f32());
            untouched("lse", &r.lse);
            untouched("d_q", &r.d_q.f32());
            untouched("d_k", &r.d_k.f32());
            untouched("d_v", &r.d_v.f32());
        }
    }
}

/// Scores far beyond the range of the exponential, of both signs, ascending and descending along the keys.
#[test]
fn large_scores_stay_exact() {
    for sign in [1.0f32, -1.0] {
        let mut case = Case::new((2, 2, 16, 16), &[150], DType::F32, 9);
        let ramp: Vec<f32> =
            (0..150 * 32).map(|i| sign * (i / 32) as f32 * if i % 32 < 16 { 1.0 } else { 20.0 }).collect();
        case.k = Tensor::F32(ramp);
        case.q = Tensor::filled(150 * 32, 0.5, DType::F32);
        let (q, k, v) = (case.q.f64(), case.k.f64(), case.v.f64());
        let (out, lse) = forward_ref(&case.shape, &q, &k, &v, &case.segments);
        let (got, got_lse) = case.forward(&Cpu::detect(1));
        // a score of 6,000 has an f32 rounding error of 2.4e-4, and so has its exponential
        Tolerance::new(1e-3, 1e-3).check("out", &got.f32(), &out).unwrap();
        Tolerance::new(1e-3, 1e-6).check("lse", &got_lse, &lse).unwrap();
    }
}

#[test]
fn hostile_numbers_end_and_stay_in_their_sequence() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -3e38, 1e-40] {
        for which in 0..4 {
            for level in Level::available() {
                let mut case = Case::new((2, 1, 20, 12), &[70, 66, 40], DType::F32, 11);
                let clean = case.run(&Cpu::with_level(level, 1));
                let x = [&mut case.q, &mut case.k, &mut case.v, &mut case.d_out];
                if let Tensor::F32(x) = x.into_iter().nth(which).unwrap() {
                    let width = x.len() / 176;
                    for row in [70, 100, 134] {
                        x[row * width + 3] = bad;
                    }
                }
                let dirty = case.run(&Cpu::with_level(level, 2));
                let outside = |x: &Tensor| {
                    let (x, width) = (x.f32(), x.view().len() / 176);
                    [&x[..70 * width], &x[136 * width..]].concat()
                };
                for (a, b) in [
                    (&clean.out, &dirty.out),
                    (&clean.d_q, &dirty.d_q),
                    (&clean.d_k, &dirty.d_k),
                    (&clean.d_v, &dirty.d_v),
                ] {
                    assert_same_bits("other sequences", &outside(a), &outside(b));
                }
                if bad.is_nan() && which == 2 {
                    assert!(dirty.out.f32()[135 * 24..136 * 24].iter().any(|x| x.is_nan()), "NaN was lost");
                }
            }
        }
    }
}

/// What is read of `x`, in rows of `width` for each head, from a cache of 8 bits.
fn decoded(x: &Tensor, width: usize) -> Vec<f32> {
    let mut x = x.f32();
    for x in x.chunks_mut(width).flat_map(|row| row.chunks_mut(32)) {
        let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let scale = bf16::from_f32(most / 127.0).to_f32();
        for x in x {
            let code = (*x * (1.0 / scale)).round_ties_even();
            assert!(
                code.abs() <= 127.0 && (code * scale - *x).abs() <= 0.502 * most / 127.0,
                "{x} is {code}"
            );
            *x = code * scale;
        }
    }
    x
}

/// A case with the keys and values that products on a level read from a cache of this format.
fn held(case: &Case, format: KvFormat, level: Level) -> Case {
    if format != KvFormat::Int8 {
        return case.clone();
    }
    let dtype = if level.has_bf16_dot() { case.dtype } else { DType::F32 };
    let AttentionShape { qk_dim, v_dim, .. } = case.shape;
    let read = |x: &Tensor, width| Tensor::from(&decoded(x, width), dtype);
    Case { k: read(&case.k, qk_dim), v: read(&case.v, v_dim), ..case.clone() }
}

fn append(cache: &mut KvCache, case: &Case, segment: Segment, from: usize, to: usize) {
    let rows = |x: &'_ Tensor| x.view().len() / case.tokens;
    let (k_width, v_width) = (rows(&case.k), if cache.is_of_latents() { 0 } else { rows(&case.v) });
    let (a, b) = (segment.start + from, segment.start + to);
    cache
        .append(case.k.view().slice(a * k_width, b * k_width), case.v.view().slice(a * v_width, b * v_width));
}

/// Runs all sequences of a case through caches, `step(sequence, done, len)` new rows at a time, mixed in one batch.
fn through_caches(
    case: &Case,
    cpu: &Cpu,
    format: impl Into<KvFormat>,
    step: impl FnMut(usize, usize, usize) -> usize,
) -> Vec<f32> {
    through(case, cpu, &KvCache::new(&case.shape, format), step)
}

/// The same through copies of an empty cache.
fn through(
    case: &Case,
    cpu: &Cpu,
    empty: &KvCache,
    mut step: impl FnMut(usize, usize, usize) -> usize,
) -> Vec<f32> {
    let x = &case.shape;
    let mut caches = vec![empty.clone(); case.segments.len()];
    let (q_width, o_width) = (x.heads * x.qk_dim, x.heads * x.v_dim);
    let (q, mut out) = (case.q.f32(), vec![0.0; case.tokens * o_width]);
    loop {
        let (mut rows, mut batch, mut work) = (Vec::new(), Vec::new(), Vec::new());
        for (i, segment) in case.segments.iter().enumerate() {
            let done = caches[i].len();
            let now = step(i, done, segment.len).min(segment.len - done);
            append(&mut caches[i], case, *segment, done, done + now);
            let a = (segment.start + done) * q_width;
            work.push((i, rows.len() / q_width, now, segment.start + done));
            rows.extend_from_slice(&q[a..a + now * q_width]);
        }
        if rows.is_empty() {
            return out;
        }
        for &(i, start, len, _) in &work {
            batch.push(CachedSegment { start, len, cache: &caches[i] });
        }
        let rows = Tensor::from(&rows, case.dtype);
        let mut got = Tensor::filled(rows.view().len() / x.qk_dim * x.v_dim, 3.0, case.dtype);
        let len = got.view().len();
        forward_cached(cpu, x, rows.view(), &batch, got.part(0, len));
        let got = got.f32();
        for (_, start, len, token) in work {
            out[token * o_width..(token + len) * o_width]
                .copy_from_slice(&got[start * o_width..(start + len) * o_width]);
        }
    }
}

#[test]
fn one_token_at_a_time_is_the_forward() {
    for (i, dims) in DIMS.into_iter().enumerate() {
        for level in Level::available() {
            for (look, dtype) in [
                (0, DType::F32),
                (0, DType::Bf16),
                (1 + i, DType::F32),
                (2 + i, DType::Bf16),
                (4 + i, DType::Bf16),
            ] {
                let look = LOOKS[look % LOOKS.len()];
                let case = Case::new(dims, &[130, 1, 67], dtype, 200 + i as u64).looking(look);
                let cpu = Cpu::with_level(level, 2);
                for format in [dtype.into(), KvFormat::Int8] {
                    let (out, _) = held(&case, format, level).forward(&cpu);
                    let got = through_caches(&case, &cpu, format, |_, _, _| 1);
                    let what = format!("{} {dims:?} {dtype:?} in {format:?} {look:?}", level.name());
                    assert_same_bits(&what, &got, &out.f32());
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]
    #[test]
    fn any_chunking_is_the_forward(
        seed in 0u64..1000,
        dims in 0usize..DIMS.len(),
        lengths in prop::collection::vec(1usize..220, 1..4),
        most in 1u64..150,
        half in any::<bool>(),
        coded in any::<bool>(),
        threads in 1usize..4,
        window in prop::option::of(1usize..200),
        capped in any::<bool>(),
    ) {
        let dtype = if half { DType::Bf16 } else { DType::F32 };
        let case = Case::new(DIMS[dims], &lengths, dtype, seed).looking((window, capped.then_some(2.5)));
        let format = if coded { KvFormat::Int8 } else { dtype.into() };
        let (out, _) = held(&case, format, Level::detect()).forward(&Cpu::detect(1));
        let chunk = |i: usize, done: usize, _| 1 + rng::below(seed, i as u64, done as u64, most) as usize;
        let got = through_caches(&case, &Cpu::detect(threads), format, chunk);
        assert_same_bits("chunks", &got, &out.f32());
    }
}

/// Single tokens behind so many that the heads of a sequence are tasks of their own.
#[test]
fn far_tokens_are_the_forward() {
    for format in [KvFormat::F32, KvFormat::Int8] {
        for look in [(None, None), (Some(70), None)] {
            let case = Case::new((4, 4, 8, 8), &[600], DType::F32, 80).looking(look);
            let (out, _) = held(&case, format, Level::detect()).forward(&Cpu::detect(1));
            for threads in [1, 3] {
                let step = |_, done: usize, _| if done == 0 { 590 } else { 1 };
                let got = through_caches(&case, &Cpu::detect(threads), format, step);
                assert_same_bits(&format!("{format:?} {look:?} {threads} threads"), &got, &out.f32());
            }
        }
    }
}

/// A case whose values are the first columns of its keys.
fn of_latents(case: Case) -> Case {
    let AttentionShape { qk_dim, v_dim, .. } = case.shape;
    let values: Vec<f32> = case.k.f32().chunks(qk_dim).flat_map(|k| &k[..v_dim]).copied().collect();
    let dtype = case.k.view().dtype();
    Case { v: Tensor::from(&values, dtype), ..case }
}

/// What is read of such a case from a cache of latents: values as the keys hold them.
fn held_latents(case: &Case, format: KvFormat, level: Level) -> Case {
    of_latents(held(case, format, level))
}

/// heads, kv heads, qk, v: whole and odd numbers of everything, and values as wide as keys.
const LATENTS: [(usize, usize, usize, usize); 7] = [
    (16, 1, 96, 64),
    (5, 1, 288, 256),
    (3, 1, 36, 32),
    (33, 1, 40, 24),
    (2, 1, 21, 9),
    (6, 2, 48, 48),
    (1, 1, 7, 3),
];

/// On every level, in every format, on blocks whose memory was left full of NaN.
#[test]
fn a_cache_of_latents_is_one_of_keys_and_values() {
    for (i, dims) in LATENTS.into_iter().enumerate() {
        for level in Level::available() {
            for (dtype, format) in FORMATS {
                let look = LOOKS[i % LOOKS.len()];
                let case = of_latents(Case::new(dims, &[130, 1, 67], dtype, 400 + i as u64).looking(look));
                let (out, _) = held_latents(&case, format, level).forward(&Cpu::with_level(level, 1));
                for (threads, chunk) in [(2, 1), (1, 5), (2, 16), (3, 17), (2, 33), (1, 64), (2, 200)] {
                    let empty = KvCache::of_latents(&case.shape, format);
                    let junk = Tensor::filled(512 * dims.1 * dims.2, f32::NAN, dtype);
                    empty.clone().append(junk.view(), View::F32(&[]));
                    let got = through(&case, &Cpu::with_level(level, threads), &empty, |_, _, _| chunk);
                    let what = format!("{} {dims:?} {dtype:?} in {format:?} {look:?}", level.name());
                    assert_same_bits(&format!("{what} chunks of {chunk}"), &got, &out.f32());
                }
            }
        }
    }
}

/// Few rows behind many, whose query heads are shared out.
#[test]
fn far_latents_are_the_forward() {
    for (dtype, format) in FORMATS {
        for heads in [7, 16, 40] {
            let case = of_latents(Case::new((heads, 1, 48, 32), &[600, 3, 530], dtype, 81));
            let (out, _) = held_latents(&case, format, Level::detect()).forward(&Cpu::detect(1));
            for threads in [1, 2, 3, 8] {
                let step = |_, done: usize, len: usize| if done == 0 { len - 10 } else { 1 + done % 3 };
                let empty = KvCache::of_latents(&case.shape, format);
                let got = through(&case, &Cpu::detect(threads), &empty, step);
                assert_same_bits(&format!("{heads} heads in {format:?} {threads} threads"), &got, &out.f32());
            }
        }
    }
}

/// Positions that are forgotten, and copies: what lies behind the last position is read into no value.
#[test]
fn latents_are_forgotten_and_shared() {
    for level in Level::available() {
        for (dtype, format) in FORMATS {
            for kept in [1, 15, 16, 31, 32, 33, 63, 64, 65] {
                let case = of_latents(Case::new((3, 1, 20, 12), &[100], dtype, 72));
                let cpu = Cpu::with_level(level, 1);
                let (out, _) = held_latents(&case, format, level).forward(&cpu);
                let mut cache = KvCache::of_latents(&case.shape, format);
                append(&mut cache, &case, case.segments[0], 0, kept);
                cache.append(Tensor::filled(70 * 20, f32::NAN, dtype).view(), View::F32(&[]));
                let mut copy = cache.clone();
                copy.truncate(kept);
                cache.truncate(kept);
                for mut cache in [copy, cache] {
                    append(&mut cache, &case, case.segments[0], kept, kept + 1);
                    let row = Tensor::from(&case.q.f32()[kept * 60..(kept + 1) * 60], dtype);
                    let mut got = Tensor::filled(36, 0.0, dtype);
                    let batch = [CachedSegment { start: 0, len: 1, cache: &cache }];
                    forward_cached(&cpu, &case.shape, row.view(), &batch, got.part(0, 36));
                    let what = format!("{} {dtype:?} in {format:?} after {kept}", level.name());
                    assert_same_bits(&what, &got.f32(), &out.f32()[kept * 36..(kept + 1) * 36]);
                }
            }
        }
    }
}

/// Keys and nothing else, whole half blocks of pairs.
#[test]
fn latents_are_held_once() {
    let shape = shape((16, 1, 288, 256));
    let bytes = |format| KvCache::of_latents(&shape, format).bytes_per_block();
    assert_eq!(bytes(KvFormat::Bf16), BLOCK * 288 * 2);
    assert_eq!(bytes(KvFormat::F32), BLOCK * 288 * 4);
    assert_eq!(bytes(KvFormat::Int8), BLOCK * (288 + 288 / 16));
}

/// Rounding when appended is the rounding of a bf16 tensor; an f32 cache keeps what it is given.
#[test]
fn caches_convert() {
    let half = Case::new((2, 1, 20, 12), &[90], DType::Bf16, 60);
    let mut full = half.clone();
    let mut noise = vec![0.0; full.k.view().len()];
    rng::fill_normal(1, 1, 1.0, &mut noise);
    full.k = Tensor::F32(noise.clone());
    let rounded = Case { k: Tensor::from(&noise, DType::Bf16), ..half.clone() };
    let cpu = Cpu::detect(1);
    let (out, _) = rounded.forward(&cpu);
    let got = through_caches(&full, &cpu, DType::Bf16, |_, _, _| 90);
    assert_same_bits("rounded", &got, &out.f32());
    let widened = [&half.k, &half.v].map(|x| Tensor::F32(x.f32()));
    let [k, v] = widened;
    let (out, _) = Case { k, v, ..half.clone() }.forward(&cpu);
    let got = through_caches(&half, &cpu, DType::F32, |_, _, _| 7);
    assert_same_bits("widened", &got, &out.f32());
}

/// Chunks of every kind of tile, on blocks whose memory was left full of NaN.
#[test]
fn chunks_around_a_tile_are_the_forward() {
    for dims in [DIMS[0], DIMS[1], DIMS[4], DIMS[5]] {
        for level in Level::available() {
            for (dtype, format, window) in [
                (DType::F32, KvFormat::F32, None),
                (DType::F32, KvFormat::Int8, Some(65)),
                (DType::Bf16, KvFormat::Bf16, None),
                (DType::Bf16, KvFormat::Bf16, Some(20)),
                (DType::Bf16, KvFormat::Bf16, Some(65)),
                (DType::Bf16, KvFormat::Int8, None),
                (DType::Bf16, KvFormat::Int8, Some(20)),
            ] {
                let case = Case::new(dims, &[130, 66, 34], dtype, 300).looking((window, None));
                let cpu = Cpu::with_level(level, 2);
                let (out, _) = held(&case, format, level).forward(&cpu);
                for chunk in [3, 5, 8, 15, 16, 17, 31, 32, 33, 64, 65] {
                    let x = &case.shape;
                    let junk = |width: usize| Tensor::filled(512 * width, f32::NAN, dtype);
                    let (k, v) = (junk(x.kv_heads * x.qk_dim), junk(x.kv_heads * x.v_dim));
                    KvCache::new(x, format).append(k.view(), v.view());
                    let got = through_caches(&case, &cpu, format, |_, _, _| chunk);
                    let kind = format!("{dtype:?} in {format:?}");
                    let what = format!("{} {dims:?} {kind} {window:?} chunks of {chunk}", level.name());
                    assert_same_bits(&what, &got, &out.f32());
                }
            }
        }
    }
}

#[test]
fn forgotten_positions_leave_no_trace() {
    for kept in [31, 32, 33, 40, 47, 63, 64, 65, 70, 71] {
        for level in Level::available() {
            for (dtype, format) in FORMATS {
                forget(&Cpu::with_level(level, 1), dtype, format, kept);
            }
        }
    }
}

/// Formats, and the dtype of what is appended and computed.
const FORMATS: [(DType, KvFormat); 4] = [
    (DType::F32, KvFormat::F32),
    (DType::Bf16, KvFormat::Bf16),
    (DType::F32, KvFormat::Int8),
    (DType::Bf16, KvFormat::Int8),
];

/// Positions from `kept` on are NaN, forgotten, and appended again: by the cache and by a copy of it.
fn forget(cpu: &Cpu, dtype: DType, format: KvFormat, kept: usize) {
    let case = Case::new((3, 3, 20, 12), &[100], dtype, 70);
    let x = &case.shape;
    let (out, _) = held(&case, format, cpu.level()).forward(cpu);
    let mut cache = KvCache::new(x, format);
    append(&mut cache, &case, case.segments[0], 0, kept);
    let junk = |width: usize| Tensor::filled(70 * width, f32::NAN, dtype);
    cache.append(junk(3 * 20).view(), junk(3 * 12).view());
    assert_eq!(cache.len(), kept + 70);
    let before = cache.bytes();
    let copy_of_junk = cache.clone();
    cache.truncate(kept);
    assert_eq!((cache.len(), cache.is_empty()), (kept, false));
    assert!(cache.bytes() < before);
    assert_eq!(cache.bytes(), kept.div_ceil(BLOCK) * KvCache::block_bytes(x, format));
    // the copy gets memory that was full of NaN
    drop(copy_of_junk);
    let q = case.q.f32();
    for mut cache in [cache.clone(), cache] {
        for at in kept - 1..100 {
            if at >= kept {
                append(&mut cache, &case, case.segments[0], at, at + 1);
            }
            let row = Tensor::from(&q[at * 60..(at + 1) * 60], dtype);
            let mut got = Tensor::filled(36, 0.0, dtype);
            let batch = [CachedSegment { start: 0, len: 1, cache: &cache }];
            forward_cached(cpu, x, row.view(), &batch, got.part(0, 36));
            let what = format!("{} {dtype:?} in {format:?} after truncation to {kept}", cpu.level().name());
            assert_same_bits(&what, &got.f32(), &out.f32()[at * 36..(at + 1) * 36]);
        }
    }
}

/// What one copy writes, forgets or takes over shows in no other, whether they part in a block or between two.
#[test]
fn copies_share_blocks_and_write_apart() {
    for level in Level::available() {
        for (dtype, format) in FORMATS {
            for common in [5, 64, 75, 128] {
                share(&Cpu::with_level(level, 1), dtype, format, common);
            }
        }
    }
}

fn share(cpu: &Cpu, dtype: DType, format: KvFormat, common: usize) {
    let case = Case::new((3, 3, 20, 12), &[150], dtype, 71);
    let (x, segment) = (&case.shape, case.segments[0]);
    let (out, _) = held(&case, format, cpu.level()).forward(cpu);
    let mut first = KvCache::new(x, format);
    append(&mut first, &case, segment, 0, common);
    let mut second = first.clone();
    let mut pages = KvCache::new(x, format);
    let junk = |width: usize| Tensor::filled(70 * width, f32::NAN, dtype);
    second.append(junk(3 * 20).view(), junk(3 * 12).view());
    let mut third = second.clone();
    third.truncate(common);
    second.truncate(common - 3);
    append(&mut first, &case, segment, common, 150);
    append(&mut third, &case, segment, common, 150);
    append(&mut second, &case, segment, common - 3, 150);
    for i in 0..2 {
        let page = third.page(i).expect("a full block");
        assert!(page.is_shared());
        pages.push_page(&page);
        second.replace_page(i, &page);
    }
    assert!(third.page(2).is_none());
    append(&mut pages, &case, segment, 128, 150);
    let q = case.q.f32();
    for cache in [first, second, third, pages] {
        let row = Tensor::from(&q[149 * 60..], dtype);
        let mut got = Tensor::filled(36, 0.0, dtype);
        let batch = [CachedSegment { start: 0, len: 1, cache: &cache }];
        forward_cached(cpu, x, row.view(), &batch, got.part(0, 36));
        let what = format!("{} {dtype:?} in {format:?}, {common} positions in common", cpu.level().name());
        assert_same_bits(&what, &got.f32(), &out.f32()[149 * 36..]);
    }
}

/// Half of bf16, and a scale of two bytes for 32 elements.
#[test]
fn eight_bits_are_eight_and_a_half() {
    let shape = shape((8, 2, 128, 96));
    let elements = BLOCK * 2 * (128 + 96);
    assert_eq!(KvCache::block_bytes(&shape, DType::Bf16), 2 * elements);
    assert_eq!(KvCache::block_bytes(&shape, KvFormat::Int8), elements + elements / 16);
}

/// What is too small for a code is zero; among numbers that share a scale with one that is none, none is left.
#[test]
fn codes_of_hostile_numbers_are_numbers_or_none() {
    let inputs = [0.0, -0.0, 1e-45, -1e-37, f32::MAX, -f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
    for (bad, level) in
        inputs.into_iter().flat_map(|bad| Level::available().into_iter().map(move |level| (bad, level)))
    {
        for dtype in [DType::F32, DType::Bf16] {
            let x = shape((1, 1, 40, 40));
            let mut v = vec![1.0; 40];
            v[3] = bad;
            v[17] = bad / 2.0;
            let mut cache = KvCache::new(&x, KvFormat::Int8);
            let one = Tensor::filled(40, 1.0, dtype);
            cache.append(one.view(), Tensor::from(&v, dtype).view());
            let mut got = Tensor::filled(40, 5.0, DType::F32);
            let batch = [CachedSegment { start: 0, len: 1, cache: &cache }];
            forward_cached(&Cpu::with_level(level, 1), &x, one.view(), &batch, got.part(0, 40));
            let (got, what) = (got.f32(), format!("{} {dtype:?} {bad}", level.name()));
            let finite = Tensor::from(&[bad], dtype).f32()[0].is_finite();
            assert_eq!(got[..32].iter().any(|x| x.is_nan()), !finite, "{what}");
            assert_eq!(got[..32].iter().all(|x| x.is_nan()), !finite, "{what}");
            assert!(got[32..].iter().all(|x| (x - 1.0).abs() < 0.005), "{what}: {:?}", &got[32..]);
            if finite {
                let least = bad.abs().max(1.0) / 127.0;
                assert!((got[3] - bad).abs() <= least && (got[17] - bad / 2.0).abs() <= least, "{what}");
            }
        }
    }
}

#[test]
fn contradictions_are_named() {
    let case = Case::new((2, 1, 4, 4), &[3], DType::F32, 1);
    let message = |segments: &[Segment]| {
        let segments = segments.to_vec();
        let case = Case { segments, ..case.clone() };
        let result = std::panic::catch_unwind(|| case.forward(&Cpu::detect(1)));
        *result.err().expect("it must panic").downcast::<String>().expect("a message")
    };
    assert!(message(&[Segment { start: 0, len: 4 }]).contains("leaves the 3 tokens"));
    assert!(message(&[Segment { start: 0, len: 2 }, Segment { start: 1, len: 1 }]).contains("overlaps"));
    assert!(message(&[Segment { start: 1, len: usize::MAX }]).contains("segment 1+"));
}
