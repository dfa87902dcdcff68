//! How long a step will take: each piece of work measured at its own shape, times how often it comes.

use std::collections::HashMap;
use std::time::Instant;

use minke_cpu::adamw::{AdamW, adamw};
use minke_cpu::attention::{self, AttentionShape, Segment};
use minke_cpu::gemm::{Operand, Packed, matmul, matmul_tn};
use minke_cpu::loss::{self, Scales};
use minke_cpu::reduce::sum_squares;
use minke_cpu::{Cpu, DType, View, ViewMut, copy, norm, rope, swiglu};
use minke_model::spec;
use minke_num::bf16;
use minke_tensor::Tensor;
use serde::Serialize;

use super::{Found, Shape, Work, compute, trained, weights};
use crate::optim::muon;

/// Rows that a piece is measured over, at most; longer ones are as fast.
const ROWS: usize = 4096;
/// Times that a piece is measured, after once to warm up.
const RUNS: usize = 5;
/// What a step takes beside the pieces: threads that wait for each other, choices of experts, short loops.
const REST: f64 = 1.08;
/// Elements that pass through the caches before each.
const OTHER_ELEMENTS: usize = 8 << 20;
/// How far apart the tokens of an expert are, about.
const APART: usize = 5;
/// Elements of the optimizer's measurement: more than caches hold.
const PASS_ELEMENTS: usize = 4 << 20;
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

/// Numbers of one dtype, none of them special, in memory of the kind that training has.
fn numbers(len: usize, dtype: DType) -> Tensor {
    let number = |i: usize| (i * 37 % 101) as f32 / 101.0 - 0.5;
    let mut x = Tensor::uninit(1, len, dtype);
    match x.view_mut() {
        ViewMut::F32(x) => x.iter_mut().enumerate().for_each(|(i, x)| *x = number(i)),
        ViewMut::Bf16(x) => x.iter_mut().enumerate().for_each(|(i, x)| *x = bf16::from_f32(number(i))),
    }
    x
}

/// Measures as a step finds things: what is read was written a while ago, and other memory has passed since.
struct Probe<'a> {
    cpu: &'a Cpu,
    other: Vec<f32>,
}

impl Probe<'_> {
    /// Seconds of `f`: the mean of a few runs, each after other memory went through the caches. Not their middle: what
    /// others on the machine take from a short run once in a while they take from every step.
    fn seconds(&mut self, mut f: impl FnMut()) -> f64 {
        f();
        let times = [(); RUNS].map(|()| {
            let (from, to) = self.other.split_at_mut(OTHER_ELEMENTS / 2);
            copy::add(self.cpu, View::F32(from), View::F32(from), ViewMut::F32(to));
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        });
        times.iter().sum::<f64>() / RUNS as f64
    }
}

/// How rows and groups of a product are measured: the rows of a group as they are, in fewer groups where there are many;
/// and the factor to all of it.
fn part(rows: usize, groups: usize) -> (usize, usize, f64) {
    if rows <= ROWS {
        return (rows, groups, 1.0);
    }
    let each = rows.div_ceil(groups).min(ROWS);
    let groups = groups.min(ROWS.div_ceil(each));
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
        Work::Product { rows, k, n, groups, weights, x, y } => {
            let (rows, groups, factor) = part(rows, groups);
            let (x, mut y) = (numbers(rows * k, x), numbers(rows * n, y));
            let w = numbers(groups * n * k, DType::F32);
            let mut packed = Packed::empty();
            packed.pack_nt(cpu, w.view(), groups, n, k, compute(weights));
            drop(w);
            let (offsets, index) = (offsets(rows, groups), index(rows, groups));
            factor
                * probe.seconds(|| {
                    let x = Operand { view: x.view(), cols: k, index: index.as_deref() };
                    matmul(cpu, x, &offsets, &packed, y.view_mut(), false);
                })
        }
        Work::Gradient { rows, m, n, groups, weights, x } => {
            let (rows, groups, factor) = part(rows, groups);
            let (d_y, x) = (numbers(rows * m, x), numbers(rows * n, x));
            let mut d_w = vec![0.0; groups * m * n];
            let (offsets, index) = (offsets(rows, groups), index(rows, groups));
            factor
                * probe.seconds(|| {
                    let d_y = Operand { view: d_y.view(), cols: m, index: index.as_deref() };
                    let x = Operand::new(x.view(), n);
                    matmul_tn(cpu, d_y, x, &offsets, compute(weights), &mut d_w, false);
                })
        }
        Work::Attention { heads, kv_heads, qk, v, dtype, back } => {
            let all = (rows / sequence_length.max(1)).max(1);
            let some = all.min((ROWS / sequence_length.max(1)).max(cpu.threads()));
            let n = some * sequence_length;
            let shape = AttentionShape { heads, kv_heads, qk_dim: qk, v_dim: v, scale: 0.1 };
            let segments: Vec<Segment> =
                (0..some).map(|i| Segment { start: i * sequence_length, len: sequence_length }).collect();
            let of = |width| numbers(n * width, dtype);
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
            let (x, w) = (numbers(rows * d, dtype), numbers(vocabulary * d, DType::F32));
            let mut packed = Packed::empty();
            packed.pack_nt(cpu, w.view(), 1, vocabulary, d, compute(dtype));
            drop(w);
            let labels: Vec<u32> = (0..rows).map(|i| (i * 7 % vocabulary) as u32).collect();
            let (mut losses, mut gradient) = (vec![0.0; rows], numbers(rows * vocabulary, dtype));
            probe.seconds(|| {
                let gradient = Some(gradient.view_mut());
                loss::head(cpu, x.view(), &packed, &labels, Scales::All(1.0), &mut losses, gradient);
            })
        }
        Work::Norm { rows, d, x, y, back } => {
            let (rows, _, factor) = part(rows, 1);
            let (x, mut d_x, mut y) = (numbers(rows * d, x), numbers(rows * d, x), numbers(rows * d, y));
            let (w, mut d_w, mut rstd) = (vec![1.0; d], vec![0.0; d], vec![1.0; rows]);
            factor
                * if back {
                    probe.seconds(|| {
                        let (d_y, d_x) = (y.view(), d_x.view_mut());
                        norm::rmsnorm_backward(cpu, x.view(), &w, &rstd, d_y, None, d_x, &mut d_w);
                    })
                } else {
                    probe.seconds(|| norm::rmsnorm(cpu, x.view(), &w, 1e-6, y.view_mut(), &mut rstd))
                }
        }
        Work::Swiglu { rows, f, dtype, back } => {
            let (rows, _, factor) = part(rows, 1);
            let of = |width| numbers(rows * width, dtype);
            let (gu, mut h, mut d_gu, d_h) = (of(2 * f), of(f), of(2 * f), of(f));
            factor
                * if back {
                    probe.seconds(|| {
                        let (h, d_gu) = (Some(h.view_mut()), d_gu.view_mut());
                        swiglu::swiglu_backward(cpu, gu.view(), f, d_h.view(), None, None, h, d_gu);
                    })
                } else {
                    probe.seconds(|| swiglu::swiglu(cpu, gu.view(), f, h.view_mut()))
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
    let (mut w, g, mut m, mut v) = (vec![0.1; n], vec![0.2; n], vec![0.3; n], vec![0.4; n]);
    let cfg = AdamW { lr: 1e-9, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    let adamw_s = probe
        .seconds(|| adamw(cpu, &cfg, 10, 1.0, &mut w, &g, ViewMut::F32(&mut m), ViewMut::F32(&mut v)))
        / n as f64;
    let mut sum = 0.0;
    let norm_s = probe.seconds(|| sum += sum_squares(cpu, &g)) / n as f64;
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
        let matrix = numbers(rows * columns, DType::F32);
        let once = probe.seconds(|| {
            std::hint::black_box(muon::orthogonalised(&alone, matrix.f32(), rows, columns));
        });
        total += once * count as f64 * share;
    }
    total += adamw_s * 0.75 * by_muon as f64;
    // packed per direction, the first of which turns the weight over
    let side = PACKED_SIDE;
    for dtype in [DType::F32, DType::Bf16] {
        let elements: usize = weights(&shape.config, shape.precision)
            .iter()
            .filter(|w| w.dtype == dtype)
            .map(|w| w.groups * w.rows * w.cols)
            .sum();
        if elements == 0 {
            continue;
        }
        let mut packed = Packed::empty();
        let w = View::F32(&g[..(side * side).min(n)]);
        let rows = w.len() / side;
        if rows == 0 {
            continue;
        }
        let w = w.slice(0, rows * side);
        let once = probe.seconds(|| {
            packed.pack_nt(cpu, w, 1, rows, side, compute(dtype));
            packed.pack_nn(cpu, w, 1, rows, side, compute(dtype));
        });
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
    let (x, mut y) = (numbers(rows * heads * width, dtype), numbers(rows * heads * width, dtype));
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
    let mut probe = Probe { cpu, other: vec![1.0; OTHER_ELEMENTS] };
    for (work, &count) in &found.work {
        let all = count as f64 * seconds(&mut probe, work, shape.batch.rows, shape.batch.sequence_length);
        match work {
            Work::Product { .. } | Work::Gradient { .. } => time.products_s += all,
            Work::Attention { .. } => time.attention_s += all,
            Work::Head { .. } => time.head_s += all,
            Work::Norm { .. } | Work::Swiglu { .. } => time.passes_s += all,
        }
    }
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
    minke_tensor::release();
    time.measuring_s = start.elapsed().as_secs_f64();
    time
}
