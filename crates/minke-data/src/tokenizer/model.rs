//! The model of a tokenizer: ours where it is byte-pair encoding, the library's for all else.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token,
    TokenizerImpl,
};

use super::MAX_VOCABULARY;
use super::bpe::{Bpe, Merges, Rule};
use super::pieces::{Gathered, NotPieces, Pieces};

/// A tokenizer of the library around a model that may be ours.
pub(super) type Library =
    TokenizerImpl<Model, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// A model; a clone shares the vocabulary.
#[derive(Clone)]
pub(super) enum Model {
    Own(Arc<Bpe>),
    Library(Arc<ModelWrapper>),
}

/// The library's tokenizer, whatever its model.
pub(super) fn wrapped(tokenizer: &tokenizers::Tokenizer) -> Library {
    let mut library = Library::new(Model::Library(Arc::new(tokenizer.get_model().clone())));
    library
        .with_normalizer(tokenizer.get_normalizer().cloned())
        .with_pre_tokenizer(tokenizer.get_pre_tokenizer().cloned())
        .with_post_processor(tokenizer.get_post_processor().cloned())
        .with_decoder(tokenizer.get_decoder().cloned())
        .with_added_vocabulary(tokenizer.get_added_vocabulary().clone());
    library
}

impl Model {
    /// The largest id plus one.
    pub(super) fn end(&self) -> usize {
        match self {
            Self::Own(bpe) => bpe.pieces.end(),
            Self::Library(_) => {
                tokenizers::Model::get_vocab(self).into_values().max().map_or(0, |id| id as usize + 1)
            }
        }
    }

    /// The token of an id.
    pub(super) fn text(&self, id: u32) -> Option<Cow<'_, str>> {
        match self {
            Self::Own(bpe) => bpe.pieces.text(id).map(Cow::Borrowed),
            Self::Library(model) => tokenizers::Model::id_to_token(&**model, id).map(Cow::Owned),
        }
    }
}

impl tokenizers::Model for Model {
    type Trainer = TrainerWrapper;

    /// Of our own model only the ids, which is all that is asked for.
    fn tokenize(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        match self {
            Self::Own(bpe) => {
                let mut ids = Vec::new();
                bpe.encode(text, &mut ids)?;
                Ok(ids.into_iter().map(|id| Token::new(id, String::new(), (0, 0))).collect())
            }
            Self::Library(model) => model.tokenize(text),
        }
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Own(bpe) => bpe.pieces.id(token),
            Self::Library(model) => model.token_to_id(token),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.text(id).map(Cow::into_owned)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match self {
            Self::Own(bpe) => bpe.pieces.iter().map(|(id, token)| (token.to_owned(), id)).collect(),
            Self::Library(model) => model.get_vocab(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match self {
            Self::Own(bpe) => bpe.pieces.count(),
            Self::Library(model) => model.get_vocab_size(),
        }
    }

    fn save(&self, folder: &Path, name: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        match self {
            Self::Own(_) => Err("a vocabulary is saved as tokenizer.json".into()),
            Self::Library(model) => model.save(folder, name),
        }
    }

    fn get_trainer(&self) -> TrainerWrapper {
        match self {
            Self::Own(_) => BpeTrainer::default().into(),
            Self::Library(model) => model.get_trainer(),
        }
    }
}

/// The `model` of a `tokenizer.json`, if ours can do what it says; an error is no verdict, the library has the last word.
impl<'de> Deserialize<'de> for Model {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(BpeVisitor).map(|bpe| Self::Own(Arc::new(bpe)))
    }
}

struct BpeVisitor;

impl<'de> Visitor<'de> for BpeVisitor {
    type Value = Bpe;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a BPE model")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Bpe, A::Error> {
        let (mut is_bpe, mut pieces, mut merges) = (false, None, None);
        let (mut unknown, mut switches) = (None, [false; 3]);
        while let Some(Text(key)) = map.next_key()? {
            match &*key {
                "type" => is_bpe = map.next_value::<Text>()?.0 == "BPE",
                "vocab" if pieces.is_none() => pieces = Some(map.next_value::<Vocabulary>()?.0),
                "merges" if merges.is_none() => {
                    let pieces = pieces.as_ref().ok_or_else(|| de::Error::custom("merges before tokens"))?;
                    merges = Some(map.next_value_seed(ListOf(pieces))?);
                }
                "unk_token" => unknown = map.next_value::<Option<Text>>()?,
                "fuse_unk" => switches[0] = map.next_value::<Option<bool>>()? == Some(true),
                "byte_fallback" => switches[1] = map.next_value::<Option<bool>>()? == Some(true),
                "ignore_merges" => switches[2] = map.next_value::<Option<bool>>()? == Some(true),
                "dropout" if map.next_value::<Option<f32>>()?.is_none() => {}
                "continuing_subword_prefix" | "end_of_word_suffix"
                    if map.next_value::<Option<Text>>()?.is_none_or(|Text(text)| text.is_empty()) => {}
                "vocab" | "merges" | "dropout" | "continuing_subword_prefix" | "end_of_word_suffix" => {
                    return Err(de::Error::custom(format!("{key} is another's business")));
                }
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        let (true, Some(pieces), Some(list)) = (is_bpe, pieces, merges) else {
            return Err(de::Error::custom("no BPE model"));
        };
        let unknown = match unknown {
            None => None,
            Some(Text(token)) => Some(pieces.id(&token).ok_or_else(|| de::Error::custom("no such token"))?),
        };
        let [fuse_unknown, byte_fallback, ignore_merges] = switches;
        let rule = Rule::Listed(Merges::new(list));
        Ok(Bpe { pieces, rule, unknown, fuse_unknown, byte_fallback, ignore_merges })
    }
}

/// A string that is copied only where it has escapes.
struct Text<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(TextVisitor)
    }
}

struct Vocabulary(Pieces);

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct VocabularyVisitor;
        impl<'de> Visitor<'de> for VocabularyVisitor {
            type Value = Vocabulary;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("tokens with their ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocabulary, A::Error> {
                let refused = |why: NotPieces| de::Error::custom(format!("{why:?}"));
                let mut gathered = Gathered::default();
                while let Some((Text(token), id)) = map.next_entry::<Text, u32>()? {
                    if id as usize >= MAX_VOCABULARY {
                        return Err(de::Error::custom("an id too large"));
                    }
                    gathered.push(id, &token).map_err(refused)?;
                }
                gathered.finish().map(Vocabulary).map_err(refused)
            }
        }
        deserializer.deserialize_map(VocabularyVisitor)
    }
}

/// Merges of a vocabulary, each `a b` or [a, b].
struct ListOf<'p>(&'p Pieces);

impl<'de> DeserializeSeed<'de> for ListOf<'_> {
    type Value = Vec<[u32; 3]>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ListOf<'_> {
    type Value = Vec<[u32; 3]>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::with_capacity(self.0.count());
        let mut form = None;
        while let Some((merge, is_pair)) = seq.next_element_seed(MergeOf(self.0))? {
            if *form.get_or_insert(is_pair) != is_pair {
                return Err(de::Error::custom("merges in two forms"));
            }
            list.push(merge);
        }
        Ok(list)
    }
}

struct MergeOf<'p>(&'p Pieces);

impl MergeOf<'_> {
    fn of<E: de::Error>(&self, left: &str, right: &str) -> Result<[u32; 3], E> {
        let ids = self.0.id(left).zip(self.0.id(right));
        let merge = ids.and_then(|(left, right)| Some([left, right, self.0.joint(left, right)?]));
        merge.ok_or_else(|| E::custom("a merge of what is no token"))
    }
}

impl<'de> DeserializeSeed<'de> for MergeOf<'_> {
    type Value = ([u32; 3], bool);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MergeOf<'_> {
    type Value = ([u32; 3], bool);

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a merge")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        // a first line of old files, `#version: 0.2`, is the library's business
        let pair =
            text.split_once(' ').filter(|(_, right)| !right.contains(' ') && !text.starts_with("#version"));
        let (left, right) = pair.ok_or_else(|| E::custom("no pair"))?;
        Ok((self.of(left, right)?, false))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let pair = seq.next_element::<Text>()?.zip(seq.next_element::<Text>()?);
        let (Text(left), Text(right)) = pair.ok_or_else(|| de::Error::custom("no pair"))?;
        if seq.next_element::<IgnoredAny>()?.is_some() {
            return Err(de::Error::custom("more than a pair"));
        }
        Ok((self.of(&left, &right)?, true))
    }
}
