//! A `tokenizer.json` from the metadata of a file.

use std::collections::HashMap;

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Value, json};

use super::{SPACE, kind, pre};
use crate::gguf::GgufFile;
use crate::template::ChatTemplate;
use crate::{Error, Result};

/// No published vocabulary has a million tokens.
const MAX_TOKENS: usize = 4 << 20;
/// Longer pieces are not looked at for merges: no trainer makes any, and looking costs the square of the length.
const MAX_PIECE_BYTES: usize = 512;
/// How tokens that end an answer are called, where a file only says how a document ends.
const END_NAMES: [&str; 6] =
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<|endoftext|>"];

/// The vocabulary of a file.
struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<i64>,
}

impl Vocabulary {
    /// None where a file has no tokenizer.
    fn of(file: &GgufFile) -> Result<Option<(String, Self)>> {
        let key = "tokenizer.ggml.tokens";
        let Some(model) = file.text("tokenizer.ggml.model")? else { return Ok(None) };
        if model == "none" || model == "no_vocab" {
            return Ok(None);
        }
        let value =
            file.value(key).ok_or_else(|| file.wrong(format!("key `{key}`"), "tokens", "no such key"))?;
        if value.len().is_some_and(|len| len > MAX_TOKENS) {
            return Err(file.wrong(
                format!("key `{key}`"),
                format!("at most {MAX_TOKENS} tokens"),
                value.type_name(),
            ));
        }
        let mut tokens = file.strings(key)?.unwrap_or_default();
        for (id, token) in tokens.iter_mut().enumerate().filter(|(_, token)| token.is_empty()) {
            *token = format!("[EMPTY_{id}]");
        }
        let kinds = match file.ints("tokenizer.ggml.token_type")? {
            None => vec![kind::NORMAL; tokens.len()],
            Some(kinds) if kinds.len() == tokens.len() => kinds,
            Some(kinds) => {
                return Err(per_token(file, "tokenizer.ggml.token_type", tokens.len(), kinds.len()));
            }
        };
        Ok(Some((model, Self { tokens, kinds })))
    }

    fn entries(&self) -> impl Iterator<Item = (u32, &str, i64)> {
        self.tokens
            .iter()
            .zip(&self.kinds)
            .enumerate()
            .map(|(id, (token, kind))| (id as u32, token.as_str(), *kind))
    }

    /// Tokens that are found in text before it is cut.
    fn added(&self) -> Vec<Value> {
        let added = self
            .entries()
            .filter(|(_, _, kind)| matches!(*kind, kind::CONTROL | kind::UNKNOWN | kind::USER_DEFINED));
        let entry = |(id, content, kind): (u32, &str, i64)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind != kind::USER_DEFINED,
            })
        };
        added.map(entry).collect()
    }
}

fn per_token(file: &GgufFile, key: &str, expected: usize, got: usize) -> Error {
    file.wrong(format!("key `{key}`"), format!("one for each of {expected} tokens"), got.to_string())
}

/// Tokens that frame a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ends {
    /// The token that begins a text, if one does.
    pub bos: Option<u32>,
    /// The token that ends a document.
    pub eos: Option<u32>,
}

fn id(file: &GgufFile, name: &str, tokens: usize) -> Result<Option<u32>> {
    let id = file.uint(&format!("tokenizer.ggml.{name}_token_id"))?;
    // files with the id of a token that is not there exist; such an id is no token
    Ok(id.filter(|id| (*id as usize) < tokens).map(|id| id as u32))
}

fn tokens(file: &GgufFile) -> usize {
    file.value("tokenizer.ggml.tokens").and_then(|value| value.len()).unwrap_or(0)
}

/// The tokens that frame a text: bos only where texts begin with it.
///
/// # Errors
/// A key of another type than it should have.
pub fn ends(file: &GgufFile) -> Result<Ends> {
    let tokens = tokens(file);
    let spm = file.text("tokenizer.ggml.model")?.as_deref() == Some("llama");
    let by_cut = || -> Result<bool> {
        let name = file.text("tokenizer.ggml.pre")?;
        Ok(name.and_then(|name| pre::named(&name)).is_some_and(|cut| cut.add_bos))
    };
    let add_bos = match file.flag("tokenizer.ggml.add_bos_token")? {
        Some(add) => add,
        None => spm || by_cut()?,
    };
    let or =
        |found: Option<u32>, default: u32| found.or((spm && (default as usize) < tokens).then_some(default));
    let bos = or(id(file, "bos", tokens)?, 1);
    Ok(Ends { bos: bos.filter(|_| add_bos), eos: or(id(file, "eos", tokens)?, 2) })
}

/// All tokens that end an answer, ascending: those that the file names, and control tokens that are called so.
///
/// # Errors
/// A key of another type than it should have.
pub fn end_ids(file: &GgufFile) -> Result<Vec<u32>> {
    let tokens = tokens(file);
    let mut ids: Vec<u32> = ends(file)?.eos.into_iter().collect();
    for name in ["eot", "eom"] {
        ids.extend(id(file, name, tokens)?);
    }
    if let Some((_, vocabulary)) = Vocabulary::of(file)? {
        let named = |(_, token, kind): &(u32, &str, i64)| *kind == kind::CONTROL && END_NAMES.contains(token);
        ids.extend(vocabulary.entries().filter(named).map(|(id, ..)| id));
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The chat template of a file, if it has one.
///
/// # Errors
/// There is one, and it is broken.
pub fn template(file: &GgufFile) -> Result<Option<ChatTemplate>> {
    let Some(source) = file.text("tokenizer.chat_template")? else { return Ok(None) };
    let mut template =
        ChatTemplate::new(&format!("{}, key `tokenizer.chat_template`", file.path().display()), &source)?;
    let tokens = file.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
    let name = |which: &str| -> Result<String> {
        Ok(id(file, which, tokens.len())?.map(|id| tokens[id as usize].clone()).unwrap_or_default())
    };
    template.set_names(name("bos")?, name("eos")?, name("padding")?, name("unknown")?);
    Ok(Some(template))
}

/// The content of the `tokenizer.json` that cuts text as the file says; None where the file has no tokenizer.
///
/// # Errors
/// Keys that are missing, of another type or that contradict each other, a kind of vocabulary or a cut that is not known,
/// a token that comes twice.
pub fn tokenizer_json(file: &GgufFile) -> Result<Option<Vec<u8>>> {
    let Some((model, vocabulary)) = Vocabulary::of(file)? else { return Ok(None) };
    let mut by_token = HashMap::with_capacity(vocabulary.tokens.len());
    for (id, token, _) in vocabulary.entries() {
        if let Some(first) = by_token.insert(token, id) {
            let got = format!("`{}` as {first} and {id}", token.escape_debug());
            return Err(file.wrong("key `tokenizer.ggml.tokens`", "each token once", got));
        }
    }
    match model.as_str() {
        "gpt2" => byte_level(file, &vocabulary).map(Some),
        "llama" => sentence_piece(file, &vocabulary, &by_token).map(Some),
        other => {
            let got = format!("\"{}\"", other.escape_debug());
            Err(file.wrong("key `tokenizer.ggml.model`", "\"gpt2\" or \"llama\"", got))
        }
    }
}

fn byte_level(file: &GgufFile, vocabulary: &Vocabulary) -> Result<Vec<u8>> {
    let name = file.text("tokenizer.ggml.pre")?.unwrap_or_else(|| "default".to_owned());
    let Some(cut) = pre::named(&name) else {
        let got = format!("\"{}\", whose cut of text is not known here", name.escape_debug());
        return Err(file.wrong("key `tokenizer.ggml.pre`", format!("one of {}", pre::known()), got));
    };
    let key = "tokenizer.ggml.merges";
    let merges =
        file.strings(key)?.ok_or_else(|| file.wrong(format!("key `{key}`"), "merges", "no such key"))?;
    let pairs: Option<Vec<(&str, &str)>> = merges.iter().map(|merge| split_merge(merge)).collect();
    let pairs = pairs
        .ok_or_else(|| file.wrong(format!("key `{key}`"), "two tokens with a space between", "another"))?;
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let document = Document {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens: vocabulary.added(),
        normalizer: if cut.compose { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer: cut.json(),
        post_processor: framed(file, vocabulary)?,
        decoder: bytes,
        model: Bpe { ignore_merges: cut.ignore_merges, ..Bpe::new(vocabulary, pairs) },
    };
    Ok(document.bytes())
}

/// `a b` at its first space behind the first character.
fn split_merge(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let at = first + merge.get(first..)?.find(' ')?;
    let (left, right) = (&merge[..at], &merge[at + 1..]);
    (!right.is_empty()).then_some((left, right))
}

fn sentence_piece(file: &GgufFile, vocabulary: &Vocabulary, ids: &HashMap<&str, u32>) -> Result<Vec<u8>> {
    let key = "tokenizer.ggml.scores";
    let scores =
        file.floats(key)?.ok_or_else(|| file.wrong(format!("key `{key}`"), "scores", "no such key"))?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(per_token(file, key, vocabulary.tokens.len(), scores.len()));
    }
    if let Some(at) = scores.iter().position(|score| score.is_nan()) {
        return Err(file.wrong(format!("key `{key}`"), "numbers", format!("NaN for token {at}")));
    }
    let prefix = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE.to_string()});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE.to_string()}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let normalizer = if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE.to_string()}, spaces]})
    } else {
        spaces
    };
    let unknown = vocabulary.entries().find(|(_, _, kind)| *kind == kind::UNKNOWN).map(|(id, ..)| id);
    let unknown = match unknown {
        Some(id) => Some(id),
        None => id(file, "unknown", vocabulary.tokens.len())?,
    };
    let document = Document {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens: vocabulary.added(),
        normalizer,
        pre_tokenizer: Value::Null,
        post_processor: framed(file, vocabulary)?,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: Bpe {
            unk_token: unknown.map(|id| vocabulary.tokens[id as usize].as_str()),
            fuse_unk: true,
            byte_fallback: true,
            ..Bpe::new(vocabulary, merges_by_score(vocabulary, ids, &scores))
        },
    };
    Ok(document.bytes())
}

/// Every way to join two tokens into a third that text may hold, the highest score first, then the lowest ids.
fn merges_by_score<'a>(
    vocabulary: &'a Vocabulary,
    ids: &HashMap<&str, u32>,
    scores: &[f32],
) -> Vec<(&'a str, &'a str)> {
    let in_text = |kind: i64| {
        !matches!(kind, kind::CONTROL | kind::UNKNOWN | kind::USER_DEFINED | kind::UNUSED | kind::BYTE)
    };
    let part = |text: &str| ids.get(text).copied().filter(|id| in_text(vocabulary.kinds[*id as usize]));
    let mut merges = Vec::new();
    for (id, token, kind) in vocabulary.entries() {
        if !in_text(kind) || token.len() > MAX_PIECE_BYTES {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (part(left), part(right)) {
                merges.push((scores[id as usize], id, l, r, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
    merges.into_iter().map(|(.., left, right)| (left, right)).collect()
}

/// What puts bos and eos around a text, for other programs.
fn framed(file: &GgufFile, vocabulary: &Vocabulary) -> Result<Value> {
    let ends = ends(file)?;
    let add_eos = file.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let (bos, eos) = (ends.bos, ends.eos.filter(|_| add_eos));
    if bos.is_none() && eos.is_none() {
        return Ok(Value::Null);
    }
    let token = |id: u32| vocabulary.tokens[id as usize].as_str();
    let special =
        |id: Option<u32>, kind: u32| id.map(|id| json!({"SpecialToken": {"id": token(id), "type_id": kind}}));
    let sequence = |name: &str, kind: u32| -> Vec<Value> {
        let text = json!({"Sequence": {"id": name, "type_id": kind}});
        special(bos, kind).into_iter().chain([text]).chain(special(eos, kind)).collect()
    };
    let pair: Vec<Value> = [sequence("A", 0), sequence("B", 1)].concat();
    let mut names = serde_json::Map::new();
    for id in bos.into_iter().chain(eos) {
        names.insert(token(id).to_owned(), json!({"id": token(id), "ids": [id], "tokens": [token(id)]}));
    }
    Ok(json!({
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": pair,
        "special_tokens": names,
    }))
}

/// A `tokenizer.json`; its large parts are written from where they are.
#[derive(Serialize)]
struct Document<'a> {
    version: &'static str,
    truncation: Option<()>,
    padding: Option<()>,
    added_tokens: Vec<Value>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Bpe<'a>,
}

#[derive(Serialize)]
struct Bpe<'a> {
    r#type: &'static str,
    dropout: Option<f32>,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<&'a str>,
    end_of_word_suffix: Option<&'a str>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: Tokens<'a>,
    merges: Vec<(&'a str, &'a str)>,
}

impl<'a> Bpe<'a> {
    fn new(vocabulary: &'a Vocabulary, merges: Vec<(&'a str, &'a str)>) -> Self {
        Self {
            r#type: "BPE",
            dropout: None,
            unk_token: None,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab: Tokens(&vocabulary.tokens),
            merges,
        }
    }
}

/// Tokens as an object of ids.
struct Tokens<'a>(&'a [String]);

impl Serialize for Tokens<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (id, token) in self.0.iter().enumerate() {
            map.serialize_entry(token, &id)?;
        }
        map.end()
    }
}

impl Document<'_> {
    fn bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("JSON values serialise")
    }
}
