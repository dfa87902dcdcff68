//! Tests of whole operations. An operation is described once ([`Case`]: inputs, weights, the call, an f64 reference);
//! from that come its value, gradient, thread, batch and empty-batch checks, on every level and in every precision.
//!
//! Inputs and weights are drawn as bf16 values, so the reference of all precisions is the same.

mod cases;
mod reference;

use std::ops::Range;
use std::sync::Arc;

use minke_cpu::attention::{AttentionShape, KvCache};
use minke_cpu::fp8::Fp8;
use minke_cpu::stored::{Bytes, Form, Stored, StoredWeight};
use minke_cpu::{Cpu, DType, Level, ViewMut};
use minke_num::blocks::{BlockFormat, encode};
use minke_num::fp8::Quantized;
use minke_num::tolerance::{Tolerance, assert_same_bits};
use minke_num::{bf16, rng};

use crate::ops::{self, Keys};
use crate::{Context, Stack, Store, Tensor, Var, WeightId};
use cases::{Case, Gradient, cases};

/// Rows of the gradient checks: three sequences, odd in everything.
const FEW: usize = 6;
/// Rows that need several tiles and several attention blocks.
const MANY: usize = 530;

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    F32,
    Bf16,
    /// Linear layers in FP8, all else as in bf16.
    Fp8,
}

const MODES: [Mode; 3] = [Mode::F32, Mode::Bf16, Mode::Fp8];

impl Mode {
    /// Of activations.
    fn dtype(self) -> DType {
        if self == Mode::F32 { DType::F32 } else { DType::Bf16 }
    }

    /// How far results may be from the f64 reference, as a share of the tensor's largest element.
    fn share(self) -> f64 {
        match self {
            // sums of up to MANY terms, each rounded to 2⁻²⁴
            Mode::F32 => 530f64.sqrt() * 2f64.powi(-24) * 8.0,
            // up to eight roundings to 2⁻⁹ between an input and a result (norm, product, gate, product, and back)
            Mode::Bf16 => 8.0 * 2f64.powi(-9),
            // both operands of up to four products rounded to 2⁻⁴, in random directions
            Mode::Fp8 => 4.0 * 2f64.powi(-4),
        }
    }
}

/// Normal draws that are exact in bf16.
fn draw(stream: u64, len: usize, std: f32) -> Vec<f64> {
    let mut x = vec![0.0; len];
    rng::fill_normal(20, stream, std, &mut x);
    x.into_iter().map(|x| bf16::from_f32(x).to_f64()).collect()
}

fn tensor(cols: usize, data: &[f64], dtype: DType) -> Tensor {
    let mut t = Tensor::uninit(data.len() / cols, cols, dtype);
    match t.view_mut() {
        ViewMut::F32(out) => out.iter_mut().zip(data).for_each(|(out, &x)| *out = x as f32),
        ViewMut::Bf16(out) => out.iter_mut().zip(data).for_each(|(out, &x)| *out = bf16::from_f64(x)),
    }
    t
}

/// What a call gave.
struct Outcome {
    outputs: Vec<Vec<f32>>,
    scalar: f64,
    d_inputs: Vec<Vec<f32>>,
    d_weights: Vec<Vec<f32>>,
}

impl Outcome {
    fn assert_same(&self, what: &str, other: &Outcome) {
        assert_eq!(self.scalar.to_bits(), other.scalar.to_bits(), "{what}: scalar");
        for (part, a, b) in [
            ("outputs", &self.outputs, &other.outputs),
            ("d_inputs", &self.d_inputs, &other.d_inputs),
            ("d_weights", &self.d_weights, &other.d_weights),
        ] {
            assert_eq!(a.len(), b.len(), "{what}: {part}");
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                assert_same_bits(&format!("{what}: {part} {i}"), a, b);
            }
        }
    }
}

/// The store of a case's weights for one mode.
fn store(case: &Case, mode: Mode) -> (Store, Vec<WeightId>) {
    let mut store = Store::default();
    let ids = case
        .weights
        .iter()
        .map(|w| {
            let dtype = if w.product { mode.dtype() } else { DType::F32 };
            let fp8 = (w.product && w.coded && mode == Mode::Fp8).then(Fp8::default);
            let id = store.add_stacked(
                Stack { groups: w.groups, parts: w.parts, rows: w.rows, cols: w.cols },
                dtype,
                fp8,
            );
            let range = store.range(id);
            store.data[range].iter_mut().zip(&w.data).for_each(|(out, &x)| *out = x as f32);
            id
        })
        .collect();
    (store, ids)
}

/// The gradient that a test gives to output `i`.
fn d_output(i: usize, len: usize) -> Vec<f64> {
    draw(900 + i as u64, len, 1.0)
}

fn call(
    case: &Case,
    cx: &mut Context<'_>,
    ids: &[WeightId],
    dtype: DType,
    rows: Range<usize>,
) -> (Vec<Var>, Vec<Var>, f64) {
    let of = |x: &cases::Input| {
        tensor(x.cols, &x.data[rows.start * x.cols..rows.end * x.cols], x.dtype.unwrap_or(dtype))
    };
    let inputs: Vec<Var> = case.inputs.iter().map(|x| cx.var(of(x))).collect();
    let (outputs, scalar) = (case.run)(cx, &inputs, ids, dtype, rows);
    (inputs, outputs, scalar)
}

/// Forward and backward over all rows.
fn train(case: &Case, cpu: &Cpu, mode: Mode) -> Outcome {
    let (mut store, ids) = store(case, mode);
    store.zero_grad();
    let mut cx = Context::training(cpu, &mut store);
    let (inputs, outputs, scalar) = call(case, &mut cx, &ids, mode.dtype(), 0..case.n);
    for (i, y) in outputs.iter().enumerate() {
        let (cols, dtype) = (y.value.cols(), y.value.dtype());
        cx.add_grad(y, tensor(cols, &d_output(i, case.n * cols), dtype));
    }
    cx.backward();
    let d_inputs = inputs
        .iter()
        .map(|x| cx.take_grad(x).map_or_else(|| vec![0.0; case.n * x.value.cols()], |d| d.to_vec()))
        .collect();
    let outputs = outputs.iter().map(|y| y.value.to_vec()).collect();
    let d_weights = ids.iter().map(|&id| store.grad(id).to_vec()).collect();
    Outcome { outputs, scalar, d_inputs, d_weights }
}

/// Forward over some rows, without a tape.
fn infer(case: &Case, cpu: &Cpu, mode: Mode, rows: Range<usize>) -> Vec<Vec<f32>> {
    let (mut store, ids) = store(case, mode);
    let mut cx = Context::inference(cpu, &mut store);
    call(case, &mut cx, &ids, mode.dtype(), rows).1.iter().map(|y| y.value.to_vec()).collect()
}

fn assert_close(what: &str, got: &[f32], expected: &[f64], share: f64) {
    let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let bound = Tolerance::new(share * largest + 1e-30, 0.0);
    bound.check(what, got, expected).unwrap_or_else(|message| panic!("{message}"));
}

/// The derivative of the objective for every element of `x`, by central differences.
fn differences(x: &[f64], objective: &mut dyn FnMut(&[f64]) -> f64) -> Vec<f64> {
    let mut at = x.to_vec();
    (0..x.len())
        .map(|i| {
            let step = 1e-5;
            at[i] = x[i] + step;
            let above = objective(&at);
            at[i] = x[i] - step;
            let below = objective(&at);
            at[i] = x[i];
            (above - below) / (2.0 * step)
        })
        .collect()
}

fn everywhere(mut f: impl FnMut(&str, &Cpu, Mode)) {
    for level in Level::available() {
        for mode in MODES {
            f(&format!("{} {mode:?}", level.name()), &Cpu::with_level(level, 1), mode);
        }
    }
}

#[test]
fn values_are_those_of_the_reference() {
    for case in cases(FEW).into_iter().chain(cases(MANY)) {
        let (outputs, scalar) = (case.reference)(&case.input_data(), &case.weight_data());
        everywhere(|what, cpu, mode| {
            let (what, share) = (format!("{} [{}] {what}", case.name, case.n), mode.share());
            let got = train(&case, cpu, mode);
            assert_close(&format!("{what}: scalar"), &[got.scalar as f32], &[scalar], share);
            assert_eq!(got.outputs.len(), outputs.len(), "{what}");
            for (i, (got, expected)) in got.outputs.iter().zip(&outputs).enumerate() {
                assert_close(&format!("{what}: output {i}"), got, expected, share);
            }
        });
    }
}

/// What is differentiated: the reference's outputs against the gradients that the test gives, and its scalar.
fn objective(case: &Case, inputs: &[Vec<f64>], weights: &[Vec<f64>]) -> f64 {
    let (outputs, scalar) = (case.reference)(inputs, weights);
    let terms = outputs.iter().enumerate().map(|(i, y)| {
        let d_y = d_output(i, y.len());
        y.iter().zip(&d_y).map(|(y, d)| y * d).sum::<f64>()
    });
    terms.sum::<f64>() + scalar
}

/// Applies `derive` to the objective as a function of each input and of each weight; zeros where there is no gradient.
fn of_each(
    case: &Case,
    derive: impl Fn(&[f64], &mut dyn FnMut(&[f64]) -> f64) -> Vec<f64>,
) -> [Vec<Vec<f64>>; 2] {
    let (inputs, weights) = (case.input_data(), case.weight_data());
    let of_input = |i: usize| {
        let mut at = inputs.clone();
        derive(&inputs[i], &mut |x| {
            at[i].copy_from_slice(x);
            objective(case, &at, &weights)
        })
    };
    let of_weight = |i: usize| match case.weights[i].gradient {
        Gradient::None => Vec::new(),
        Gradient::Formula => {
            let mut at = weights.clone();
            derive(&weights[i], &mut |w| {
                at[i].copy_from_slice(w);
                objective(case, &inputs, &at)
            })
        }
    };
    [(0..inputs.len()).map(of_input).collect(), (0..weights.len()).map(of_weight).collect()]
}

#[test]
fn gradients_are_the_differences_of_the_reference() {
    for case in cases(FEW) {
        let [d_inputs, mut d_weights] = of_each(&case, |x, objective| differences(x, objective));
        for (d, w) in d_weights.iter_mut().zip(&case.weights) {
            d.resize(w.data.len(), 0.0);
        }
        everywhere(|what, cpu, mode| {
            let got = train(&case, cpu, mode);
            for (part, got, expected) in
                [("input", &got.d_inputs, &d_inputs), ("weight", &got.d_weights, &d_weights)]
            {
                for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
                    assert_close(&format!("{} {what}: d_{part} {i}", case.name), got, expected, mode.share());
                }
            }
        });
    }
}

/// Over many rows a difference per element is too slow: one along a random direction finds what is lost between tiles,
/// blocks and chunks.
#[test]
fn gradients_over_many_rows_are_the_slopes_of_the_reference() {
    let direction = |len: usize| {
        let v = draw(800, len, 1.0);
        let norm = v.iter().map(|v| v * v).sum::<f64>().sqrt();
        v.into_iter().map(|v| v / norm).collect::<Vec<_>>()
    };
    for case in cases(MANY) {
        let slopes = of_each(&case, |x, objective| {
            let mut along = |step: f64| {
                let at: Vec<_> = x.iter().zip(direction(x.len())).map(|(x, v)| x + step * v).collect();
                objective(&at)
            };
            vec![(along(1e-5) - along(-1e-5)) / 2e-5]
        });
        everywhere(|what, cpu, mode| {
            let got = train(&case, cpu, mode);
            for (part, got, slopes) in
                [("input", &got.d_inputs, &slopes[0]), ("weight", &got.d_weights, &slopes[1])]
            {
                for (i, (got, slope)) in got.iter().zip(slopes).enumerate() {
                    let &[slope] = &slope[..] else { continue };
                    let got_slope: f64 =
                        got.iter().zip(direction(got.len())).map(|(&d, v)| f64::from(d) * v).sum();
                    // errors of elements have random signs, and the direction has length one
                    let largest = got.iter().fold(0.0, |m: f64, d| m.max(f64::from(d.abs())));
                    let bound = mode.share() * largest + 1e-7;
                    let what = format!("{} {what}: slope of {part} {i}", case.name);
                    let off = (got_slope - slope).abs();
                    assert!(off <= bound, "{what}: got {got_slope}, expected {slope}, bound {bound:e}");
                }
            }
        });
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for case in cases(MANY) {
        for mode in MODES {
            let one = train(&case, &Cpu::detect(1), mode);
            for threads in [2, 3] {
                let many = train(&case, &Cpu::detect(threads), mode);
                many.assert_same(&format!("{} {mode:?} with {threads} threads", case.name), &one);
            }
        }
    }
}

#[test]
fn a_row_alone_is_the_row_in_the_batch() {
    for case in cases(MANY).into_iter().filter(|case| case.row_wise) {
        everywhere(|what, cpu, mode| {
            let all = infer(&case, cpu, mode, 0..case.n);
            for rows in [0..1, 1..2, 5..22, 511..514, MANY - 1..MANY] {
                let some = infer(&case, cpu, mode, rows.clone());
                for (some, all) in some.iter().zip(&all) {
                    let cols = all.len() / case.n;
                    let what = format!("{} {what}: rows {rows:?}", case.name);
                    assert_same_bits(&what, some, &all[rows.start * cols..rows.end * cols]);
                }
            }
        });
    }
}

#[test]
fn training_and_inference_give_the_same_bits() {
    for case in cases(MANY) {
        everywhere(|what, cpu, mode| {
            let trained = train(&case, cpu, mode).outputs;
            for (a, b) in infer(&case, cpu, mode, 0..case.n).iter().zip(&trained) {
                assert_same_bits(&format!("{} {what}", case.name), a, b);
            }
        });
    }
}

#[test]
fn no_rows_are_no_work() {
    for case in cases(0) {
        everywhere(|what, cpu, mode| {
            let got = train(&case, cpu, mode);
            assert!(got.outputs.iter().all(Vec::is_empty), "{} {what}", case.name);
            assert!(got.d_weights.iter().flatten().all(|&d| d == 0.0), "{} {what}", case.name);
        });
    }
}

/// Rows of a call and where they are cut; every cut runs as its own call over the cache.
fn chunkings() -> [Vec<usize>; 3] {
    [vec![70; 1], vec![1; 70], vec![3, 61, 1, 5]]
}

/// Attention over chunks of one sequence of 70 rows, each appended to a cache.
fn over_caches(case: &Case, cpu: &Cpu, mode: Mode, chunks: &[usize], cache: &mut KvCache) -> Vec<f32> {
    let (mut store, ids) = store(case, mode);
    let mut cx = Context::inference(cpu, &mut store);
    let (mut start, mut out) = (0, Vec::new());
    let run = case.cached.as_ref().expect("an attention case");
    for &len in chunks {
        let rows = start..start + len;
        let of =
            |x: &cases::Input| tensor(x.cols, &x.data[rows.start * x.cols..rows.end * x.cols], mode.dtype());
        let inputs: Vec<Var> = case.inputs.iter().map(|x| cx.var(of(x))).collect();
        let keys = Keys::Caches(vec![(0, len, &mut *cache)]);
        out.extend(run(&mut cx, &inputs, &ids, rows.clone(), keys));
        start += len;
    }
    out
}

#[test]
fn attention_over_a_cache_has_the_bits_of_attention_over_rows() {
    let mut attentions = vec![cases::mla(&[70], true), cases::mla(&[70], false)];
    attentions.extend(cases::LOOKS.map(|look| cases::gqa(&[70], look)));
    for case in attentions {
        everywhere(|what, cpu, mode| {
            let rows = infer(&case, cpu, mode, 0..70).remove(0);
            for chunks in chunkings() {
                let shape = case.shape.expect("an attention case");
                let mut cache = KvCache::new(&shape, mode.dtype());
                let cached = over_caches(&case, cpu, mode, &chunks, &mut cache);
                assert_same_bits(&format!("{} {what} in chunks {chunks:?}", case.name), &cached, &rows);
            }
        });
    }
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    let (long, short) = (cases::mla(&[70], true), cases::mla(&[7, 40, 23], true));
    everywhere(|what, cpu, mode| {
        let batch = infer(&short, cpu, mode, 0..70).remove(0);
        let alone = infer(&long, cpu, mode, 0..70).remove(0);
        let cols = alone.len() / 70;
        assert_same_bits(what, &batch[..7 * cols], &alone[..7 * cols]);
        assert_ne!(batch[7 * cols..], alone[7 * cols..], "{what}: later sequences begin anew");
    });
}

#[test]
fn absorbed_latent_attention_is_the_expanded_form_up_to_rounding() {
    for interleaved in [true, false] {
        let case = cases::mla_absorbed(&[70], interleaved);
        let (expected, _) = (case.reference)(&case.input_data(), &case.weight_data());
        let expanded = cases::mla(&[70], interleaved);
        let (formula, _) = (expanded.reference)(&case.input_data(), &case.weight_data());
        for (a, b) in formula[0].iter().zip(&expected[0]) {
            assert!((a - b).abs() < 1e-12, "the formulas: {a} and {b}");
        }
        everywhere(|what, cpu, mode| {
            for format in [mode.dtype(), DType::F32] {
                let what = format!("absorbed {what} in {format:?}");
                let (mut first, level) = (None, cpu.level());
                for (threads, chunks) in [1, 2, 3].into_iter().zip(chunkings()) {
                    let mut cache = KvCache::of_latents(&cases::latent_shape(), format);
                    let cpu = Cpu::with_level(level, threads);
                    let got = over_caches(&case, &cpu, mode, &chunks, &mut cache);
                    assert_close(&what, &got, &expected[0], mode.share());
                    let what = format!("{what} {chunks:?}");
                    assert_same_bits(&what, &got, first.get_or_insert_with(|| got.clone()));
                }
            }
        });
    }
}

/// Codes, numbers and blocks of a file are packed once, as what they stand for.
#[test]
fn absorbed_weights_are_made_of_whatever_is_stored() {
    let (heads, p, v, c, r, n) = (2, 5, 7, 64, 6, 9);
    let rows = heads * (p + v);
    let cpu = Cpu::detect(2);
    let shape = AttentionShape { heads, kv_heads: heads, qk_dim: p + r, v_dim: v, ..cases::latent_shape() };
    let latent = AttentionShape { kv_heads: 1, qk_dim: c + r, v_dim: c, ..shape };
    let (q, kv_a) = (draw(1, n * heads * (p + r), 1.0), draw(2, n * (c + r), 1.0));
    let numbers: Vec<f32> = draw(3, rows * c, 0.1).into_iter().map(|x| x as f32 * 1.01).collect();
    let run = |store: &mut Store, kv_b| {
        let kv_a_norm = store.add(1, 1, c, DType::F32);
        let range = store.range(kv_a_norm);
        store.data[range].fill(1.0);
        let mut cache = KvCache::of_latents(&latent, DType::Bf16);
        let mut cx = Context::inference(&cpu, store);
        let [q, kv_a] = [(&q, heads * (p + r)), (&kv_a, c + r)].map(|(x, cols)| tensor(cols, x, DType::Bf16));
        let w = ops::MlaWeights { kv_a_norm, kv_b, eps: 1e-6 };
        let a = ops::AttentionWeights { shape, rotary: r };
        let rotary = cases::rotary(&(0..n as u32).collect::<Vec<_>>(), true);
        ops::mla_absorbed(&mut cx, &q, &kv_a, w, a, &rotary, vec![(0, n, &mut cache)]).to_vec()
    };
    let of_numbers = |numbers: &[f32]| {
        let mut store = Store::default();
        let kv_b = store.add(1, rows, c, DType::Bf16);
        store.data.copy_from_slice(numbers);
        run(&mut store, kv_b)
    };
    let mut all: Vec<(Store, WeightId)> = Vec::new();
    let coded = Quantized::quantize(&numbers, rows, c, false);
    for form in [Form::F32, Form::Bf16, Form::E4m3, Form::Blocks(BlockFormat::Q8_0)] {
        let mut bytes = vec![0; form.row_bytes(c).expect("whole blocks") * rows];
        match form {
            Form::F32 => {
                for (four, x) in bytes.chunks_exact_mut(4).zip(&numbers) {
                    four.copy_from_slice(&x.to_le_bytes());
                }
            }
            Form::Blocks(format) => encode(format, &numbers, None, &mut bytes).unwrap(),
            Form::E4m3 => bytes.copy_from_slice(&coded.codes),
            Form::Bf16 | Form::F16 => {
                for (two, x) in bytes.chunks_exact_mut(2).zip(&numbers) {
                    two.copy_from_slice(&bf16::from_f32(*x).to_bits().to_le_bytes());
                }
            }
        }
        let end = bytes.len();
        let bytes = Bytes::new(Arc::new(bytes), 0..end);
        let (stored, fp8) = match form {
            Form::E4m3 => (Stored::coded(rows, c, bytes, coded.scales.clone().into()), Some(Fp8::default())),
            Form::F32 | Form::F16 | Form::Bf16 | Form::Blocks(_) => (Stored::new(form, rows, c, bytes), None),
        };
        let mut store = Store::default();
        let kv_b = store.add_stored(StoredWeight::new(1, vec![stored]), DType::Bf16, fp8);
        all.push((store, kv_b));
    }
    let mut codes = Store::default();
    let kv_b = codes.add_codes(Stack { groups: 1, parts: 1, rows, cols: c }, DType::Bf16, Fp8::default());
    codes.set_codes(&cpu, kv_b, &numbers, Fp8::default());
    all.push((codes, kv_b));
    for (i, (mut store, kv_b)) in all.into_iter().enumerate() {
        let stands_for = store.numbers(kv_b, 0).into_owned();
        let got = run(&mut store, kv_b);
        assert_same_bits(&format!("{i}"), &got, &of_numbers(&stands_for));
        let held = store.packed_bytes();
        assert_same_bits(&format!("{i}, again"), &run(&mut store, kv_b), &got);
        assert_eq!(store.packed_bytes(), held);
    }
    // a change of the weights is seen
    let mut store = Store::default();
    let kv_b = store.add(1, rows, c, DType::Bf16);
    store.data.copy_from_slice(&numbers);
    let first = run(&mut store, kv_b);
    store.data.iter_mut().for_each(|w| *w *= 2.0);
    store.changed();
    assert_ne!(run(&mut store, kv_b), first);
}

#[test]
fn head_losses_and_logits_are_those_of_the_loss() {
    let case = cases::head(2 * MANY, None);
    let labels = cases::labels(0..case.n);
    everywhere(|what, cpu, mode| {
        let (mut store, ids) = store(&case, mode);
        let mut cx = Context::inference(cpu, &mut store);
        let x = cx.var(tensor(case.inputs[0].cols, &case.inputs[0].data, mode.dtype()));
        let loss = ops::head_loss(&mut cx, &x, ids[0], &labels, 1.0, false);
        let losses = ops::head_losses(&mut cx, &x, ids[0], &labels);
        assert_eq!(loss.sum, losses.iter().map(|&l| f64::from(l)).sum::<f64>(), "{what}");
        assert_eq!(loss.count, labels.iter().filter(|&&l| l != u32::MAX).count(), "{what}");
        assert!(losses.iter().zip(&labels).all(|(&loss, &l)| (l == u32::MAX) == (loss == 0.0)), "{what}");
        let logits = ops::head_logits(&mut cx, &x.value, ids[0]);
        for ((row, &label), &loss) in logits.f32().chunks(logits.cols()).zip(&labels).zip(&losses) {
            if label != u32::MAX {
                let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                let expected = sum.ln() - f64::from(row[label as usize]);
                assert_close(&format!("{what}: loss"), &[loss], &[expected], 1e-5);
            }
        }
    });
}

#[test]
fn gradients_add_up_over_calls() {
    let case = cases::linear(FEW);
    let cpu = Cpu::detect(1);
    let (mut store, ids) = store(&case, Mode::F32);
    store.zero_grad();
    let mut once = Vec::new();
    for _ in 0..2 {
        let mut cx = Context::training(&cpu, &mut store);
        let (_, outputs, _) = call(&case, &mut cx, &ids, DType::F32, 0..FEW);
        let cols = outputs[0].value.cols();
        cx.add_grad(&outputs[0], tensor(cols, &d_output(0, FEW * cols), DType::F32));
        cx.backward();
        if once.is_empty() {
            once = store.grads().to_vec();
        }
    }
    let twice: Vec<f64> = once.iter().map(|&d| 2.0 * f64::from(d)).collect();
    assert_close("two calls", &store.grads().to_vec(), &twice, Mode::F32.share());
}

#[test]
fn a_changed_weight_is_packed_again() {
    let case = cases::linear(FEW);
    let cpu = Cpu::detect(1);
    let (mut store, ids) = store(&case, Mode::Bf16);
    let forward = |store: &mut Store| {
        let mut cx = Context::inference(&cpu, store);
        call(&case, &mut cx, &ids, DType::Bf16, 0..FEW).1[0].value.to_vec()
    };
    let before = forward(&mut store);
    store.data.iter_mut().for_each(|w| *w *= 2.0);
    store.changed();
    let doubled: Vec<f32> = before.iter().map(|x| 2.0 * x).collect();
    assert_same_bits("doubled weights", &forward(&mut store), &doubled);
}

/// Rows of the sequences that tests cut `n` rows into.
fn lengths(n: usize) -> [usize; 3] {
    [n / 6, n / 2 - n / 6, n - n / 2]
}

fn borders(lengths: &[usize]) -> Arc<[u32]> {
    let mut at = 0;
    let ends = lengths.iter().map(|len| {
        at += *len as u32;
        at
    });
    std::iter::once(0).chain(ends).collect()
}
