//! Folders in FP8 that run as they are stored: codes and scales, and the bits of masters that are coded again.

use std::path::Path;

use minke_cpu::Cpu;
use minke_data::hf::{Dtype, SafetensorsWriter, TensorSpec, scales_name};
use minke_infer::{Engine, Loaded, Request, Sampling, WeightFolder, load_model, read_config};
use minke_model::config::{Config, Quantization};
use minke_model::{
    Cache, CacheKind, Coded, DType, Fp8, KvFormat, Loading, Model, Precision, Purpose, Step, TrainBatch,
    Unmoved, Want,
};
use minke_num::bf16;
use minke_num::fp8::Quantized;
use minke_num::tolerance::assert_same_bits;
use serde_json::{Value, json};

/// Sides that 128 does not divide, and more than one block of most.
const SIZES: [(&str, usize); 7] = [
    ("hidden_size", 160),
    ("intermediate_size", 200),
    ("moe_intermediate_size", 136),
    ("q_lora_rank", 48),
    ("kv_lora_rank", 136),
    ("qk_nope_head_dim", 72),
    ("v_head_dim", 80),
];

fn config(name: &str) -> Config {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors").join(name);
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    for (key, size) in SIZES {
        if value.get(key).is_some_and(Value::is_number) {
            value[key] = json!(size);
        }
    }
    Config::from_json(&value).unwrap()
}

/// Writes a folder in FP8 whose codes are found again from their numbers: every square is filled to 448 of a scale that is
/// a power of two or short enough that the scale times 448 is exact. `spared` are left in bf16.
fn write(folder: &Path, config: &Config, power_of_two: bool, spared: &str) {
    let model = Model::random(config.clone(), Precision::uniform(DType::F32), 7);
    let mut tensors: Vec<(TensorSpec, Vec<u8>)> = Vec::new();
    let mut put = |name: &str, dtype, shape: Vec<usize>, bytes| {
        tensors.push((TensorSpec { name: name.to_owned(), dtype, shape }, bytes));
    };
    for entry in &model.params.entries {
        let w = &model.params.data[entry.range.clone()];
        let floats = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        if !entry.role.takes_fp8() {
            put(&entry.name, Dtype::F32, entry.shape.clone(), floats(w));
        } else if !spared.is_empty() && entry.name.contains(spared) {
            let halves = w.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
            put(&entry.name, Dtype::BF16, entry.shape.clone(), halves);
        } else {
            let (rows, cols) = (entry.shape[0], entry.shape[1]);
            let mut q = Quantized::quantize(w, rows, cols, power_of_two);
            if !power_of_two {
                for scale in &mut q.scales {
                    *scale = f32::from_bits(scale.to_bits() & !0xfff);
                }
            }
            let scales = floats(&q.scales);
            put(&entry.name, Dtype::F8E4M3, entry.shape.clone(), q.codes);
            let shape = minke_num::fp8::scale_shape(rows, cols).to_vec();
            put(&scales_name(&entry.name), Dtype::F32, shape, scales);
        }
    }
    tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = SafetensorsWriter::create(folder.join("model.safetensors"), specs).unwrap();
    for (spec, bytes) in &tensors {
        writer.tensor(&spec.name, bytes).unwrap();
    }
    writer.finish().unwrap();
    let config = Config { quantization: Some(Quantization { power_of_two }), ..config.clone() };
    std::fs::write(folder.join("config.json"), config.to_json().to_string()).unwrap();
}

fn load(folder: &Path, precision: Option<Precision>, purpose: Purpose<'_>) -> Loaded {
    load_model(folder.to_str().unwrap(), precision, purpose).unwrap()
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n as u64).map(|i| minke_num::rng::below(3, 1, i, 96) as u32).collect()
}

/// Logits of all tokens, in chunks; without a cache in one of expanded keys.
fn logits(model: &mut Model, cpu: &Cpu, cache: Option<Cache>, chunks: &[usize]) -> Vec<f32> {
    let ids = tokens(chunks.iter().sum());
    let mut cache = cache.unwrap_or_else(|| Cache::new(model));
    let (mut at, mut out) = (0, Vec::new());
    for chunk in chunks {
        let tokens = &ids[at..at + chunk];
        out.extend(model.infer(cpu, &mut [Step { tokens, cache: &mut cache, want: Want::All }]));
        at += chunk;
    }
    out
}

#[test]
fn stored_codes_run_with_the_bits_of_masters_that_are_coded_again() {
    for (name, power_of_two) in [("v3_groups_published", true), ("v3_mtp1", false), ("llama_gqa", true)] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &config(name), power_of_two, "");
        let cpu = Cpu::detect(2);
        let mut runs = load(folder.path(), None, Purpose::Run(&cpu)).model;
        let coded = Coded { how: Fp8 { power_of_two, per_tensor: false }, ..runs.precision.coded };
        assert!(coded.linear && coded.attention && runs.precision.coded == coded && runs.params.only_runs());
        // the same precision over f32 masters
        let mut trains = load(folder.path(), Some(runs.precision), Purpose::Train).model;
        assert!(!trains.params.only_runs());
        let whole = logits(&mut runs, &cpu, None, &[40]);
        let masters = logits(&mut trains, &cpu, None, &[40]);
        assert_same_bits(name, &whole, &masters);
        // nothing of a weight in FP8 is there but a byte for each element and its scales
        let numbers: usize = runs
            .params
            .entries
            .iter()
            .filter(|entry| !entry.role.takes_fp8())
            .map(|entry| entry.shape.iter().product::<usize>())
            .sum();
        assert_eq!(runs.params.data.len(), numbers);
        assert!(runs.params.entries.iter().all(|entry| entry.role.takes_fp8() == entry.range.is_empty()));
        // whatever changes, codes are not made again from what is not there
        runs.weights_changed();
        for (threads, chunks) in [(1, &[40][..]), (3, &[7, 1, 20, 1, 1, 1, 9]), (2, &[1; 40])] {
            let cpu = Cpu::detect(threads);
            let got = logits(&mut runs, &cpu, None, chunks);
            assert_same_bits(&format!("{name}, {threads} threads, {chunks:?}"), &got, &whole);
        }
        // the absorbed form reads numbers of `kv_b_proj`
        let latent = |model: &Model| Cache::of_kind(model, CacheKind::Latent(Some(KvFormat::F32)));
        if let (Some(of_codes), Some(of_masters)) = (latent(&runs), latent(&trains)) {
            let got = logits(&mut runs, &cpu, Some(of_codes), &[9, 1, 5]);
            assert_same_bits(name, &got, &logits(&mut trains, &cpu, Some(of_masters), &[9, 1, 5]));
        }
        // the pass that training makes, over one sequence
        let ids = tokens(40);
        let batch = TrainBatch {
            labels: ids[1..].iter().copied().chain([0]).collect(),
            positions: (0..40).collect(),
            segments: vec![minke_model::Segment { start: 0, len: 40 }],
            tokens: ids,
            ..TrainBatch::default()
        };
        let losses = runs.evaluate(&cpu, &batch);
        assert_same_bits(name, &losses, &trains.evaluate(&cpu, &batch));
        // in panels too
        runs.copy_mapped_weights();
        runs.copy_mapped_weights_first(&cpu);
        assert_same_bits(&format!("{name}, laid"), &logits(&mut runs, &cpu, None, &[7, 1, 32]), &whole);
        // f32 and bf16 are what they were, from the file too
        for dtype in [DType::F32, DType::Bf16] {
            let precision = Some(Precision::uniform(dtype));
            let mut a = load(folder.path(), precision, Purpose::Run(&cpu)).model;
            let mut b = load(folder.path(), precision, Purpose::Train).model;
            assert!(!a.params.only_runs());
            let config = read_config(folder.path()).unwrap();
            let source = WeightFolder::open(folder.path(), &config).unwrap();
            let run = Purpose::Run(&cpu);
            let unmoved = Loading::new(config, precision, &source, run, Unmoved::Converted).unwrap();
            assert!(unmoved.held_bytes() < unmoved.mapped_bytes());
            let (mut c, _) = unmoved.load(&source, run).unwrap();
            assert!(c.params.entries.iter().all(|entry| !entry.role.takes_fp8() || entry.range.is_empty()));
            let [x, y, z] = [&mut a, &mut b, &mut c].map(|model| logits(model, &cpu, None, &[12]));
            assert_same_bits(name, &x, &y);
            assert_same_bits(&format!("{name}, converted"), &z, &y);
        }
        assert_eq!(load(folder.path(), None, Purpose::Train).model.precision.linear, DType::F32);
    }
}

#[test]
fn what_a_folder_spares_runs_as_it_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &config("v3_mtp1"), true, "down_proj");
    let cpu = Cpu::detect(2);
    let mut model = load(folder.path(), None, Purpose::Run(&cpu)).model;
    for entry in &model.params.entries {
        let in_codes = entry.role.takes_fp8() && !entry.name.contains("down_proj");
        assert_eq!(entry.range.is_empty(), in_codes, "{}", entry.name);
    }
    let whole = logits(&mut model, &cpu, None, &[20]);
    let parts = logits(&mut model, &cpu, None, &[3, 1, 16]);
    assert_same_bits("spared", &parts, &whole);
    // asked for, they are coded as well; and the folder's scales are kept
    let all = load(folder.path(), Some(Precision::fp8(Fp8::default())), Purpose::Run(&cpu)).model;
    assert!(all.precision.coded.how.power_of_two);
    assert!(all.params.entries.iter().all(|entry| entry.role.takes_fp8() == entry.range.is_empty()));
}

#[test]
fn a_folder_of_numbers_is_coded_when_it_is_loaded() {
    let name = "v3_groups_published";
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../minke-model/tests/vectors").join(name);
    let cpu = Cpu::detect(2);
    let precision = Some(Precision::fp8(Fp8::default()));
    let mut runs = load(&folder, precision, Purpose::Run(&cpu)).model;
    let mut trains = load(&folder, precision, Purpose::Train).model;
    assert!(runs.params.only_runs() && !trains.params.only_runs());
    let [x, y] = [&mut runs, &mut trains].map(|model| logits(model, &cpu, None, &[30]));
    assert_same_bits(name, &x, &y);
    let request = Request {
        prompt: tokens(9),
        max_tokens: 12,
        sampling: Sampling::greedy(),
        sequence: 1,
        ..Request::default()
    };
    let [x, y] = [&mut runs, &mut trains].map(|model| {
        let mut go = |_: minke_infer::Delta<'_>| std::ops::ControlFlow::Continue(());
        Engine::new(model, &cpu, None).generate(std::slice::from_ref(&request), &mut go).unwrap()
    });
    assert_eq!(x[0].tokens, y[0].tokens);
}

#[test]
#[should_panic(expected = "cannot be trained")]
fn a_model_that_only_runs_is_not_trained() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &config("llama_gqa"), true, "");
    load(folder.path(), None, Purpose::Run(&Cpu::detect(1))).model.params.zero_grad();
}
