//! How long a step will take: each piece of work measured at its own shape, times how often it comes.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use minke_cpu::adamw::{AdamW, adamw};
use minke_cpu::attention::{self, AttentionShape, Segment};
use minke_cpu::fp8::{Cuts, Values};
use minke_cpu::gemm::{Operand, Packed, Packed8, Weight8, matmul, matmul_tn, matmul8, matmul8_tn};
use minke_cpu::loss::{self, Scales};
use minke_cpu::reduce::sum_squares;
use minke_cpu::swiglu::{self, Gate};
use minke_cpu::{Cpu, DType, View, ViewMut, copy, norm, rope};
use minke_model::spec;
use minke_num::bf16;
use minke_tensor::{Tensor, Tensor8};
use serde::Serialize;

use super::{Found, Shape, Weights, Work, compute, trained, weights};
use crate::optim::muon;

/// Seconds that all measurements share by what they are about; a little more where the least that each needs is more.
const BUDGET_S: f64 = 2.5;
/// The least share of it.
const LEAST_S: f64 = 0.02;
/// Rows that a piece is measured over, at most; longer ones are as fast.
const ROWS: usize = 4096;
/// Operations of a measured product, about, at most, and the rows that it has at least: more are as fast.
const PRODUCT_OPS: usize = 3 << 30;
const PRODUCT_ROWS: usize = 512;
/// Operations of a measured orthogonalisation, about, at most.
const MUON_OPS: f64 = 3e9;
/// Times that a piece is measured, at most, after once to warm up.
const RUNS: usize = 5;
/// What a step takes beside the pieces: threads that wait for each other, choices of experts, short loops.
const REST: f64 = 1.08;
/// Elements that pass through the caches before each.
const OTHER_ELEMENTS: usize = 8 << 20;
/// How far apart the tokens of an expert are, about.
const APART: usize = 5;
/// Elements of the optimizer's measurement: more than caches hold.
const PASS_ELEMENTS: usize = 4 << 20;
/// Seconds of each piece of the update.
const PIECE_S: f64 = 0.1;
/// Elements of a weight whose packing is measured.
const PACKED_SIDE: usize = 1024;

/// What a step will take, in seconds, and a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Time {
    /// A whole step.
    pub step_s: f64,
    /// Tokens per second.
    pub tok_s: f64,
    /// All steps, without evaluations, samples and checkpoints.
    pub run_s: f64,
    /// Matrix products of layers.
    pub products_s: f64,
    /// Attention.
    pub attention_s: f64,
    /// The head and its loss.
    pub head_s: f64,
    /// Norms and gated products, and everything that only moves memory.
    pub passes_s: f64,
    /// The optimizer, the gradient's norm, and packing the weights again.
    pub update_s: f64,
    /// How long measuring took.
    pub measuring_s: f64,
}

/// A matrix of one dtype, none of whose numbers is special, in memory of the kind that training has.
fn numbers(rows: usize, cols: usize, dtype: DType) -> Tensor {
    let some: Vec<f32> = (0..101 * 64).map(|i| (i * 37 % 101) as f32 / 101.0 - 0.5).collect();
    let mut x = Tensor::uninit(rows, cols, dtype);
    match x.view_mut() {
        ViewMut::F32(x) => x.chunks_mut(some.len()).for_each(|x| x.copy_from_slice(&some[..x.len()])),
        ViewMut::Bf16(x) => {
            let some: Vec<bf16> = some.iter().map(|&x| bf16::from_f32(x)).collect();
            x.chunks_mut(some.len()).for_each(|x| x.copy_from_slice(&some[..x.len()]));
        }
    }
    x
}

/// Measures as a step finds things: what is read was written a while ago, and other memory has passed since.
struct Probe<'a> {
    cpu: &'a Cpu,
    other: Vec<f32>,
    /// When the piece in work should be done.
    until: Instant,
}

impl Probe<'_> {
    /// Gives the next piece so many seconds, preparations included.
    fn allow(&mut self, seconds: f64) {
        self.until = Instant::now() + Duration::from_secs_f64(seconds.max(LEAST_S));
    }

    /// Seconds of `f`: the mean of a few runs, each after other memory went through the caches. Not their middle: what
    /// others on the machine take from a short run once in a while they take from every step.
    fn seconds(&mut self, mut f: impl FnMut()) -> f64 {
        f();
        let (mut sum, mut runs) = (0.0, 0);
        while runs == 0 || runs < RUNS && Instant::now() < self.until {
            let (from, to) = self.other.split_at_mut(OTHER_ELEMENTS / 2);
            copy::add(self.cpu, View::F32(from), View::F32(from), ViewMut::F32(to));
            let start = Instant::now();
            f();
            sum += start.elapsed().as_secs_f64();
            runs += 1;
        }
        sum / runs as f64
    }
}

/// About how long a piece of work takes, in operations of a product: what it is worth to measure it.
fn worth(work: &Work, rows: usize, sequence_length: usize) -> f64 {
    // of a pass over memory each element counts as many operations
    let passes = |rows: usize, cols: usize| 64.0 * rows as f64 * cols as f64;
    let product = |rows: usize, m: usize, n: usize| 2.0 * rows as f64 * m as f64 * n as f64;
    match *work {
        Work::Product { rows, k, n, .. } => product(rows, k, n),
        Work::Gradient { rows, m, n, .. } => product(rows, m, n),
        Work::Attention { heads, qk, v, back, .. } => {
            let once = product(rows, heads * (qk + v), sequence_length) / 2.0;
            if back { 2.5 * once } else { once }
        }
        Work::Head { rows, d, vocabulary, .. } => product(rows, d, vocabulary),
        Work::Coding { rows, cols, .. } => passes(rows, cols),
        Work::Norm { rows, d, .. } => passes(rows, d),
        Work::Swiglu { rows, f, .. } => passes(rows, 3 * f),
    }
}

/// How rows and groups of a product of `each_ops` operations a row are measured: the rows of a group as they are, in
/// fewer groups where there are many; and the factor to all of it.
fn part(rows: usize, groups: usize, each_ops: usize) -> (usize, usize, f64) {
    let most = (PRODUCT_OPS / each_ops.max(1)).clamp(PRODUCT_ROWS, ROWS);
    if rows <= most {
        return (rows, groups, 1.0);
    }
    let each = rows.div_ceil(groups).min(most);
    let groups = groups.min(most.div_ceil(each));
    let measured = each * groups;
    (measured, groups, rows as f64 / measured as f64)
}

/// Rows of a grouped product, read as experts read their tokens: ascending, a few apart.
fn index(rows: usize, groups: usize) -> Option<Vec<u32>> {
    (groups > 1).then(|| (0..rows).map(|i| (i * APART % rows) as u32).collect())
}

/// Where each of `groups` begins among `rows`, and the end.
fn offsets(rows: usize, groups: usize) -> Vec<u32> {
    (0..=groups).map(|g| (rows * g / groups) as u32).collect()
}

/// Seconds of one piece of work, once.
fn seconds(probe: &mut Probe<'_>, work: &Work, rows: usize, sequence_length: usize) -> f64 {
    let cpu = probe.cpu;
    match *work {
        Work::Product { rows, k, parts, n, groups, weights, x, passing, y } => {
            let (rows, groups, factor) = part(rows, groups, 2 * k * n);
            let (x, mut y) = (numbers(rows, k, x), numbers(rows, n, y));
            let w = numbers(groups * n, k, DType::F32);
            let (offsets, index) = (offsets(rows, groups), index(rows, groups));
            if let Some(how) = weights.fp8 {
                let depth = Cuts::parts(k, parts);
                let codes = (!passing).then(|| Tensor8::quantize(cpu, &x, depth, how));
                let mut packed = Packed8::empty();
                let weight = Weight8 { w: w.f32(), how, groups, rows: depth, cols: n };
                packed.pack(cpu, weight, false, true);
                drop(w);
                return factor
                    * probe.seconds(|| {
                        let index = index.as_deref();
                        let x = match &codes {
                            Some(codes) => Values::Codes(codes.codes(index)),
                            None => Values::Plain(Operand { view: x.view(), cols: k, index }),
                        };
                        matmul8(cpu, x, how, &offsets, &packed, y.view_mut());
                    });
            }
            let mut packed = Packed::empty();
            packed.pack_nt(cpu, w.view(), groups, n, k, compute(weights.dtype));
            drop(w);
            factor
                * probe.seconds(|| {
                    let x = Operand { view: x.view(), cols: k, index: index.as_deref() };
                    matmul(cpu, x, &offsets, &packed, y.view_mut(), false);
                })
        }
        Work::Gradient { rows, m, n, groups, weights, x, coded } => {
            let (rows, groups, factor) = part(rows, groups, 2 * m * n);
            let (d_y, x) = (numbers(rows, m, x), numbers(rows, n, x));
            let mut d_w = vec![0.0; groups * m * n];
            let (offsets, index) = (offsets(rows, groups), index(rows, groups));
            let Weights { dtype, fp8: Some(how) } = weights else {
                return factor
                    * probe.seconds(|| {
                        let d_y = Operand { view: d_y.view(), cols: m, index: index.as_deref() };
                        let x = Operand::new(x.view(), n);
                        matmul_tn(cpu, d_y, x, &offsets, compute(weights.dtype), &mut d_w, false);
                    });
            };
            debug_assert_eq!(dtype, x.dtype(), "activations of a weight in FP8");
            let codes = coded.then(|| Tensor8::quantize(cpu, &x, Cuts::whole(n), how));
            factor
                * probe.seconds(|| {
                    // what is coded are the tokens that went in, and experts read those through an index
                    let (of_d_y, values) = match &codes {
                        Some(codes) => (None, Values::Codes(codes.codes(index.as_deref()))),
                        None => (index.as_deref(), Values::Plain(Operand::new(x.view(), n))),
                    };
                    let d_y = Operand { view: d_y.view(), cols: m, index: of_d_y };
                    let power = [how.power_of_two, how.power_of_two || coded];
                    matmul8_tn(cpu, d_y, values, &offsets, how, power, &mut d_w, false);
                })
        }
        Work::Coding { rows, cols, parts, dtype, how, back } => {
            let (rows, _, factor) = part(rows, 1, 1);
            let (x, cuts) = (numbers(rows, cols, dtype), Cuts::parts(cols, parts));
            factor
                * if back {
                    let codes = Tensor8::quantize(cpu, &x, cuts, how);
                    probe.seconds(|| drop(codes.numbers(cpu, dtype)))
                } else {
                    probe.seconds(|| drop(Tensor8::quantize(cpu, &x, cuts, how)))
                }
        }
        Work::Attention { heads, kv_heads, qk, v, window, dtype, back } => {
            let all = (rows / sequence_length.max(1)).max(1);
            let some = all.min((ROWS / sequence_length.max(1)).max(cpu.threads()));
            let n = some * sequence_length;
            // (a soft cap costs little beside the products)
            let (scale, softcap) = (0.1, None);
            let shape = AttentionShape { heads, kv_heads, qk_dim: qk, v_dim: v, scale, window, softcap };
            let segments: Vec<Segment> =
                (0..some).map(|i| Segment { start: i * sequence_length, len: sequence_length }).collect();
            let of = |width| numbers(n, width, dtype);
            let (q, k, values) = (of(heads * qk), of(kv_heads * qk), of(kv_heads * v));
            let (mut out, mut lse) = (of(heads * v), vec![0.0; n * heads]);
            let mut forward = || {
                let (q, k, v) = (q.view(), k.view(), values.view());
                attention::forward(cpu, &shape, q, k, v, &segments, out.view_mut(), &mut lse);
            };
            let factor = all as f64 / some as f64;
            if !back {
                return factor * probe.seconds(forward);
            }
            forward();
            let d_out = of(heads * v);
            let (mut d_q, mut d_k, mut d_v) = (of(heads * qk), of(kv_heads * qk), of(kv_heads * v));
            factor
                * probe.seconds(|| {
                    let (q, k, v, out) = (q.view(), k.view(), values.view(), out.view());
                    let (d_q, d_k, d_v) = (d_q.view_mut(), d_k.view_mut(), d_v.view_mut());
                    let d_out = d_out.view();
                    attention::backward(cpu, &shape, q, k, v, out, &lse, d_out, &segments, d_q, d_k, d_v);
                })
        }
        Work::Head { rows, d, vocabulary, dtype } => {
            let (x, w) = (numbers(rows, d, dtype), numbers(vocabulary, d, DType::F32));
            let mut packed = Packed::empty();
            packed.pack_nt(cpu, w.view(), 1, vocabulary, d, compute(dtype));
            drop(w);
            let labels: Vec<u32> = (0..rows).map(|i| (i * 7 % vocabulary) as u32).collect();
            let (mut losses, mut gradient) = (vec![0.0; rows], numbers(rows, vocabulary, dtype));
            probe.seconds(|| {
                let gradient = Some(gradient.view_mut());
                loss::head(cpu, x.view(), &packed, None, &labels, Scales::All(1.0), &mut losses, gradient);
            })
        }
        Work::Norm { rows, d, x, kept, y, back } => {
            let (rows, _, factor) = part(rows, 1, 1);
            let (w, mut d_w, mut rstd) = (vec![1.0; d], vec![0.0; d], vec![1.0; rows]);
            let mut y = numbers(rows, d, y);
            factor
                * if back {
                    let (kept, mut d_x) = (numbers(rows, d, kept), numbers(rows, d, x));
                    probe.seconds(|| {
                        let (d_y, d_x) = (y.view(), d_x.view_mut());
                        norm::rmsnorm_backward(
                            cpu,
                            kept.view(),
                            w[..].into(),
                            &rstd,
                            d_y,
                            None,
                            d_x,
                            &mut d_w,
                        );
                    })
                } else {
                    let x = numbers(rows, d, x);
                    probe
                        .seconds(|| norm::rmsnorm(cpu, x.view(), w[..].into(), 1e-6, y.view_mut(), &mut rstd))
                }
        }
        Work::Swiglu { rows, f, dtype, back } => {
            let (rows, _, factor) = part(rows, 1, 1);
            let of = |width| numbers(rows, width, dtype);
            let (gu, mut h, mut d_gu, d_h) = (of(2 * f), of(f), of(2 * f), of(f));
            factor
                * if back {
                    probe.seconds(|| {
                        let (h, d_gu) = (Some(h.view_mut()), d_gu.view_mut());
                        swiglu::swiglu_backward(
                            cpu,
                            Gate::Silu,
                            gu.view(),
                            f,
                            d_h.view(),
                            None,
                            None,
                            h,
                            d_gu,
                        );
                    })
                } else {
                    probe.seconds(|| swiglu::swiglu(cpu, Gate::Silu, gu.view(), f, h.view_mut()))
                }
        }
    }
}

/// Seconds of the update: the gradient's norm, the optimizer, and the weights packed again for both directions.
fn update_s(shape: &Shape, probe: &mut Probe<'_>) -> f64 {
    let cpu = probe.cpu;
    let counts = spec::parameters(&shape.config);
    let parameters = (counts.total + counts.mtp) as f64;
    let (by_adamw, by_muon, matrices) = trained(&shape.config, shape.optim.optimizer);
    let n = PASS_ELEMENTS.min(counts.total as usize).max(1);
    let (mut w, g) = (vec![0.1; n], vec![0.2; n]);
    let [mut m, mut v] = [(); 2].map(|()| Tensor::zeros(1, n, shape.moments()));
    let cfg = AdamW { lr: 1e-9, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    probe.allow(PIECE_S);
    let adamw_s =
        probe.seconds(|| adamw(cpu, &cfg, 10, 1.0, &mut w, &g, m.view_mut(), v.view_mut())) / n as f64;
    let mut sum = 0.0;
    probe.allow(PIECE_S);
    let norm_s = probe.seconds(|| sum += sum_squares(cpu, &[&g])) / n as f64;
    std::hint::black_box(sum);
    let mut total = adamw_s * by_adamw as f64 + norm_s * parameters;
    // matrices are tasks of one thread each where there are many
    let many = matrices.len() >= 2 * cpu.threads();
    let alone = if many { Cpu::with_level(cpu.level(), 1) } else { cpu.clone() };
    let share = if many { 1.0 / cpu.threads() as f64 } else { 1.0 };
    let mut by_shape: HashMap<(usize, usize), usize> = HashMap::new();
    for shape in matrices {
        *by_shape.entry(shape).or_default() += 1;
    }
    for ((rows, columns), count) in by_shape {
        // two products of each of its steps; a smaller matrix of the same form where that is much
        let (short, long) = (rows.min(columns) as f64, rows.max(columns) as f64);
        let ops = 10.0 * short * short * (2.0 * long + short);
        let scale = (MUON_OPS / ops).cbrt().min(1.0);
        let [m, n] = [rows, columns].map(|side| ((side as f64 * scale) as usize).max(1));
        let (less, more) = (m.min(n) as f64, m.max(n) as f64);
        let factor = ops / (10.0 * less * less * (2.0 * more + less));
        let matrix = numbers(m, n, DType::F32);
        probe.allow(PIECE_S);
        let once = factor
            * probe.seconds(|| {
                std::hint::black_box(muon::orthogonalised(&alone, matrix.f32(), m, n));
            });
        total += once * count as f64 * share;
    }
    // a moment less than two in f32, as much as two in bf16
    total += adamw_s * if shape.moments() == DType::F32 { 0.75 } else { 1.0 } * by_muon as f64;
    // packed per direction, the first of which turns the weight over
    let side = PACKED_SIDE;
    let mut by_kind: HashMap<Weights, usize> = HashMap::new();
    for weight in weights(&shape.config, shape.precision) {
        *by_kind.entry(weight.kind).or_default() += weight.groups * weight.rows * weight.cols;
    }
    for (kind, elements) in by_kind {
        let rows = (n / side).min(side);
        if rows == 0 {
            continue;
        }
        let w = &g[..rows * side];
        probe.allow(PIECE_S);
        let once = if let Some(how) = kind.fp8 {
            let mut packed = [Packed8::empty(), Packed8::empty()];
            let weight = Weight8 { w, how, groups: 1, rows: Cuts::whole(rows), cols: side };
            probe.seconds(|| {
                let [forward, backward] = &mut packed;
                forward.pack(cpu, weight, true, true);
                backward.pack(cpu, weight, false, true);
            })
        } else {
            let mut packed = Packed::empty();
            probe.seconds(|| {
                packed.pack_nt(cpu, View::F32(w), 1, rows, side, compute(kind.dtype));
                packed.pack_nn(cpu, View::F32(w), 1, rows, side, compute(kind.dtype));
            })
        };
        total += once * elements as f64 / (rows * side) as f64;
    }
    total
}

/// Seconds in which everything that is not measured by itself moves a byte: those of the rotation of queries, which is
/// a little arithmetic on every element, as in most of it.
fn byte_s(shape: &Shape, probe: &mut Probe<'_>) -> f64 {
    let config = &shape.config;
    let (heads, width, r) = (config.num_attention_heads, config.qk_head_dim(), config.rotary_dim());
    let (rows, dtype) = (shape.batch.rows.min(ROWS), shape.precision.attention);
    let (x, mut y) = (numbers(rows, heads * width, dtype), numbers(rows, heads * width, dtype));
    let positions = vec![0; rows];
    let (cos, sin) = (vec![1.0; r / 2], vec![0.0; r / 2]);
    let cpu = probe.cpu;
    let (offset, interleaved) = (width - r, config.rope.interleaved);
    let once = probe.seconds(|| {
        let (x, y) = (x.view(), y.view_mut());
        rope::rope(cpu, x, heads, width, offset, r, &positions, &cos, &sin, interleaved, false, y);
    });
    once / (2 * rows * heads * width * dtype.size_bytes()) as f64
}

/// Adds up what a walk found.
pub(super) fn predict(shape: &Shape, found: &Found, cpu: &Cpu) -> Time {
    let start = Instant::now();
    let mut time = Time::default();
    let mut probe = Probe { cpu, other: vec![1.0; OTHER_ELEMENTS], until: start };
    let (rows, sequence_length) = (shape.batch.rows, shape.batch.sequence_length);
    // the cheap ones first: what they leave goes to the others
    let mut all: Vec<(f64, &Work, f64)> = found
        .work
        .iter()
        .map(|(work, &count)| (count as f64 * worth(work, rows, sequence_length), work, count as f64))
        .collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut ahead: f64 = all.iter().map(|&(worth, ..)| worth).sum();
    for (worth, work, count) in all {
        let left = BUDGET_S - start.elapsed().as_secs_f64();
        probe.allow(left * worth / ahead);
        ahead -= worth;
        let all = count * seconds(&mut probe, work, rows, sequence_length);
        match work {
            Work::Product { .. } | Work::Gradient { .. } => time.products_s += all,
            Work::Attention { .. } => time.attention_s += all,
            Work::Head { .. } => time.head_s += all,
            Work::Norm { .. } | Work::Swiglu { .. } | Work::Coding { .. } => time.passes_s += all,
        }
    }
    probe.allow(PIECE_S);
    let byte_s = byte_s(shape, &mut probe);
    time.passes_s += byte_s * found.moved_bytes as f64;
    let passes = shape.accumulation as f64;
    for part in [&mut time.products_s, &mut time.attention_s, &mut time.head_s, &mut time.passes_s] {
        *part *= passes;
    }
    time.update_s = update_s(shape, &mut probe);
    let Time { products_s, attention_s, head_s, passes_s, update_s, .. } = time;
    time.step_s = REST * (products_s + attention_s + head_s + passes_s + update_s);
    time.tok_s = (shape.batch.rows * shape.accumulation) as f64 / time.step_s;
    time.run_s = time.step_s * shape.steps as f64;
    drop(probe);
    minke_cpu::arena::release();
    time.measuring_s = start.elapsed().as_secs_f64();
    time
}
