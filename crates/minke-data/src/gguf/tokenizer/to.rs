//! The metadata that says what a `tokenizer.json` says.

use std::collections::{HashMap, HashSet};

use serde_json::Value as Json;

use super::from::END_NAMES;
use super::{SPACE, kind, pre};
use crate::gguf::Value;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// The score of a token that no merge makes.
const UNMERGED: f32 = -1e9;

/// What a `tokenizer.json` does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Endings {
    /// Rows of the model's embedding: the vocabulary is filled up to them.
    pub rows: usize,
    /// All tokens that end an answer; the first is the end of a document for a tokenizer that does not know.
    pub ends: Vec<u32>,
    /// The token that pads.
    pub pad: Option<u32>,
}

fn fail(reason: impl Into<String>) -> Error {
    Error::tokenizer("for GGUF", reason.into())
}

/// Keys with their values, and what a user should know of them.
type Told = (Vec<(String, Value<'static>)>, Vec<String>);

/// The keys `tokenizer.*` of a tokenizer.
///
/// # Errors
/// The tokenizer does something that no program that reads GGUF would do, and what it is; or it has more tokens than the
/// model has rows.
pub fn metadata(tokenizer: &Tokenizer, template: Option<&ChatTemplate>, endings: &Endings) -> Result<Told> {
    let file: Json =
        serde_json::from_slice(tokenizer.json()).map_err(|error| fail(format!("not JSON: {error}")))?;
    if tokenizer.vocab_size() > endings.rows {
        let reason = format!("{} tokens, and the model has {} rows", tokenizer.vocab_size(), endings.rows);
        return Err(fail(reason));
    }
    let model = &file["model"];
    let kind = model["type"].as_str().unwrap_or("of no kind");
    if kind != "BPE" {
        return Err(fail(format!("expected a model of type BPE, got {kind}, which is not written yet")));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[key].as_str().is_some_and(|text| !text.is_empty()) {
            return Err(fail(format!("`model.{key}` = {}: GGUF has no place for it", model[key])));
        }
    }
    let vocabulary = Vocabulary::of(&file, endings.rows)?;
    let mut keys = if model["byte_fallback"] == true {
        sentence_piece(&file, vocabulary)?
    } else {
        byte_level(&file, &vocabulary)?
    };
    let mut put = |key: &str, value: Value<'static>| keys.push((format!("tokenizer.{key}"), value));
    let (bos, eos) = (tokenizer.bos(), tokenizer.eos().or(endings.ends.first().copied()));
    // readers find some ends by their names; the others need the keys
    let is_named = |id: &u32| {
        let token = tokenizer.token_of(*id).unwrap_or_default();
        END_NAMES.contains(&&*token) && tokenizer.control_tokens().iter().any(|token| token.id == *id)
    };
    let others = endings.ends.iter().copied().filter(|id| Some(*id) != eos);
    let (named, unnamed): (Vec<u32>, Vec<u32>) = others.partition(is_named);
    let mut others = unnamed.into_iter().chain(named);
    let (eot, eom) = (others.next(), others.next());
    let lost: Vec<String> = others.filter(|id| !is_named(id)).map(|id| id.to_string()).collect();
    let notes = match lost.as_slice() {
        [] => Vec::new(),
        lost => {
            vec![format!("GGUF has keys for three ends of an answer: it does not end at {}", lost.join(", "))]
        }
    };
    // readers have ids of their own where these are missing, and would take other tokens for the ends
    for (name, id) in
        [("bos", bos.or(eos)), ("eos", eos.or(bos)), ("eot", eot), ("eom", eom), ("padding", endings.pad)]
    {
        if let Some(id) = id.filter(|id| (*id as usize) < endings.rows) {
            put(&format!("ggml.{name}_token_id"), id.into());
        }
    }
    put("ggml.add_bos_token", tokenizer.bos_of_text().is_some().into());
    put("ggml.add_eos_token", false.into());
    if let Some(template) = template {
        if let Some(tool_use) = template.tool_use() {
            put("chat_templates", Value::strings(["tool_use"]));
            put("chat_template.tool_use", tool_use.to_owned().into());
        }
        put("chat_template", template.source().to_owned().into());
    }
    Ok((keys, notes))
}

struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<i64>,
    ids: HashMap<String, u32>,
}

impl Vocabulary {
    fn of(file: &Json, rows: usize) -> Result<Self> {
        let mut tokens: Vec<Option<(String, i64)>> = vec![None; rows];
        let mut put = |token: &str, id: Option<u64>, kind: i64| -> Result<()> {
            let place = id.and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
            let place = place
                .ok_or_else(|| fail(format!("token `{}` has no id below {rows}", token.escape_debug())))?;
            *place = Some((token.to_owned(), kind));
            Ok(())
        };
        for (token, id) in file["model"]["vocab"].as_object().into_iter().flatten() {
            put(token, id.as_u64(), kind::NORMAL)?;
        }
        let unknown = file["model"]["unk_token"].as_str();
        for added in file["added_tokens"].as_array().into_iter().flatten() {
            let content = added["content"].as_str().unwrap_or_default();
            let kind = match added["special"] == true {
                _ if unknown == Some(content) => kind::UNKNOWN,
                true => kind::CONTROL,
                false => kind::USER_DEFINED,
            };
            put(content, added["id"].as_u64(), kind)?;
        }
        let fill = |(id, token): (usize, Option<(String, i64)>)| {
            token.unwrap_or((format!("[PAD{id}]"), kind::UNUSED))
        };
        let (tokens, kinds): (Vec<String>, Vec<i64>) = tokens.into_iter().enumerate().map(fill).unzip();
        let ids: HashMap<String, u32> = tokens.iter().cloned().zip(0..).collect();
        if ids.len() < tokens.len() {
            let mut seen = HashSet::new();
            let twice = tokens.iter().find(|token| !seen.insert(*token)).cloned().unwrap_or_default();
            return Err(fail(format!("token `{}` has two ids", twice.escape_debug())));
        }
        Ok(Self { tokens, kinds, ids })
    }

    fn keys(&self, model: &str, pre: &str) -> Vec<(String, Value<'static>)> {
        let kinds: Vec<i32> = self.kinds.iter().map(|kind| *kind as i32).collect();
        vec![
            ("tokenizer.ggml.model".to_owned(), model.into()),
            ("tokenizer.ggml.pre".to_owned(), pre.into()),
            ("tokenizer.ggml.tokens".to_owned(), Value::strings(&self.tokens)),
            ("tokenizer.ggml.token_type".to_owned(), Value::i32s(&kinds)),
        ]
    }
}

/// Merges as pairs, whichever of the two forms a file has.
fn merges(file: &Json) -> Result<Vec<(&str, &str)>> {
    let wrong = || fail("a merge is neither `a b` nor [a, b]");
    let list = file["model"]["merges"].as_array().ok_or_else(|| fail("no merges"))?;
    list.iter()
        .map(|merge| match merge {
            Json::String(text) => text.split_once(' ').ok_or_else(wrong),
            other => other[0].as_str().zip(other[1].as_str()).ok_or_else(wrong),
        })
        .collect()
}

fn byte_level(file: &Json, vocabulary: &Vocabulary) -> Result<Vec<(String, Value<'static>)>> {
    let compose = match &file["normalizer"] {
        Json::Null => false,
        Json::Object(normalizer) if normalizer["type"] == "NFC" => true,
        Json::Object(normalizer)
            if normalizer["type"] == "Sequence"
                && normalizer.get("normalizers").and_then(Json::as_array).is_some_and(Vec::is_empty) =>
        {
            false
        }
        other => return Err(fail(format!("normalizer {other}: GGUF has no place for it"))),
    };
    let not_a_cut =
        |what: String| fail(format!("pre_tokenizer {what}: no cut of that kind has a name in GGUF"));
    let patterns = pre::patterns_of(&file["pre_tokenizer"]).map_err(not_a_cut)?;
    let ignore_merges = file["model"]["ignore_merges"] == true;
    let name = match pre::name_of(&patterns, ignore_merges, compose) {
        Some(name) => name,
        None => {
            few_digits(&patterns, vocabulary).map_err(|why| not_a_cut(format!("{patterns:?}{why}")))?;
            "deepseek-v3"
        }
    };
    let merges = merges(file)?;
    let mut keys = vocabulary.keys("gpt2", name);
    let joined = merges.iter().map(|(left, right)| format!("{left} {right}"));
    keys.push(("tokenizer.ggml.merges".to_owned(), Value::strings(joined)));
    Ok(keys)
}

/// Whether a cut is DeepSeek-V3's but for fewer digits in a piece, and merges never join digits: then up to three digits in
/// a piece give the same tokens.
fn few_digits(patterns: &[String], vocabulary: &Vocabulary) -> Result<(), String> {
    let theirs = pre::named("deepseek-v3").expect("the table has it").patterns;
    let like = patterns.len() == theirs.len() && patterns[1..] == theirs[1..];
    if !like || !matches!(patterns[0].as_str(), r"\p{N}" | r"\p{N}{1,2}") {
        return Err(String::new());
    }
    let joins = |(token, kind): &(&String, &i64)| {
        **kind == kind::NORMAL && token.len() > 1 && token.contains(|c: char| c.is_ascii_digit())
    };
    match vocabulary.tokens.iter().zip(&vocabulary.kinds).find(joins) {
        None => Ok(()),
        Some((token, _)) => Err(format!(" and tokens of more than a digit, such as `{token}`")),
    }
}

fn sentence_piece(file: &Json, mut vocabulary: Vocabulary) -> Result<Vec<(String, Value<'static>)>> {
    let prefix = space_prefix(file)?;
    let mut scores = vec![UNMERGED; vocabulary.tokens.len()];
    for (rank, (left, right)) in merges(file)?.into_iter().enumerate() {
        let Some(&id) = vocabulary.ids.get(&format!("{left}{right}")) else { continue };
        let score = &mut scores[id as usize];
        // the first merge that makes a token decides
        *score = score.max(-(rank as f32));
    }
    for (id, token) in vocabulary.tokens.iter_mut().enumerate() {
        let kind = &mut vocabulary.kinds[id];
        if *kind == kind::NORMAL && is_byte(token) {
            *kind = kind::BYTE;
        }
        if *kind == kind::USER_DEFINED {
            *token = token.replace(SPACE, " ");
        }
    }
    let mut keys = vocabulary.keys("llama", "default");
    keys.push(("tokenizer.ggml.scores".to_owned(), Value::f32s(&scores)));
    keys.push(("tokenizer.ggml.add_space_prefix".to_owned(), prefix.into()));
    if let Some(unknown) = file["model"]["unk_token"].as_str().and_then(|token| vocabulary.ids.get(token)) {
        keys.push(("tokenizer.ggml.unknown_token_id".to_owned(), (*unknown).into()));
    }
    Ok(keys)
}

fn is_byte(token: &str) -> bool {
    let hex = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// Whether a text gets a space in front; everything but this and `▁` for spaces is refused.
fn space_prefix(file: &Json) -> Result<bool> {
    let space = SPACE.to_string();
    let replaces = |part: &Json| {
        part["type"] == "Replace" && part["pattern"]["String"] == " " && part["content"] == space.as_str()
    };
    let prepends = |part: &Json| part["type"] == "Prepend" && part["prepend"] == space.as_str();
    let normalizer = &file["normalizer"];
    let parts: Vec<&Json> = match normalizer["type"].as_str() {
        None => Vec::new(),
        Some("Sequence") => normalizer["normalizers"].as_array().into_iter().flatten().collect(),
        Some(_) => vec![normalizer],
    };
    let by_normalizer = match parts[..] {
        [] => None,
        [one] if replaces(one) => Some(false),
        [first, second] if prepends(first) && replaces(second) => Some(true),
        _ => return Err(fail(format!("normalizer {normalizer}: GGUF has no place for it"))),
    };
    let pre = &file["pre_tokenizer"];
    let by_cut = match pre["type"].as_str() {
        None => None,
        // spaces are replaced before it, so it finds none
        Some("Split") if pre["pattern"]["String"] == " " && by_normalizer.is_some() => None,
        Some("Metaspace") if pre["replacement"] == space.as_str() && pre["split"] == false => {
            match pre["prepend_scheme"].as_str() {
                Some("never") => Some(false),
                Some("first" | "always") => Some(true),
                _ => Some(pre["add_prefix_space"] != false),
            }
        }
        _ => return Err(fail(format!("pre_tokenizer {pre}: GGUF has no place for it"))),
    };
    match (by_normalizer, by_cut) {
        (Some(prefix), None) | (None, Some(prefix)) => Ok(prefix),
        (None, None) => {
            Err(fail(format!("expected spaces to become `{SPACE}`, and nothing in the file does so")))
        }
        (Some(a), Some(b)) => Ok(a || b),
    }
}
