//! Byte-level BPE, trained to the same vocabulary on every run.
//!
//! The library's own trainer keeps its words and pairs in hash maps with random seeds and lets the order of
//! that walk reach its queue, so that when the same token arises from two different pairs, ties may fall
//! either way. Here words are sorted before they are numbered, the queue is ordered by (count, then the
//! smaller pair) and holds no state of its own, so the merges are a function of the word counts alone.

use std::borrow::Borrow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hash, Hasher};

use serde_json::{Value, json};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::fast::{cut_ascii, parts};
use super::parallel_map;
use super::stream::{byte_letters, byte_table};
use crate::{Error, Result};

/// The control tokens of a trained vocabulary, in the order of their ids, and whether they are marked special.
pub const SPECIAL_TOKENS: [(&str, bool); 16] = [
    ("<|bos|>", true),
    ("<|eos|>", true),
    ("<|pad|>", true),
    ("<|user|>", true),
    ("<|assistant|>", true),
    ("<|system|>", true),
    ("<think>", false),
    ("</think>", false),
    ("<|reserved_0|>", true),
    ("<|reserved_1|>", true),
    ("<|reserved_2|>", true),
    ("<|reserved_3|>", true),
    ("<|reserved_4|>", true),
    ("<|reserved_5|>", true),
    ("<|reserved_6|>", true),
    ("<|reserved_7|>", true),
];

/// Longer tokens are rulers of dashes and the like: they cost a row and teach nothing.
const MAX_TOKEN_BYTES: usize = 64;
/// A pair that occurs once in the sample is chance.
const MIN_COUNT: i64 = 2;

/// Settings of training a vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// Tokens in all: special ones, the 256 bytes, merges. A small sample may give fewer.
    pub vocab_size: usize,
    /// How many digits may share a token, 1 to 3. One makes arithmetic easier for small models, three is
    /// `DeepSeek`'s choice.
    pub digits: u8,
    /// Threads for cutting the text; the result does not depend on it.
    pub threads: usize,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { vocab_size: 4096, digits: 1, threads: 1 }
    }
}

/// Trains and gives the bytes of a `tokenizer.json`.
pub(super) fn train_json(sample: &[String], options: &TrainOptions) -> Result<Vec<u8>> {
    let fixed = SPECIAL_TOKENS.len() + 256;
    if !(fixed..=1 << 20).contains(&options.vocab_size) {
        return Err(Error::setting("vocab_size", format!("{fixed} to {}", 1 << 20), options.vocab_size));
    }
    if !(1..=3).contains(&options.digits) {
        return Err(Error::setting("digits", "1 to 3", options.digits));
    }
    if sample.iter().all(String::is_empty) {
        return Err(Error::tokenizer("(training)", "the sample of documents is empty"));
    }
    let mut names: Vec<String> = SPECIAL_TOKENS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let mut letters: Vec<char> = byte_table().into_keys().collect();
    letters.sort_unstable();
    names.extend(letters.iter().map(ToString::to_string));

    let words = count_words(sample, options)?;
    let letter_ids: HashMap<char, u32> =
        letters.iter().enumerate().map(|(at, &c)| (c, (SPECIAL_TOKENS.len() + at) as u32)).collect();
    let merges = Merger::new(&words, &letter_ids).run(&mut names, options.vocab_size);

    let vocabulary: serde_json::Map<String, Value> =
        names.iter().enumerate().map(|(id, name)| (name.clone(), json!(id))).collect();
    let mut file = skeleton(options.digits);
    file["model"]["vocab"] = Value::Object(vocabulary);
    file["model"]["merges"] =
        merges.iter().map(|&(a, b)| json!([names[a as usize], names[b as usize]])).collect();
    let mut bytes = serde_json::to_vec_pretty(&file).expect("JSON values serialise");
    bytes.push(b'\n');
    Ok(bytes)
}

/// A `tokenizer.json` without a vocabulary. The cuts are those of DeepSeek-V3's file.
pub(crate) fn skeleton(digits: u8) -> Value {
    let split = |regex: String| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let words = concat!(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+",
        "|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
        "| ?[\\p{P}\\p{S}]+[\\r\\n]*",
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    );
    let number = if digits == 1 { "\\p{N}".to_owned() } else { format!("\\p{{N}}{{1,{digits}}}") };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let added: Vec<Value> = SPECIAL_TOKENS
        .iter()
        .enumerate()
        .map(|(id, (content, special))| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            })
        })
        .collect();
    let bos = SPECIAL_TOKENS[0].0;
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            split(number),
            split("[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+".to_owned()),
            split(words.to_owned()),
            byte_level.clone(),
        ]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {}, "merges": [],
        },
    })
}

/// Cuts the sample and counts each different word, sorted.
fn count_words(sample: &[String], options: &TrainOptions) -> Result<BTreeMap<String, u64>> {
    let mut file = skeleton(options.digits);
    // control tokens need a vocabulary, and the sample is plain text anyway
    file["added_tokens"] = json!([]);
    file["post_processor"] = Value::Null;
    let cutter: tokenizers::Tokenizer = serde_json::from_value::<tokenizers::Tokenizer>(file)
        .map_err(|e| Error::tokenizer("(training)", e))?;
    let cutter = cutter.get_pre_tokenizer().expect("the skeleton has one");
    let chunk = sample.len().div_ceil(options.threads.max(1) * 4).max(1);
    let chunks: Vec<&[String]> = sample.chunks(chunk).collect();
    let letters = byte_letters();
    let work = |(): &mut (), at: usize| -> tokenizers::Result<HashMap<String, u64>> {
        // ASCII words are counted as bytes, and become letters once each
        let (mut plain, mut counts) = (HashMap::<Vec<u8>, u64>::new(), HashMap::<String, u64>::new());
        for (part, is_ascii) in chunks[at].iter().flat_map(|text| parts(text)) {
            if is_ascii {
                cut_ascii(part.as_bytes(), options.digits, &mut |word| count(&mut plain, word, 1));
                continue;
            }
            let mut cut = PreTokenizedString::from(part);
            cutter.pre_tokenize(&mut cut)?;
            for (word, _, _) in cut.get_splits(OffsetReferential::Normalized, OffsetType::None) {
                count(&mut counts, word, 1);
            }
        }
        for (word, times) in plain {
            let word: String = word.iter().map(|&byte| letters[byte as usize]).collect();
            count(&mut counts, word.as_str(), times);
        }
        Ok(counts)
    };
    let counts = parallel_map(chunks.len(), options.threads, || (), work);
    let mut words = BTreeMap::new();
    for part in counts {
        for (word, count) in part.map_err(|e| Error::tokenizer("(training)", e))? {
            *words.entry(word).or_default() += count;
        }
    }
    Ok(words)
}

/// Adds to a count without making a key for words that have one.
fn count<K, Q>(counts: &mut HashMap<K, u64>, word: &Q, times: u64)
where
    K: Hash + Eq + Borrow<Q>,
    Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
{
    match counts.get_mut(word) {
        Some(count) => *count += times,
        None => _ = counts.insert(word.to_owned(), times),
    }
}

type Pair = (u32, u32);

/// Hashes two ids with one multiplication; the default hasher would take most of the training's time.
#[derive(Debug, Default)]
pub(super) struct PairHasher(u64);

impl Hasher for PairHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.0 = (self.0.rotate_left(32) ^ u64::from(value)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }
}

pub(super) type PairMap<V> = HashMap<Pair, V, BuildHasherDefault<PairHasher>>;

struct Merger {
    words: Vec<(Vec<u32>, i64)>,
    counts: PairMap<i64>,
    /// Words that may hold the pair; some no longer do.
    places: PairMap<Vec<u32>>,
}

impl Merger {
    fn new(words: &BTreeMap<String, u64>, letters: &HashMap<char, u32>) -> Self {
        let words: Vec<(Vec<u32>, i64)> = words
            .iter()
            .map(|(word, &count)| (word.chars().map(|c| letters[&c]).collect(), count as i64))
            .filter(|(ids, _): &(Vec<u32>, i64)| ids.len() > 1)
            .collect();
        let (mut counts, mut places) = (PairMap::<i64>::default(), PairMap::<Vec<u32>>::default());
        for (at, (ids, count)) in words.iter().enumerate() {
            for pair in pairs(ids) {
                *counts.entry(pair).or_default() += count;
                let places = places.entry(pair).or_default();
                if places.last() != Some(&(at as u32)) {
                    places.push(at as u32);
                }
            }
        }
        Self { words, counts, places }
    }

    /// Adds tokens to `names` until there are `vocab_size` or no pair is left; gives the merges in order.
    fn run(mut self, names: &mut Vec<String>, vocab_size: usize) -> Vec<Pair> {
        let mut ids: HashMap<String, u32> = names.iter().cloned().zip(0..).collect();
        let mut queue: BinaryHeap<(i64, Reverse<Pair>)> =
            self.counts.iter().map(|(&pair, &count)| (count, Reverse(pair))).collect();
        let mut merges = Vec::new();
        while names.len() < vocab_size {
            let Some((count, Reverse(pair))) = queue.pop() else { break };
            let current = self.counts.get(&pair).copied().unwrap_or(0);
            if current != count {
                // counts that rose were queued again when they did; those that fell are corrected here
                if current > 0 && current < count {
                    queue.push((current, Reverse(pair)));
                }
                continue;
            }
            if count < MIN_COUNT {
                break;
            }
            let name = format!("{}{}", names[pair.0 as usize], names[pair.1 as usize]);
            // the vocabulary's letters are one per byte
            if name.chars().count() > MAX_TOKEN_BYTES {
                continue;
            }
            let id = *ids.entry(name.clone()).or_insert_with(|| {
                names.push(name);
                names.len() as u32 - 1
            });
            merges.push(pair);
            for new in self.merge(pair, id) {
                if let Some(&count) = self.counts.get(&new) {
                    queue.push((count, Reverse(new)));
                }
            }
        }
        merges
    }

    /// Replaces a pair in all words; gives the pairs whose count may have risen.
    fn merge(&mut self, pair: Pair, id: u32) -> HashSet<Pair, BuildHasherDefault<PairHasher>> {
        let mut risen = HashSet::default();
        let mut places = self.places.remove(&pair).unwrap_or_default();
        places.sort_unstable();
        places.dedup();
        for at in places {
            let (ids, count) = &mut self.words[at as usize];
            if !pairs(ids).any(|p| p == pair) {
                continue;
            }
            for old in pairs(ids) {
                *self.counts.entry(old).or_default() -= *count;
            }
            let (mut read, mut write) = (0, 0);
            while read < ids.len() {
                let here = read + 1 < ids.len() && (ids[read], ids[read + 1]) == pair;
                ids[write] = if here { id } else { ids[read] };
                read += 1 + usize::from(here);
                write += 1;
            }
            ids.truncate(write);
            for new in pairs(ids) {
                *self.counts.entry(new).or_default() += *count;
                if new.0 == id || new.1 == id {
                    risen.insert(new);
                    self.places.entry(new).or_default().push(at);
                }
            }
        }
        self.counts.remove(&pair);
        risen
    }
}

fn pairs(ids: &[u32]) -> impl Iterator<Item = Pair> + '_ {
    ids.windows(2).map(|pair| (pair[0], pair[1]))
}
