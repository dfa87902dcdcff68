//! Training and validation, split by hash.
//!
//! A document goes to validation when the hash of its key, read as a number in [0, 1), is below the share. No
//! order, no random state: the same document lands on the same side in every run, also when files are added
//! or removed around it.
//!
//! The key is the content's hash, or, for files of a folder with several entries, the *group*: the first
//! name below the folders that all files share, with its version number stripped. `serde-1.0.200/src/lib.rs`
//! and `serde-1.0.219/src/de.rs` are both of group `serde`, so two versions of one package, which are nearly
//! the same text, never lie on both sides. Rows of tables have no group: a table is a container, not a work.
//!
//! With few keys chance could leave one side empty. Then the smallest key alone is validation (or the largest
//! alone is training): still a function of the content only.

use crate::{Document, Error, Result};

/// Which side a document is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Learned from.
    Training,
    /// Held out.
    Validation,
}

/// Gathers the keys of a corpus, to build a [`Split`].
#[derive(Debug, Clone, Copy, Default)]
pub struct KeyRange {
    least: Option<u64>,
    greatest: Option<u64>,
}

impl KeyRange {
    /// Takes one more document into account.
    pub fn add(&mut self, key: u64) {
        self.least = Some(self.least.map_or(key, |least| least.min(key)));
        self.greatest = Some(self.greatest.map_or(key, |greatest| greatest.max(key)));
    }
}

/// The rule of a split: keys up to and including a bound are validation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    bound: Option<u64>,
}

impl Split {
    /// Makes the rule for a share of validation in [0, 0.5].
    ///
    /// # Errors
    /// A share out of range, or a corpus whose documents all have one key and so cannot be split.
    pub fn new(validation_share: f64, keys: KeyRange) -> Result<Self> {
        if !(0.0..=0.5).contains(&validation_share) {
            return Err(Error::setting("validation_share", "a number from 0 to 0.5", validation_share));
        }
        let (Some(least), Some(greatest)) = (keys.least, keys.greatest) else {
            return Ok(Self { bound: None });
        };
        if validation_share == 0.0 {
            return Ok(Self { bound: None });
        }
        if least == greatest {
            let expected =
                "at least two documents (or groups), to hold one out; add data or set validation_share = 0";
            return Err(Error::setting("data", expected, 1));
        }
        // exact enough: a share of 0.5 at most, so the product stays below 2^63
        let bound = (validation_share * 2f64.powi(64)) as u64;
        Ok(Self { bound: Some(bound.max(least).min(greatest - 1)) })
    }

    /// The side of a document with this key.
    pub fn side(&self, key: u64) -> Side {
        match self.bound {
            Some(bound) if key <= bound => Side::Validation,
            _ => Side::Training,
        }
    }
}

/// The key that decides a document's side.
pub fn split_key(document: &Document, by_group: bool) -> u64 {
    let hash = match &document.group {
        Some(group) if by_group => *blake3::hash(group.as_bytes()).as_bytes(),
        _ => document.hash,
    };
    u64::from_le_bytes(*hash.first_chunk().expect("32 bytes hold 8"))
}

/// The group of a path: its first name without a version number.
pub(crate) fn group_key(relative: &str) -> String {
    let first = relative.split('/').next().unwrap_or(relative);
    strip_version(first).to_owned()
}

/// `name-1.2.3-beta` to `name`; a version is a dash or underscore, perhaps `v`, digits, a dot and a digit.
fn strip_version(name: &str) -> &str {
    for (at, c) in name.char_indices() {
        if at == 0 || !matches!(c, '-' | '_') {
            continue;
        }
        let rest = name[at + 1..].trim_start_matches('v');
        let after = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        let dotted =
            after.strip_prefix('.').is_some_and(|tail| tail.starts_with(|c: char| c.is_ascii_digit()));
        if after.len() < rest.len() && dotted {
            return &name[..at];
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_stripped() {
        let cases = [
            ("serde-1.0.200/src/lib.rs", "serde"),
            ("windows-sys-0.52.0/a", "windows-sys"),
            ("foo-1.0.0-beta.2+build/x", "foo"),
            ("sha-2/x", "sha-2"),
            ("x-2d-1.0.0/x", "x-2d"),
            ("pkg_v3.11.tar", "pkg"),
            ("readme.md", "readme.md"),
            ("-1.0", "-1.0"),
        ];
        for (path, expected) in cases {
            assert_eq!(group_key(path), expected, "{path}");
        }
    }

    fn range(keys: &[u64]) -> KeyRange {
        let mut range = KeyRange::default();
        for &key in keys {
            range.add(key);
        }
        range
    }

    #[test]
    fn both_sides_are_never_empty() {
        for keys in [[5, u64::MAX - 3], [0, 1], [u64::MAX - 1, u64::MAX], [1 << 50, 1 << 51]] {
            for share in [1e-9, 0.01, 0.5] {
                let split = Split::new(share, range(&keys)).unwrap();
                let sides = keys.map(|key| split.side(key));
                assert_eq!(sides, [Side::Validation, Side::Training], "{keys:?} {share}");
            }
        }
        assert!(Split::new(0.1, range(&[7])).is_err());
        assert!(Split::new(0.0, range(&[7])).is_ok());
        assert!(Split::new(f64::NAN, range(&[7, 8])).is_err());
        assert!(Split::new(0.6, range(&[7, 8])).is_err());
    }

    #[test]
    fn the_share_is_kept_and_order_does_not_matter() {
        let keys: Vec<u64> = (0..20_000u64)
            .map(|i| u64::from_le_bytes(*blake3::hash(&i.to_le_bytes()).as_bytes().first_chunk().unwrap()))
            .collect();
        let split = Split::new(0.1, range(&keys)).unwrap();
        let held_out = keys.iter().filter(|&&key| split.side(key) == Side::Validation).count();
        assert!((1800..2200).contains(&held_out), "{held_out}");
        let mut reversed = keys.clone();
        reversed.reverse();
        assert_eq!(Split::new(0.1, range(&reversed)).unwrap(), split);
    }
}
