use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use minke_cpu::Cpu;
use minke_data::gguf::{GgufFile, GgufWriter, TensorPlan, TensorType, Value};
use minke_model::config::Config;
use minke_model::{Purpose, WeightSource, spec};
use minke_num::blocks::BlockFormat;
use minke_num::rng;

use super::*;
use crate::{GenerationDefaults, ModelFiles, load_model};

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../minke-model/tests/vectors");

fn folder(name: &str) -> ModelFiles {
    ModelFiles::open(&Path::new(VECTORS).join(name)).unwrap()
}

/// A GGUF file in a folder of its own.
pub(crate) struct Temporary {
    folder: tempfile::TempDir,
}

impl Temporary {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("model.gguf")
    }

    fn write(&self, model: &ModelFiles, kind: TensorType) -> ModelFiles {
        let weights = model.weights().unwrap();
        self.try_write(&model.config, &weights, kind).unwrap();
        ModelFiles::open(&self.path()).unwrap()
    }

    pub(crate) fn try_write(
        &self,
        config: &Config,
        source: &dyn WeightSource,
        kind: TensorType,
    ) -> Result<Written, WriteError> {
        let generation = &suggestions();
        let (tokenizer, template, name) = (None, None, Some("test"));
        let model = ToWrite { config, source, tokenizer, template, generation, name, more: &[] };
        write_gguf(&self.path(), &model, &mut { kind }, &mut |_| ControlFlow::Continue(()))
    }
}

fn suggestions() -> GenerationDefaults {
    GenerationDefaults {
        temperature: Some(0.6),
        top_k: Some(20),
        top_p: Some(0.95),
        min_p: Some(0.0),
        repetition_penalty: Some(1.05),
        ..GenerationDefaults::default()
    }
}

fn read(source: &dyn WeightSource, name: &str) -> Vec<f32> {
    let mut out = vec![0.0; source.shape(name).unwrap().iter().product()];
    source.read_into(name, &mut out).unwrap();
    out
}

/// What differs though it means the same: tokens that nobody has, types, and fields that no reader asks for.
fn comparable(config: &Config) -> serde_json::Value {
    let mut json = config.to_json();
    let object = json.as_object_mut().unwrap();
    for field in ["bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_range"]
    {
        object.remove(field);
    }
    for field in config.extra.keys() {
        object.remove(field);
    }
    json
}

pub(crate) fn random_source(config: &Config, seed: u64) -> Random {
    Random { config: config.clone(), seed }
}

/// Weights that are a function of their names.
pub(crate) struct Random {
    config: Config,
    seed: u64,
}

impl WeightSource for Random {
    fn names(&self) -> Vec<String> {
        spec::tensors(&self.config).into_iter().map(|spec| spec.name).collect()
    }
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        spec::tensors(&self.config).into_iter().find(|spec| spec.name == name).map(|spec| spec.shape)
    }
    fn dtype(&self, _: &str) -> Option<minke_model::DType> {
        Some(minke_model::DType::F32)
    }
    fn read_into(&self, name: &str, out: &mut [f32]) -> Result<(), String> {
        let stream =
            name.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let spec = spec::tensors(&self.config).into_iter().find(|spec| spec.name == name).ok_or("none")?;
        rng::fill_normal(self.seed, stream, 0.1, out);
        if spec.role == spec::Role::Norm && !self.config.family.model_type().starts_with("gemma") {
            for gain in out.iter_mut() {
                *gain += 1.0;
            }
        }
        Ok(())
    }
}

/// Small configs of every family that is written.
fn configs() -> Vec<Config> {
    let base = |family: &str, more: serde_json::Value| {
        let mut json = serde_json::json!({
            "model_type": family, "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        });
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        // a family that is not known (yet) is not tested
        Config::from_json(&json).map_err(|error| error.to_string())
    };
    let all = [
        base("llama", serde_json::json!({})),
        base(
            "llama",
            serde_json::json!({"tie_word_embeddings": true, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ),
        base(
            "llama",
            serde_json::json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}),
        ),
        base(
            "llama",
            serde_json::json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25,
            "original_max_position_embeddings": 16}}),
        ),
        base("llama", serde_json::json!({"attention_bias": true, "mlp_bias": true})),
        base("mistral", serde_json::json!({"sliding_window": null})),
        base("qwen2", serde_json::json!({})),
        base("qwen3", serde_json::json!({"tie_word_embeddings": true})),
        base(
            "qwen3_moe",
            serde_json::json!({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        ),
        base(
            "gemma2",
            serde_json::json!({"query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": true}),
        ),
        base(
            "gemma3_text",
            serde_json::json!({"query_pre_attn_scalar": 8, "sliding_window": 16, "tie_word_embeddings": true,
            "rope_theta": 1000000.0, "sliding_window_pattern": 2}),
        ),
    ];
    all.into_iter()
        .filter_map(|config| match config {
            Ok(config) => Some(config),
            Err(why) => {
                assert!(why.contains("unknown family") || why.contains("not supported"), "{why}");
                None
            }
        })
        .collect()
}

#[test]
fn a_file_says_what_its_folder_says() {
    let temporary = Temporary::new();
    for name in [
        "llama_gqa",
        "llama_mha_tied",
        "v2_greedy_qlora_tied",
        "v2_greedy_yarn_published",
        "v2_group_limited_published",
        "v3_groups_published",
        "v3_mtp1",
        "v3_mtp2",
        "v3_plain",
        "v3_tied_all_moe",
        "v3_yarn_published",
    ] {
        let ours = folder(name);
        let source = ours.weights().unwrap();
        let theirs = temporary.write(&ours, TensorType::F32);
        assert_eq!(comparable(&ours.config), comparable(&theirs.config), "{name}");
        assert_eq!(theirs.generation().unwrap(), suggestions());
        let file = theirs.weights().unwrap();
        let mut names = file.names();
        names.sort();
        let mut expected: Vec<String> =
            spec::tensors(&ours.config).into_iter().map(|spec| spec.name).collect();
        expected.sort();
        assert_eq!(names, expected, "{name}");
        for tensor in expected {
            assert_eq!(file.shape(&tensor), source.shape(&tensor), "{name}, {tensor}");
            assert_eq!(read(&file, &tensor), read(&source, &tensor), "{name}, {tensor}");
        }
    }
}

#[test]
fn every_family_comes_back() {
    let temporary = Temporary::new();
    let configs = configs();
    for config in &configs {
        let family = config.family.model_type();
        let source = random_source(config, 3);
        temporary.try_write(config, &source, TensorType::F32).unwrap();
        let file = ModelFiles::open(&temporary.path()).unwrap();
        let (mut ours, mut theirs) = (comparable(config), comparable(&file.config));
        // Mistral is written as Llama
        for json in [&mut ours, &mut theirs] {
            for field in ["model_type", "architectures"] {
                json[field] = if family == "mistral" { serde_json::Value::Null } else { json[field].clone() };
            }
            let object = json.as_object_mut().unwrap();
            object.retain(|field, _| {
                family != "mistral"
                    || !["sliding_window", "mlp_bias", "attention_bias"].contains(&field.as_str())
            });
        }
        let close = |json: &serde_json::Value| json["rope_parameters"]["attention_factor"].as_f64();
        if let (Some(a), Some(b)) = (close(&ours), close(&theirs)) {
            assert!((a - b).abs() < 1e-6);
            for json in [&mut ours, &mut theirs] {
                json["rope_parameters"]["attention_factor"] = 0.into();
                json["rope_scaling"]["attention_factor"] = 0.into();
            }
        }
        assert_eq!(ours, theirs);
        let weights = file.weights().unwrap();
        for spec in spec::tensors(config) {
            let (a, b) = (read(&weights, &spec.name), read(&source, &spec.name));
            // Gemma's gains gain and lose one
            let near = a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-7);
            assert!(if family.starts_with("gemma") { near } else { a == b }, "{family}, {}", spec.name);
        }
    }
}

#[test]
fn what_runs_from_a_file_runs_as_its_folder_does() {
    let cpu = Cpu::detect(2);
    let temporary = Temporary::new();
    let logits = |path: &Path, purpose: Purpose<'_>| -> Vec<f32> {
        let mut loaded = load_model(path.to_str().unwrap(), None, purpose).unwrap();
        let mut engine = crate::Engine::new(&mut loaded.model, &cpu, None);
        let mut all = Vec::new();
        engine.score(&[3, 1, 4, 1, 5, 9, 2, 6], &mut |logits| all.extend_from_slice(logits)).unwrap();
        all
    };
    for name in ["llama_gqa", "v3_mtp1", "v2_greedy_yarn_published"] {
        let ours = folder(name);
        temporary.write(&ours, TensorType::F32);
        let expected = logits(&ours.path, Purpose::Run(&cpu));
        let trained = logits(&temporary.path(), Purpose::Train);
        assert_eq!(trained, expected, "{name}: the same model, to the bit");
        let run = logits(&temporary.path(), Purpose::Run(&cpu));
        let far = run.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-4, "{name}: rows in another order, the sums in another too: {far}");
    }
}

#[test]
fn stored_parts_are_the_files_own_bytes() {
    let temporary = Temporary::new();
    let config = &configs()[0];
    let source = random_source(config, 1);
    temporary.try_write(config, &source, TensorType::Blocks(BlockFormat::Q8_0)).unwrap();
    let file = ModelFiles::open(&temporary.path()).unwrap();
    let (_, weights) = file.to_run().unwrap();
    let mut blocks = 0;
    for spec in spec::tensors(config) {
        let stored = weights.stored(&spec.name);
        assert_eq!(stored.is_some(), spec.shape.len() == 2, "{}", spec.name);
        let Some(stored) = stored else { continue };
        let mut numbers = vec![0.0; spec.numel()];
        if let minke_cpu::stored::Form::Blocks(format) = stored.form {
            minke_num::blocks::decode(format, &stored.bytes, &mut numbers);
            blocks += 1;
        } else {
            continue;
        }
        assert_eq!(read(&weights, &spec.name), numbers, "{}", spec.name);
    }
    assert!(blocks > 10, "{blocks}");
    // of an expert, its own rows
    let ours = folder("v3_plain");
    let file = temporary.write(&ours, TensorType::Bf16);
    let (_, weights) = file.to_run().unwrap();
    let expert = spec::tensors(&ours.config).into_iter().find(|s| s.name.contains("experts.1.down")).unwrap();
    let stored = weights.stored(&expert.name).unwrap();
    let numbers: Vec<f32> = stored
        .bytes
        .chunks_exact(2)
        .map(|pair| minke_num::bf16::from_le_bytes([pair[0], pair[1]]).to_f32())
        .collect();
    assert_eq!(numbers, read(&weights, &expert.name));
    let kv = spec::tensors(&ours.config).into_iter().find(|s| s.name.contains("kv_b_proj")).unwrap();
    assert!(weights.stored(&kv.name).is_none(), "keys that are turned over cannot run where they are");
    let made = weights.made(&kv.name).expect("put together of two tensors");
    for _ in 0..2 {
        let mut numbers = vec![0.0; kv.numel()];
        made(&mut numbers);
        assert_eq!(numbers, read(&weights, &kv.name));
    }
    assert!(weights.made(&expert.name).is_none());
}

/// Numbers that f16 does not have.
struct Wrong(Random);
impl WeightSource for Wrong {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.shape(name)
    }
    fn dtype(&self, name: &str) -> Option<minke_model::DType> {
        self.0.dtype(name)
    }
    fn read_into(&self, name: &str, out: &mut [f32]) -> Result<(), String> {
        out.fill(if name.contains("down_proj") { 1e30 } else { 1.0 });
        Ok(())
    }
}

#[test]
fn what_gguf_has_no_place_for_is_said() {
    let temporary = Temporary::new();
    let halves = folder("v3_halves_tied");
    let error = temporary.try_write(&halves.config, &halves.weights().unwrap(), TensorType::F32).unwrap_err();
    assert!(error.is_user_error());
    assert!(error.to_string().contains("`rope_interleave`: false has no place in GGUF"), "{error}");
    let mut source = random_source(&configs()[0], 1);
    source.seed = 2;
    let config = configs()[0].clone();
    let error = temporary.try_write(&config, &Wrong(source), TensorType::F16).unwrap_err().to_string();
    assert!(error.contains("down_proj") && error.contains("up to 65504"), "{error}");
    assert!(!temporary.path().exists(), "nothing is left");
}

type Keys = Vec<(String, Value<'static>)>;
type Tensors = Vec<(TensorPlan, Vec<u8>)>;
type Change = Box<dyn Fn(&mut Keys, &mut Tensors)>;

/// A file of a small model with one thing changed.
fn broken(change: &dyn Fn(&mut Keys, &mut Tensors)) -> String {
    let temporary = Temporary::new();
    let config = &configs()[0];
    let source = random_source(config, 1);
    let (mut keys, _) = metadata(config).unwrap();
    let mut tensors: Tensors = gguf_tensors(config)
        .unwrap()
        .into_iter()
        .map(|tensor| {
            let numbers = tensor.read(&source, 0).unwrap();
            let plan =
                TensorPlan { name: tensor.name.clone(), kind: TensorType::F32, shape: tensor.shape.clone() };
            (plan, elements(TensorType::F32, &numbers, 1).unwrap())
        })
        .collect();
    change(&mut keys, &mut tensors);
    let plans = tensors.iter().map(|(plan, _)| plan.clone()).collect();
    let mut writer = GgufWriter::create(temporary.path(), &keys, plans).unwrap();
    for (plan, bytes) in &tensors {
        writer.tensor(&plan.name, bytes).unwrap();
    }
    writer.finish().unwrap();
    match load_model(temporary.path().to_str().unwrap(), None, Purpose::Train) {
        Ok(loaded) => loaded.notes.join("; "),
        Err(error) => {
            assert!(error.is_user_error(), "{error}");
            error.to_string()
        }
    }
}

#[test]
fn files_that_contradict_themselves_are_refused_with_a_reason() {
    let set = |key: &'static str, value: Value<'static>| {
        move |keys: &mut Keys, _: &mut Tensors| {
            keys.retain(|(found, _)| found != key);
            keys.push((key.to_owned(), value.clone()));
        }
    };
    let without =
        |key: &'static str| move |keys: &mut Keys, _: &mut Tensors| keys.retain(|(found, _)| found != key);
    let reshaped = |name: &'static str, shape: &'static [usize]| {
        move |_: &mut Keys, tensors: &mut Tensors| {
            let (plan, bytes) = tensors.iter_mut().find(|(plan, _)| plan.name == name).unwrap();
            plan.shape = shape.to_vec();
            *bytes = vec![0; plan.bytes().unwrap()];
        }
    };
    assert_eq!(broken(&|_, _| {}), "");
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(without("general.architecture")), "`general.architecture`: expected one of llama"),
        (Box::new(set("general.architecture", "mamba".into())), "got \"mamba\""),
        (
            Box::new(without("llama.block_count")),
            "`llama.block_count`: expected a whole number, got no such key",
        ),
        (Box::new(set("llama.block_count", "three".into())), "expected a whole number"),
        (Box::new(set("llama.block_count", 0u32.into())), "nextn_predict_layers"),
        (Box::new(set("llama.block_count", u32::MAX.into())), "at most 1024"),
        (Box::new(set("llama.block_count", 4u32.into())), "missing tensors, the first: `model.layers.3."),
        (Box::new(set("llama.block_count", 2u32.into())), "does not know, the first: `blk.2."),
        (Box::new(set("llama.attention.head_count", 0u32.into())), "num_attention_heads"),
        (Box::new(set("llama.attention.head_count", 3u32.into())), "num_attention_heads"),
        (Box::new(set("llama.attention.head_count", Value::i32s(&[4, 4, 2]))), "the same for all layers"),
        (Box::new(set("llama.attention.value_length", 4u32.into())), "that of keys, 8"),
        (Box::new(set("llama.rope.dimension_count", 4u32.into())), "whole heads, 8"),
        (
            Box::new(set("llama.rope.freq_base", f32::NAN.into())),
            "`llama.rope.freq_base`: expected a finite number",
        ),
        (Box::new(set("llama.attention.layer_norm_rms_epsilon", 2f32.into())), "rms_norm_eps"),
        (Box::new(set("llama.context_length", 0u32.into())), "max_position_embeddings"),
        (Box::new(set("llama.embedding_length", (1u64 << 40).into())), "hidden_size"),
        (Box::new(set("llama.expert_count", 8u32.into())), "none in this architecture"),
        (Box::new(set("llama.attention.scale", 0.5f32.into())), "which is not built"),
        (Box::new(set("llama.rope.scaling.type", "longrope".into())), "none, linear or yarn"),
        (Box::new(reshaped("token_embd.weight", &[40])), "a matrix"),
        (
            Box::new(reshaped("blk.1.ffn_up.weight", &[48, 31])),
            "tensor `model.layers.1.mlp.up_proj.weight`: expected shape [48, 32], got [48, 31]",
        ),
        (Box::new(reshaped("blk.0.attn_q.weight", &[3, 32])), "expected shape [32, 32], got [3, 32]"),
        (
            Box::new(|_, tensors| tensors.retain(|(plan, _)| plan.name != "output_norm.weight")),
            "1 missing tensor, the first: `model.norm.weight`",
        ),
        (
            Box::new(|_, tensors| {
                let plan = TensorPlan {
                    name: "blk.0.strange.weight".to_owned(),
                    kind: TensorType::F32,
                    shape: vec![1],
                };
                tensors.push((plan, vec![0; 4]));
            }),
            "the first: `blk.0.strange.weight`",
        ),
        (
            Box::new(|_, tensors| {
                let plan = TensorPlan {
                    name: "rope_freqs.weight".to_owned(),
                    kind: TensorType::F32,
                    shape: vec![4],
                };
                tensors.push((plan, [1f32, 2.0, 3.0, 5.0].iter().flat_map(|x| x.to_le_bytes()).collect()));
            }),
            "divisors of frequencies by Llama 3's rule",
        ),
    ];
    for (change, why) in cases {
        let text = broken(&*change);
        assert!(text.contains(why), "expected `{why}` in: {text}");
    }
    // more tokens than rows: said, and the model runs
    let tokens = |count: usize| {
        move |keys: &mut Keys, _: &mut Tensors| {
            keys.push(("tokenizer.ggml.model".to_owned(), "llama".into()));
            keys.push((
                "tokenizer.ggml.tokens".to_owned(),
                Value::strings((0..count).map(|i| format!("t{i}"))),
            ));
            keys.push(("tokenizer.ggml.scores".to_owned(), Value::f32s(&vec![0.0; count])));
        }
    };
    assert!(broken(&tokens(50)).contains("ids up to 49, the model only 40 rows"));
    assert_eq!(broken(&tokens(40)), "");
}

#[test]
fn a_file_that_is_cut_short_is_no_model() {
    let temporary = Temporary::new();
    let config = &configs()[0];
    temporary.try_write(config, &random_source(config, 1), TensorType::Bf16).unwrap();
    let good = fs::read(temporary.path()).unwrap();
    for cut in [0, 1, 4, 8, 23, 24, 60, 500, good.len() / 2, good.len() - 33] {
        fs::write(temporary.path(), &good[..cut]).unwrap();
        let text = ModelFiles::open(&temporary.path()).unwrap_err().to_string();
        assert!(text.contains("model.gguf") && text.contains("expected"), "{cut}: {text}");
    }
    assert_eq!(GgufFile::open(temporary.path()).unwrap_err().to_string().matches("truncated").count(), 1);
}
