//! The tokens of a vocabulary, by id and by text, in one string and one table.

use std::hash::{BuildHasher, RandomState};

/// No id.
const ABSENT: u32 = u32::MAX;

/// Entries whose slots are read together.
pub(super) const AT_ONCE: usize = 32;

/// A hash table of numbers; what they stand for is known to whoever asks.
#[derive(Debug)]
pub(super) struct Index {
    /// Half of a hash, and a number plus one; 0 is empty.
    slots: Vec<u64>,
    /// Random, so that no file can be made whose tokens all meet.
    seeds: [u64; 2],
}

impl Index {
    /// For at most `count` numbers, all below 2^32 - 1.
    pub(super) fn new(count: usize) -> Self {
        let random = RandomState::new();
        let seeds = [random.hash_one(0), random.hash_one(1) | 1];
        Self { slots: vec![0; (count * 4 / 3 + 1).next_power_of_two()], seeds }
    }

    fn mix(a: u64, b: u64) -> u64 {
        let product = u128::from(a) * u128::from(b);
        product as u64 ^ (product >> 64) as u64
    }

    pub(super) fn hash_bytes(&self, bytes: &[u8]) -> u64 {
        let (words, rest) = bytes.as_chunks::<8>();
        let mut last = [0; 8];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        let begin = self.seeds[0] ^ bytes.len() as u64;
        let words = words.iter().chain([&last]);
        words.fold(begin, |hash, word| Self::mix(hash ^ u64::from_le_bytes(*word), self.seeds[1]))
    }

    pub(super) fn hash_pair(&self, left: u32, right: u32) -> u64 {
        Self::mix(self.seeds[0] ^ (u64::from(left) << 32 | u64::from(right)), self.seeds[1])
    }

    /// Reads the slots of hashes that are asked for next, all at once: one by one, each would wait for memory.
    pub(super) fn touch(&self, hashes: &[u64]) {
        let mask = self.slots.len() - 1;
        std::hint::black_box(hashes.iter().fold(0, |all, hash| all | self.slots[*hash as usize & mask]));
    }

    /// The slot of what `is` says yes to, or the empty one where it belongs.
    fn slot(&self, hash: u64, is: impl Fn(u32) -> bool) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = self.slots[at];
            if slot == 0 || (slot >> 32 == hash >> 32 && is(slot as u32 - 1)) {
                return at;
            }
            at = (at + 1) & mask;
        }
    }

    /// The number with this hash that `is` says yes to.
    pub(super) fn find(&self, hash: u64, is: impl Fn(u32) -> bool) -> Option<u32> {
        (self.slots[self.slot(hash, is)] as u32).checked_sub(1)
    }

    /// Puts a number in place of the one that `is` says yes to, and gives that one.
    pub(super) fn put(&mut self, hash: u64, number: u32, is: impl Fn(u32) -> bool) -> Option<u32> {
        let at = self.slot(hash, is);
        let old = (self.slots[at] as u32).checked_sub(1);
        self.slots[at] = hash >> 32 << 32 | u64::from(number + 1);
        old
    }
}

/// Tokens that are gathered.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    text: String,
    spans: Vec<(u32, u32)>,
    count: usize,
}

/// Why tokens are no vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotPieces {
    /// Two tokens with one id.
    SameId(u32),
    /// Two ids of one token.
    SameText(u32, u32),
    /// More than 4 GiB of text.
    TooLarge,
}

impl Gathered {
    pub(crate) fn with_capacity(tokens: usize, bytes: usize) -> Self {
        Self { text: String::with_capacity(bytes), spans: Vec::with_capacity(tokens), count: 0 }
    }

    /// Takes a token; whoever calls has bounded its id.
    pub(crate) fn push(&mut self, id: u32, token: &str) -> Result<(), NotPieces> {
        let at = id as usize;
        if self.spans.len() <= at {
            self.spans.resize(at + 1, (ABSENT, 0));
        }
        if self.spans[at].0 != ABSENT {
            return Err(NotPieces::SameId(id));
        }
        let (start, end) = (self.text.len(), self.text.len() + token.len());
        if end >= ABSENT as usize {
            return Err(NotPieces::TooLarge);
        }
        self.text.push_str(token);
        self.spans[at] = (start as u32, end as u32);
        self.count += 1;
        Ok(())
    }

    /// The vocabulary of all that were taken.
    pub(crate) fn finish(mut self) -> Result<Pieces, NotPieces> {
        self.text.shrink_to_fit();
        let mut index = Index::new(self.count);
        let mut longest = 0;
        let text = |id: u32| {
            let (start, end) = self.spans[id as usize];
            &self.text.as_bytes()[start as usize..end as usize]
        };
        let present = |id: &u32| self.spans[*id as usize].0 != ABSENT;
        let ids: Vec<u32> = (0..self.spans.len() as u32).filter(present).collect();
        for ids in ids.chunks(AT_ONCE) {
            let mut hashes = [0; AT_ONCE];
            for (hash, id) in hashes.iter_mut().zip(ids) {
                *hash = index.hash_bytes(text(*id));
            }
            index.touch(&hashes[..ids.len()]);
            for (hash, &id) in hashes.iter().zip(ids) {
                let bytes = text(id);
                longest = longest.max(bytes.len());
                if let Some(first) = index.put(*hash, id, |other| text(other) == bytes) {
                    return Err(NotPieces::SameText(first, id));
                }
            }
        }
        Ok(Pieces { text: self.text, spans: self.spans, count: self.count, longest, index })
    }
}

/// A vocabulary.
#[derive(Debug)]
pub(crate) struct Pieces {
    text: String,
    /// Where tokens begin and end in the text, by id.
    spans: Vec<(u32, u32)>,
    count: usize,
    /// Bytes of the longest token.
    longest: usize,
    index: Index,
}

impl Pieces {
    /// How many tokens there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The largest id plus one.
    pub(crate) fn end(&self) -> usize {
        self.spans.len()
    }

    /// The token of an id.
    pub(crate) fn text(&self, id: u32) -> Option<&str> {
        let &(start, end) = self.spans.get(id as usize).filter(|span| span.0 != ABSENT)?;
        Some(&self.text[start as usize..end as usize])
    }

    /// All tokens with their ids, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &str)> {
        (0..self.spans.len() as u32).filter_map(|id| Some((id, self.text(id)?)))
    }

    /// The id of a token.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.id_of_bytes(token.as_bytes())
    }

    fn id_of_bytes(&self, token: &[u8]) -> Option<u32> {
        if token.len() > self.longest {
            return None;
        }
        let is = |id: u32| {
            let (start, end) = self.spans[id as usize];
            &self.text.as_bytes()[start as usize..end as usize] == token
        };
        self.index.find(self.index.hash_bytes(token), is)
    }

    /// The token that two tokens are when they stand together.
    pub(crate) fn joint(&self, left: u32, right: u32) -> Option<u32> {
        let [left, right] = [self.text(left)?.as_bytes(), self.text(right)?.as_bytes()];
        let length = left.len() + right.len();
        if length > self.longest {
            return None;
        }
        let mut few = [0; 64];
        let Some(both) = few.get_mut(..length) else { return self.id_of_bytes(&[left, right].concat()) };
        both[..left.len()].copy_from_slice(left);
        both[left.len()..].copy_from_slice(right);
        self.id_of_bytes(both)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gathered(tokens: &[(u32, &str)]) -> Result<Pieces, NotPieces> {
        let mut gathered = Gathered::default();
        tokens.iter().try_for_each(|(id, token)| gathered.push(*id, token))?;
        gathered.finish()
    }

    #[test]
    fn tokens_are_found_by_id_and_by_text() {
        let long = "whale".repeat(40);
        let tokens = [(7, "a"), (2, "ab"), (3, "b"), (0, ""), (9, "鲸"), (5, &*long), (6, &long[..190])];
        let pieces = gathered(&tokens).unwrap();
        assert_eq!((pieces.count(), pieces.end()), (7, 10));
        for (id, token) in tokens {
            assert_eq!((pieces.id(token), pieces.text(id)), (Some(id), Some(token)));
        }
        assert_eq!((pieces.id("ba"), pieces.text(1), pieces.text(10)), (None, None, None));
        assert_eq!((pieces.joint(7, 3), pieces.joint(3, 7), pieces.joint(7, 0)), (Some(2), None, Some(7)));
        assert_eq!((pieces.joint(5, 7), pieces.joint(6, 6)), (None, None));
        let ids: Vec<u32> = pieces.iter().map(|(id, _)| id).collect();
        assert_eq!(ids, [0, 2, 3, 5, 6, 7, 9]);
    }

    #[test]
    fn a_token_has_one_id_and_an_id_one_token() {
        assert_eq!(gathered(&[(0, "a"), (0, "b")]).unwrap_err(), NotPieces::SameId(0));
        assert_eq!(gathered(&[(0, "a"), (4, "b"), (2, "b")]).unwrap_err(), NotPieces::SameText(2, 4));
        assert_eq!(gathered(&[]).unwrap().id(""), None);
    }

    #[test]
    fn many_tokens_find_their_places() {
        let tokens: Vec<String> = (0..20_000).map(|i| format!("{:x}", i * 7919)).collect();
        let mut gathered = Gathered::with_capacity(tokens.len(), 0);
        for (id, token) in tokens.iter().enumerate() {
            gathered.push(id as u32, token).unwrap();
        }
        let pieces = gathered.finish().unwrap();
        assert!(tokens.iter().zip(0..).all(|(token, id)| pieces.id(token) == Some(id)));
        assert!((20_000..40_000).all(|i| pieces.id(&format!("{:x}", i * 7919)).is_none()));
    }
}
