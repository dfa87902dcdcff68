//! Proof against an implementation that nobody here wrote: Hugging Face transformers on CPU.
//!
//! Each folder of `vectors/` holds a config, weights, and what transformers computed from them (logits, losses, the
//! gradient of every parameter); `scripts/parity_vectors.py` makes them. Beside parity, the same models show the
//! identities that need no reference: generation gives the bits of training, in any chunking and batch.

use std::path::{Path, PathBuf};

use minke_cpu::Cpu;
use minke_cpu::loss::{Scales, cross_entropy};
use minke_model::{
    Cache, CacheKind, Config, DType, DraftCache, DraftStep, Fp8, IGNORE, KvFormat, LossOptions, Model,
    MtpTargets, PolicyBatch, Precision, Purpose, Recompute, Segment, Step, TrainBatch, Want, WeightSource,
};
use minke_num::tolerance::assert_same_bits;
use safetensors::SafeTensors;

struct File(Vec<u8>);

impl File {
    fn open(path: &Path) -> Self {
        Self(std::fs::read(path).unwrap())
    }
    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }
    fn f32(&self, name: &str) -> Vec<f32> {
        let bytes = self.tensors().tensor(name).unwrap().data().to_vec();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }
}

impl WeightSource for File {
    fn names(&self) -> Vec<String> {
        self.tensors().names().into_iter().map(str::to_owned).collect()
    }
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.tensors().tensor(name).ok()?.shape().to_vec())
    }
    fn dtype(&self, _: &str) -> Option<DType> {
        Some(DType::F32)
    }
    fn read_into(&self, name: &str, out: &mut [f32]) -> Result<(), String> {
        out.copy_from_slice(&self.f32(name));
        Ok(())
    }
}

struct Case {
    name: String,
    model: Model,
    vectors: File,
    rows: usize,
    len: usize,
    ids: Vec<u32>,
}

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    let mut folders: Vec<_> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    folders.retain(|f| f.is_dir());
    folders.sort();
    assert!(folders.len() >= 25, "the vectors are there");
    folders
}

fn load(folder: &Path, precision: Option<Precision>) -> Case {
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let config = Config::from_json(&serde_json::from_str(&config).unwrap()).unwrap();
    let weights = File::open(&folder.join("model.safetensors"));
    let (model, notes) = Model::load(config, precision, &weights, Purpose::Train).unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    let vectors = File::open(&folder.join("vectors.safetensors"));
    let (shape, ids) = {
        let tensors = vectors.tensors();
        let ids = tensors.tensor("input_ids").unwrap();
        let values = ids.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32);
        (ids.shape().to_vec(), values.collect::<Vec<_>>())
    };
    let name = folder.file_name().unwrap().to_string_lossy().into_owned();
    Case { name, model, vectors, rows: shape[0], len: shape[1], ids }
}

/// Labels `ahead` tokens ahead within each row of `ids`.
fn ahead(case: &Case, ahead: usize, none: u32) -> Vec<u32> {
    let rows = case.ids.chunks(case.len);
    rows.flat_map(|row| (0..row.len()).map(move |i| row.get(i + ahead).copied().unwrap_or(none))).collect()
}

fn batch(case: &Case) -> TrainBatch {
    TrainBatch {
        tokens: case.ids.clone(),
        positions: (0..case.rows).flat_map(|_| 0..case.len as u32).collect(),
        segments: (0..case.rows).map(|r| Segment { start: r * case.len, len: case.len }).collect(),
        labels: ahead(case, 1, IGNORE),
        mtp: (1..=case.model.config.num_nextn_predict_layers)
            .map(|k| MtpTargets { tokens: ahead(case, k, 0), labels: ahead(case, k + 1, IGNORE) })
            .collect(),
    }
}

fn options(case: &Case) -> LossOptions {
    let modules = case.model.config.num_nextn_predict_layers;
    let labels = |k: usize| (case.rows * (case.len - k - 1)) as f32;
    let mtp_scale = (1..=modules).map(|k| 0.3 / (modules as f32 * labels(k))).collect();
    LossOptions { loss_scale: 1.0 / labels(0), mtp_scale, balance_alpha: 0.0 }
}

fn worst(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    got.iter()
        .zip(expected)
        .map(|(g, e)| (g - e).abs())
        .fold(0.0, |m, x| if x > m || x.is_nan() { x } else { m })
}

fn infer_all(case: &mut Case, cpu: &Cpu) -> Vec<f32> {
    let mut logits = Vec::new();
    for row in 0..case.rows {
        let mut cache = Cache::new(&case.model);
        let tokens = &case.ids[row * case.len..][..case.len];
        logits.extend(case.model.infer(cpu, &mut [Step { tokens, cache: &mut cache, want: Want::All }]));
    }
    logits
}

#[test]
fn logits_match_transformers() {
    let cpu = Cpu::detect(2);
    for folder in folders() {
        let mut case = load(&folder, None);
        let logits = infer_all(&mut case, &cpu);
        let worst = worst(&logits, &case.vectors.f32("logits"));
        println!("{:28} logits differ by {worst:.1e}", case.name);
        assert!(worst < 1e-4, "{}: logits differ by {worst}", case.name);
    }
}

#[test]
fn losses_and_gradients_match_transformers() {
    let cpu = Cpu::detect(2);
    for folder in folders() {
        let mut case = load(&folder, None);
        let (batch, options) = (batch(&case), options(&case));
        let stats = case.model.train_step(&cpu, &batch, &options);
        let model = &case.model;
        let mut worst_of = (0.0, String::new());
        for entry in &model.params.entries {
            let name = format!("grad.{}", entry.name);
            if case.vectors.tensors().tensor(&name).is_err() {
                assert!(
                    entry.name.ends_with("e_score_correction_bias"),
                    "{}: no vector of {name}",
                    case.name
                );
                continue;
            }
            let expected = case.vectors.f32(&name);
            let scale = expected.iter().fold(0.0f32, |m, x| m.max(x.abs())).max(1e-6);
            let off = worst(model.params.grads().of(entry.range.clone()), &expected) / scale;
            if off > worst_of.0 || off.is_nan() {
                worst_of = (off, entry.name.clone());
            }
        }
        println!("{:28} gradients differ by {:.1e} of their largest ({})", case.name, worst_of.0, worst_of.1);
        assert!(worst_of.0 < 1e-4, "{}: gradient of {} differs by {}", case.name, worst_of.1, worst_of.0);
        let mean = stats.loss_sum / stats.tokens as f64;
        assert!((mean - f64::from(case.vectors.f32("loss")[0])).abs() < 1e-4, "{}: loss {mean}", case.name);
        for (k, (&sum, &count)) in stats.mtp_loss_sum.iter().zip(&stats.mtp_tokens).enumerate() {
            let expected = f64::from(case.vectors.f32(&format!("mtp_loss.{k}"))[0]);
            assert!((sum / count as f64 - expected).abs() < 1e-4, "{}: MTP loss {k}", case.name);
        }
    }
}

fn precisions() -> [Precision; 3] {
    [Precision::uniform(DType::F32), Precision::uniform(DType::Bf16), Precision::fp8(Fp8::default())]
}

/// Losses of the training pass and logits of inference, whatever the chunking, batch and threads, are the same bits.
#[test]
fn generation_has_the_bits_of_training() {
    for folder in folders() {
        for precision in precisions() {
            let mut case = load(&folder, Some(precision));
            let cpu = Cpu::detect(2);
            let batch = batch(&case);
            let losses = case.model.evaluate(&cpu, &batch);
            let whole = infer_all(&mut case, &cpu);
            let w = case.model.config.vocab_size;
            let mut from_logits = vec![0.0; case.ids.len()];
            cross_entropy(&cpu, &whole, w, &batch.labels, Scales::All(1.0), &mut from_logits, None);
            assert_same_bits(&format!("{} {:?}: losses", case.name, precision.coded), &from_logits, &losses);
            // and what a policy's pass makes of the same rows, soft caps included
            let policy =
                PolicyBatch { rows: batch.clone(), temperature: 1.0, kept: minke_model::Kept::default() };
            let log_probs: Vec<f32> = case.model.log_probs(&cpu, &policy).iter().map(|x| -x).collect();
            let labelled: Vec<f32> =
                losses.iter().zip(&batch.labels).filter(|(_, l)| **l != IGNORE).map(|(&x, _)| x).collect();
            assert_same_bits(&format!("{} log-probabilities", case.name), &log_probs, &labelled);
            // both rows at once, in uneven chunks, the last tokens one by one
            for threads in [1, 3] {
                let cpu = Cpu::detect(threads);
                let mut caches: Vec<_> = (0..case.rows).map(|_| Cache::new(&case.model)).collect();
                let mut chunks = vec![7, 1, 13];
                let left = case.len - 21;
                chunks.extend([left / 2].into_iter().chain(std::iter::repeat_n(1, left - left / 2)));
                let mut at = 0;
                for chunk in chunks {
                    let mut steps: Vec<_> = caches
                        .iter_mut()
                        .enumerate()
                        .map(|(r, cache)| Step {
                            tokens: &case.ids[r * case.len + at..][..chunk],
                            cache,
                            want: Want::All,
                        })
                        .collect();
                    let logits = case.model.infer(&cpu, &mut steps);
                    for r in 0..case.rows {
                        let expected = &whole[(r * case.len + at) * w..][..chunk * w];
                        let what = format!("{} {:?}: row {r} from {at}", case.name, precision.coded);
                        assert_same_bits(&what, &logits[r * chunk * w..][..chunk * w], expected);
                    }
                    at += chunk;
                }
                assert_eq!(at, case.len);
            }
        }
    }
}

#[test]
fn gradients_are_the_same_bits_at_any_thread_count() {
    for folder in folders() {
        for precision in precisions() {
            let grads = [1, 2, 3].map(|threads| {
                let mut case = load(&folder, Some(precision));
                let (batch, options) = (batch(&case), LossOptions { balance_alpha: 0.01, ..options(&case) });
                case.model.train_step(&Cpu::detect(threads), &batch, &options);
                case.model.params.grads().to_vec()
            });
            assert_same_bits("gradients, 2 threads", &grads[1], &grads[0]);
            assert_same_bits("gradients, 3 threads", &grads[2], &grads[0]);
        }
    }
}

#[test]
fn layers_that_are_computed_twice_change_no_bit() {
    let (mut experts, mut modules, mut dense) = (0, 0, 0);
    for folder in folders() {
        for precision in [DType::F32, DType::Bf16] {
            let pass = |recompute, threads| {
                let mut case = load(&folder, Some(Precision::uniform(precision)));
                case.model.recompute = recompute;
                let (batch, options) = (batch(&case), LossOptions { balance_alpha: 0.01, ..options(&case) });
                // two micro-batches of one step
                let stats = [(); 2].map(|()| case.model.train_step(&Cpu::detect(threads), &batch, &options));
                (case.model.params.grads().to_vec(), stats)
            };
            let (grads, stats) = pass(Recompute::None, 2);
            for threads in [1, 2, 3] {
                let (again, again_stats) = pass(Recompute::Layer, threads);
                assert_same_bits(&format!("{} {precision:?}", folder.display()), &again, &grads);
                // losses, loads and routes, each counted once
                assert_eq!(format!("{again_stats:?}"), format!("{stats:?}"));
            }
            experts += usize::from(!stats[0].expert_load.is_empty() && stats[0].balance_loss > 0.0);
            modules += stats[0].mtp_loss_sum.len();
            dense += usize::from(stats[0].expert_load.is_empty());
        }
    }
    assert!(experts > 0 && modules > 0 && dense > 0, "{experts} {modules} {dense}");
}

#[test]
fn absorbed_attention_agrees_with_expanded() {
    let cpu = Cpu::detect(2);
    let mut tried = 0;
    for folder in folders() {
        let mut case = load(&folder, None);
        let whole = infer_all(&mut case, &cpu);
        let kind = CacheKind::Latent(Some(KvFormat::F32));
        let Some(mut cache) = Cache::of_kind(&case.model, kind) else { continue };
        let (first, rest) = case.ids[..case.len].split_at(20);
        let mut logits =
            case.model.infer(&cpu, &mut [Step { tokens: first, cache: &mut cache, want: Want::All }]);
        logits
            .extend(case.model.infer(&cpu, &mut [Step { tokens: rest, cache: &mut cache, want: Want::All }]));
        let off = worst(&logits, &whole[..logits.len()]);
        assert!(off < 1e-4, "{}: absorbed and expanded differ by {off}", case.name);
        tried += 1;
    }
    assert!(tried >= 8);
}

/// A row has the same bits however its sequence is cut, and is close to what it is over the model's own cache.
#[test]
fn other_caches_are_cut_anywhere_and_close() {
    let mut tried = [0; 3];
    for folder in folders() {
        for dtype in [DType::F32, DType::Bf16] {
            let mut case = load(&folder, Some(Precision::uniform(dtype)));
            let ids = case.ids[..case.len].to_vec();
            let mut run = |kind, cpu: &Cpu, chunk: usize| {
                let mut cache = Cache::of_kind(&case.model, kind)?;
                let step = |tokens| {
                    case.model.infer(cpu, &mut [Step { tokens, cache: &mut cache, want: Want::All }])
                };
                Some(ids.chunks(chunk).flat_map(step).collect::<Vec<f32>>())
            };
            let whole = run(CacheKind::Model, &Cpu::detect(1), ids.len()).expect("every model has them");
            let int8 = KvFormat::Int8;
            let kinds = [CacheKind::Expanded(int8), CacheKind::Latent(Some(int8)), CacheKind::Latent(None)];
            for (i, kind) in kinds.into_iter().enumerate() {
                let Some(coded) = run(kind, &Cpu::detect(1), ids.len()) else { continue };
                let what = format!("{} {dtype:?} {kind:?}", case.name);
                let off = worst(&coded, &whole);
                let mean =
                    coded.iter().zip(&whole).map(|(a, b)| (a - b).abs()).sum::<f32>() / whole.len() as f32;
                println!("{what}: logits differ by {mean:.1e}, at most {off:.1e}");
                // the most is not bounded: another expert may be chosen
                assert!(off > 0.0 && mean < 0.05, "{what}: logits differ by {mean}");
                for (threads, chunk) in [(2, 1), (3, 7), (2, 17)] {
                    let cut = run(kind, &Cpu::detect(threads), chunk).expect("as before");
                    assert_same_bits(&format!("{what} in chunks of {chunk}"), &cut, &coded);
                }
                tried[i] += 1;
            }
        }
    }
    assert!(tried[0] >= 30 && tried[1] >= 16 && tried[2] >= 16, "{tried:?}");
}

/// A file whose query and key rows are turned from halves to neighbours, as GGUF files have them.
struct Neighbours {
    file: File,
    head_dim: usize,
}

impl WeightSource for Neighbours {
    fn names(&self) -> Vec<String> {
        self.file.names()
    }
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.file.shape(name)
    }
    fn dtype(&self, name: &str) -> Option<DType> {
        self.file.dtype(name)
    }
    fn read_into(&self, name: &str, out: &mut [f32]) -> Result<(), String> {
        let values = self.file.f32(name);
        if !["q_proj", "k_proj", "q_norm", "k_norm"].iter().any(|part| name.contains(part)) {
            out.copy_from_slice(&values);
            return Ok(());
        }
        let shape = self.shape(name).unwrap_or_default();
        let cols = if shape.len() == 2 { shape[1] } else { 1 };
        let (p, half) = (self.head_dim, self.head_dim / 2);
        for (row, out) in out.chunks_mut(cols).enumerate() {
            let (head, i) = (row / p, row % p);
            let from = head * p + i / 2 + if i % 2 == 1 { half } else { 0 };
            out.copy_from_slice(&values[from * cols..(from + 1) * cols]);
        }
        Ok(())
    }
}

#[test]
fn rotation_of_neighbours_is_that_of_halves_with_rows_moved() {
    let cpu = Cpu::detect(2);
    for name in
        ["llama_gqa", "llama_biases_llama3", "mistral_window", "qwen2_window_tied", "gemma3_published"]
    {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name);
        let mut case = load(&folder, None);
        let halves = infer_all(&mut case, &cpu);
        let mut config = case.model.config.clone();
        config.rope.interleaved = true;
        if let Some(rope) = config.sliding.as_mut().and_then(|sliding| sliding.rope.as_mut()) {
            rope.interleaved = true;
        }
        let file = File::open(&folder.join("model.safetensors"));
        let source = Neighbours { file, head_dim: config.qk_head_dim() };
        case.model = Model::load(config, None, &source, Purpose::Train).unwrap().0;
        let off = worst(&infer_all(&mut case, &cpu), &halves);
        assert!(off < 2e-5, "{name}: neighbours and halves differ by {off}");
    }
}

#[test]
fn bf16_stays_near_f32() {
    let cpu = Cpu::detect(2);
    for folder in folders() {
        let mut exact = load(&folder, None);
        let mut half = load(&folder, Some(Precision::uniform(DType::Bf16)));
        let (a, b) = (exact.model.evaluate(&cpu, &batch(&exact)), half.model.evaluate(&cpu, &batch(&half)));
        let mean = |x: &[f32]| x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len() as f64;
        let off = (mean(&a) - mean(&b)).abs();
        // a router near a tie may choose another expert: a bound on the mean, not on each token
        assert!(off < 0.05, "{}: mean loss differs by {off}", exact.name);
    }
}

#[test]
fn drafts_are_what_the_modules_were_trained_to_say() {
    let cpu = Cpu::detect(2);
    let mut modules = 0;
    for folder in folders() {
        let mut case = load(&folder, None);
        let empty = DraftCache::of_modules(&case.model);
        let d = case.model.config.hidden_size;
        let mut logits = vec![Vec::new(); empty.len()];
        for row in 0..case.rows {
            let tokens = &case.ids[row * case.len..][..case.len];
            let mut cache = Cache::new(&case.model);
            let mut steps = [Step { tokens, cache: &mut cache, want: Want::None }];
            let mut states = case.model.infer_whole(&cpu, &mut steps, !empty.is_empty()).states;
            for (k, empty) in empty.iter().enumerate() {
                let rows = case.len - k - 1;
                let mut step = |cache: &mut DraftCache, from: usize, rows: usize| {
                    let (states, position) = (&states[from * d..(from + rows) * d], from + k + 1);
                    let tokens = &tokens[position..position + rows];
                    case.model.draft(&cpu, k, &mut [DraftStep { states, tokens, position, cache }])
                };
                // one after the other, and in pieces of three
                let (mut one, mut pieces) = (empty.clone(), empty.clone());
                let (mut made, mut last) = (Vec::new(), Vec::new());
                for i in 0..rows {
                    let drafted = step(&mut one, i, 1);
                    last = drafted.logits.to_vec();
                    logits[k].extend_from_slice(&last);
                    made.extend_from_slice(&drafted.states);
                    if i % 3 == 2 {
                        let whole = step(&mut pieces, i - 2, 3);
                        assert_same_bits(&case.name, &whole.logits.to_vec(), &last);
                        assert_same_bits(&case.name, &whole.states, &made[(i - 2) * d..]);
                    }
                }
                assert_eq!((one.len(), one.bytes() > 0), (rows, true));
                // what was a guess is taken back
                let mut again = one.clone();
                again.truncate(rows - 1);
                assert_same_bits(&case.name, &step(&mut again, rows - 1, 1).logits.to_vec(), &last);
                states = made;
            }
        }
        for (k, logits) in logits.iter().enumerate() {
            let worst = worst(logits, &case.vectors.f32(&format!("mtp_logits.{k}")));
            println!("{:28} logits of module {k} differ by {worst:.1e}", case.name);
            assert!(worst < 1e-4, "{}: logits of module {k} differ by {worst}", case.name);
            modules += 1;
        }
    }
    assert_eq!(modules, 3, "modules of two models");
}
