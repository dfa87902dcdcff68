//! A short way for the cut that training uses, on ASCII lines.
//!
//! The library cuts text with three regular expressions one after the other and tracks where every character
//! came from; on source code that is most of its time. Here the same cut is written by hand for ASCII, and each
//! different word is merged once per thread. Everything else (other tokenizers, lines with other characters,
//! very long words) goes the library's way, and a property test holds the two together.
//!
//! A text may be encoded in parts that meet after a line end and before a visible ASCII character: every
//! alternative of the cut that takes a line end stops there, whatever follows.

use std::collections::HashMap;
use std::sync::Arc;

use tokenizers::PreTokenizerWrapper;

use super::bpe::Bpe;
use super::model::{Library, Model};
use super::stream::byte_table;
use super::train::skeleton;
use crate::Result;

/// Longer words are merged by the library, whose queue does not grow with the square of the length.
const MAX_WORD_BYTES: usize = 64;
/// Words that a thread remembers before it starts afresh.
const MAX_WORDS: usize = 1 << 17;

/// Merges a word that is too long for here, and appends its ids.
pub(super) type LongWord<'a> = dyn FnMut(&[u8], &mut Vec<u32>) -> Result<()> + 'a;

/// Words that were merged before.
#[derive(Debug, Default)]
pub(super) struct Words(HashMap<Box<[u8]>, Box<[u32]>>);

/// The vocabulary as numbers.
#[derive(Debug)]
pub(super) struct FastBpe {
    digits: u8,
    letters: Box<[u32; 256]>,
    bpe: Arc<Bpe>,
}

impl FastBpe {
    /// None unless the tokenizer cuts as [`skeleton`] does and its model is plain BPE over all bytes.
    pub(super) fn new(library: &Library) -> Option<Self> {
        let Model::Own(bpe) = library.get_model() else { return None };
        let cut = serde_json::to_value(library.get_pre_tokenizer()?).ok()?;
        let digits = (1..=3u8).find(|&digits| {
            let ours =
                serde_json::from_value::<PreTokenizerWrapper>(skeleton(digits)["pre_tokenizer"].clone());
            ours.is_ok_and(|ours| serde_json::to_value(ours).is_ok_and(|ours| ours == cut))
        })?;
        let is_plain = bpe.unknown.is_none() && !bpe.byte_fallback && !bpe.ignore_merges;
        if library.get_normalizer().is_some() || !is_plain {
            return None;
        }
        let mut letters = Box::new([0; 256]);
        for (letter, byte) in byte_table() {
            letters[byte as usize] = bpe.pieces.id(letter.encode_utf8(&mut [0; 4]))?;
        }
        Some(Self { digits, letters, bpe: bpe.clone() })
    }

    /// Appends the ids of one ASCII part; `long` merges words that are too long for here.
    pub(super) fn encode_ascii(
        &self,
        text: &[u8],
        words: &mut Words,
        out: &mut Vec<u32>,
        long: &mut LongWord<'_>,
    ) -> Result<()> {
        let mut result = Ok(());
        cut_ascii(text, self.digits, &mut |word| {
            if result.is_err() {
                return;
            }
            if word.len() > MAX_WORD_BYTES {
                result = long(word, out);
            } else if let Some(ids) = words.0.get(word) {
                out.extend_from_slice(ids);
            } else {
                let ids = self.merge(word);
                out.extend_from_slice(&ids);
                if words.0.len() >= MAX_WORDS {
                    words.0.clear();
                }
                words.0.insert(word.into(), ids.into());
            }
        });
        result
    }

    /// The lowest rank first, the leftmost of equals.
    fn merge(&self, word: &[u8]) -> Vec<u32> {
        let mut ids: Vec<u32> = word.iter().map(|&byte| self.letters[byte as usize]).collect();
        loop {
            let ranked = ids
                .windows(2)
                .enumerate()
                .filter_map(|(at, pair)| self.bpe.merge(pair[0], pair[1]).map(|(rank, id)| (rank, at, id)));
            let Some((_, at, id)) = ranked.min() else { return ids };
            ids[at] = id;
            ids.remove(at + 1);
        }
    }
}

/// Splits a text into parts that can be encoded one by one, with whether each is ASCII.
pub(super) fn parts(text: &str) -> impl Iterator<Item = (&str, bool)> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let kind = rest[..line_end(rest)].is_ascii();
        let mut end = line_end(rest);
        while end < rest.len() {
            let next = end + line_end(&rest[end..]);
            if rest[end..next].is_ascii() != kind {
                break;
            }
            end = next;
        }
        let part = &rest[..end];
        rest = &rest[end..];
        Some((part, kind))
    })
}

/// The end of the first stretch after which a text may be parted.
fn line_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(found) = bytes[at..].iter().position(|&byte| byte == b'\n') {
        at += found + 1;
        if bytes.get(at).is_some_and(u8::is_ascii_graphic) {
            return at;
        }
    }
    bytes.len()
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ')
}

fn is_line(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

fn run(text: &[u8], from: usize, is: impl Fn(u8) -> bool) -> usize {
    from + text[from..].iter().take_while(|&&byte| is(byte)).count()
}

/// Calls `word` with each piece of the cut, in order.
pub(super) fn cut_ascii(text: &[u8], digits: u8, word: &mut dyn FnMut(&[u8])) {
    let mut at = 0;
    while at < text.len() {
        let numbers = run(text, at, |byte| byte.is_ascii_digit());
        text[at..numbers].chunks(digits as usize).for_each(&mut *word);
        at = run(text, numbers, |byte| !byte.is_ascii_digit());
        cut_words(&text[numbers..at], word);
    }
}

/// The last expression of the cut; the text has no digits, and its end is the end of what lookahead sees.
fn cut_words(text: &[u8], word: &mut dyn FnMut(&[u8])) {
    let mut unmatched = 0;
    let mut at = 0;
    while at < text.len() {
        let Some(end) = match_word(text, at) else {
            at += 1;
            continue;
        };
        if unmatched < at {
            word(&text[unmatched..at]);
        }
        word(&text[at..end]);
        (at, unmatched) = (end, end);
    }
    if unmatched < at {
        word(&text[unmatched..at]);
    }
}

/// Where the match at `at` ends, its alternatives in the order of the expression.
fn match_word(text: &[u8], at: usize) -> Option<usize> {
    let letter = |byte: u8| byte.is_ascii_alphabetic();
    let mark = |byte: u8| byte.is_ascii_punctuation();
    let first = text[at];
    let second_is_letter = text.get(at + 1).copied().is_some_and(letter);
    // a mark or any other character but a line end, before letters
    if letter(first) || (second_is_letter && !is_line(first)) {
        return Some(run(text, at + 1, letter));
    }
    let marks = if first == b' ' { at + 1 } else { at };
    if text.get(marks).copied().is_some_and(mark) {
        return Some(run(text, run(text, marks, mark), is_line));
    }
    let spaces = run(text, at, is_space);
    if spaces == at {
        return None;
    }
    if let Some(line) = text[at..spaces].iter().rposition(|&byte| is_line(byte)) {
        return Some(at + line + 1);
    }
    // all but the last space before a word, which takes that one
    Some(if spaces == text.len() || spaces - at == 1 { spaces } else { spaces - 1 })
}
