//! What came the last time that a text went this way.

use std::collections::HashMap;

/// Tokens that must be the same before a place counts as the same way.
const SHORTEST: usize = 2;
/// Tokens that are compared.
const LONGEST: usize = 24;
/// Places that are remembered for each pair of tokens.
const PLACES: usize = 6;

/// The places of a sequence, by the tokens before them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ngrams {
    /// Where the last pairs like this one end, the latest first.
    ends: HashMap<[u32; SHORTEST], [u32; PLACES]>,
    /// Tokens that are in it.
    len: usize,
}

impl Ngrams {
    /// Takes in what a sequence has more than last time; a sequence only grows.
    pub fn read(&mut self, all: &[u32]) {
        // the pair at the very end is what is looked for
        for end in self.len.max(SHORTEST)..all.len() {
            let places = self.ends.entry([all[end - 2], all[end - 1]]).or_insert([0; PLACES]);
            places.rotate_right(1);
            places[0] = end as u32;
        }
        self.len = self.len.max(all.len());
    }

    /// What followed the longest earlier stretch that is as the end of `all`, the latest of those; at most `most` tokens.
    pub fn propose<'a>(&self, all: &'a [u32], most: usize) -> &'a [u32] {
        let n = all.len();
        let Some(places) =
            n.checked_sub(SHORTEST).and_then(|from| self.ends.get(&[all[from], all[from + 1]]))
        else {
            return &[];
        };
        let alike = |end: usize| {
            let pairs = all[..end].iter().rev().zip(all.iter().rev());
            pairs.take(LONGEST).take_while(|(a, b)| a == b).count()
        };
        let places = places.iter().map(|&end| end as usize).filter(|&end| end > 0 && end < n);
        // the later of two that are as long
        match places.map(|end| (alike(end), end)).max() {
            Some((length, end)) if length >= SHORTEST => &all[end..n.min(end + most)],
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn proposed(all: &[u32], most: usize) -> Vec<u32> {
        let mut ngrams = Ngrams::default();
        // in pieces, as it grows
        (1..=all.len()).for_each(|n| ngrams.read(&all[..n]));
        ngrams.propose(all, most).to_vec()
    }

    #[test]
    fn the_longest_and_then_the_latest_stretch_is_followed() {
        assert_eq!(proposed(&[1, 2, 3, 4, 1, 2], 8), [3, 4, 1, 2]);
        assert_eq!(proposed(&[1, 2, 3, 4, 1, 2], 1), [3]);
        // 7 1 2 is longer than the later 8 1 2
        assert_eq!(proposed(&[7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], 1), [5]);
        assert_eq!(proposed(&[1, 2, 5, 1, 2, 6, 1, 2], 1), [6]);
        assert!(proposed(&[1, 2, 3, 4], 8).is_empty());
        assert!(
            proposed(&[], 8).is_empty() && proposed(&[1], 8).is_empty() && proposed(&[1, 1], 8).is_empty()
        );
        assert_eq!(proposed(&[1, 1, 1], 8), [1]);
    }

    proptest! {
        #[test]
        fn it_is_what_a_search_finds(all in proptest::collection::vec(0_u32..3, 0..14)) {
            let n = all.len();
            let best = (SHORTEST..n)
                .map(|end| (all[..end].iter().rev().zip(all.iter().rev()).take_while(|(a, b)| a == b).count(), end))
                .filter(|(length, _)| *length >= SHORTEST)
                .max();
            let got = proposed(&all, 3);
            match best {
                None => prop_assert!(got.is_empty()),
                // only the last places of a pair are remembered
                Some((_, end)) => prop_assert!(!got.is_empty() && (got == all[end..n.min(end + 3)] || n > PLACES)),
            }
        }
    }
}
