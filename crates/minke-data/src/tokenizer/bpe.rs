//! Byte-pair encoding over a vocabulary that is read in milliseconds.
//!
//! The library's own model keeps every token and every merge in several hash maps of strings, which for a quarter of a
//! million tokens takes seconds to fill. Here tokens lie in one string, and merges are either a list of ids or are not
//! listed at all: SentencePiece's rule, that the pair with the best joint merges first, needs only the scores. The
//! library stays the definition (tests compare ids), and all around the model (added tokens, normalizers, cuts,
//! decoders) is still the library.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::pieces::{AT_ONCE, Index, Pieces};

/// Joints that are longer are not made by scores: no trainer makes any.
const MAX_JOINT_BYTES: usize = 512;

/// Which pairs merge, and which of them first.
#[derive(Debug)]
pub(crate) enum Rule {
    /// As listed, the first first.
    Listed(Merges),
    /// Those whose joint is a token: the highest score first, then the lowest id of the joint, then the lowest parts.
    Scored {
        /// Of each token.
        scores: Vec<f32>,
        /// Whether merges know the token.
        merged: Vec<bool>,
    },
}

/// Merges in order.
#[derive(Debug)]
pub(crate) struct Merges {
    /// Left, right and joint.
    list: Vec<[u32; 3]>,
    index: Index,
}

impl Merges {
    /// Of a pair that comes twice, the second place holds.
    pub(crate) fn new(list: Vec<[u32; 3]>) -> Self {
        let mut index = Index::new(list.len());
        let mut rank = 0;
        for some in list.chunks(AT_ONCE) {
            let mut hashes = [0; AT_ONCE];
            for (hash, &[left, right, _]) in hashes.iter_mut().zip(some) {
                *hash = index.hash_pair(left, right);
            }
            index.touch(&hashes[..some.len()]);
            for (hash, &[left, right, _]) in hashes.iter().zip(some) {
                index.put(*hash, rank, |other| list[other as usize][..2] == [left, right]);
                rank += 1;
            }
        }
        Self { list, index }
    }

    fn find(&self, left: u32, right: u32) -> Option<(u64, u32)> {
        let is = |rank: u32| self.list[rank as usize][..2] == [left, right];
        let rank = self.index.find(self.index.hash_pair(left, right), is)?;
        Some((u64::from(rank), self.list[rank as usize][2]))
    }
}

/// A vocabulary and how text becomes tokens of it.
#[derive(Debug)]
pub(crate) struct Bpe {
    pub(crate) pieces: Pieces,
    pub(crate) rule: Rule,
    /// What stands for a character that is no token.
    pub(crate) unknown: Option<u32>,
    /// Whether it stands for several in a row.
    pub(crate) fuse_unknown: bool,
    /// Whether the bytes of such a character are tried first, as `<0x0A>`.
    pub(crate) byte_fallback: bool,
    /// Whether a word that is a token is taken whole, whatever merges say.
    pub(crate) ignore_merges: bool,
}

/// A part of the text on its way to a token.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    id: u32,
    before: u32,
    /// The next one; of one that was merged away, itself.
    next: u32,
}

/// No symbol.
const NONE: u32 = u32::MAX;

/// A pair that may merge; the least is the next.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u64,
    left: u32,
    right: u32,
    at: u32,
    joint: u32,
}

impl Bpe {
    /// When a pair merges (the least first, then by the ids of its parts), and to what.
    pub(super) fn merge(&self, left: u32, right: u32) -> Option<(u64, u32)> {
        match &self.rule {
            Rule::Listed(merges) => merges.find(left, right),
            Rule::Scored { scores, merged } => {
                let known = |id: u32| merged.get(id as usize) == Some(&true);
                if !known(left) || !known(right) {
                    return None;
                }
                let joint = self.pieces.joint(left, right).filter(|&id| known(id))?;
                let short = self.pieces.text(joint)?.len() <= MAX_JOINT_BYTES;
                short.then(|| (rank(scores[joint as usize], joint), joint))
            }
        }
    }

    /// Appends the ids of a text.
    ///
    /// # Errors
    /// A text of 4 GiB.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), &'static str> {
        if text.len() >= NONE as usize {
            return Err("expected a text of less than 4 GiB");
        }
        if self.ignore_merges
            && let Some(id) = self.pieces.id(text)
        {
            out.push(id);
            return Ok(());
        }
        let mut symbols = self.characters(text);
        self.merge_all(&mut symbols);
        let alive = symbols.iter().zip(0..).filter(|(symbol, at)| symbol.next != *at);
        out.extend(alive.map(|(symbol, _)| symbol.id));
        Ok(())
    }

    /// One symbol for each character that is a token, and what there is for others.
    fn characters(&self, text: &str) -> Vec<Symbol> {
        let mut ids: Vec<u32> = Vec::with_capacity(text.len());
        let mut unknown = None;
        for (at, character) in text.char_indices() {
            let character = &text[at..at + character.len_utf8()];
            if let Some(id) = self.pieces.id(character) {
                ids.extend(unknown.take());
                ids.push(id);
                continue;
            }
            let known = ids.len();
            if self.byte_fallback {
                let bytes = character.bytes().map(|byte| self.pieces.id(&byte_token(byte)));
                if bytes.fold(true, |all, id| all & id.map(|id| ids.push(id)).is_some()) {
                    // an unknown before it still waits, as in the library
                    continue;
                }
                ids.truncate(known);
            }
            if let Some(id) = self.unknown
                && !(self.fuse_unknown && unknown.is_some())
            {
                ids.extend(unknown.replace(id));
            }
        }
        ids.extend(unknown);
        let count = ids.len() as u32;
        let symbol = |(id, at): (u32, u32)| Symbol {
            id,
            before: at.checked_sub(1).unwrap_or(NONE),
            next: if at + 1 < count { at + 1 } else { NONE },
        };
        ids.into_iter().zip(0..).map(symbol).collect()
    }

    fn merge_all(&self, symbols: &mut [Symbol]) {
        let candidate = |symbols: &[Symbol], at: u32| {
            let next = symbols[at as usize].next;
            if next == NONE {
                return None;
            }
            let (left, right) = (symbols[at as usize].id, symbols[next as usize].id);
            let (rank, joint) = self.merge(left, right)?;
            Some(Reverse(Candidate { rank, left, right, at, joint }))
        };
        let first: Vec<_> = (0..symbols.len() as u32).filter_map(|at| candidate(symbols, at)).collect();
        let mut queue = BinaryHeap::from(first);
        while let Some(Reverse(best)) = queue.pop() {
            let (at, left) = (best.at as usize, symbols[best.at as usize]);
            if left.next == best.at || left.next == NONE {
                continue;
            }
            let right = symbols[left.next as usize];
            // its parts may have merged otherwise since it was queued
            let is_same = (left.id, right.id) == (best.left, best.right);
            if !is_same && self.merge(left.id, right.id).map(|(_, joint)| joint) != Some(best.joint) {
                continue;
            }
            symbols[left.next as usize].next = left.next;
            symbols[at] = Symbol { id: best.joint, before: left.before, next: right.next };
            if right.next != NONE {
                symbols[right.next as usize].before = best.at;
            }
            if left.before != NONE {
                queue.extend(candidate(symbols, left.before));
            }
            queue.extend(candidate(symbols, best.at));
        }
    }

    /// All merges, in order.
    pub(crate) fn merges(&self) -> Vec<(&str, &str)> {
        let text = |id: u32| self.pieces.text(id).unwrap_or_default();
        match &self.rule {
            Rule::Listed(merges) => {
                merges.list.iter().map(|&[left, right, _]| (text(left), text(right))).collect()
            }
            Rule::Scored { scores, merged } => self.merges_by_score(scores, merged),
        }
    }

    fn merges_by_score(&self, scores: &[f32], merged: &[bool]) -> Vec<(&str, &str)> {
        let known = |token: &str| self.pieces.id(token).filter(|&id| merged[id as usize]);
        let mut all = Vec::new();
        for (id, token) in self.pieces.iter() {
            if !merged[id as usize] || token.len() > MAX_JOINT_BYTES {
                continue;
            }
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(l), Some(r)) = (known(left), known(right)) {
                    all.push((rank(scores[id as usize], id), l, r, left, right));
                }
            }
        }
        all.sort_unstable_by_key(|&(rank, l, r, ..)| (rank, l, r));
        all.into_iter().map(|(.., left, right)| (left, right)).collect()
    }
}

/// The token of a byte.
fn byte_token(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// Less for a higher score, then for a lower id.
fn rank(score: f32, id: u32) -> u64 {
    let bits = score.to_bits();
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | u64::from(id)
}
