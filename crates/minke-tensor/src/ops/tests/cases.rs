//! Every operation, described once.

use std::ops::Range;
use std::sync::Arc;

use minke_cpu::attention::{AttentionShape, Segment};
use minke_cpu::routing::{Choice, RouterConfig, Scoring};
use minke_cpu::swiglu::Gate;
use minke_cpu::{DType, rope};

use super::{MANY, borders, draw, lengths, reference};
use crate::ops::{self, AttentionWeights, HeadWeights, Keys, Linear, MlaWeights, MoeWeights, Norm, Rotary};
use crate::{Context, Var, WeightId};

const EPS: f32 = 1e-5;

/// Width.
const D: usize = 19;
/// Latent, rotary, plain and value widths of latent attention.
pub const C: usize = 17;
pub const R: usize = 6;
const P: usize = 5;
const V: usize = 7;
const HEADS: usize = 3;

pub struct Input {
    pub cols: usize,
    /// Where the operation fixes it.
    pub dtype: Option<DType>,
    pub data: Vec<f64>,
}

pub enum Gradient {
    Formula,
    /// Moved by another rule; its gradient stays zero.
    None,
}

pub struct Weight {
    pub groups: usize,
    pub rows: usize,
    pub cols: usize,
    /// Whether products with it compute in the dtype of the mode; f32 otherwise.
    pub product: bool,
    /// Whether they are in FP8 where that is the mode.
    pub coded: bool,
    /// Matrices stacked in its rows.
    pub parts: usize,
    pub gradient: Gradient,
    pub data: Vec<f64>,
}

type Run = Box<dyn Fn(&mut Context<'_>, &[Var], &[WeightId], DType, Range<usize>) -> (Vec<Var>, f64)>;
type Reference = Box<dyn Fn(&[Vec<f64>], &[Vec<f64>]) -> (Vec<Vec<f64>>, f64)>;
type Cached = Box<dyn Fn(&mut Context<'_>, &[Var], &[WeightId], Range<usize>, Keys<'_>) -> Vec<f32>>;

pub struct Case {
    pub name: &'static str,
    pub n: usize,
    pub inputs: Vec<Input>,
    pub weights: Vec<Weight>,
    /// Whether an output row depends on the same input row alone.
    pub row_wise: bool,
    pub run: Run,
    /// Outputs, and a scalar (a loss) that is differentiated beside them.
    pub reference: Reference,
    pub shape: Option<AttentionShape>,
    pub cached: Option<Cached>,
}

impl Case {
    fn new(
        name: &'static str,
        n: usize,
        run: impl Fn(&mut Context<'_>, &[Var], &[WeightId], DType, Range<usize>) -> (Vec<Var>, f64) + 'static,
        reference: impl Fn(&[Vec<f64>], &[Vec<f64>]) -> (Vec<Vec<f64>>, f64) + 'static,
    ) -> Self {
        let (run, reference): (Run, Reference) = (Box::new(run), Box::new(reference));
        let (inputs, weights) = (Vec::new(), Vec::new());
        Self { name, n, inputs, weights, row_wise: true, run, reference, shape: None, cached: None }
    }

    fn input(mut self, cols: usize) -> Self {
        let data = draw(self.inputs.len() as u64, self.n * cols, 1.0);
        self.inputs.push(Input { cols, dtype: None, data });
        self
    }

    fn input_f32(self, cols: usize) -> Self {
        let mut case = self.input(cols);
        case.inputs.last_mut().unwrap().dtype = Some(DType::F32);
        case
    }

    fn product(mut self, groups: usize, rows: usize, cols: usize) -> Self {
        let data = draw(100 + self.weights.len() as u64, groups * rows * cols, 0.3);
        let (product, coded, parts, gradient) = (true, true, 1, Gradient::Formula);
        self.weights.push(Weight { groups, rows, cols, product, coded, parts, gradient, data });
        self
    }

    /// The last weight is never in FP8.
    fn never_coded(mut self) -> Self {
        self.weights.last_mut().unwrap().coded = false;
        self
    }

    /// The last weight is two matrices.
    fn stacked(mut self) -> Self {
        self.weights.last_mut().unwrap().parts = 2;
        self
    }

    /// Gains around one.
    fn norm(self, d: usize) -> Self {
        let mut case = self.product(1, d, 1);
        let gain = case.weights.last_mut().unwrap();
        gain.product = false;
        gain.data.iter_mut().for_each(|g| *g = half(1.0 + *g));
        case
    }

    fn sequence_wise(mut self) -> Self {
        self.row_wise = false;
        self
    }

    pub fn input_data(&self) -> Vec<Vec<f64>> {
        self.inputs.iter().map(|x| x.data.clone()).collect()
    }

    pub fn weight_data(&self) -> Vec<Vec<f64>> {
        self.weights.iter().map(|w| w.data.clone()).collect()
    }
}

/// Rounded to bf16.
fn half(x: f64) -> f64 {
    minke_num::bf16::from_f64(x).to_f64()
}

/// All of them, over `n` rows.
pub fn cases(n: usize) -> Vec<Case> {
    let mut cases = vec![embedding(n, None), embedding(n, Some(4.5)), rmsnorm(n, 1), rmsnorm(n, 3)];
    cases.extend([add_rmsnorm(n, true), add_rmsnorm(n, false), linear(n), biased(n), reused(n)]);
    cases.extend([swiglu_ffn(n, Gate::Silu), swiglu_ffn(n, Gate::GeluTanh), gated_unit(n)]);
    // a chunk of the head has up to 1024 rows: many rows are two of them
    let many = if n < MANY { n } else { 2 * n };
    cases.extend([policy(n, None), policy(n, Some(0.7)), head(many, None), head(many, Some(0.7))]);
    cases.extend(routers().into_iter().map(|(name, cfg, alpha, shared)| moe(name, n, cfg, alpha, shared)));
    let lengths = lengths(n);
    cases.extend([mla(&lengths, true), mla(&lengths, false)]);
    cases.extend(LOOKS.map(|look| gqa(&lengths, look)));
    cases
}

fn ids(rows: Range<usize>, below: u32) -> Arc<[u32]> {
    rows.map(|i| (i as u32 * 7 + 3) % below).collect()
}

fn embedding(n: usize, scale: Option<f32>) -> Case {
    Case::new(
        if scale.is_some() { "embedding, scaled" } else { "embedding" },
        n,
        move |cx, _, w, _, rows| (vec![ops::embedding(cx, w[0], &ids(rows, 5), scale)], 0.0),
        move |_, w| {
            let (rows, scale) = (ids(0..n, 5), f64::from(scale.unwrap_or(1.0)));
            let row = |&i: &u32| w[0][i as usize * D..][..D].iter().map(move |w| scale * w);
            (vec![rows.iter().flat_map(row).collect()], 0.0)
        },
    )
    .product(1, 5, D)
}

/// Of whole rows, or of heads under gains that are stored as distances from one.
fn rmsnorm(n: usize, heads: usize) -> Case {
    let offset = if heads > 1 { 1.0 } else { 0.0 };
    let mut case = Case::new(
        if heads > 1 { "rmsnorm of heads" } else { "rmsnorm" },
        n,
        move |cx, x, w, dtype, _| {
            let norm = Norm { offset, ..norm(w[0]) };
            (vec![ops::rmsnorm(cx, &x[0], norm, dtype)], 0.0)
        },
        move |x, w| {
            let gain: Vec<f64> = w[0].iter().map(|w| w + f64::from(offset)).collect();
            (vec![reference::rmsnorm(&x[0], &gain, EPS.into())], 0.0)
        },
    )
    .input(heads * D)
    .norm(D);
    case.weights[0].data.iter_mut().for_each(|w| *w = half(*w - f64::from(offset)));
    case
}

fn norm(w: WeightId) -> Norm {
    Norm { w, offset: 0.0, eps: EPS }
}

/// With both results read by what follows, or the sum alone.
fn add_rmsnorm(n: usize, both: bool) -> Case {
    Case::new(
        if both { "add_rmsnorm" } else { "add_rmsnorm, sum alone" },
        n,
        move |cx, x, w, dtype, _| {
            let (sum, y) = ops::add_rmsnorm(cx, &x[0], &x[1], norm(w[0]), dtype);
            (if both { vec![sum, y] } else { vec![sum] }, 0.0)
        },
        move |x, w| {
            let sum = reference::add(&x[0], &x[1]);
            let y = reference::rmsnorm(&sum, &w[0], EPS.into());
            (if both { vec![sum, y] } else { vec![sum] }, 0.0)
        },
    )
    .input_f32(D)
    .input(D)
    .norm(D)
}

pub fn linear(n: usize) -> Case {
    Case::new(
        "linear",
        n,
        |cx, x, w, dtype, _| (vec![ops::linear(cx, &x[0], w[0], dtype)], 0.0),
        |x, w| (vec![reference::product(&x[0], &w[0], D)], 0.0),
    )
    .input(D)
    .product(1, 13, D)
}

/// With biases, which are never in another dtype than f32.
fn biased(n: usize) -> Case {
    let mut case = Case::new(
        "linear with a bias",
        n,
        |cx, x, w, dtype, _| {
            let layer = Linear { w: w[0], bias: Some(w[1]) };
            (vec![ops::linear(cx, &x[0], layer, dtype)], 0.0)
        },
        |x, w| {
            let y = reference::product(&x[0], &w[0], D);
            (vec![y.iter().zip(w[1].iter().cycle()).map(|(y, b)| y + b).collect()], 0.0)
        },
    )
    .input(D)
    .product(1, 13, D)
    .product(1, 13, 1);
    case.weights[1].product = false;
    case
}

/// A value that two operations read: its gradients are added.
fn reused(n: usize) -> Case {
    Case::new(
        "concat of a value and its product",
        n,
        |cx, x, w, dtype, _| {
            let y = ops::linear(cx, &x[0], w[0], dtype);
            (vec![ops::concat(cx, &x[0], &y)], 0.0)
        },
        |x, w| (vec![reference::concat(&x[0], D, &reference::product(&x[0], &w[0], D), 13)], 0.0),
    )
    .input(D)
    .product(1, 13, D)
}

fn swiglu_ffn(n: usize, gate: Gate) -> Case {
    Case::new(
        if gate == Gate::Silu { "swiglu_ffn" } else { "swiglu_ffn by GELU" },
        n,
        move |cx, x, w, dtype, _| (vec![ops::swiglu_ffn(cx, &x[0], gate, w[0], w[1], dtype)], 0.0),
        move |x, w| (vec![reference::swiglu(gate, &x[0], &w[0], &w[1], D)], 0.0),
    )
    .input(D)
    .product(1, 2 * 11, D)
    .stacked()
    .product(1, D, 11)
}

fn gated_unit(n: usize) -> Case {
    Case::new(
        "gated_unit",
        n,
        |cx, x, _, _, _| (vec![ops::gated_unit(cx, &x[0], Gate::GeluTanh)], 0.0),
        |x, _| (vec![reference::gated(Gate::GeluTanh, &x[0], D)], 0.0),
    )
    .input(2 * D)
}

const VOCABULARY: usize = 37;

/// Every third row has no label.
pub fn labels(rows: Range<usize>) -> Vec<u32> {
    rows.map(|i| if i % 3 == 2 { u32::MAX } else { (i * 5 + 1) as u32 % VOCABULARY as u32 }).collect()
}

/// Logits that went through a soft cap.
fn capped(logits: Vec<f64>, softcap: Option<f32>) -> Vec<f64> {
    match softcap.map(f64::from) {
        None => logits,
        Some(cap) => logits.into_iter().map(|x| cap * (x / cap).tanh()).collect(),
    }
}

pub fn head(n: usize, softcap: Option<f32>) -> Case {
    const SCALE: f32 = 0.25;
    Case::new(
        if softcap.is_some() { "head_loss, capped" } else { "head_loss" },
        n,
        move |cx, x, w, _, rows| {
            let head = HeadWeights { w: w[0], softcap };
            let loss = ops::head_loss(cx, &x[0], head, &labels(rows), SCALE, false);
            (Vec::new(), f64::from(SCALE) * loss.sum)
        },
        move |x, w| {
            let logits = capped(reference::product(&x[0], &w[0], D), softcap);
            (Vec::new(), f64::from(SCALE) * reference::cross_entropy(&logits, VOCABULARY, &labels(0..n)))
        },
    )
    .input(D)
    .product(1, VOCABULARY, D)
    .never_coded()
}

/// The labelled rows of a range, numbered from its start, their labels, and sequences of three of them.
fn policy_rows(rows: &Range<usize>) -> (Vec<u32>, Vec<u32>, Vec<usize>) {
    let all = labels(rows.clone());
    let chosen: Vec<u32> = (0..all.len() as u32).filter(|&i| all[i as usize] != u32::MAX).collect();
    let labels = chosen.iter().map(|&i| all[i as usize]).collect();
    let mut groups: Vec<usize> = (0..chosen.len()).step_by(3).collect();
    groups.push(chosen.len());
    (chosen, labels, groups)
}

/// `sum of s_i log p_i`, at a temperature: what every objective over log-probabilities is to first order.
fn policy(n: usize, softcap: Option<f32>) -> Case {
    const TEMPERATURE: f32 = 0.8;
    let weigh = |i: usize| 0.1 * ((i % 5) as f32 - 2.0);
    Case::new(
        if softcap.is_some() { "head_policy, capped" } else { "head_policy" },
        n,
        move |cx, x, w, _, rows| {
            let (chosen, labels, groups) = policy_rows(&rows);
            let kept = minke_cpu::policy::Kept::default();
            let of = ops::PolicyRows {
                rows: &chosen,
                labels: &labels,
                groups: &groups,
                temperature: TEMPERATURE,
                kept: &kept,
            };
            let at = |i: usize| weigh(rows.start + chosen[i] as usize);
            let head = HeadWeights { w: w[0], softcap };
            let log_probs = ops::head_policy(cx, &x[0], head, of, &mut |s, log_probs, out| {
                assert_eq!(log_probs.len(), out.len());
                out.iter_mut().enumerate().for_each(|(i, out)| *out = at(groups[s] + i));
            });
            let sum = log_probs.iter().enumerate().map(|(i, &l)| f64::from(at(i)) * f64::from(l)).sum();
            (Vec::new(), sum)
        },
        move |x, w| {
            let logits = capped(reference::product(&x[0], &w[0], D), softcap);
            let rows = logits.chunks(VOCABULARY).zip(labels(0..n)).enumerate();
            let of_row = |(i, (row, label)): (usize, (&[f64], u32))| {
                let tempered: Vec<f64> = row.iter().map(|x| x / f64::from(TEMPERATURE)).collect();
                -f64::from(weigh(i)) * reference::cross_entropy(&tempered, VOCABULARY, &[label])
            };
            (Vec::new(), rows.map(of_row).sum())
        },
    )
    .input(D)
    .product(1, VOCABULARY, D)
    .never_coded()
}

/// (name, router, alpha of the balance loss, whether there are shared experts)
fn routers() -> [(&'static str, RouterConfig, f32, bool); 3] {
    let v3 = RouterConfig {
        experts: 8,
        top_k: 3,
        groups: 4,
        top_groups: 2,
        scoring: Scoring::Sigmoid,
        choice: Choice::NoAuxTc,
        normalize: true,
        scale: 2.5,
    };
    let greedy = RouterConfig {
        groups: 1,
        top_groups: 1,
        scoring: Scoring::Softmax,
        choice: Choice::Greedy,
        normalize: false,
        scale: 1.0,
        ..v3
    };
    let limited =
        RouterConfig { groups: 4, top_groups: 2, choice: Choice::GroupLimitedGreedy, scale: 16.0, ..greedy };
    [
        ("moe_ffn of V3, shared, balanced", v3, 0.5, true),
        ("moe_ffn greedy, balanced", greedy, 0.5, false),
        ("moe_ffn group-limited, shared", limited, 0.0, true),
    ]
}

const F: usize = 7;

/// Weights: router, gate and up, down, then what there is of bias, shared gate and up, shared down.
fn moe(name: &'static str, n: usize, cfg: RouterConfig, alpha: f32, shared: bool) -> Case {
    let (e, k) = (cfg.experts, cfg.top_k);
    let biased = cfg.choice == Choice::NoAuxTc;
    let first_shared = if biased { 4 } else { 3 };
    let borders = borders(&lengths(n));
    let mut case = Case::new(name, n, |_, _, _, _, _| (Vec::new(), 0.0), |_, _| (Vec::new(), 0.0))
        .input(D)
        .product(1, e, D)
        .product(e, 2 * F, D)
        .stacked()
        .product(e, D, F);
    case.weights[0].product = false;
    if biased {
        case = case.product(1, e, 1);
        case.weights[3].product = false;
        case.weights[3].gradient = Gradient::None;
    }
    if shared {
        case = case.product(1, 4 * F, D).stacked().product(1, D, 2 * F);
    }
    // frozen: differences must not see a token change its experts
    let bias = if biased { case.weights[3].data.clone() } else { Vec::new() };
    let scores = reference::scores(&reference::product(&case.inputs[0].data, &case.weights[0].data, D), &cfg);
    let experts: Arc<[usize]> = reference::choose(&scores, &bias, &cfg).into();
    let (expected, run_borders) = (experts.clone(), borders.clone());
    case.run = Box::new(move |cx, x, w, dtype, rows| {
        let weights = MoeWeights {
            router: w[0],
            bias: biased.then(|| w[3]),
            gate_up: w[1],
            down: w[2],
            shared: shared.then(|| (w[first_shared], w[first_shared + 1])),
            gate: Gate::Silu,
        };
        let whole = cx.recording();
        let borders = if whole { run_borders.clone() } else { Arc::new([0, rows.len() as u32]) };
        let (y, routed) = ops::moe_ffn(cx, &x[0], weights, &cfg, &borders, alpha, dtype);
        let chosen: Vec<usize> = routed.experts.iter().map(|&e| e as usize).collect();
        assert_eq!(chosen, expected[rows.start * k..rows.end * k], "{name}: experts");
        let count = |e: usize| chosen.iter().filter(|&&x| x == e).count() as u32;
        assert_eq!(routed.counts, (0..cfg.experts).map(count).collect::<Vec<_>>(), "{name}: counts");
        (vec![y], routed.balance_loss.into())
    });
    case.reference = Box::new(move |x, w| {
        let scores = reference::scores(&reference::product(&x[0], &w[0], D), &cfg);
        let weights = reference::weights(&scores, &experts, &cfg);
        let mut y = vec![0.0; n * D];
        for (t, out) in y.chunks_mut(D).enumerate() {
            let x = &x[0][t * D..][..D];
            for (&e, weight) in experts[t * k..][..k].iter().zip(&weights[t * k..]) {
                let (gate_up, down) = (&w[1][e * 2 * F * D..][..2 * F * D], &w[2][e * D * F..][..D * F]);
                let part = reference::swiglu(Gate::Silu, x, gate_up, down, D);
                out.iter_mut().zip(part).for_each(|(out, part)| *out += weight * part);
            }
        }
        if shared {
            let (gate_up, down) = (&w[first_shared], &w[first_shared + 1]);
            y = reference::add(&y, &reference::swiglu(Gate::Silu, &x[0], gate_up, down, D));
        }
        (vec![y], reference::balance(&scores, &experts, &borders, &cfg, alpha.into()))
    });
    case
}

const FREQUENCIES: [f32; 3] = [1.0, 0.3, 0.01];

/// Positions from 0 in each sequence.
fn positions(lengths: &[usize]) -> Arc<[u32]> {
    lengths.iter().flat_map(|&len| 0..len as u32).collect()
}

pub fn rotary(positions: &[u32], interleaved: bool) -> Rotary {
    let rows = positions.iter().max().map_or(0, |&p| p as usize + 1);
    let (cos, sin) = rope::cos_sin(&FREQUENCIES, rows, 1.0);
    Rotary { cos: cos.into(), sin: sin.into(), positions: positions.into(), interleaved }
}

fn segments(lengths: &[usize]) -> Arc<[Segment]> {
    let borders = borders(lengths);
    borders.windows(2).map(|w| Segment { start: w[0] as usize, len: (w[1] - w[0]) as usize }).collect()
}

fn mla_shape() -> AttentionShape {
    let (window, softcap) = (None, None);
    AttentionShape { heads: HEADS, kv_heads: HEADS, qk_dim: P + R, v_dim: V, scale: 0.4, window, softcap }
}

fn mla_weights(w: &[WeightId]) -> MlaWeights {
    MlaWeights { kv_a_norm: w[0], kv_b: w[1], eps: EPS }
}

pub fn mla(lengths: &[usize], interleaved: bool) -> Case {
    let (shape, n, positions) = (mla_shape(), lengths.iter().sum(), positions(lengths));
    let a = AttentionWeights { shape, rotary: R };
    let (segments, of_sequences) = (segments(lengths), lengths.to_vec());
    let (for_rows, for_caches) = (positions.clone(), positions.clone());
    let mut case = Case::new(
        if interleaved { "mla_attention" } else { "mla_attention, halves" },
        n,
        move |cx, x, w, _, _| {
            let keys = Keys::Rows(segments.clone());
            let rotary = rotary(&for_rows, interleaved);
            (vec![ops::mla_attention(cx, &x[0], &x[1], mla_weights(w), a, &rotary, keys)], 0.0)
        },
        move |x, w| {
            let turn = |x: &[f64], heads, width| {
                reference::rope(x, heads, width, R, &positions, &FREQUENCIES, interleaved)
            };
            let q = turn(&x[0], HEADS, P + R);
            let latent = reference::rmsnorm(&reference::columns(&x[1], C + R, 0, C), &w[0], EPS.into());
            let kv = reference::product(&latent, &w[1], C);
            let rope_keys = turn(&reference::columns(&x[1], C + R, C, C + R), 1, R);
            let (mut k, mut v) = (Vec::new(), Vec::new());
            for (kv, rope_key) in kv.chunks(HEADS * (P + V)).zip(rope_keys.chunks(R)) {
                for kv in kv.chunks(P + V) {
                    k.extend(kv[..P].iter().chain(rope_key));
                    v.extend(&kv[P..]);
                }
            }
            (vec![reference::attention(&shape, &q, &k, &v, &of_sequences)], 0.0)
        },
    )
    .input(HEADS * (P + R))
    .input(C + R)
    .norm(C)
    .product(1, HEADS * (P + V), C)
    .sequence_wise();
    case.shape = Some(shape);
    case.cached = Some(Box::new(move |cx, x, w, rows, keys| {
        let rotary = rotary(&for_caches[rows], interleaved);
        ops::mla_attention(cx, &x[0], &x[1], mla_weights(w), a, &rotary, keys).value.to_vec()
    }));
    case
}

/// As [`mla`], but over caches of latents in the absorbed form, and with the reference in it.
pub fn mla_absorbed(lengths: &[usize], interleaved: bool) -> Case {
    let (a, positions) = (AttentionWeights { shape: mla_shape(), rotary: R }, positions(lengths));
    let (for_caches, of_sequences) = (positions.clone(), lengths.to_vec());
    let cached = Box::new(
        move |cx: &mut Context<'_>, x: &[Var], w: &[WeightId], rows: Range<usize>, keys: Keys<'_>| {
            let rotary = rotary(&for_caches[rows], interleaved);
            let Keys::Caches(caches) = keys else { unreachable!("latents are in caches") };
            ops::mla_absorbed(cx, &x[0].value, &x[1].value, mla_weights(w), a, &rotary, caches).to_vec()
        },
    );
    let reference = Box::new(move |x: &[Vec<f64>], w: &[Vec<f64>]| {
        let turn = |x: &[f64], heads, width| {
            reference::rope(x, heads, width, R, &positions, &FREQUENCIES, interleaved)
        };
        let latent = reference::rmsnorm(&reference::columns(&x[1], C + R, 0, C), &w[0], EPS.into());
        let rope_keys = turn(&reference::columns(&x[1], C + R, C, C + R), 1, R);
        let keys = reference::concat(&latent, C, &rope_keys, R);
        let head = |i: usize| &w[1][i % HEADS * (P + V) * C..][..(P + V) * C];
        // a query's part without position by the key rows of its head, its rotary part as it is
        let mut q = Vec::new();
        for (i, row) in turn(&x[0], HEADS, P + R).chunks(P + R).enumerate() {
            q.extend((0..C).map(|c| (0..P).map(|j| row[j] * head(i)[j * C + c]).sum::<f64>()));
            q.extend(&row[P..]);
        }
        let shape = latent_shape();
        let out = reference::attention(&shape, &q, &keys, &latent, &of_sequences);
        let back = out.chunks(C).enumerate().flat_map(|(i, x)| reference::product(x, &head(i)[P * C..], C));
        (vec![back.collect()], 0.0)
    });
    Case { cached: Some(cached), reference, ..mla(lengths, interleaved) }
}

/// Heads and widths of attention over latents.
pub fn latent_shape() -> AttentionShape {
    AttentionShape { kv_heads: 1, qk_dim: C + R, v_dim: C, ..mla_shape() }
}

/// What grouped-query attention may have beside the plain form.
#[derive(Clone, Copy)]
pub struct Look {
    name: &'static str,
    window: Option<usize>,
    softcap: Option<f32>,
    interleaved: bool,
}

pub const LOOKS: [Look; 4] = [
    Look { name: "gqa_attention", window: None, softcap: None, interleaved: false },
    Look { name: "gqa_attention, interleaved", window: None, softcap: None, interleaved: true },
    Look { name: "gqa_attention in a window", window: Some(2), softcap: None, interleaved: false },
    Look {
        name: "gqa_attention in a window, capped",
        window: Some(67),
        softcap: Some(0.6),
        interleaved: false,
    },
];

pub fn gqa(lengths: &[usize], look: Look) -> Case {
    let Look { name, window, softcap, interleaved } = look;
    let shape = AttentionShape { heads: 4, kv_heads: 2, qk_dim: R, v_dim: R, scale: 0.4, window, softcap };
    let (n, positions) = (lengths.iter().sum(), positions(lengths));
    let a = AttentionWeights { shape, rotary: R };
    let (segments, of_sequences) = (segments(lengths), lengths.to_vec());
    let (for_rows, for_caches) = (positions.clone(), positions.clone());
    let mut case = Case::new(
        name,
        n,
        move |cx, x, _, _, _| {
            let keys = Keys::Rows(segments.clone());
            (
                vec![ops::gqa_attention(cx, [&x[0], &x[1], &x[2]], a, &rotary(&for_rows, interleaved), keys)],
                0.0,
            )
        },
        move |x, _| {
            let turn =
                |x: &[f64], heads| reference::rope(x, heads, R, R, &positions, &FREQUENCIES, interleaved);
            let (q, k) = (turn(&x[0], 4), turn(&x[1], 2));
            (vec![reference::attention(&shape, &q, &k, &x[2], &of_sequences)], 0.0)
        },
    )
    .input(4 * R)
    .input(2 * R)
    .input(2 * R)
    .sequence_wise();
    case.shape = Some(shape);
    case.cached = Some(Box::new(move |cx, x, _, rows, keys| {
        let rotary = rotary(&for_caches[rows], interleaved);
        ops::gqa_attention(cx, [&x[0], &x[1], &x[2]], a, &rotary, keys).value.to_vec()
    }));
    case
}
