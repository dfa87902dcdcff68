use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::gguf::{GgufFile, GgufWriter, Value};
use crate::template::{ChatTemplate, RenderOptions};
use crate::tokenizer::{Tokenizer, TrainOptions};

fn keys(pairs: Vec<(&str, Value<'static>)>) -> Vec<(String, Value<'static>)> {
    pairs.into_iter().map(|(key, value)| (format!("tokenizer.{key}"), value)).collect()
}

fn file(folder: &tempfile::TempDir, metadata: &[(String, Value<'_>)]) -> GgufFile {
    let path: PathBuf = folder.path().join("t.gguf");
    GgufWriter::create(&path, metadata, Vec::new()).unwrap().finish().unwrap();
    GgufFile::open(path).unwrap()
}

fn open(metadata: &[(String, Value<'_>)]) -> crate::Result<Option<Tokenizer>> {
    let folder = tempfile::tempdir().unwrap();
    Tokenizer::from_gguf(&file(&folder, metadata))
}

/// `<unk> <s> </s>`, bytes, and pieces that spell "▁hello ▁hell".
fn spm() -> Vec<(&'static str, Value<'static>)> {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    let mut kinds = vec![2, 3, 3];
    let mut scores = vec![0.0; 3];
    for byte in 0..=255u8 {
        tokens.push(format!("<0x{byte:02X}>"));
        kinds.push(6);
        scores.push(0.0);
    }
    let pieces = ["ll", "he", "▁he", "llo", "▁hello", "▁", "h", "e", "l", "o", "  ", "<tool>"];
    for (i, piece) in pieces.into_iter().enumerate() {
        tokens.push(piece.to_owned());
        kinds.push(if i >= 10 { 4 } else { 1 });
        scores.push(-(i as f32));
    }
    vec![
        ("ggml.model", "llama".into()),
        ("ggml.tokens", Value::strings(tokens)),
        ("ggml.scores", Value::f32s(&scores)),
        ("ggml.token_type", Value::i32s(&kinds)),
    ]
}

#[test]
fn scores_become_merges_and_bytes_stand_for_the_rest() {
    let tokenizer = open(&keys(spm())).unwrap().unwrap();
    let tokens = |text: &str| -> Vec<String> {
        tokenizer.encode(text).unwrap().into_iter().map(|id| tokenizer.token_of(id).unwrap()).collect()
    };
    assert_eq!(tokens("hello"), ["▁hello"]);
    assert_eq!(tokens("hello hell"), ["▁hello", "▁he", "ll"]);
    assert_eq!(tokens("é"), ["▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(tokens("h  ello"), ["▁", "h", "  ", "▁", "e", "llo"]);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
    for text in ["hello hell", "é!", "  hello  ", "a<s>b", "漢字 hello\n"] {
        let ids = tokenizer.encode(text).unwrap();
        assert!(!ids.contains(&1), "text cannot write a control token");
        assert_eq!(tokenizer.decode(&ids, false), text);
    }
    let hello = tokenizer.id_of("▁hello").unwrap();
    assert_eq!(tokenizer.encode_with_special("<s>hello").unwrap(), [1, hello]);
    // the space of a text's first word is no text, that of a word behind others is
    let behind = |id: u32| tokenizer.stream_decoder(true).behind(id).step(hello);
    assert_eq!((behind(1), behind(hello)), ("hello".to_owned(), " hello".to_owned()));
    let without =
        [spm(), vec![("ggml.add_space_prefix", false.into()), ("ggml.add_bos_token", false.into())]].concat();
    let tokenizer = open(&keys(without)).unwrap().unwrap();
    assert_eq!(tokenizer.bos(), None);
    let ids = tokenizer.encode("hello").unwrap();
    assert_eq!(ids.iter().map(|id| tokenizer.token_of(*id).unwrap()).collect::<Vec<_>>(), ["he", "llo"]);
}

#[test]
fn what_is_written_means_the_same_when_it_is_read() {
    let first = open(&keys(spm())).unwrap().unwrap();
    let endings = Endings { rows: 300, ..Endings::default() };
    let written_template = ChatTemplate::new("t", "{{ bos_token }}").unwrap();
    let (written, _) = metadata(&first, Some(&written_template), &endings).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = file(&folder, &written);
    let second = Tokenizer::from_gguf(&file).unwrap().unwrap();
    assert_eq!(second.vocab_size(), 300, "filled up to the rows of the model");
    for text in ["hello hell", "h  ello", "é", "  ", " <tool> hello", "<unk>"] {
        assert_eq!(first.encode(text).unwrap(), second.encode(text).unwrap(), "{text}");
        assert_eq!(
            first.encode_with_special(text).unwrap(),
            second.encode_with_special(text).unwrap(),
            "{text}"
        );
    }
    assert_eq!((second.bos(), second.eos()), (first.bos(), first.eos()));
    let read_template = template(&file).unwrap().unwrap();
    assert_eq!((read_template.source(), read_template.tool_use()), ("{{ bos_token }}", None));
    assert_eq!(end_ids(&file).unwrap(), [2]);
}

/// A file names templates as folders do: one for all, and one for conversations with tools.
#[test]
fn templates_come_back_by_name() {
    let tokenizer = open(&keys(spm())).unwrap().unwrap();
    let endings = Endings { rows: 300, ..Endings::default() };
    let both =
        ChatTemplate::compiled("t", "{{ bos_token }}a", Some("{{ bos_token }}{{ tools | length }}")).unwrap();
    let (written, _) = metadata(&tokenizer, Some(&both), &endings).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = |keys: &[(String, Value<'static>)]| file(&folder, keys);
    let read = file(&written);
    assert_eq!(read.strings("tokenizer.chat_templates").unwrap(), Some(vec!["tool_use".to_owned()]));
    let template = |file: &GgufFile| template(file).unwrap().unwrap();
    let tools = [serde_json::json!({"type": "function", "function": {"name": "f"}})];
    let render = |template: &ChatTemplate, tools| {
        template.render(&[], RenderOptions { tools, ..RenderOptions::default() }).unwrap()
    };
    let back = template(&read);
    assert_eq!((back.source(), back.tool_use()), (both.source(), both.tool_use()));
    assert_eq!((render(&back, &[]), render(&back, &tools)), ("<s>a".to_owned(), "<s>1".to_owned()));
    // a file with that for tools alone
    let alone: Vec<_> = written.into_iter().filter(|(key, _)| key != "tokenizer.chat_template").collect();
    let back = template(&file(&alone));
    assert_eq!(render(&back, &tools), "<s>1");
    assert_eq!(back.source(), both.tool_use().unwrap());
    // and what is no text, or broken, is told of
    for (wrong, expected) in [(3u32.into(), "tool_use"), ("{% for".into(), "chat_template")] {
        let mut keys = alone.clone();
        keys.retain(|(key, _)| key != "tokenizer.chat_template.tool_use");
        keys.push(("tokenizer.chat_template.tool_use".to_owned(), wrong));
        let error = super::template(&file(&keys)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

fn trained(digits: u8) -> Tokenizer {
    let sample: Vec<String> = (0..300)
        .map(|i| {
            format!(
                "The number {i} and {} again, it's 2026.\n\tif x{i} == {}: return # naïve 漢字かな\n",
                i * 37,
                i % 7
            )
        })
        .collect();
    Tokenizer::train(&sample, &TrainOptions { vocab_size: 500, digits, threads: 1 }).unwrap()
}

fn rewritten(tokenizer: &Tokenizer) -> Tokenizer {
    let endings = Endings { rows: tokenizer.vocab_size(), ..Endings::default() };
    open(&metadata(tokenizer, None, &endings).unwrap().0).unwrap().unwrap()
}

#[test]
fn trained_vocabularies_keep_their_tokens() {
    for digits in [1, 3] {
        let ours = trained(digits);
        let theirs = rewritten(&ours);
        assert_eq!(ours.vocab_size(), theirs.vocab_size());
        assert_eq!((ours.bos(), ours.eos()), (theirs.bos(), theirs.eos()));
        for id in 0..ours.vocab_size() as u32 {
            assert_eq!(ours.token_of(id), theirs.token_of(id));
            assert_eq!(ours.decode(&[id], true), theirs.decode(&[id], true));
        }
        assert_eq!(ours.control_tokens(), theirs.control_tokens());
    }
    let endings = Endings { rows: 500, ..Endings::default() };
    let error = metadata(&trained(2), None, &endings).unwrap_err().to_string();
    assert!(error.contains("tokens of more than a digit, such as `"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn trained_vocabularies_cut_text_as_before(text in "(\\PC|[0-9]{1,7}|[ \n\t]{1,3}|<\\|user\\|>|<think>|it's|漢字){0,40}") {
        static BOTH: std::sync::OnceLock<[(Tokenizer, Tokenizer); 2]> = std::sync::OnceLock::new();
        let both = BOTH.get_or_init(|| [1, 3].map(|digits| { let ours = trained(digits); let theirs = rewritten(&ours); (ours, theirs) }));
        for (ours, theirs) in both {
            let ids = ours.encode(&text).unwrap();
            prop_assert_eq!(&ids, &theirs.encode(&text).unwrap());
            prop_assert_eq!(theirs.decode(&ids, false), text.clone());
            prop_assert_eq!(ours.encode_with_special(&text).unwrap(), theirs.encode_with_special(&text).unwrap());
        }
    }
}

#[test]
fn every_end_of_an_answer_comes_back() {
    let tokenizer = trained(3);
    let eos = tokenizer.eos().unwrap();
    let ends_of = |ends: &[u32]| {
        let endings = Endings { rows: 500, ends: ends.to_vec(), ..Endings::default() };
        let (keys, notes) = metadata(&tokenizer, None, &endings).unwrap();
        let folder = tempfile::tempdir().unwrap();
        (end_ids(&file(&folder, &keys)).unwrap(), notes)
    };
    assert_eq!(ends_of(&[]), (vec![eos], vec![]));
    assert_eq!(ends_of(&[40, eos, 41]), (vec![eos, 40, 41], vec![]));
    let (ends, notes) = ends_of(&[40, 41, 42, 43]);
    assert_eq!(ends, [eos, 40, 41]);
    assert!(notes[0].ends_with("it does not end at 42, 43"), "{notes:?}");
}

#[test]
fn tokenizers_that_contradict_themselves_are_refused() {
    let with = |key: &'static str, value: Value<'static>| {
        let mut pairs = spm();
        pairs.retain(|(found, _)| *found != key);
        pairs.push((key, value));
        keys(pairs)
    };
    let without = |key: &str| keys(spm().into_iter().filter(|(found, _)| *found != key).collect());
    let gpt2 = |pre: &'static str, merges: &[&str]| {
        keys(vec![
            ("ggml.model", "gpt2".into()),
            ("ggml.pre", pre.into()),
            ("ggml.tokens", Value::strings(["a", "b", "ab"])),
            ("ggml.merges", Value::strings(merges)),
        ])
    };
    let cases = [
        (without("ggml.tokens"), "`tokenizer.ggml.tokens`: expected tokens, got no such key"),
        (without("ggml.scores"), "expected scores"),
        (with("ggml.model", "rwkv".into()), "expected \"gpt2\" or \"llama\", got \"rwkv\""),
        (with("ggml.model", 3u32.into()), "expected a string, got u32"),
        (with("ggml.tokens", Value::i32s(&[1])), "expected an array of strings"),
        (with("ggml.tokens", Value::strings(["a", "a"])), "one for each of 2 tokens"),
        (with("ggml.token_type", Value::i32s(&[1])), "one for each of 271 tokens, got 1"),
        (with("ggml.scores", Value::f32s(&[0.0])), "one for each of 271 tokens, got 1"),
        (with("ggml.scores", Value::f32s(&[f32::NAN; 271])), "NaN for token 0"),
        (with("ggml.add_bos_token", 1u32.into()), "true or false"),
        (gpt2("kimi-k9", &["a b"]), "\"kimi-k9\", whose cut of text is not known here"),
        (gpt2("default", &["ab"]), "two tokens with a space between"),
        (gpt2("default", &["a c"]), "out of vocabulary"),
        (gpt2("default", &["b a"]), "out of vocabulary"),
    ];
    for (metadata, why) in cases {
        let text = open(&metadata).unwrap_err().to_string();
        assert!(text.contains(why) && text.contains("t.gguf"), "expected `{why}` in: {text}");
    }
    let twice = keys(vec![("ggml.model", "llama".into()), ("ggml.tokens", Value::strings(["a", "b", "a"]))]);
    assert!(open(&twice).unwrap_err().to_string().contains("each token once, got `a` as 0 and 2"));
    assert!(open(&keys(vec![])).unwrap().is_none());
    assert!(open(&with("ggml.model", "none".into())).unwrap().is_none());
    let strange =
        [spm(), vec![("ggml.bos_token_id", 9999u32.into()), ("ggml.eos_token_id", 9999u32.into())]].concat();
    assert_eq!(open(&keys(strange)).unwrap().unwrap().bos(), Some(1), "an id past the end is no token");
    assert!(open(&gpt2("default", &["a b"])).unwrap().is_some());
    assert!(open(&gpt2("kimi-k2", &["a b"])).unwrap().is_some());
}
