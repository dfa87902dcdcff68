//! Ten `AdamW` steps give the losses of `torch.optim.AdamW` on transformers' models, for every configuration.
//!
//! The vectors lie with the model (`scripts/parity_vectors.py` makes them). The trainer takes the steps, so its loss
//! scaling, the MTP weight and the optimizer are all in it; clipping, schedule and the router's bias are off, as there.

use std::path::{Path, PathBuf};

use minke_cpu::Cpu;
use minke_data::hf::WeightFiles;
use minke_infer::{WeightFolder, read_config};
use minke_model::{DType, IGNORE, Model, MtpTargets, Precision, Purpose, Recompute, Segment, TrainBatch};
use minke_train::optim::{Rates, Settings};
use minke_train::recipe::{Moments, Optimizer};
use minke_train::schedule::{Decay, Schedule};
use minke_train::trainer::{Course, Trainer};

const STEPS: u64 = 10;
const MTP_LOSS_WEIGHT: f64 = 0.3;

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors");
    let mut folders: Vec<_> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|folder| folder.is_dir());
    folders.sort();
    assert!(folders.len() >= 10, "the vectors are there");
    folders
}

/// All sequences in one batch, or each in a micro-batch of its own.
fn batches(vectors: &WeightFiles, modules: usize, apart: bool) -> Vec<TrainBatch> {
    let view = vectors.get("input_ids").unwrap();
    let (rows, len) = (view.shape[0], view.shape[1]);
    let ids: Vec<u32> =
        view.bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect();
    let of = |ids: &[u32]| {
        let ahead = |by: usize, none: u32| -> Vec<u32> {
            let rows = ids.chunks(len);
            rows.flat_map(|row| (0..len).map(move |i| row.get(i + by).copied().unwrap_or(none))).collect()
        };
        TrainBatch {
            tokens: ids.to_vec(),
            positions: (0..ids.len()).map(|i| (i % len) as u32).collect(),
            segments: (0..ids.len() / len).map(|row| Segment { start: row * len, len }).collect(),
            labels: ahead(1, IGNORE),
            mtp: (1..=modules)
                .map(|k| MtpTargets { tokens: ahead(k, 0), labels: ahead(k + 1, IGNORE) })
                .collect(),
        }
    };
    if apart { (0..rows).map(|row| of(&ids[row * len..][..len])).collect() } else { vec![of(&ids)] }
}

fn losses(folder: &Path, cpu: &Cpu, apart: bool) -> Vec<f64> {
    let config = read_config(folder).unwrap();
    let source = WeightFolder::open(folder, &config).unwrap();
    let f32 = Precision::uniform(DType::F32);
    let (model, notes) = Model::load(config, Some(f32), &source, Purpose::Train).unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    let vectors = WeightFiles::open_file(folder.join("vectors.safetensors")).unwrap();
    let batch = batches(&vectors, model.config.num_nextn_predict_layers, apart);
    let settings = Settings {
        optimizer: Optimizer::AdamW,
        betas: [0.9, 0.95],
        moments: Moments::F32,
        eps: 1e-8,
        weight_decay: 0.1,
        muon_momentum: 0.95,
    };
    let course = Course {
        steps: STEPS,
        rates: Rates { adamw: 1e-3, muon: 0.0 },
        schedule: Schedule { warmup_share: 0.0, decay_share: 0.0, decay: Decay::Linear, final_share: 1.0 },
        clip: 0.0,
        skip_limit: 0,
        mtp_loss_weight: MTP_LOSS_WEIGHT,
        bias_update_speed: 0.0,
        balance_alpha: 0.0,
        recompute: Recompute::None,
    };
    let mut trainer = Trainer::new(model, &settings, course);
    let mut step = |_| {
        let report = trainer.step(cpu, &batch).unwrap();
        report.loss + MTP_LOSS_WEIGHT * report.mtp_loss.unwrap_or(0.0)
    };
    (0..STEPS).map(&mut step).collect()
}

#[test]
fn ten_adamw_steps_have_the_losses_of_torch() {
    let cpu = Cpu::detect(2);
    let mut worst = (0.0, String::new());
    for folder in folders() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let vectors = WeightFiles::open_file(folder.join("vectors.safetensors")).unwrap();
        let expected = vectors.read_f32("adamw_losses").unwrap();
        assert_eq!(expected.len() as u64, STEPS);
        assert!(expected[9] < expected[0], "{name}: the reference learns");
        // accumulating is the same step, summed in another order
        for apart in [false, true] {
            for (step, (got, expected)) in losses(&folder, &cpu, apart).iter().zip(&expected).enumerate() {
                let difference = (got - f64::from(*expected)).abs();
                assert!(difference < 1e-4, "{name}, step {step}: loss {got}, torch has {expected}");
                if difference > worst.0 {
                    worst = (difference, format!("{name}, step {step}"));
                }
            }
        }
    }
    println!("worst difference of a loss: {:.1e} in {}", worst.0, worst.1);
}
