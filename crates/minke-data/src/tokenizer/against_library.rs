//! Our models against the library's, on vocabularies that are drawn at random.

use std::fmt::Write;

use proptest::prelude::*;

use super::*;
use crate::gguf::GgufWriter;

impl Tokenizer {
    /// The same tokenizer with the library's model in it.
    pub(super) fn of_library(&self) -> Self {
        let library = Self::by_library(self.json(), "(in memory)").unwrap();
        assert!(matches!(library.get_model(), Model::Library(_)));
        let ends = Ends { bos: self.bos(), eos: self.eos() };
        Self::finish(library, JsonFile::Read(self.json().to_owned()), "(in memory)", &EndTokens::Ids(ends))
            .unwrap()
    }

    fn is_own(&self) -> bool {
        matches!(self.shared.special.get_model(), Model::Own(_))
    }
}

/// Everything that can be asked of a tokenizer, of ours and of the library's.
fn assert_same(ours: &Tokenizer, text: &str) -> std::result::Result<(), TestCaseError> {
    let theirs = ours.of_library();
    prop_assert!(ours.is_own());
    for encode in [Tokenizer::encode, Tokenizer::encode_with_special] {
        let (ids, expected) = (encode(ours, text).unwrap(), encode(&theirs, text).unwrap());
        prop_assert_eq!(&ids, &expected);
        for skip in [false, true] {
            let whole = ours.decode(&ids, skip);
            prop_assert_eq!(&whole, &theirs.decode(&ids, skip));
            prop_assert_eq!(&whole, &theirs.shared.special.decode(&ids, skip).unwrap());
            prop_assert_eq!(&whole, &streamed(ours, &ids, skip));
        }
    }
    prop_assert_eq!(ours.vocab_size(), theirs.vocab_size());
    prop_assert_eq!(ours.has_bytes(), theirs.has_bytes());
    prop_assert_eq!(ours.control_tokens(), theirs.control_tokens());
    for id in 0..=ours.vocab_size() as u32 {
        let token = ours.token_of(id);
        prop_assert_eq!(&token, &theirs.token_of(id));
        prop_assert_eq!(ours.token_bytes(id), theirs.token_bytes(id));
        prop_assert_eq!(token.and_then(|token| ours.id_of(&token)).unwrap_or(id), id);
    }
    Ok(())
}

/// What a stream of these ids says.
pub(super) fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut decoder = tokenizer.stream_decoder(skip_special);
    let mut joined: String = ids.iter().map(|&id| decoder.step(id)).collect();
    joined.push_str(&decoder.finish());
    joined
}

const TEXT: &str = "([ab ▁é鲸🐋\nz]|ab|  |<s>|<0x41>|aab|▁▁|ß){0,40}";

/// Tokens of few letters, each once; many are parts of others.
fn tokens() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("[ab▁é鲸🐋]{1,4}", 1..60).prop_map(|mut tokens| {
        tokens.sort();
        tokens.dedup();
        tokens
    })
}

/// A file with a vocabulary of SentencePiece's kind; bytes stand for some characters and not for others.
fn scored(tokens: &[String], scores: &[u8], kinds: &[i32], bytes: u8, prefix: bool) -> Tokenizer {
    let mut all = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    let (mut all_kinds, mut all_scores) = (vec![2, 3, 3], vec![0.0; 3]);
    for (i, token) in tokens.iter().enumerate() {
        all.push(token.clone());
        all_kinds.push(kinds[i % kinds.len()]);
        // few different scores, so that ids decide often; both zeros
        all_scores.push([-0.0, 0.0, -1.0, -2.5, -1e9, 3.0][scores[i % scores.len()] as usize % 6]);
    }
    for byte in (0..=255u8).filter(|byte| byte % 8 < bytes) {
        all.push(format!("<0x{byte:02X}>"));
        all_kinds.push(6);
        all_scores.push(0.0);
    }
    let metadata = [
        ("model", "llama".into()),
        ("tokens", gguf::Value::strings(all)),
        ("token_type", gguf::Value::i32s(&all_kinds)),
        ("scores", gguf::Value::f32s(&all_scores)),
        ("add_space_prefix", prefix.into()),
    ];
    let metadata: Vec<_> =
        metadata.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.gguf");
    GgufWriter::create(&path, &metadata, Vec::new()).unwrap().finish().unwrap();
    Tokenizer::from_gguf(&GgufFile::open(path).unwrap()).unwrap().unwrap()
}

/// A `tokenizer.json` whose merges join tokens in an order of chance.
fn listed(tokens: &[String], order: &[u8], switches: [bool; 5], unknown: bool) -> Tokenizer {
    let [fuse, fallback, whole, prefix, as_text] = switches;
    let mut vocabulary: Vec<String> = vec!["<unk>".to_owned(), "<s>".to_owned(), "<0xC3>".to_owned()];
    vocabulary.extend(["<0x41>", "<0xA9>", "<0x7A>"].map(str::to_owned));
    vocabulary.extend(tokens.iter().cloned());
    let mut merges = Vec::new();
    for token in tokens {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if [left, right].iter().all(|part| vocabulary.iter().any(|token| token == part)) {
                merges.push((order[merges.len() % order.len()], left, right));
            }
        }
    }
    merges.sort_unstable();
    // one that comes twice
    merges.extend(merges.first().copied());
    let merges: Vec<Value> = merges
        .into_iter()
        .map(|(_, left, right)| if as_text { json!(format!("{left} {right}")) } else { json!([left, right]) })
        .collect();
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": !special, "rstrip": false,
            "normalized": !special, "special": special})
    };
    let normalizer = if prefix {
        json!({"type": "Prepend", "prepend": "▁"})
    } else {
        json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    };
    let ids: serde_json::Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(1, "<s>", true), added(6, &tokens[0], false)],
        "normalizer": normalizer, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": unknown.then_some("<unk>"),
            "continuing_subword_prefix": "", "end_of_word_suffix": null, "fuse_unk": fuse,
            "byte_fallback": fallback, "ignore_merges": whole, "vocab": ids, "merges": merges}
    });
    Tokenizer::from_json(file.to_string().into_bytes()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn scores_give_the_ids_of_merges(
        tokens in tokens(),
        scores in prop::collection::vec(any::<u8>(), 1..20),
        kinds in prop::collection::vec(prop::sample::select(vec![1, 1, 1, 1, 4, 5, 7]), 1..12),
        bytes in prop::sample::select(vec![0u8, 4, 8]),
        prefix: bool,
        text in TEXT,
    ) {
        assert_same(&scored(&tokens, &scores, &kinds, bytes, prefix), &text)?;
    }

    #[test]
    fn listed_merges_give_the_ids_of_the_library(
        tokens in tokens(),
        order in prop::collection::vec(any::<u8>(), 1..20),
        switches: [bool; 5],
        unknown: bool,
        text in TEXT,
    ) {
        assert_same(&listed(&tokens, &order, switches, unknown), &text)?;
    }
}

/// A vocabulary of SentencePiece's kind with all bytes, so that any text can be written.
fn bytes_for_the_rest() -> &'static Tokenizer {
    static ONCE: OnceLock<Tokenizer> = OnceLock::new();
    ONCE.get_or_init(|| {
        let tokens = ["▁", "a", "▁a", "▁▁", "o", "k", "ok", "▁ok", "é"].map(str::to_owned);
        scored(&tokens, &[2, 3, 1], &[1], 8, true)
    })
}

proptest! {
    #[test]
    fn any_stream_of_bytes_joins_to_the_whole(
        text in "([a ok▁é𓀀𓁀\\PC]|<s>){0,30}",
        ids in prop::collection::vec(0u32..275, 0..40),
        skip: bool,
    ) {
        let tokenizer = bytes_for_the_rest();
        let written = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(tokenizer.decode(&written, skip), text.replace('▁', " "));
        for ids in [written, ids] {
            prop_assert_eq!(streamed(tokenizer, &ids, skip), tokenizer.decode(&ids, skip));
        }
    }
}

#[test]
fn characters_of_several_bytes_stream_one_behind_the_other() {
    let tokenizer = bytes_for_the_rest();
    let ids = tokenizer.encode("ok 𓀀𓀀𓁀 ok").unwrap();
    let mut decoder = tokenizer.stream_decoder(true);
    let pieces: Vec<String> =
        ids.iter().map(|&id| decoder.step(id)).filter(|piece| !piece.is_empty()).collect();
    assert_eq!(pieces, ["ok", " ", "𓀀", "𓀀", "𓁀", " ok"]);
    assert_eq!(decoder.finish(), "");
}

#[test]
fn a_long_text_is_encoded_as_by_the_library() {
    let tokens: Vec<String> =
        ["a", "aa", "aaa", "aaaa", "ab", "b", "ba", "▁", "▁a", "▁▁"].map(str::to_owned).to_vec();
    let ours = scored(&tokens, &[2, 3, 2, 1], &[1], 8, true);
    let mut text = String::new();
    for i in 0..5000u32 {
        write!(text, "{}", ["a", "aab", " ", "  ", "é"][(i * i % 97 % 5) as usize]).unwrap();
    }
    assert_same(&ours, &text).unwrap();
}

#[test]
fn what_ours_cannot_do_is_left_to_the_library() {
    let own = listed(&["a".to_owned(), "ab".to_owned(), "b".to_owned()], &[0], [false; 5], true);
    let file: Value = serde_json::from_slice(own.json()).unwrap();
    let with = |key: &str, value: Value| {
        let mut file = file.clone();
        file["model"][key] = value;
        Tokenizer::from_json(file.to_string().into_bytes())
    };
    assert!(with("fuse_unk", json!(true)).unwrap().is_own());
    assert!(!with("dropout", json!(0.0)).unwrap().is_own());
    assert!(!with("end_of_word_suffix", json!("</w>")).unwrap().is_own());
    assert!(!with("unk_token", json!("nowhere")).unwrap().is_own());
    assert!(!with("vocab", json!({"a": 0, "b": 0, "ab": 1, "<unk>": 2, "<s>": 3})).unwrap().is_own());
    for merges in
        [json!([["a", "c"]]), json!(["a c"]), json!(["ab"]), json!([["a"]]), json!([["a", "b", "a"]])]
    {
        let refused = with("merges", merges.clone()).unwrap_err().to_string();
        assert!(refused.contains("not a tokenizer"), "{merges}: {refused}");
    }
    let old = with("merges", json!(["#version: 0.2", "a b"])).unwrap();
    assert!(!old.is_own());
    assert_eq!(old.encode("ab").unwrap(), own.encode("ab").unwrap());
}
