//! What is fuzzed: small valid files, the words of their formats, and the way in.

use std::path::PathBuf;

use minke_data::gguf;
use minke_data::hf::{Dtype, TensorSpec, WeightFiles, write_safetensors};
use minke_data::{
    ChatTemplate, Message, RenderOptions, Thinking, Tokenizer, ToolCall, TrainOptions, Transcript,
};
use serde_json::{Map, Value, json};

/// A format.
pub struct Target {
    /// Its name on the command line.
    pub name: &'static str,
    /// Valid files.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Words of the format, to be put anywhere.
    pub words: &'static [&'static str],
    /// Takes a file in, and uses what came of it; whether it was taken.
    pub run: fn(&[u8]) -> bool,
    /// Memory that a case may take at most, in bytes: a fixed part, and a part for each byte of the file.
    pub memory: (usize, usize),
}

/// All of them.
pub const TARGETS: [Target; 5] = [
    Target {
        name: "safetensors",
        seeds: weights,
        words: &[
            "\"shape\":[",
            "\"dtype\":\"",
            "\"data_offsets\":[",
            "F8_E4M3",
            "BF16",
            "F32",
            "__metadata__",
            "{}",
            "]]",
            "_scale_inv",
            "\"\"",
            "\\u0000",
            "{\"a\":",
        ],
        run: safetensors,
        memory: (4 << 20, 200),
    },
    Target {
        name: "gguf",
        seeds: ggufs,
        words: &[
            "GGUF",
            "\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}",
            "\u{1}\u{0}\u{0}\u{0}",
            "\u{8}\u{0}\u{0}\u{0}",
            "\u{9}\u{0}\u{0}\u{0}",
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.merges",
            "tokenizer.ggml.model",
            "gpt2",
            "llama",
            "general.alignment",
            "tokenizer.chat_template",
            "tokenizer.chat_template.tool_use",
            "tokenizer.ggml.token_type",
            "tokenizer.ggml.eos_token_id",
        ],
        run: gguf,
        memory: (64 << 20, 4000),
    },
    Target {
        name: "tokenizer",
        seeds: tokenizers,
        words: &[
            "\"merges\":[",
            "\"vocab\":{",
            "[\"a\",\"b\"]",
            "\"type\":\"BPE\"",
            "\"type\":\"Unigram\"",
            "\"type\":\"WordPiece\"",
            "\"type\":\"WordLevel\"",
            "\"normalizer\":{\"type\":\"NFKC\"}",
            "null",
            "{}",
            "[]",
            "\"pre_tokenizer\":",
            "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(a*)*b\"},\"behavior\":\"Isolated\",\"invert\":false}",
            "{\"type\":\"Prepend\",\"prepend\":\"aaaaaaaa\"}",
            "{\"type\":\"Replace\",\"pattern\":{\"String\":\"\"},\"content\":\"xxxxxxxx\"}",
            "{\"type\":\"Sequence\",\"normalizers\":[",
            "\"added_tokens\":[",
            "\"content\":\"\"",
            "\"lstrip\":true",
            "\"unk_token\":\"zz\"",
            "\"continuing_subword_prefix\":\"##\"",
            "\"byte_fallback\":true",
            "\"ignore_merges\":true",
            "\"dropout\":1.0",
            "\u{120}",
            "(?=",
            "{1000}",
        ],
        run: tokenizer,
        memory: (64 << 20, 4000),
    },
    Target {
        name: "template",
        seeds: templates,
        words: &[
            "{{ ",
            " }}",
            "{% ",
            " %}",
            "{%- for x in messages %}",
            "{% endfor %}",
            "{% if ",
            "{% endif %}",
            "{% set ns.a = ns %}",
            "{% set ns = namespace() %}",
            "{% set ns.s = ns.s ~ ns.s %}",
            "{% for i in range(99999) %}",
            "{% set ns.l = [ns.l] %}",
            "~",
            "+",
            "*",
            " * 9999999",
            " ** 99",
            "|tojson",
            "|string",
            "|list",
            "|join(x)",
            "|replace('a', x)",
            ".split(",
            "|indent(",
            "{% macro m(a) %}",
            "{% endmacro %}",
            "{{ m(m) }}",
            "[::-1]",
            "[1:]",
            "|upper",
            ".join(",
            " ~ ns.s",
            "[999999999999]",
            "messages",
            "ns",
            "loop",
            "\"",
            "'",
            "(",
            "{#",
            ".format(",
            "'{:999999999}'.format(1)",
            "recursive",
            "{% endset %}",
            "{% set x %}",
            "|sort",
            "|unique",
            "==",
            " in ",
        ],
        run: template,
        memory: (320 << 20, 4000),
    },
    Target {
        name: "transcript",
        seeds: transcripts,
        words: &[
            "\"role\":",
            "\"user\"",
            "\"tool_calls\":[",
            "null",
            "{}",
            "[",
            "\"content\":",
            "\\ud800",
            "\"messages\":",
            "\"text\":",
        ],
        run: transcript,
        memory: (1 << 20, 400),
    },
];

/// A file for a case, this thread's own.
pub fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!(
        "minke-hostile-{}-{:?}-{name}",
        std::process::id(),
        std::thread::current().id()
    ))
}

fn weights() -> Vec<Vec<u8>> {
    let path = scratch("seed.safetensors");
    let spec = |name: &str, dtype, shape: &[usize]| TensorSpec {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
    };
    let plain =
        [(spec("a", Dtype::F32, &[2, 3]), &[0x3f_u8; 24][..]), (spec("b", Dtype::BF16, &[4]), &[1; 8])];
    let coded = [
        (spec("w.weight", Dtype::F8E4M3, &[130, 3]), &[0x38_u8; 390][..]),
        (spec("w.weight_scale_inv", Dtype::F32, &[2, 1]), &[0x3f; 8]),
    ];
    let files = [&plain, &coded].map(|tensors| {
        write_safetensors(&path, tensors).expect("the folder for temporary files can be written");
        std::fs::read(&path).expect("it was just written")
    });
    let _ = std::fs::remove_file(path);
    files.into()
}

fn safetensors(file: &[u8]) -> bool {
    let path = scratch("model.safetensors");
    std::fs::write(&path, file).expect("the folder for temporary files can be written");
    let opened = WeightFiles::open_file(&path);
    if let Ok(weights) = &opened {
        let _ = weights.check_quantized();
        let names: Vec<String> = weights.names().map(str::to_owned).collect();
        for name in names {
            let Some(view) = weights.get(&name) else { continue };
            assert!(
                view.shape.iter().product::<usize>() * view.dtype.size() == view.bytes.len(),
                "{name}: a wrong view"
            );
            let _ = view.bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            if weights.is_quantized(&name)
                && let Ok(codes) = weights.quantized_view(&name)
            {
                let mut out = vec![0.0; view.bytes.len()];
                codes.dequantize(&mut out);
            }
        }
    }
    let _ = std::fs::remove_file(path);
    opened.is_ok()
}

fn ggufs() -> Vec<Vec<u8>> {
    let path = scratch("seed.gguf");
    let letters: Vec<String> =
        "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"
            .chars()
            .map(String::from)
            .collect();
    let mut tokens = letters;
    tokens.extend(["wh", "wha", "<|eos|>", "<0x41>", "▁"].map(str::to_owned));
    let types: Vec<i32> = tokens.iter().map(|token| if token.starts_with("<|") { 3 } else { 1 }).collect();
    let scores: Vec<f32> = (0..tokens.len()).map(|at| -(at as f32)).collect();
    let eos = tokens.iter().position(|token| token == "<|eos|>").unwrap_or(0) as u32;
    let files = ["gpt2", "llama"].map(|model| {
        let metadata: Vec<(String, gguf::Value<'_>)> = [
            ("general.architecture", "llama".into()),
            ("tokenizer.ggml.model", model.into()),
            ("tokenizer.ggml.pre", "default".into()),
            ("tokenizer.ggml.tokens", gguf::Value::strings(&tokens)),
            ("tokenizer.ggml.token_type", gguf::Value::i32s(&types)),
            ("tokenizer.ggml.scores", gguf::Value::f32s(&scores)),
            ("tokenizer.ggml.merges", gguf::Value::strings(["w h", "wh a"])),
            ("tokenizer.ggml.eos_token_id", eos.into()),
            ("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}".into()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        let plan = gguf::TensorPlan {
            name: "token_embd.weight".into(),
            kind: gguf::TensorType::F32,
            shape: vec![2, 3],
        };
        let mut writer =
            gguf::GgufWriter::create(&path, &metadata, vec![plan]).expect("the file can be written");
        writer
            .tensor("token_embd.weight", &[0; 24])
            .and_then(|()| writer.finish())
            .expect("the file can be written");
        std::fs::read(&path).expect("it was just written")
    });
    let _ = std::fs::remove_file(path);
    files.into()
}

fn gguf(file: &[u8]) -> bool {
    let path = scratch("model.gguf");
    std::fs::write(&path, file).expect("the folder for temporary files can be written");
    let opened = gguf::GgufFile::open(&path);
    if let Ok(file) = &opened {
        let bytes: usize =
            file.names().filter_map(|name| file.tensor(name)).map(|tensor| tensor.bytes.len()).sum();
        assert!(bytes as u64 <= file.file_bytes(), "tensors are larger than their file");
        let _ = (gguf::tokenizer::ends(file), gguf::tokenizer::end_ids(file));
        let _ = gguf::tokenizer::template(file);
        if let Ok(Some(json)) = gguf::tokenizer::tokenizer_json(file) {
            tokenizer(&json);
        }
    }
    let _ = std::fs::remove_file(path);
    opened.is_ok()
}

fn tokenizers() -> Vec<Vec<u8>> {
    let sample = ["the whale dives, 12 meters; das ist tief\n".repeat(4)];
    let options = TrainOptions { vocab_size: 290, ..TrainOptions::default() };
    let folder = scratch("tokenizer");
    let trained = Tokenizer::train(&sample, &options).expect("the sample is large enough");
    let saved = std::fs::create_dir_all(&folder).is_ok() && trained.save(&folder).is_ok();
    assert!(saved, "the folder for temporary files can be written");
    let bytes = std::fs::read(folder.join("tokenizer.json")).expect("it was just written");
    let _ = std::fs::remove_dir_all(folder);
    let pieces = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [
            {"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 1, "content": "<s>", "single_word": false, "lstrip": true, "rstrip": true, "normalized": true, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": {"<unk>": 0, "<s>": 1, "▁": 2, "w": 3, "h": 4, "a": 5, "wh": 6, "wha": 7, "<0x41>": 8, "▁wha": 9},
            "merges": [["w", "h"], ["wh", "a"], ["▁", "wha"]]}
    });
    let unigram = json!({
        "version": "1.0", "added_tokens": [], "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "post_processor": null, "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false,
            "vocab": [["<unk>", 0.0], ["▁", -2.0], ["whale", -3.0], ["w", -4.0], ["h", -4.0]]}
    });
    vec![bytes, pieces.to_string().into_bytes(), unigram.to_string().into_bytes()]
}

fn tokenizer(file: &[u8]) -> bool {
    let Ok(tokenizer) = Tokenizer::from_json(file.to_vec()) else { return false };
    let text = "The whale said: <s>\"12345\"\n\n  鯨 🐋 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\u{0}\u{feff} <|user|></think>";
    for ids in [tokenizer.encode(text), tokenizer.encode_with_special(text)].into_iter().flatten() {
        let whole = tokenizer.decode(&ids, true);
        let mut stream = tokenizer.stream_decoder(true);
        let mut pieces: String = ids.iter().map(|&id| stream.step(id)).collect();
        pieces.push_str(&stream.finish());
        let _ = (whole, pieces);
    }
    let _ = tokenizer.decode(&[0, 1, u32::MAX, tokenizer.vocab_size() as u32], false);
    true
}

fn templates() -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = ChatTemplate::builtin_names()
        .iter()
        .map(|name| ChatTemplate::named(name).expect("it is built in").source().as_bytes().to_vec())
        .collect();
    let vectors = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/templates.json");
    let vectors: Value =
        std::fs::read(vectors).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    for entry in vectors["templates"].as_array().into_iter().flatten() {
        all.extend(entry["source"].as_str().map(|source| source.as_bytes().to_vec()));
    }
    for pair in vectors["snippets"].as_array().into_iter().flatten() {
        all.extend(pair[0].as_str().map(|source| source.as_bytes().to_vec()));
    }
    all
}

fn template(file: &[u8]) -> bool {
    let Ok(source) = std::str::from_utf8(file) else { return false };
    let Ok(template) = ChatTemplate::new("t", source) else { return false };
    let call =
        ToolCall { id: "abcdefghi".into(), name: "depth".into(), arguments: json!({"animal": "whale"}) };
    let messages = [
        Message::system("be brief"),
        Message::user("q"),
        Message::assistant(Some("t"), "a").calling(vec![call]),
        Message::tool("abcdefghi", "depth", "3"),
        Message::user("q"),
    ];
    let tools = [json!({"type": "function", "function": {"name": "depth", "description": "d",
        "parameters": {"type": "object", "properties": {"animal": {"type": "string"}}}}})];
    let variables: Map<String, Value> =
        json!({"d": {"b": 1, "a": [true, null]}, "xs": [3, 1, 2], "n": null, "text": "The quick brown fox", "f": 1e-7,
            "names": ["x", "Y"], "big": [{"k": "a", "v": 1}, {"k": "b", "v": 2}]})
        .as_object()
        .cloned()
        .unwrap_or_default();
    let options =
        RenderOptions { tools: &tools, variables: Some(&variables), ..RenderOptions::prompt(Thinking::Open) };
    template.render(&messages[..2], options).is_ok() | template.render(&messages, options).is_ok()
}

fn transcripts() -> Vec<Vec<u8>> {
    let call = ToolCall { id: "x".into(), name: "depth".into(), arguments: json!({"animal": "鯨"}) };
    let messages = vec![
        Message::system("be brief"),
        Message::user("how deep?\n🐋"),
        Message::assistant(Some("look"), "").calling(vec![call]),
        Message::tool("x", "depth", "3 km"),
        Message::assistant(None, "3 km"),
    ];
    let whole = json!({ "model": "m", "messages": messages });
    vec![whole.to_string().into_bytes(), json!({"text": "the whale"}).to_string().into_bytes()]
}

fn transcript(file: &[u8]) -> bool {
    Transcript::parse(file).is_ok()
}
