//! Models in other dtypes, and FP8 folders as they come from elsewhere.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use minke_cpu::Cpu;
use minke_data::gguf::TensorType;
use minke_data::hf::{Dtype, TensorSpec, WeightFiles, write_safetensors};
use minke_data::tokenizer::TrainOptions;
use minke_data::{ChatTemplate, Tokenizer};
use minke_infer::{Engine, load_model};
use minke_model::config::{Config, Quantization};
use minke_model::spec::{self, Role};
use minke_model::{DType, Model, Precision, Purpose};
use minke_num::tolerance::assert_same_bits;
use minke_train::checkpoint::save_model;
use minke_train::export::{
    ExportError, Exported, Format, GgufOptions, Options, Progress, export, export_gguf,
};
use serde_json::{Value, json};

type Tensor = (TensorSpec, Vec<u8>);

const FP8: Format = Format::Fp8 { power_of_two: None };

fn fp8(power_of_two: bool) -> Format {
    Format::Fp8 { power_of_two: Some(power_of_two) }
}

/// Experts, latent attention and a prediction module; most sides are above 128 and no multiple of it.
fn config() -> Config {
    let value = json!({
        "model_type": "deepseek_v3", "vocab_size": 40, "hidden_size": 140, "intermediate_size": 270,
        "num_hidden_layers": 2, "num_attention_heads": 2, "q_lora_rank": 130, "kv_lora_rank": 24,
        "qk_nope_head_dim": 65, "qk_rope_head_dim": 6, "v_head_dim": 70, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 129, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 64,
        "eos_token_id": 1, "initializer_range": 0.08
    });
    Config::from_json(&value).unwrap()
}

fn write(folder: &Path, tensors: &[Tensor]) {
    let borrowed: Vec<(TensorSpec, &[u8])> =
        tensors.iter().map(|(spec, bytes)| (spec.clone(), bytes.as_slice())).collect();
    write_safetensors(folder.join("model.safetensors"), &borrowed).unwrap();
}

fn read(folder: &Path) -> Vec<Tensor> {
    let weights = WeightFiles::open(folder).unwrap();
    let tensor = |name: &str| {
        let view = weights.get(name).unwrap();
        let spec = TensorSpec { name: name.to_owned(), dtype: view.dtype, shape: view.shape.to_vec() };
        (spec, view.bytes.to_vec())
    };
    weights.names().map(tensor).collect()
}

fn json_of(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

/// A model with drawn weights in f32.
fn model(root: &Path) -> PathBuf {
    let folder = root.join("source");
    fs::create_dir(&folder).unwrap();
    let mut drawn = Model::random(config(), Precision::uniform(DType::F32), 5);
    for entry in drawn.params.entries.clone() {
        for (i, x) in drawn.params.data[entry.range].iter_mut().enumerate() {
            // gains and biases that are not all alike
            *x += if entry.shape.len() == 1 { (i as f32).sin() * 0.1 } else { 0.0 };
        }
    }
    fs::write(folder.join("config.json"), drawn.config.to_json().to_string()).unwrap();
    fs::write(folder.join("generation_config.json"), "{ \"temperature\":0.5 }").unwrap();
    fs::write(folder.join("chat_template.jinja"), "{{ messages }}\n").unwrap();
    fs::create_dir(folder.join("additional_chat_templates")).unwrap();
    fs::write(folder.join("additional_chat_templates/tool_use.jinja"), "{{ tools }}\n").unwrap();
    fs::write(folder.join("notes.txt"), "mine").unwrap();
    let tensor = |entry: &minke_model::Param| {
        let spec = TensorSpec { name: entry.name.clone(), dtype: Dtype::F32, shape: entry.shape.clone() };
        (spec, drawn.params.data[entry.range.clone()].iter().flat_map(|x| x.to_le_bytes()).collect())
    };
    write(&folder, &drawn.params.entries.iter().map(tensor).collect::<Vec<_>>());
    folder
}

fn to(source: &Path, out: &Path, format: Format) -> Exported {
    let options = Options { out: out.to_owned(), format, force: false };
    export(source.to_str().unwrap(), &options, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn logits(folder: &Path) -> Vec<f32> {
    let mut loaded =
        load_model(folder.to_str().unwrap(), Some(Precision::uniform(DType::F32)), Purpose::Train).unwrap();
    assert!(loaded.notes.is_empty() && loaded.model.config.quantization.is_none());
    let cpu = Cpu::detect(1);
    let mut all = Vec::new();
    Engine::new(&mut loaded.model, &cpu, None)
        .score(&[1, 5, 9, 33, 2, 2, 17], &mut |rows| all.extend_from_slice(rows))
        .unwrap();
    all
}

#[test]
fn fp8_is_written_as_published_and_read_as_the_same_numbers() {
    let root = tempfile::tempdir().unwrap();
    let source = model(root.path());
    for (name, power_of_two) in [("f32", false), ("ue8m0", true)] {
        let folder = root.path().join(name);
        let done = to(&source, &folder, fp8(power_of_two));
        // which are codes, which are not, and what lies beside them
        let weights = WeightFiles::open(&folder).unwrap();
        weights.check_quantized().unwrap();
        let (mut quantized, mut tensors) = (0, 0);
        for spec in spec::tensors(&config()) {
            let dtype = weights.get(&spec.name).unwrap().dtype;
            let projection = spec.name.ends_with("_proj.weight") || spec.name.contains("kv_a_proj_with_mqa");
            assert_eq!(dtype == Dtype::F8E4M3, projection, "{}: {dtype}", spec.name);
            if projection {
                quantized += 1;
                tensors += 1;
            } else if matches!(spec.role, Role::Norm | Role::Router | Role::RouterBias) {
                // as the source has them
                assert_eq!(dtype, Dtype::F32, "{}", spec.name);
            } else {
                assert_eq!(dtype, Dtype::BF16, "{}", spec.name);
            }
            tensors += 1;
        }
        assert_eq!(
            (done.quantized, done.kept, done.tensors, weights.len()),
            (quantized, 0, tensors, tensors)
        );
        let scales = weights.get("model.layers.0.mlp.down_proj.weight_scale_inv").unwrap();
        assert_eq!((scales.dtype, scales.shape), (Dtype::F32, &[2, 3][..]));
        let found = weights.quantized("model.layers.2.eh_proj.weight").unwrap();
        assert_eq!((found.scales.len(), found.has_power_of_two_scales()), (6, power_of_two));
        let error = done.largest_error.unwrap().1;
        assert!((0.02..0.04).contains(&error), "{error}");
        let config = json_of(&folder);
        let mut expected = json!({
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
        });
        if power_of_two {
            expected["scale_fmt"] = "ue8m0".into();
        }
        assert_eq!(config["quantization_config"], expected);
        assert_eq!((&config["dtype"], &config["torch_dtype"]), (&json!("bfloat16"), &json!("bfloat16")));

        // the same model from codes and from the numbers that they stand for
        let plain = root.path().join(format!("{name}-plain"));
        let done = to(&folder, &plain, Format::F32);
        assert_eq!((done.quantized, done.quantization), (0, None));
        let config = json_of(&plain);
        assert_eq!((config.get("quantization_config"), &config["dtype"]), (None, &json!("float32")));
        let (from_codes, from_numbers) = (logits(&folder), logits(&plain));
        assert_same_bits("logits", &from_codes, &from_numbers);
        let distance = |a: &[f32], b: &[f32]| {
            let square: f32 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
            (square / b.iter().map(|b| b * b).sum::<f32>()).sqrt()
        };
        let off = distance(&from_codes, &logits(&source));
        assert!(off > 1e-3 && off < 0.2, "{off}");

        // codes that are there stay as they are, and quantising their numbers gives the same numbers
        let again = root.path().join(format!("{name}-again"));
        let done = to(&folder, &again, FP8);
        assert_eq!((done.kept, done.largest_error), (done.quantized, None));
        assert_eq!(done.quantization, Some(Quantization { power_of_two }));
        assert!(read(&again) == read(&folder));
        let back = root.path().join(format!("{name}-back"));
        let done = to(&plain, &back, fp8(power_of_two));
        assert_eq!((done.kept, done.largest_error.unwrap().1), (0, 0.0));
        assert_same_bits("back", &logits(&back), &from_codes);
    }
    // any f32 is a scale; not any is a power of two
    let kept = to(&root.path().join("ue8m0"), &root.path().join("kept"), fp8(false));
    assert_eq!(kept.kept, kept.quantized);
    let rounded = to(&root.path().join("f32"), &root.path().join("rounded"), fp8(true));
    assert!(rounded.kept == 0 && rounded.largest_error.unwrap().1 > 0.0);
}

#[test]
fn powers_of_two_make_bf16_exact() {
    let root = tempfile::tempdir().unwrap();
    // norms and routers are in bf16 where they were
    let half = root.path().join("half");
    to(&model(root.path()), &half, Format::Bf16);
    let (folder, wide, narrow) = (root.path().join("a"), root.path().join("b"), root.path().join("c"));
    to(&half, &folder, fp8(true));
    to(&folder, &wide, Format::F32);
    let done = to(&folder, &narrow, Format::Bf16);
    assert_same_bits("logits", &logits(&narrow), &logits(&wide));
    let bytes: u64 = read(&narrow).iter().map(|(_, bytes)| bytes.len() as u64).sum();
    assert_eq!((done.bytes, done.tensors), (bytes, spec::tensors(&config()).len()));
    let config = json_of(&narrow);
    assert_eq!((config.get("quantization_config"), &config["dtype"]), (None, &json!("bfloat16")));
}

#[test]
fn what_lies_beside_the_weights_is_copied() {
    let root = tempfile::tempdir().unwrap();
    let source = model(root.path());
    let out = root.path().join("deep/er");
    to(&source, &out, Format::F32);
    for file in ["generation_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    {
        assert_eq!(fs::read(out.join(file)).unwrap(), fs::read(source.join(file)).unwrap());
    }
    assert!(!out.join("notes.txt").exists());
    assert!(read(&out) == read(&source));
    assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1, "no litter");
}

#[test]
fn nothing_is_written_over_unasked() {
    let root = tempfile::tempdir().unwrap();
    let source = model(root.path());
    let out = root.path().join("out");
    let tell = |out: &Path, force: bool| {
        let options = Options { out: out.to_owned(), format: Format::Bf16, force };
        export(source.to_str().unwrap(), &options, &mut |_| ControlFlow::Continue(())).map_err(|error| {
            assert!(matches!(error, ExportError::Occupied { .. }) && error.is_user_error());
            error.to_string()
        })
    };
    fs::create_dir(&out).unwrap();
    tell(&out, false).unwrap();
    assert!(tell(&out, false).unwrap_err().contains("is not empty"));
    fs::write(out.join("old.txt"), "old").unwrap();
    tell(&out, true).unwrap();
    assert!(!out.join("old.txt").exists());
    for force in [false, true] {
        assert!(tell(&source, force).unwrap_err().contains("holds the model"));
        assert!(tell(root.path(), force).unwrap_err().contains("holds the model"));
        assert!(tell(&source.join("config.json"), force).unwrap_err().contains("no folder"));
    }
    // a folder within that has more than templates
    fs::write(out.join("additional_chat_templates/mine.txt"), "mine").unwrap();
    assert!(tell(&out, true).unwrap_err().contains("not only a model"));
    fs::remove_file(out.join("additional_chat_templates/mine.txt")).unwrap();
    tell(&out, true).unwrap();
    // a run, and files that are no model
    fs::create_dir(out.join("training")).unwrap();
    assert!(tell(&out, true).unwrap_err().contains("not only a model"));
    let other = root.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("letter.txt"), "dear").unwrap();
    assert!(tell(&other, true).unwrap_err().contains("not only a model"));
    assert_eq!(fs::read(other.join("letter.txt")).unwrap(), b"dear");
}

#[test]
fn numbers_that_fp8_cannot_hold_are_refused_and_the_old_folder_stays() {
    let root = tempfile::tempdir().unwrap();
    let source = model(root.path());
    let out = root.path().join("out");
    to(&source, &out, Format::F32);
    let before = read(&out);
    let name = "model.layers.1.mlp.experts.2.up_proj.weight";
    let mut tensors = read(&source);
    for (spec, bytes) in &mut tensors {
        if spec.name == name {
            bytes[400..404].copy_from_slice(&f32::INFINITY.to_le_bytes());
        }
    }
    write(&source, &tensors);
    let options = Options { out: out.clone(), format: FP8, force: true };
    let text = export(source.to_str().unwrap(), &options, &mut |_| ControlFlow::Continue(()))
        .unwrap_err()
        .to_string();
    assert!(text.contains(&format!("tensor `{name}`: expected finite numbers, got inf")), "{text}");
    assert!(read(&out) == before);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2, "no litter");
}

#[test]
fn shards_are_read() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("fp8");
    to(&model(root.path()), &folder, fp8(false));
    let whole = logits(&folder);
    // codes and scales in different files, as happens at the end of a shard
    let mut map = serde_json::Map::new();
    let mut parts: [Vec<Tensor>; 3] = Default::default();
    for (i, tensor) in read(&folder).into_iter().enumerate() {
        map.insert(tensor.0.name.clone(), format!("model-{}.safetensors", i % 3).into());
        parts[i % 3].push(tensor);
    }
    for (i, part) in parts.iter().enumerate() {
        write(&folder, part);
        fs::rename(folder.join("model.safetensors"), folder.join(format!("model-{i}.safetensors"))).unwrap();
    }
    fs::write(folder.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    assert_same_bits("logits", &logits(&folder), &whole);
    let joined = to(&folder, &root.path().join("joined"), FP8);
    assert_eq!(joined.kept, joined.quantized);
    assert_same_bits("joined", &logits(&root.path().join("joined")), &whole);
}

#[test]
fn broken_fp8_folders_are_refused_by_name() {
    type Break = Box<dyn Fn(&mut Vec<Tensor>)>;
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("fp8");
    to(&model(root.path()), &folder, fp8(false));
    let weight = "model.layers.1.mlp.experts.3.down_proj.weight";
    let scales = format!("{weight}_scale_inv");
    let whole = read(&folder);
    let at = |name: &str| whole.iter().position(|(spec, _)| spec.name == name).unwrap();
    let (weight_at, scales_at) = (at(weight), at(&scales));
    let scale = |x: f32| {
        move |tensors: &mut Vec<Tensor>| tensors[scales_at].1[4..8].copy_from_slice(&x.to_le_bytes())
    };
    let cases: Vec<(Break, String)> = vec![
        (
            Box::new(move |t| {
                t.remove(scales_at);
            }),
            format!("tensor `{weight}`: expected its scales `{scales}` of shape [2, 2], got no such tensor"),
        ),
        (
            Box::new(move |t| t[scales_at].0.shape = vec![4, 1]),
            format!(
                "tensor `{scales}`: expected shape [2, 2] for the squares of 128 of a weight [140, 129], got [4, 1]"
            ),
        ),
        (
            Box::new(move |t| {
                t.remove(weight_at);
            }),
            format!("tensor `{scales}`: expected its weight `{weight}` in F8_E4M3, got no such tensor"),
        ),
        (
            Box::new(move |t| t[weight_at].0.dtype = Dtype::U8),
            format!("tensor `{scales}`: expected its weight `{weight}`"),
        ),
        (
            Box::new(move |t| t[scales_at].0.dtype = Dtype::I32),
            format!("tensor `{scales}`: expected F32, BF16 or F8_E8M0, got I32"),
        ),
        (
            Box::new(scale(f32::NAN)),
            format!("tensor `{scales}`: expected scales that are finite and positive, got NaN at [0, 1]"),
        ),
        (
            Box::new(scale(f32::INFINITY)),
            format!("tensor `{scales}`: expected scales that are finite and positive, got inf"),
        ),
        (
            Box::new(scale(-0.5)),
            format!("tensor `{scales}`: expected scales that are finite and positive, got -0.5"),
        ),
        (
            Box::new(scale(0.0)),
            format!("tensor `{scales}`: expected scales that are finite and positive, got 0"),
        ),
        (
            Box::new(move |t| t[weight_at].1[131] = 0xff),
            format!("tensor `{weight}`: expected numbers, got NaN (code 0xff) at [1, 2]"),
        ),
        (
            Box::new(move |t| t[weight_at].0.shape.reverse()),
            format!("tensor `{weight}`: expected shape [140, 129], got [129, 140]"),
        ),
    ];
    for (damage, expected) in cases {
        let mut tensors = whole.clone();
        damage(&mut tensors);
        write(&folder, &tensors);
        for purpose in [Purpose::Train, Purpose::Run(&Cpu::detect(1))] {
            let error = load_model(folder.to_str().unwrap(), None, purpose).err().expect(&expected);
            assert!(error.is_user_error() && error.to_string().contains(&expected), "{expected}\n{error}");
        }
        let options = Options { out: root.path().join("out"), format: FP8, force: false };
        let error = export(folder.to_str().unwrap(), &options, &mut |_| ControlFlow::Continue(()))
            .expect_err(&expected);
        assert!(error.is_user_error() && error.to_string().contains(&expected), "{expected}\n{error}");
        assert!(!root.path().join("out").exists());
    }
    // a model that only runs has no numbers to save
    write(&folder, &whole);
    let running = load_model(folder.to_str().unwrap(), None, Purpose::Run(&Cpu::detect(1))).unwrap().model;
    let options = TrainOptions { vocab_size: 300, ..TrainOptions::default() };
    let tokenizer = Tokenizer::train(&["whale".to_owned()], &options).unwrap();
    let place = root.path().join("saved");
    let text = save_model(&place, &running, &tokenizer, None).unwrap_err().to_string();
    assert!(text.contains("loaded to run") && !place.exists(), "{text}");
    // codes that the config does not speak of
    write(&folder, &whole);
    let mut config = json_of(&folder);
    config.as_object_mut().unwrap().remove("quantization_config");
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let text = load_model(folder.to_str().unwrap(), None, Purpose::Train).err().unwrap().to_string();
    assert!(
        text.contains("config.json") && text.contains("is in F8_E4M3: expected `quantization_config`"),
        "{text}"
    );
}

fn to_gguf(source: &Path, out: &Path, force: bool) -> Result<Exported, ExportError> {
    let options = GgufOptions { out: out.to_owned(), kind: TensorType::F32, force };
    export_gguf(source.to_str().unwrap(), &options, &mut |_| ControlFlow::Continue(()))
}

#[test]
fn what_is_stopped_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let source = model(root.path());
    let (name, left) = (source.to_str().unwrap(), || fs::read_dir(root.path()).unwrap().count());
    let mut last = 0;
    let mut stop = |progress: Progress| {
        assert!(progress.done >= last && progress.done < progress.total);
        last = progress.done;
        if last > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let options = GgufOptions { out: root.path().join("new.gguf"), kind: TensorType::F32, force: false };
    assert!(matches!(export_gguf(name, &options, &mut stop), Err(ExportError::Stopped)));
    assert_eq!(left(), 1);
    let options = Options { out: root.path().join("new"), format: FP8, force: false };
    let mut stop = |_| ControlFlow::Break(());
    assert!(matches!(export(name, &options, &mut stop), Err(ExportError::Stopped)));
    assert_eq!(left(), 1);
}

#[test]
fn a_gguf_file_and_back_is_the_same_model() {
    let root = tempfile::tempdir().unwrap();
    let source = model(root.path());
    // rows for a small vocabulary
    let mut wide = config();
    wide.vocab_size = 420;
    let drawn = Model::random(wide, Precision::uniform(DType::F32), 5);
    fs::write(source.join("config.json"), drawn.config.to_json().to_string()).unwrap();
    let tensor = |entry: &minke_model::Param| {
        let spec = TensorSpec { name: entry.name.clone(), dtype: Dtype::F32, shape: entry.shape.clone() };
        (spec, drawn.params.data[entry.range.clone()].iter().flat_map(|x| x.to_le_bytes()).collect())
    };
    write(&source, &drawn.params.entries.iter().map(tensor).collect::<Vec<_>>());
    let file = root.path().join("model.gguf");
    let bare = to_gguf(&source, &file, false).unwrap();
    assert!(bare.notes.iter().any(|note| note.contains("no tokenizer")), "{:?}", bare.notes);

    let sample = vec!["A whale is a small whale is 42 whales, they said.\n".repeat(50)];
    let options = TrainOptions { vocab_size: 400, ..TrainOptions::default() };
    let tokenizer = Tokenizer::train(&sample, &options).unwrap();
    tokenizer.save(&source).unwrap();
    ChatTemplate::named("minke").unwrap().save(&source).unwrap();
    fs::write(source.join("additional_chat_templates/tool_use.jinja"), "{{ tools }}").unwrap();
    let suggested = r#"{"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.25}"#;
    fs::write(source.join("generation_config.json"), suggested).unwrap();
    let done = to_gguf(&source, &file, true).unwrap();
    assert!(done.notes.is_empty(), "{:?}", done.notes);
    let back = root.path().join("back");
    to(&file, &back, Format::F32);
    let sorted = |mut tensors: Vec<Tensor>| {
        tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        tensors
    };
    assert!(sorted(read(&back)) == sorted(read(&source)), "every number, to the bit");
    assert_same_bits("back in a folder", &logits(&back), &logits(&source));
    assert_same_bits("from the file", &logits(&file), &logits(&source));
    let theirs = Tokenizer::load(&back).unwrap();
    for text in ["A whale is 42 whales", "<|user|>hi", "é 1234567"] {
        assert_eq!(theirs.encode(text).unwrap(), tokenizer.encode(text).unwrap());
        assert_eq!(theirs.encode_with_special(text).unwrap(), tokenizer.encode_with_special(text).unwrap());
    }
    let template = |folder: &Path| ChatTemplate::load(folder).unwrap().unwrap();
    assert_eq!(template(&back).source(), template(&source).source());
    assert_eq!(template(&back).tool_use(), Some("{{ tools }}"));
    let generation: Value =
        serde_json::from_slice(&fs::read(back.join("generation_config.json")).unwrap()).unwrap();
    let expected = json!({"bos_token_id": generation["bos_token_id"], "eos_token_id": [1], "do_sample": true,
        "temperature": 0.5, "top_k": 20, "repetition_penalty": 1.25});
    assert_eq!(generation, expected);
    let running = load_model(file.to_str().unwrap(), None, Purpose::Run(&Cpu::detect(1))).unwrap();
    let told = running.template().unwrap().unwrap();
    assert_eq!((told.source(), told.tool_use()), (template(&source).source(), Some("{{ tools }}")));
    assert_eq!((running.bos(), running.stop_ids()), (tokenizer.bos(), vec![1]));

    // ends that only the generation config names, numbers that are short, and what has no key
    for (suggested, expected, notes) in [
        (
            json!({"eos_token_id": [1, 30, 31], "top_p": 0.95, "typical_p": 0.9}),
            json!({"eos_token_id": [1, 30, 31], "do_sample": true, "top_p": 0.95}),
            vec!["`typical_p` of 0.9"],
        ),
        (
            json!({"eos_token_id": [29, 30, 31], "do_sample": false, "temperature": 0.6}),
            json!({"eos_token_id": [1, 29, 30], "do_sample": false}),
            vec!["does not end at 31"],
        ),
        (
            json!({"temperature": 0.6}),
            json!({"eos_token_id": [1], "do_sample": true, "temperature": 0.6}),
            vec![],
        ),
    ] {
        fs::write(source.join("generation_config.json"), suggested.to_string()).unwrap();
        let done = to_gguf(&source, &file, true).unwrap();
        assert_eq!(done.notes.len(), notes.len(), "{:?}", done.notes);
        assert!(done.notes.iter().zip(&notes).all(|(note, has)| note.contains(has)), "{:?}", done.notes);
        let options = Options { out: back.clone(), format: Format::F32, force: true };
        export(file.to_str().unwrap(), &options, &mut |_| ControlFlow::Continue(())).unwrap();
        let mut generation: Value =
            serde_json::from_slice(&fs::read(back.join("generation_config.json")).unwrap()).unwrap();
        generation.as_object_mut().unwrap().remove("bos_token_id");
        assert_eq!(generation, expected);
    }
}

#[test]
fn a_gguf_file_is_written_over_nothing_that_is_not_meant() {
    let root = tempfile::tempdir().unwrap();
    let source = model(root.path());
    let file = root.path().join("model.gguf");
    to_gguf(&source, &file, false).unwrap();
    let written = fs::read(&file).unwrap();
    let fails = |source: &Path, out: &Path, force: bool, why: &str| {
        let error = to_gguf(source, out, force).unwrap_err();
        assert!(error.is_user_error() && error.to_string().contains(why), "{error}");
    };
    fails(&source, &file, false, "is there");
    fails(&source, &root.path().join("model.bin"), true, "does not end in .gguf");
    fails(
        &source,
        &source.join("x").with_extension("gguf").join("y.gguf").join("z"),
        true,
        "does not end in .gguf",
    );
    fails(&file, &file, true, "is the model that is to be exported");
    let folder = root.path().join("folder.gguf");
    fs::create_dir(&folder).unwrap();
    fails(&source, &folder, true, "is a folder");
    fails(&root.path().join("none.gguf"), &file, true, "there is no such file");
    assert!(fs::read(&file).unwrap() == written, "what was there is as it was");
    let broken = root.path().join("broken.gguf");
    fs::write(&broken, &written[..written.len() / 2]).unwrap();
    fails(&broken, &root.path().join("new.gguf"), false, "truncated");
    assert!(!root.path().join("new.gguf").exists());
    let litter: Vec<_> = fs::read_dir(root.path())
        .unwrap()
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().contains("tmp"))
        .collect();
    assert!(litter.is_empty(), "{litter:?}");
}
