use super::*;
use proptest::prelude::*;
use tokenizers::PreTokenizer;

fn sample() -> Vec<String> {
    let words =
        ["whale", "minke", "ocean", "blow", "fluke", "deep", "für", "鲸鱼", "🐋", "let x = 42;", "1234"];
    (0..400usize)
        .map(|i| {
            (0..20).map(|j| words[(i * 7 + j * j * 3 + i * j) % words.len()]).collect::<Vec<_>>().join(" ")
        })
        .collect()
}

fn trained() -> Tokenizer {
    Tokenizer::train(&sample(), &TrainOptions { vocab_size: 400, digits: 1, threads: 2 }).unwrap()
}

#[test]
fn training_is_the_same_on_every_run_and_thread_count() {
    let mut texts = sample();
    // ties everywhere: every two-letter word equally often
    for a in 'a'..='z' {
        for b in 'a'..='z' {
            texts.push(format!(" {a}{b}{a} {a}{b}{a}"));
        }
    }
    let first = Tokenizer::train(&texts, &TrainOptions { vocab_size: 700, digits: 3, threads: 1 }).unwrap();
    assert_eq!(first.vocab_size(), 700);
    texts.reverse();
    for threads in [1, 2, 5] {
        let again = Tokenizer::train(&texts, &TrainOptions { vocab_size: 700, digits: 3, threads }).unwrap();
        assert_eq!(again.json(), first.json(), "{threads} threads");
    }
}

#[test]
fn merges_are_those_of_a_naive_trainer() {
    // the textbook: count all pairs anew for every merge
    let texts: Vec<String> = sample().into_iter().take(60).collect();
    let options = TrainOptions { vocab_size: 330, digits: 1, threads: 1 };
    let fast: Value = serde_json::from_slice(&train::train_json(&texts, &options).unwrap()).unwrap();
    let cutter = Tokenizer::train(&texts, &options).unwrap();
    let mut words: Vec<Vec<String>> = Vec::new();
    for text in &texts {
        let mut cut = tokenizers::PreTokenizedString::from(text.as_str());
        cutter.shared.special.get_pre_tokenizer().unwrap().pre_tokenize(&mut cut).unwrap();
        for (word, _, _) in
            cut.get_splits(tokenizers::OffsetReferential::Normalized, tokenizers::OffsetType::None)
        {
            words.push(word.chars().map(String::from).collect());
        }
    }
    let id = |token: &str| fast["model"]["vocab"][token].as_u64().unwrap();
    for merge in fast["model"]["merges"].as_array().unwrap() {
        let mut counts: std::collections::HashMap<(String, String), i64> = std::collections::HashMap::new();
        for word in &words {
            for pair in word.windows(2) {
                *counts.entry((pair[0].clone(), pair[1].clone())).or_default() += 1;
            }
        }
        let best = counts
            .into_iter()
            .max_by_key(|((a, b), count)| (*count, std::cmp::Reverse((id_or(a, &id), id_or(b, &id)))));
        let (a, b) = best.unwrap().0;
        assert_eq!((merge[0].as_str(), merge[1].as_str()), (Some(a.as_str()), Some(b.as_str())));
        for word in &mut words {
            let mut at = 0;
            while at + 1 < word.len() {
                if word[at] == a && word[at + 1] == b {
                    let next = word.remove(at + 1);
                    word[at].push_str(&next);
                }
                at += 1;
            }
        }
    }
}

fn id_or(token: &str, id: &dyn Fn(&str) -> u64) -> u64 {
    id(token)
}

#[test]
fn special_tokens_have_their_ids_and_cannot_be_forged() {
    let mut texts = sample();
    texts.extend(vec!["<|user|> <|bos|> <think> hm </think> <|eos|>".to_owned(); 500]);
    let tokenizer =
        Tokenizer::train(&texts, &TrainOptions { vocab_size: 500, digits: 1, threads: 1 }).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(0), Some(1)));
    for (id, (token, special)) in SPECIAL_TOKENS.iter().enumerate() {
        let id = id as u32;
        assert_eq!(tokenizer.id_of(token), Some(id));
        assert_eq!(tokenizer.encode_with_special(token).unwrap(), [id]);
        let plain = tokenizer.encode(token).unwrap();
        assert!(plain.iter().all(|&id| id as usize >= SPECIAL_TOKENS.len()), "{token}: {plain:?}");
        assert_eq!(tokenizer.decode(&plain, true), *token);
        assert_eq!(tokenizer.decode(&[id], true), if *special { "" } else { token });
        assert_eq!(tokenizer.decode(&[id], false), *token);
    }
}

#[test]
fn ordinary_tokens_are_found_where_marks_are_not() {
    let with = |added: &[(&str, bool)]| {
        let mut file: Value = serde_json::from_slice(trained().json()).unwrap();
        for (at, (content, special)) in added.iter().enumerate() {
            file["added_tokens"].as_array_mut().unwrap().push(json!({
                "id": 700 + at, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }));
        }
        Tokenizer::from_json(file.to_string().into_bytes()).unwrap()
    };
    let tokenizer = with(&[("<mark>", false), ("the whale", false), ("<|more|>", true), ("  ", false)]);
    let [whale, spaces] = ["the whale", "  "].map(|token| tokenizer.id_of(token).unwrap());
    let ids = tokenizer.encode("x<think><mark>the whale<|more|>  <|bos|>").unwrap();
    assert!(tokenizer.control_tokens().iter().all(|token| !ids.contains(&token.id)), "{ids:?}");
    assert!(ids.contains(&whale) && ids.contains(&spaces), "{ids:?}");
    assert_eq!(tokenizer.encode("<mark>").unwrap(), trained().encode("<mark>").unwrap());
    let marks = tokenizer.encode_with_special("<mark><|more|>").unwrap();
    assert_eq!(marks, ["<mark>", "<|more|>"].map(|token| tokenizer.id_of(token).unwrap()));
}

#[test]
fn a_text_begins_with_bos_where_a_file_says_so() {
    let folder = tempfile::tempdir().unwrap();
    trained().save(folder.path()).unwrap();
    assert_eq!(trained().bos_of_text(), Some(0));
    assert_eq!(Tokenizer::load(folder.path()).unwrap().bos_of_text(), Some(0));
    let path = folder.path().join("tokenizer.json");
    let mut file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    file["post_processor"] = Value::Null;
    std::fs::write(&path, file.to_string()).unwrap();
    for (added, expected) in [(json!(false), None), (Value::Null, None), (json!(true), Some(0))] {
        let config = json!({"bos_token": "<|bos|>", "add_bos_token": added});
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.bos_of_text()), (Some(0), expected), "{added}");
    }
}

#[test]
fn digits_are_cut_as_asked() {
    let texts = vec!["123456 123456 99 99 7".repeat(50)];
    for digits in 1..=3u8 {
        let options = TrainOptions { vocab_size: 300, digits, threads: 1 };
        let tokenizer = Tokenizer::train(&texts, &options).unwrap();
        let longest = (0..tokenizer.vocab_size() as u32)
            .filter_map(|id| tokenizer.token_of(id))
            .filter(|token| token.bytes().all(|b| b.is_ascii_digit()))
            .map(|token| token.len())
            .max();
        assert_eq!(longest, Some(digits as usize));
    }
}

#[test]
fn saved_and_loaded_it_is_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = trained();
    tokenizer.save(folder.path()).unwrap();
    let loaded = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(loaded.fingerprint(), tokenizer.fingerprint());
    assert_eq!((loaded.bos(), loaded.eos()), (Some(0), Some(1)));
    let text = "The minke whale, für 1234 🐋\n\n  deep";
    assert_eq!(loaded.encode(text).unwrap(), tokenizer.encode(text).unwrap());
    let config: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("tokenizer_config.json")).unwrap()).unwrap();
    assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!(config["pad_token"], "<|pad|>");
}

#[test]
fn bad_files_are_errors_with_the_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    assert!(Tokenizer::load(&path).unwrap_err().to_string().contains("tokenizer.json"));
    let good = String::from_utf8(trained().json().to_owned()).unwrap();
    let mut huge: Value = serde_json::from_str(&good).unwrap();
    huge["model"]["vocab"]["whaaale"] = json!(4_000_000_000u32);
    let mut orphan: Value = serde_json::from_str(&good).unwrap();
    orphan["model"]["merges"][0] = json!(["nowhere", "none"]);
    let cases = [
        String::new(),
        "{".to_owned(),
        "[]".to_owned(),
        "{\"model\": 3}".to_owned(),
        good[..good.len() / 2].to_owned(),
        huge.to_string(),
        orphan.to_string(),
        "[".repeat(100_000),
    ];
    for case in cases {
        std::fs::write(&path, &case).unwrap();
        let text = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(text.contains("tokenizer.json") && text.len() < 500, "{text}");
    }
    for vocab_size in [0, 271, usize::MAX] {
        assert!(Tokenizer::train(&sample(), &TrainOptions { vocab_size, digits: 1, threads: 1 }).is_err());
    }
    assert!(Tokenizer::train(&[], &TrainOptions::default()).is_err());
}

#[test]
fn a_batch_is_its_rows() {
    let tokenizer = trained();
    let texts = sample();
    let expected: Vec<Vec<u32>> = texts.iter().map(|text| tokenizer.encode(text).unwrap()).collect();
    for threads in [0, 1, 2, 7, 1000] {
        assert_eq!(tokenizer.encode_batch(&texts, threads).unwrap(), expected);
    }
}

#[test]
fn streams_give_only_whole_characters_at_every_byte_boundary() {
    // one token per byte: the hardest stream there is
    let tokenizer = trained();
    let table = stream::byte_table();
    let id_of_byte = |byte: u8| {
        let letter = table.iter().find(|(_, b)| **b == byte).unwrap().0;
        tokenizer.id_of(&letter.to_string()).unwrap()
    };
    let text = "aä€😀\u{fffd}鲸z";
    let mut decoder = tokenizer.stream_decoder(true);
    let mut given = String::new();
    for (at, byte) in text.bytes().enumerate() {
        given.push_str(&decoder.step(id_of_byte(byte)));
        let mut complete = at + 1;
        while !text.is_char_boundary(complete) {
            complete -= 1;
        }
        assert_eq!(given, text[..complete], "after byte {at}");
    }
    assert_eq!(decoder.finish(), "");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn text_survives(text in "\\PC{0,60}") {
        let tokenizer = trained_once();
        prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap(), true), text);
    }

    #[test]
    fn the_short_way_is_the_librarys(
        text in "([ -~\t\n\r\u{b}\u{c}\u{0}\u{1f}\u{7f}]|[ \n]{1,3}|[a-c]{1,4}|[0-9]{1,5}|[-_.]{1,3}|é|鲸|\u{a0}|\u{2028}|🐋){0,80}",
    ) {
        for (tokenizer, library) in trained_for_digits() {
            prop_assert!(tokenizer.shared.fast.is_some() && library.shared.fast.is_none());
            prop_assert_eq!(tokenizer.encode(&text).unwrap(), library.encode(&text).unwrap());
        }
    }

    #[test]
    fn any_stream_joins_to_the_whole(ids in prop::collection::vec(0u32..450, 0..40), skip: bool) {
        let tokenizer = trained_once();
        let joined = against_library::streamed(tokenizer, &ids, skip);
        prop_assert_eq!(&joined, &tokenizer.decode(&ids, skip));
        let library = tokenizer.shared.special.decode(&ids, skip).unwrap();
        prop_assert_eq!(joined, library);
    }
}

fn trained_once() -> &'static Tokenizer {
    static ONCE: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    ONCE.get_or_init(trained)
}

fn trained_for_digits() -> &'static [(Tokenizer, Tokenizer)] {
    static ONCE: std::sync::OnceLock<Vec<(Tokenizer, Tokenizer)>> = std::sync::OnceLock::new();
    ONCE.get_or_init(|| {
        let mut texts = sample();
        texts.push("aa bb 12 345 -- ... __\n\n\n  abc\t\tcab \n ".repeat(30));
        [1, 2, 3]
            .map(|digits| {
                let options = TrainOptions { vocab_size: 450, digits, threads: 1 };
                let tokenizer = Tokenizer::train(&texts, &options).unwrap();
                let library = tokenizer.of_library();
                (tokenizer, library)
            })
            .to_vec()
    })
}

#[test]
fn source_code_and_long_words_go_the_short_way_too() {
    let tokenizer = trained_once();
    let mut text = include_str!("mod.rs").to_owned();
    text.push_str(include_str!("train.rs"));
    text.push_str(&"-".repeat(300));
    text.push_str(&"whale".repeat(40));
    text.push_str(&"\n".repeat(200));
    text.push_str(&" ".repeat(200));
    assert_eq!(tokenizer.encode(&text).unwrap(), tokenizer.of_library().encode(&text).unwrap());
}

/// Some files call the marks of a thought special, as the ends of texts are: an answer keeps them nevertheless.
#[test]
fn marks_of_a_thought_are_shown_whatever_a_file_calls_them() {
    let folder = tempfile::tempdir().unwrap();
    trained().save(folder.path()).unwrap();
    let json = std::fs::read(folder.path().join("tokenizer.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let mut ends = Vec::new();
    for token in json["added_tokens"].as_array_mut().unwrap() {
        ends.extend((token["special"] == true).then(|| token["content"].as_str().unwrap().to_owned()));
        token["special"] = true.into();
    }
    let tokenizer = Tokenizer::from_json(json.to_string().into_bytes()).unwrap();
    let ids = tokenizer.encode_with_special(&format!("<think>deep</think>whale{}", ends[0])).unwrap();
    assert_eq!(tokenizer.decode(&ids, true), "<think>deep</think>whale");
}
