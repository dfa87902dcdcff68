//! What is fuzzed: small models of every architecture in GGUF files, and the way from a file to its first tokens.

use std::error::Error;
use std::path::Path;

use minke_cpu::Cpu;
use minke_data::gguf::{GgufWriter, TensorPlan, TensorType, Value};
use minke_infer::gguf::{gguf_tensors, metadata};
use minke_infer::{Engine, ModelFiles, load_model};
use minke_model::{Config, DType, Purpose, WeightSource, load, spec};

#[path = "../../../minke-data/tests/hostile/targets.rs"]
#[allow(dead_code, reason = "the formats of files are looked at where they are read")]
mod files;

pub use files::Target;

/// All of them.
pub const TARGETS: [Target; 1] = [Target {
    name: "model",
    seeds: models,
    words: &[
        "general.architecture",
        "general.file_type",
        "general.sampling.temp",
        "general.sampling.top_k",
        "llama.",
        "qwen3moe.",
        "gemma3.",
        "deepseek2.",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "nextn_predict_layers",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.key_length_mla",
        "attention.kv_lora_rank",
        "attention.q_lora_rank",
        "attention.sliding_window",
        "attention.layer_norm_rms_epsilon",
        "expert_count",
        "expert_used_count",
        "expert_group_count",
        "expert_group_used_count",
        "expert_gating_func",
        "leading_dense_block_count",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope_freqs.weight",
        "yarn",
        "linear",
        "token_embd.weight",
        "output.weight",
        "blk.0.attn_q.bias",
        "blk.1.",
        "tokenizer.chat_template.tool_use",
        "tokenizer.ggml.eos_token_id",
        "\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}",
        "\u{1}\u{0}\u{0}\u{0}",
        "\u{8}\u{0}\u{0}\u{0}",
        "\u{7f}\u{7f}\u{7f}\u{7f}",
    ],
    run: model,
    memory: (64 << 20, 4000),
}];

/// Weights that are all the same.
struct Same(Config);

impl WeightSource for Same {
    fn names(&self) -> Vec<String> {
        spec::tensors(&self.0).into_iter().map(|spec| spec.name).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        spec::tensors(&self.0).into_iter().find(|spec| spec.name == name).map(|spec| spec.shape)
    }

    fn dtype(&self, _: &str) -> Option<DType> {
        Some(DType::F32)
    }

    fn read_into(&self, _: &str, out: &mut [f32]) -> Result<(), String> {
        out.fill(0.25);
        Ok(())
    }
}

/// A model of each architecture, so small that its header is most of it.
fn models() -> Vec<Vec<u8>> {
    let llama3 = serde_json::json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let yarn = serde_json::json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        "mscale": 1.0, "mscale_all_dim": 1.0});
    let latent = serde_json::json!({"head_dim": null, "num_key_value_heads": 2, "q_lora_rank": 4, "kv_lora_rank": 4,
        "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "moe_intermediate_size": 4, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "routed_scaling_factor": 1.0, "n_group": 2, "topk_group": 1});
    let with = |more: &serde_json::Value, other: serde_json::Value| {
        let mut both = more.clone();
        both.as_object_mut().expect("an object").extend(other.as_object().expect("an object").clone());
        both
    };
    let none = serde_json::json!({});
    let gemma =
        serde_json::json!({"query_pre_attn_scalar": 4, "sliding_window": 4, "tie_word_embeddings": true});
    [
        ("llama", with(&none, serde_json::json!({"rope_scaling": llama3, "rope_theta": 1000000.0}))),
        ("qwen2", with(&none, serde_json::json!({"attention_bias": true}))),
        ("qwen3", with(&none, serde_json::json!({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}))),
        (
            "qwen3_moe",
            serde_json::json!({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4,
                "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        ),
        ("gemma2", gemma.clone()),
        ("gemma3_text", gemma),
        ("deepseek_v2", with(&latent, serde_json::json!({"rope_scaling": yarn, "norm_topk_prob": false, "topk_method": "group_limited_greedy"}))),
        ("deepseek_v3", with(&latent, serde_json::json!({"norm_topk_prob": true, "num_nextn_predict_layers": 1}))),
    ]
    .into_iter()
    .map(|(family, more)| {
        let json = serde_json::json!({
            "model_type": family, "vocab_size": 8, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        });
        written(Config::from_json(&with(&json, more)).expect("a small config"))
    })
    .collect()
}

/// A model's file, with a tokenizer of eight tokens and two templates.
fn written(config: Config) -> Vec<u8> {
    let (mut keys, _) = metadata(&config).expect("a config that GGUF has words for");
    let tokenizer: [(&str, Value<'static>); 9] = [
        ("ggml.model", "gpt2".into()),
        ("ggml.pre", "default".into()),
        ("ggml.tokens", Value::strings(["<|eos|>", "<|user|>", "w", "h", "a", "wh", "wha", "l"])),
        ("ggml.token_type", Value::i32s(&[3, 3, 1, 1, 1, 1, 1, 1])),
        ("ggml.merges", Value::strings(["w h", "wh a"])),
        ("ggml.eos_token_id", 0u32.into()),
        ("chat_templates", Value::strings(["tool_use"])),
        ("chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}".into()),
        ("chat_template.tool_use", "{{ tools }}".into()),
    ];
    keys.extend(tokenizer.map(|(key, value)| (format!("tokenizer.{key}"), value)));
    keys.push(("general.sampling.temp".to_owned(), 0.5f32.into()));
    let tensors = gguf_tensors(&config).expect("a config that GGUF has names for");
    let plan = |tensor: &minke_infer::gguf::OutTensor| TensorPlan {
        name: tensor.name.clone(),
        kind: TensorType::F32,
        shape: tensor.shape.clone(),
    };
    let path = files::scratch("seed.gguf");
    let plans = tensors.iter().map(plan).collect();
    let mut writer = GgufWriter::create(&path, &keys, plans).expect("the file can be written");
    let source = Same(config);
    for tensor in &tensors {
        let numbers = |piece| tensor.read(&source, piece).expect("it has all of them");
        let bytes: Vec<u8> = (0..tensor.pieces()).flat_map(numbers).flat_map(f32::to_le_bytes).collect();
        writer.tensor(&tensor.name, &bytes).expect("the file can be written");
    }
    writer.finish().expect("the file can be written");
    let file = std::fs::read(&path).expect("it was just written");
    let _ = std::fs::remove_file(path);
    file
}

fn model(file: &[u8]) -> bool {
    let path = files::scratch("model.gguf");
    std::fs::write(&path, file).expect("the folder for temporary files can be written");
    let runs = run(&path).is_ok();
    let _ = std::fs::remove_file(path);
    runs
}

/// All that is read of a file: what it says, its numbers as a folder has them, and its first tokens.
fn run(path: &Path) -> Result<(), Box<dyn Error>> {
    let files = ModelFiles::open(path)?;
    let _ = (files.tokenizer(), files.template(), files.generation());
    let _ = metadata(&files.config);
    let weights = files.weights()?;
    let checked = load::check(files.config.clone(), &weights)?;
    for spec in &checked.specs {
        weights.read_into(&spec.name, &mut vec![0.0; spec.numel()])?;
    }
    let cpu = Cpu::detect(1);
    let mut loaded = load_model(&path.display().to_string(), None, Purpose::Run(&cpu))?;
    Engine::new(&mut loaded.model, &cpu, None).score(&[1, 2, 3], &mut |_| {})?;
    Ok(())
}
