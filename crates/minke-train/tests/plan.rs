//! The plan's walk against the passes that it foretells: the buffers that tensors hold, to the byte.

use minke_cpu::Cpu;
use minke_model::{Model, Precision, Recompute};
use minke_train::batch;
use minke_train::optim::Settings;
use minke_train::plan;
use minke_train::recipe::{Optimizer, Recipe};
use minke_train::trainer::{Course, Trainer};

#[test]
fn what_does_not_fit_for_its_answers_says_so() {
    let mut shape = plan::Shape::from(&Recipe::parse("r.toml", LLAMA, &[]).unwrap().resolve().unwrap());
    shape.batch.length_key = "rollout.max_tokens";
    let cpu = Cpu::detect(1);
    let level = cpu.level();
    let without = shape.memory(level, 1).peak_bytes;
    shape.caches = plan::Caches { answers: 64, answer_bytes: 1 << 24 };
    assert_eq!(shape.memory(level, 1).peak_bytes, without + (1 << 30));
    let told = |available| match shape.fit(level, 1, Some(available)) {
        plan::Fit::TooLarge(why) => why.to_string(),
        other => panic!("{other:?}"),
    };
    let text = told(without + (20 << 24));
    for part in ["rollout.concurrency = 16: ", "change one of these, or rollout.max_tokens,"] {
        assert!(text.contains(part) && !text.contains("train.sequence_length"), "{text}");
    }
    let text = told(1 << 20);
    assert!(
        text.contains("rollout.concurrency = 1: ") && text.contains("make rollout.max_tokens or"),
        "{text}"
    );
}

const DEEPSEEK: &str = r#"
precision = "bf16"
[model]
family = "deepseek_v3"
vocab_size = 3000
hidden_size = 64
num_hidden_layers = 3
num_attention_heads = 4
q_lora_rank = 24
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 24
first_k_dense_replace = 1
intermediate_size = 160
n_routed_experts = 8
num_experts_per_tok = 3
moe_intermediate_size = 48
n_shared_experts = 1
num_nextn_predict_layers = 2
[data]
random = true
[train]
batch_size = 5
sequence_length = 96
accumulation = 2
tokens = 100000
optimizer = "adamw"
"#;

const LLAMA: &str = r#"
[model]
family = "llama"
vocab_size = 500
hidden_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 128
tie_word_embeddings = true
[data]
random = true
[train]
batch_size = 3
sequence_length = 70
tokens = 100000
"#;

/// Biases everywhere.
const BIASED: &str = r#"
[model]
family = "llama"
vocab_size = 500
hidden_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 128
attention_bias = true
mlp_bias = true
[data]
random = true
[train]
batch_size = 3
sequence_length = 70
tokens = 100000
optimizer = "adamw"
"#;

/// Norms of heads, experts, windows.
const QWEN: &str = r#"
[model]
family = "qwen3_moe"
vocab_size = 500
hidden_size = 48
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 24
intermediate_size = 128
num_experts = 6
num_experts_per_tok = 2
moe_intermediate_size = 32
mlp_only_layers = [1]
use_sliding_window = true
sliding_window = 20
[data]
random = true
[train]
batch_size = 3
sequence_length = 70
tokens = 100000
"#;

/// Norms after blocks, a scaled embedding, soft caps.
const GEMMA: &str = r#"
[model]
family = "gemma2"
vocab_size = 500
hidden_size = 48
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
intermediate_size = 128
sliding_window = 20
[data]
random = true
[train]
batch_size = 3
sequence_length = 70
tokens = 100000
optimizer = "adamw"
"#;

#[test]
fn a_walk_asks_for_the_buffers_of_a_pass() {
    let cpu = Cpu::detect(2);
    let balance = ["train.sequence_balance_alpha=0", "train.sequence_balance_alpha=0.001"];
    for text in [DEEPSEEK, LLAMA, BIASED, QWEN, GEMMA] {
        for recompute in ["none", "layer"] {
            for precision in ["f32", "bf16", "fp8"] {
                for balance in balance {
                    let set = [
                        format!("train.recompute={recompute}"),
                        format!("precision={precision}"),
                        balance.to_owned(),
                    ];
                    let recipe = Recipe::parse("plan.toml", text, &set).unwrap().resolve().unwrap();
                    let train = &recipe.train;
                    let expected = plan::walk(
                        &recipe.config,
                        Precision::from(recipe.precision),
                        Recompute::from(train.optim.recompute),
                        train.optim.sequence_balance_alpha > 0.0,
                        train.batch_size * train.sequence_length,
                        train.accumulation,
                    );
                    minke_cpu::arena::release();
                    let before = minke_tensor::Memory::now().held_bytes;
                    let model = Model::random(recipe.config.clone(), recipe.precision.into(), 1);
                    let settings = Settings::from(&train.optim);
                    let mut trainer = Trainer::new(model, &settings, Course::from(&recipe));
                    for step in 0..2 {
                        let micro: Vec<_> = (0..train.accumulation as u64)
                            .map(|at| {
                                let (rows, len) = (train.batch_size, train.sequence_length);
                                batch::random(&recipe.config, rows, len, 1, 10 * step + at)
                            })
                            .collect();
                        trainer.step(&cpu, &micro).unwrap();
                    }
                    let held = (minke_tensor::Memory::now().held_bytes - before) as u64;
                    assert_eq!(held, expected.tensor_bytes, "{} {set:?}", recipe.config.family.model_type());
                    let memory = plan::Shape::from(&recipe).memory(cpu.level(), cpu.threads());
                    assert_eq!(memory.packed_bytes, trainer.model.params.packed_bytes() as u64, "{set:?}");
                    let state = trainer.optimizer().bytes() as u64;
                    if train.optim.optimizer == Optimizer::AdamW {
                        assert_eq!(state, memory.optimizer_bytes, "{set:?}");
                    }
                    assert!(expected.kept_bytes <= expected.values_bytes && expected.values_bytes <= held);
                }
            }
        }
    }
}

#[test]
fn little_text_takes_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.md");
    let data_bytes = |text: Option<u64>| {
        if let Some(bytes) = text {
            std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        }
        let recipe =
            format!("[model]\ndepth = 2\n[data]\nvocab_size = 512\nsources = [{{ path = {path:?} }}]\n");
        let recipe = Recipe::parse("a.toml", &recipe, &[]).unwrap().resolve().unwrap();
        plan::Shape::from(&recipe).memory(Cpu::detect(1).level(), 1).data_bytes
    };
    // what is not there yet may be much
    let most = data_bytes(None);
    let [little, more, much] = [1000, 8 << 20, 1 << 30].map(|bytes| data_bytes(Some(bytes)));
    assert!(0 < little && 2 * little < more && more < much && much == most, "{little} {more} {much} {most}");
}
