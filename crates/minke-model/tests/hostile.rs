//! `config.json` comes from outside: whatever is in it, it is a config or an error, and what a config says about its
//! tensors is counted without a panic.

use std::path::Path;

use minke_model::{Config, spec};
use serde_json::Value;

#[path = "../../minke-data/tests/hostile/mutate.rs"]
mod mutate;

const CASES: u64 = 4000;
const WORDS: [&str; 14] = [
    "null",
    "true",
    "[]",
    "{}",
    "\"llama\"",
    "\"deepseek_v3\"",
    "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":0}",
    "-1",
    "1e999",
    "\"num_attention_heads\":0,",
    "\"head_dim\":18446744073709551615,",
    "\"quantization_config\":",
    "\"num_hidden_layers\":4294967296,",
    "\"topk_group\":9,",
];

/// What is looked at of every config that is taken.
fn look(text: &[u8]) -> bool {
    let Ok(value) = serde_json::from_slice::<Value>(text) else { return false };
    let Ok(config) = Config::from_json(&value) else { return false };
    // tensors are listed, so as many as the config's own bounds allow
    if config.num_hidden_layers <= 64 {
        let _ = spec::tensors(&config).len();
    }
    let _ = spec::parameters(&config);
    let _ = spec::flops_per_token(&config, 1000, true);
    let _ = config.to_json();
    true
}

#[test]
fn damaged_configs_are_errors() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    let mut seeds = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path().join("config.json");
        if path.is_file() {
            seeds.push(std::fs::read(path).unwrap());
        }
    }
    seeds.sort();
    assert!(seeds.len() > 10 && seeds.iter().all(|seed| look(seed)));
    let mut taken = 0;
    for case in 0..CASES {
        let mut dice = mutate::Dice::new(5, case);
        let from = &seeds[dice.below(seeds.len())];
        let file = mutate::mutate(from, &WORDS, &mut dice);
        let done = std::panic::catch_unwind(|| look(&file));
        let Ok(is_taken) = done else { panic!("case {case}: {}", String::from_utf8_lossy(&file)) };
        taken += u64::from(is_taken);
    }
    assert!(taken > 0 && taken < CASES, "{taken} of {CASES} taken");
}
