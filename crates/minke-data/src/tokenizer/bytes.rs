//! The bytes that each id adds to a text, for those who must know them before the text is there.

use std::borrow::Cow;

use serde_json::Value;

use super::model::Library;
use super::{Tokenizer, stream};
use crate::template::thinking::{CLOSE, OPEN};

/// The bytes of each id of a byte-level vocabulary, one behind the other.
#[derive(Debug)]
pub(super) struct ByteTable {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl ByteTable {
    pub(super) fn new(library: &Library, vocab_size: usize) -> Self {
        let byte_of = stream::bytes_of_letters();
        let added = library.get_added_vocabulary().get_added_tokens_decoder();
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(vocab_size));
        for id in 0..vocab_size as u32 {
            if let Some(token) = added.get(&id) {
                bytes.extend_from_slice(token.content.as_bytes());
            } else if let Some(token) = library.get_model().text(id) {
                stream::push_token_bytes(&token, &byte_of, &mut bytes);
            }
            ends.push(bytes.len());
        }
        bytes.shrink_to_fit();
        Self { bytes, ends }
    }

    /// Nothing for an id that is not there.
    pub(super) fn get(&self, at: usize) -> &[u8] {
        let begin = at.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        self.ends.get(at).map(|&end| &self.bytes[begin..end]).unwrap_or_default()
    }
}

/// How a vocabulary without a table of bytes spells them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Spelling {
    /// Tokens such as `<0x0A>` are bytes.
    byte_tokens: bool,
    /// Strings that stand for others, in order.
    replaced: Vec<(String, String)>,
    /// Whether all tokens are one text by then.
    fused: bool,
    /// Spaces that the first token of a text loses, if it begins with them.
    pub stripped: usize,
}

impl Spelling {
    /// Reads the `decoder` of a `tokenizer.json`; `None` where tokens are joined in a way that looks at neighbours.
    pub fn of(decoder: &Value) -> Option<Self> {
        let mut spelling = Self::default();
        spelling.add(decoder, 0)?;
        Some(spelling)
    }

    fn add(&mut self, decoder: &Value, depth: usize) -> Option<()> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        match decoder["type"].as_str()? {
            "Sequence" if depth < 4 => {
                decoder["decoders"].as_array()?.iter().try_for_each(|part| self.add(part, depth + 1))
            }
            "ByteFallback" => {
                self.byte_tokens = true;
                Some(())
            }
            "Replace" => {
                self.replaced.push((text(&decoder["pattern"]["String"])?, text(&decoder["content"])?));
                Some(())
            }
            "Metaspace" => {
                self.replaced.push((text(&decoder["replacement"])?, " ".to_owned()));
                if decoder["prepend_scheme"] != "never" {
                    self.stripped = usize::MAX;
                }
                Some(())
            }
            "Fuse" => {
                self.fused = true;
                Some(())
            }
            // looks at the beginning of the text alone
            "Strip" if self.fused && decoder["content"] == " " && decoder["stop"] == 0 => {
                self.stripped = usize::try_from(decoder["start"].as_u64()?).ok()?;
                Some(())
            }
            _ => None,
        }
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        let hex =
            token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')).filter(|hex| hex.len() == 2);
        if let Some(byte) = hex.filter(|_| self.byte_tokens).and_then(|hex| u8::from_str_radix(hex, 16).ok())
        {
            return vec![byte];
        }
        let replace = |text: String, (from, to): &(String, String)| text.replace(from.as_str(), to);
        self.replaced.iter().fold(token.to_owned(), replace).into_bytes()
    }
}

impl Tokenizer {
    /// Whether the bytes of every id are known without its neighbours: byte-level vocabularies, and those of
    /// SentencePiece with bytes to fall back to. Not where a decoder cleans up, as WordPiece's does.
    pub fn has_bytes(&self) -> bool {
        self.shared.token_bytes.is_some() || self.shared.spelling.is_some()
    }

    /// The bytes that an id adds to a text, a special token's as its name is written; nothing for an id outside the
    /// vocabulary, and the token as it stands in the vocabulary where [`Tokenizer::has_bytes`] is false.
    pub fn token_bytes(&self, id: u32) -> Cow<'_, [u8]> {
        if let Some(table) = &self.shared.token_bytes {
            return Cow::Borrowed(table.get(id as usize));
        }
        let token = self.token_of(id).unwrap_or_default();
        match &self.shared.spelling {
            Some(spelling) if !self.is_special(id) => Cow::Owned(spelling.bytes(&token)),
            _ => Cow::Owned(token.into_bytes()),
        }
    }

    /// The bytes that an id adds to a text that decoding shows; `begun` is whether any did before.
    pub(super) fn shown_bytes(&self, id: u32, skip_special: bool, begun: &mut bool) -> Cow<'_, [u8]> {
        if skip_special && self.is_special(id) && !self.is_mark(id) {
            return Cow::Borrowed(&[]);
        }
        let mut bytes = self.token_bytes(id);
        if let Some(spelling) = self.shared.spelling.as_ref().filter(|_| !*begun) {
            let spaces = bytes.iter().take(spelling.stripped).take_while(|&&byte| byte == b' ').count();
            *begun = !bytes.is_empty();
            bytes.to_mut().drain(..spaces);
        }
        bytes
    }

    fn is_special(&self, id: u32) -> bool {
        self.shared.is_special.get(id as usize) == Some(&true)
    }

    /// Whether it marks a thought: without its marks, special or not, nobody could tell a thought from the answer.
    fn is_mark(&self, id: u32) -> bool {
        self.token_of(id).is_some_and(|token| token == OPEN || token == CLOSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn spellings_are_read_from_decoders() {
        let sentence_piece = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        let spelling = Spelling::of(&sentence_piece).unwrap();
        assert_eq!(spelling.bytes("▁the▁whale"), b" the whale");
        assert_eq!(spelling.bytes("<0xE9>"), [0xe9]);
        assert_eq!(spelling.bytes("<0xE9"), b"<0xE9");
        let metaspace =
            Spelling::of(&json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}))
                .unwrap();
        assert_eq!((metaspace.bytes("▁a"), metaspace.bytes("<0x0A>")), (b" a".to_vec(), b"<0x0A>".to_vec()));
        assert_eq!((spelling.stripped, metaspace.stripped), (1, usize::MAX));
        let every_token = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let others = [json!(null), json!({"type": "WordPiece"}), json!({"type": "Sequence", "decoders": 1})];
        for other in others.into_iter().chain([every_token]) {
            assert_eq!(Spelling::of(&other), None);
        }
    }
}
