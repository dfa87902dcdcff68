//! A `tokenizer.json` from the metadata of a file.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Value, json};
use tokenizers::{AddedToken, AddedVocabulary};

use super::{SPACE, kind, pre};
use crate::gguf::{self, GgufFile};
use crate::template::ChatTemplate;
use crate::tokenizer::bpe::{Bpe, Merges, Rule};
use crate::tokenizer::pieces::{Gathered, NotPieces, Pieces};
use crate::{Error, Result};

/// No published vocabulary has a million tokens.
const MAX_TOKENS: usize = 4 << 20;
/// No published vocabulary has a million merges.
const MAX_MERGES: usize = 16 << 20;
/// How tokens that end an answer are called, where a file only says how a document ends.
pub(super) const END_NAMES: [&str; 6] =
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<|endoftext|>"];

/// The vocabulary of a file, where it lies.
struct Vocabulary<'f> {
    tokens: gguf::Value<'f>,
    kinds: Vec<i64>,
}

impl<'f> Vocabulary<'f> {
    /// None where a file has no tokenizer.
    fn of(file: &'f GgufFile) -> Result<Option<(String, Self)>> {
        let key = "tokenizer.ggml.tokens";
        let Some(model) = file.text("tokenizer.ggml.model")? else { return Ok(None) };
        if model == "none" || model == "no_vocab" {
            return Ok(None);
        }
        let tokens =
            file.value(key).ok_or_else(|| file.wrong(format!("key `{key}`"), "tokens", "no such key"))?;
        if tokens.len().is_some_and(|len| len > MAX_TOKENS) {
            return Err(file.wrong(
                format!("key `{key}`"),
                format!("at most {MAX_TOKENS} tokens"),
                tokens.type_name(),
            ));
        }
        if tokens.as_raw_strings().is_none() {
            return Err(file.wrong(format!("key `{key}`"), "an array of strings", tokens.type_name()));
        }
        let count = tokens.len().unwrap_or(0);
        let kinds = match file.ints("tokenizer.ggml.token_type")? {
            None => vec![kind::NORMAL; count],
            Some(kinds) if kinds.len() == count => kinds,
            Some(kinds) => {
                return Err(per_token(file, "tokenizer.ggml.token_type", count, kinds.len()));
            }
        };
        Ok(Some((model, Self { tokens, kinds })))
    }

    fn entries(&self) -> impl Iterator<Item = (u32, &str, i64)> {
        let tokens = self.tokens.as_strings().into_iter().flatten();
        (0..).zip(tokens.zip(&self.kinds)).map(|(id, (token, kind))| (id, token, *kind))
    }

    /// All tokens; those that are empty get a name.
    fn pieces(&self, file: &GgufFile) -> Result<Pieces> {
        let mut gathered = Gathered::with_capacity(self.kinds.len(), self.tokens.bytes());
        let done = self.entries().try_for_each(|(id, token, _)| {
            if token.is_empty() {
                gathered.push(id, &format!("[EMPTY_{id}]"))
            } else {
                gathered.push(id, token)
            }
        });
        done.and_then(|()| gathered.finish()).map_err(|why| {
            let (expected, got) = match why {
                NotPieces::SameText(first, second) => {
                    let token = self.entries().nth(second as usize).map_or("", |(_, token, _)| token);
                    ("each token once", format!("`{}` as {first} and {second}", token.escape_debug()))
                }
                NotPieces::SameId(_) | NotPieces::TooLarge => {
                    ("less than 4 GiB of tokens", "more".to_owned())
                }
            };
            file.wrong("key `tokenizer.ggml.tokens`", expected, got)
        })
    }

    /// Tokens that are found in text before it is cut.
    fn added(&self, pieces: &Pieces) -> Vec<AddedToken> {
        let added = |kind: i64| matches!(kind, kind::CONTROL | kind::UNKNOWN | kind::USER_DEFINED);
        let token = |(id, kind): (u32, i64)| {
            let content = pieces.text(id).unwrap_or_default();
            AddedToken::from(content, kind != kind::USER_DEFINED).normalized(false)
        };
        (0..).zip(self.kinds.iter().copied()).filter(|(_, kind)| added(*kind)).map(token).collect()
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
        let tokens = vocabulary.tokens.as_raw_strings().into_iter().flatten();
        let is_end = |token: &[u8]| END_NAMES.iter().any(|name| name.as_bytes() == token);
        let named = |(_, (token, kind)): &(u32, (&[u8], &i64))| **kind == kind::CONTROL && is_end(token);
        ids.extend((0..).zip(tokens.zip(&vocabulary.kinds)).filter(named).map(|(id, _)| id));
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The chat template of a file, if it has one: `tokenizer.chat_template`, with another for conversations with tools in
/// `tokenizer.chat_template.tool_use` if it has that; where a file has only the latter, it is for all.
///
/// # Errors
/// There is one, and it is broken.
pub fn template(file: &GgufFile) -> Result<Option<ChatTemplate>> {
    let key = "tokenizer.chat_template";
    let tool_use = file.text(&format!("{key}.tool_use"))?;
    let Some(source) = file.text(key)?.or_else(|| tool_use.clone()) else { return Ok(None) };
    let place = format!("{}, key `{key}`", file.path().display());
    let mut template = ChatTemplate::compiled(&place, &source, tool_use.as_deref())?;
    let key = "tokenizer.ggml.tokens";
    let tokens = file.value(key).unwrap_or(gguf::Value::strings::<&str>([]));
    if tokens.as_raw_strings().is_none() {
        return Err(file.wrong(format!("key `{key}`"), "an array of strings", tokens.type_name()));
    }
    let name = |which: &str| -> Result<String> {
        let id = id(file, which, tokens.len().unwrap_or(0))?;
        let token = id.and_then(|id| tokens.as_raw_strings()?.nth(id as usize));
        Ok(String::from_utf8_lossy(token.unwrap_or_default()).into_owned())
    };
    template.set_names(name("bos")?, name("eos")?, name("padding")?, name("unknown")?);
    Ok(Some(template))
}

/// What a tokenizer of a file is made of.
pub(crate) struct Parts {
    pub(crate) bpe: Bpe,
    /// Tokens that are found in text before it is cut.
    pub(crate) added: Vec<AddedToken>,
    pub(crate) frame: Frame,
}

/// The small parts of a `tokenizer.json`.
pub(crate) struct Frame {
    pub(crate) normalizer: Value,
    pub(crate) pre_tokenizer: Value,
    post_processor: Value,
    pub(crate) decoder: Value,
}

/// The tokenizer of a file; None where it has none.
///
/// # Errors
/// Keys that are missing, of another type or that contradict each other, a kind of vocabulary or a cut that is not known,
/// a token that comes twice.
pub(crate) fn parts(file: &GgufFile) -> Result<Option<Parts>> {
    let Some((model, vocabulary)) = Vocabulary::of(file)? else { return Ok(None) };
    let pieces = vocabulary.pieces(file)?;
    match model.as_str() {
        "gpt2" => byte_level(file, &vocabulary, pieces).map(Some),
        "llama" => sentence_piece(file, &vocabulary, pieces).map(Some),
        other => {
            let got = format!("\"{}\"", other.escape_debug());
            Err(file.wrong("key `tokenizer.ggml.model`", "\"gpt2\" or \"llama\"", got))
        }
    }
}

/// The content of the `tokenizer.json` that cuts text as the file says; None where the file has no tokenizer.
///
/// # Errors
/// As [`Tokenizer::from_gguf`](crate::Tokenizer::from_gguf).
pub fn tokenizer_json(file: &GgufFile) -> Result<Option<Vec<u8>>> {
    Ok(crate::Tokenizer::from_gguf(file)?.map(|tokenizer| tokenizer.json().to_owned()))
}

fn byte_level(file: &GgufFile, vocabulary: &Vocabulary<'_>, pieces: Pieces) -> Result<Parts> {
    let name = file.text("tokenizer.ggml.pre")?.unwrap_or_else(|| "default".to_owned());
    let Some(cut) = pre::named(&name) else {
        let got = format!("\"{}\", whose cut of text is not known here", name.escape_debug());
        return Err(file.wrong("key `tokenizer.ggml.pre`", format!("one of {}", pre::known()), got));
    };
    let frame = Frame {
        normalizer: if cut.compose { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer: cut.json(),
        post_processor: framed(file, &pieces)?,
        decoder: json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}),
    };
    let added = vocabulary.added(&pieces);
    let rule = Rule::Listed(Merges::new(merges(file, &pieces)?));
    let ignore_merges = cut.ignore_merges;
    let bpe = Bpe { pieces, rule, unknown: None, fuse_unknown: false, byte_fallback: false, ignore_merges };
    Ok(Parts { bpe, added, frame })
}

fn merges(file: &GgufFile, pieces: &Pieces) -> Result<Vec<[u32; 3]>> {
    let key = "tokenizer.ggml.merges";
    let wrong = |expected: &str, got: &str| file.wrong(format!("key `{key}`"), expected, got);
    let value = file.value(key).ok_or_else(|| wrong("merges", "no such key"))?;
    let merges = value.as_strings().ok_or_else(|| wrong("an array of strings", &value.type_name()))?;
    let count = value.len().unwrap_or(0);
    if count > MAX_MERGES {
        return Err(wrong(&format!("at most {MAX_MERGES} merges"), &value.type_name()));
    }
    let mut list = Vec::with_capacity(count);
    for merge in merges {
        let (left, right) =
            split_merge(merge).ok_or_else(|| wrong("two tokens with a space between", "another"))?;
        let missing = |token: &str| {
            wrong("merges of tokens", &format!("`{}`, which is out of vocabulary", token.escape_debug()))
        };
        let id = |token: &str| pieces.id(token).ok_or_else(|| missing(token));
        let (left_id, right_id) = (id(left)?, id(right)?);
        let joint = pieces.joint(left_id, right_id).ok_or_else(|| missing(&[left, right].concat()))?;
        list.push([left_id, right_id, joint]);
    }
    Ok(list)
}

/// `a b` at its first space behind the first character.
fn split_merge(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let at = first + merge.get(first..)?.find(' ')?;
    let (left, right) = (&merge[..at], &merge[at + 1..]);
    (!right.is_empty()).then_some((left, right))
}

fn sentence_piece(file: &GgufFile, vocabulary: &Vocabulary<'_>, pieces: Pieces) -> Result<Parts> {
    let key = "tokenizer.ggml.scores";
    let scores =
        file.floats(key)?.ok_or_else(|| file.wrong(format!("key `{key}`"), "scores", "no such key"))?;
    if scores.len() != vocabulary.kinds.len() {
        return Err(per_token(file, key, vocabulary.kinds.len(), scores.len()));
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
    let unknown = vocabulary.kinds.iter().position(|kind| *kind == kind::UNKNOWN);
    let unknown = match unknown {
        Some(id) => Some(id as u32),
        None => id(file, "unknown", vocabulary.kinds.len())?,
    };
    let frame = Frame {
        normalizer,
        pre_tokenizer: Value::Null,
        post_processor: framed(file, &pieces)?,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
    };
    let in_text = |kind: &i64| {
        !matches!(*kind, kind::CONTROL | kind::UNKNOWN | kind::USER_DEFINED | kind::UNUSED | kind::BYTE)
    };
    let merged = vocabulary.kinds.iter().map(in_text).collect();
    let (added, rule) = (vocabulary.added(&pieces), Rule::Scored { scores, merged });
    let bpe = Bpe { pieces, rule, unknown, fuse_unknown: true, byte_fallback: true, ignore_merges: false };
    Ok(Parts { bpe, added, frame })
}

/// What puts bos and eos around a text, for other programs.
fn framed(file: &GgufFile, pieces: &Pieces) -> Result<Value> {
    let ends = ends(file)?;
    let add_eos = file.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let (bos, eos) = (ends.bos, ends.eos.filter(|_| add_eos));
    if bos.is_none() && eos.is_none() {
        return Ok(Value::Null);
    }
    let token = |id: u32| pieces.text(id).unwrap_or_default();
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

impl Frame {
    /// The `tokenizer.json` that says the same.
    pub(crate) fn json(&self, bpe: &Bpe, added: &AddedVocabulary) -> Vec<u8> {
        let mut tokens: Vec<(&u32, &AddedToken)> = added.get_added_tokens_decoder().iter().collect();
        tokens.sort_unstable_by_key(|(id, _)| **id);
        let entry = |(id, token): (&u32, &AddedToken)| {
            json!({
                "id": id, "content": token.content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": token.special,
            })
        };
        let document = Document {
            version: "1.0",
            truncation: None,
            padding: None,
            added_tokens: tokens.into_iter().map(entry).collect(),
            normalizer: &self.normalizer,
            pre_tokenizer: &self.pre_tokenizer,
            post_processor: &self.post_processor,
            decoder: &self.decoder,
            model: Model {
                r#type: "BPE",
                dropout: None,
                unk_token: bpe.unknown.and_then(|id| bpe.pieces.text(id)),
                continuing_subword_prefix: None,
                end_of_word_suffix: None,
                fuse_unk: bpe.fuse_unknown,
                byte_fallback: bpe.byte_fallback,
                ignore_merges: bpe.ignore_merges,
                vocab: Tokens(&bpe.pieces),
                merges: bpe.merges(),
            },
        };
        serde_json::to_vec(&document).expect("JSON values serialise")
    }
}

/// A `tokenizer.json`; its large parts are written from where they are.
#[derive(Serialize)]
struct Document<'a> {
    version: &'static str,
    truncation: Option<()>,
    padding: Option<()>,
    added_tokens: Vec<Value>,
    normalizer: &'a Value,
    pre_tokenizer: &'a Value,
    post_processor: &'a Value,
    decoder: &'a Value,
    model: Model<'a>,
}

#[derive(Serialize)]
struct Model<'a> {
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

/// Tokens as an object of ids.
struct Tokens<'a>(&'a Pieces);

impl Serialize for Tokens<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.count()))?;
        for (id, token) in self.0.iter() {
            map.serialize_entry(token, &id)?;
        }
        map.end()
    }
}
