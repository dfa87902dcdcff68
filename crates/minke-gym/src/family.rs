//! What a family of problems is.

use crate::Draw;

/// A kind of problem: a generator with levels, and an exact verifier.
pub trait Family: Sync {
    /// Its name in suites and reports: one lower-case word, or several with hyphens.
    fn name(&self) -> &'static str;

    /// One sentence for lists: what is asked.
    fn about(&self) -> &'static str;

    /// The hardest level; the easiest is 1.
    fn levels(&self) -> u32 {
        5
    }

    /// Draws a problem's key at a level from 1 to [`Family::levels`].
    ///
    /// The key is canonical: two problems that a person would call the same have one key (the order of summands, the
    /// names in a story and the wording do not count), and it says everything that [`Family::verify`] needs.
    fn key(&self, level: u32, draw: &mut Draw) -> String;

    /// Asks the question of a key in words, which may be drawn; it says in which form the answer is expected.
    fn prompt(&self, key: &str, draw: &mut Draw) -> String;

    /// A right answer, in the form that the prompt asks for.
    fn answer(&self, key: &str) -> String;

    /// Whether `answer` (the text after the thinking, trimmed) is right. Equivalent forms of a right answer pass, and
    /// nothing passes by being similar.
    fn verify(&self, key: &str, answer: &str) -> bool;

    /// The thoughts that lead to the answer, at a degree of care; `None` where a family has none to show.
    fn work(&self, key: &str, care: Care, draw: &mut Draw) -> Option<Work> {
        let _ = (key, care, draw);
        None
    }
}

/// How much one line of worked thoughts does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Care {
    /// One small step a line: long, and each line easy to get right.
    Full,
    /// Several steps in one: shorter, and each line hard.
    Brief,
    /// Nothing: the answer is said at once.
    None,
}

/// A worked answer. Every line of it is true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// What is thought; empty for [`Care::None`].
    pub thought: String,
    /// What is answered; it passes [`Family::verify`].
    pub answer: String,
}

/// Which half of all problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// For training.
    Train,
    /// For evaluation only.
    HeldOut,
}

/// One problem in this many is held out.
const HELD_OUT_OF: u64 = 8;
/// Draws for one problem before a level is called exhausted in its split.
const MOST_TRIES: u64 = 10_000;

impl Split {
    /// Where a problem belongs: a function of its family and key alone.
    pub fn of(family: &str, key: &str) -> Self {
        let hash = blake3::hash(format!("{family}\n{key}").as_bytes());
        let bytes: [u8; 8] = hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes");
        if u64::from_le_bytes(bytes).is_multiple_of(HELD_OUT_OF) { Self::HeldOut } else { Self::Train }
    }
}

/// A question, and what is needed to check its answer.
#[derive(Clone)]
pub struct Problem {
    /// Who made it and checks it.
    pub family: &'static dyn Family,
    /// Its difficulty.
    pub level: u32,
    /// Its canonical text.
    pub key: String,
    /// The question.
    pub prompt: String,
}

impl std::fmt::Debug for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {:?}", self.family.name(), self.level, self.key)
    }
}

/// Problem number `index` of a family, level and split: a function of these and the seed.
///
/// # Panics
/// When the level is not one of the family's, or has no problem in the split.
pub fn problem(family: &'static dyn Family, level: u32, split: Split, seed: u64, index: u64) -> Problem {
    assert!((1..=family.levels()).contains(&level), "{}: no level {level}", family.name());
    let name = blake3::hash(format!("{}/{level}", family.name()).as_bytes());
    let name: [u8; 8] = name.as_bytes()[..8].try_into().expect("a hash has 32 bytes");
    let mut draw = Draw::new(seed ^ u64::from_le_bytes(name), index);
    for _ in 0..MOST_TRIES {
        let key = family.key(level, &mut draw);
        if Split::of(family.name(), &key) == split {
            let prompt = family.prompt(&key, &mut draw);
            return Problem { family, level, key, prompt };
        }
    }
    panic!("{}: level {level} has no problem in this split", family.name());
}
