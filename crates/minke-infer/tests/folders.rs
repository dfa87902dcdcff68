//! What a folder says, and what it says wrongly.

use std::fs;
use std::path::Path;

use minke_data::{ChatTemplate, Tokenizer, TrainOptions};
use minke_infer::{GenerationDefaults, Loaded, load_model};

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../minke-model/tests/vectors/llama_gqa");

fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(VECTORS).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

fn load(folder: &Path) -> Result<Loaded, String> {
    load_model(folder.to_str().unwrap(), None, minke_model::Purpose::Train).map_err(|error| {
        assert!(error.is_user_error());
        error.to_string()
    })
}

#[test]
fn caches_that_do_not_fit_are_told() {
    let mut loaded = load(copy().path()).unwrap();
    assert_eq!(loaded.leave_room(0), None);
    // where the system tells what is free
    if minke_infer::machine::available_bytes().is_some() {
        let told = loaded.leave_room(1 << 60).unwrap();
        assert!(told.starts_with("caches may come to 1073741824.0 GiB, and "), "{told}");
    }
}

#[test]
fn suggestions_and_templates_are_read() {
    let folder = copy();
    let plain = load(folder.path()).unwrap();
    assert!(plain.template().unwrap().is_none() && plain.tokenizer.is_none());
    assert_eq!(plain.generation, GenerationDefaults::default());
    assert_eq!(plain.stop_ids(), plain.model.config.eos_token_id);

    let generation =
        r#"{"temperature": 0.6, "top_p": 0.95, "top_k": 0, "eos_token_id": [7, 2], "do_sample": true}"#;
    fs::write(folder.path().join("generation_config.json"), generation).unwrap();
    let named =
        r#"{"chat_template": [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]}"#;
    fs::write(folder.path().join("tokenizer_config.json"), named).unwrap();
    let full = load(folder.path()).unwrap();
    assert_eq!(full.template().unwrap().unwrap().source(), "b");
    assert_eq!((full.generation.temperature, full.generation.top_k), (Some(0.6), Some(0)));
    assert!(full.stop_ids().contains(&7) && full.stop_ids().contains(&2));

    fs::write(folder.path().join("generation_config.json"), r#"{"temperature": 3.0, "do_sample": false}"#)
        .unwrap();
    assert_eq!(load(folder.path()).unwrap().generation.temperature, Some(0.0));

    // what ends a turn ends an answer; a template that refuses to be asked has not said it
    let options = TrainOptions { vocab_size: 300, ..TrainOptions::default() };
    Tokenizer::train(&["a whale".repeat(9)], &options).unwrap().save(folder.path()).unwrap();
    let loaded = load(folder.path()).unwrap();
    let tokenizer = loaded.tokenizer.as_ref().unwrap();
    let end = tokenizer.id_of("<|user|>").unwrap();
    let source = "{% for m in messages %}{{ m.content }}<|user|>{% endfor %}";
    let ending = ChatTemplate::new("ending", source).unwrap();
    let refusing = ChatTemplate::new("refusing", "{{ raise_exception('no') }}").unwrap();
    assert!(!loaded.stop_ids().contains(&end) && loaded.stop_ids_with(Some(&ending)).contains(&end));
    assert_eq!(loaded.stop_ids_with(Some(&refusing)), loaded.stop_ids());
}

/// Every family's folder runs, and so does one whose config was written here.
#[test]
fn folders_of_all_families_run_as_read_and_as_written() {
    let cpu = minke_cpu::Cpu::detect(2);
    let mut families = std::collections::BTreeSet::new();
    for entry in fs::read_dir(Path::new(VECTORS).parent().unwrap()).unwrap() {
        let from = entry.unwrap().path();
        let logits = |folder: &Path| {
            let loaded = load_model(folder.to_str().unwrap(), None, minke_model::Purpose::Run(&cpu)).unwrap();
            let mut model = loaded.model;
            let mut cache = minke_model::Cache::new(&model);
            let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 48).collect();
            let want = minke_model::Want::All;
            let step = minke_model::Step { tokens: &tokens, cache: &mut cache, want };
            (model.infer(&cpu, &mut [step]), model.config)
        };
        let (read, config) = logits(&from);
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), config.to_json().to_string()).unwrap();
        fs::copy(from.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
        assert_eq!(logits(folder.path()).0, read, "{}", from.display());
        families.insert(config.family.model_type());
    }
    assert!(families.len() >= 9, "{families:?}");
}

#[test]
fn files_that_are_wrong_are_named() {
    let cases = [
        ("generation_config.json", "{", "expected JSON"),
        (
            "generation_config.json",
            r#"{"temperature": "hot"}"#,
            "`temperature`: expected a number from 0 to 100, got \"hot\"",
        ),
        ("generation_config.json", r#"{"eos_token_id": -1}"#, "`eos_token_id`"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("config.json", "nonsense", "expected JSON"),
        ("config.json", r#"{"model_type": "gpt2"}"#, "unknown family \"gpt2\""),
    ];
    for (file, content, expected) in cases {
        let folder = copy();
        fs::write(folder.path().join(file), content).unwrap();
        let text = load(folder.path()).err().unwrap();
        assert!(text.contains(file) && text.contains(expected), "{file}: {text}");
    }
}

#[test]
fn a_tokenizer_of_another_form_is_named() {
    let folder = copy();
    fs::write(folder.path().join("tiktoken.model"), "IQ== 0\n").unwrap();
    let loaded = load(folder.path()).unwrap();
    assert!(loaded.notes.iter().any(|note| note.contains("tiktoken.model lies there")), "{:?}", loaded.notes);
    let error = minke_infer::AssistantError::NoTokenizer { folder: folder.path().to_owned() };
    assert!(
        error.to_string().contains("no tokenizer, so it cannot read text: tiktoken.model lies"),
        "{error}"
    );

    fs::rename(folder.path().join("tiktoken.model"), folder.path().join("tokenizer.model")).unwrap();
    let loaded = load(folder.path()).unwrap();
    assert!(loaded.notes.iter().any(|note| note.contains("save_pretrained(FOLDER)")), "{:?}", loaded.notes);
}

#[test]
fn a_template_is_read_where_messages_are_and_by_one_reader() {
    let folder = copy();
    let config = folder.path().join("tokenizer_config.json");
    fs::write(&config, r#"{"chat_template": [{"name": "tools", "template": "a"}]}"#).unwrap();
    assert_eq!(load(folder.path()).unwrap().template().unwrap().unwrap().source(), "a");
    // text can be continued without it
    for (content, expected) in [("[", "not JSON"), (r#"{"chat_template": 3}"#, "neither text nor a list")] {
        fs::write(&config, content).unwrap();
        let error = load(folder.path()).unwrap().template().unwrap_err();
        assert!(error.is_user_error());
        let text = error.to_string();
        assert!(text.contains("tokenizer_config.json") && text.contains(expected), "{text}");
    }
}
