//! How text is cut before merging: the cuts that `tokenizer.ggml.pre` names.
//!
//! A name stands for one or more patterns, applied one after the other to what the ones before left whole, as published in
//! the `tokenizer.json` of the model that the name is of. (llama.cpp's own copies are the same cuts, written for its engine.)

use serde_json::{Value, json};

/// GPT-2's cut, which `ByteLevel` of the tokenizers library applies by itself.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const LINES_AND_SPACES: &str = r"\s*[\r\n]+|\s+(?!\S)|\s+";
/// Chinese characters and kana, in DeepSeek-V3's cut.
const CJK: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const DEEPSEEK_WORDS: &str = concat!(
    r#"[!"#,
    "\"",
    r"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"| ?[\p{P}\p{S}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const UPPER: &str = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
const LOWER: &str = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";
/// Letters of the Latin, Greek, Cyrillic and a few more scripts, in DeepSeek-LLM's cut.
const DEEPSEEK_LLM_LETTERS: &str = concat!(
    "\\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-",
    "\u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-",
    "\u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-",
    "\u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}",
    "\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-",
    "\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}",
    "\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-",
    "\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}",
    "\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}",
    "\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}",
    "\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-",
    "\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}",
    "\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}",
    "\u{1e900}-\u{1e943}]+"
);

/// Chinese and Korean characters, in the cuts of DeepSeek-LLM and -Coder.
const DEEPSEEK_HAN: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
/// Punctuation, in DeepSeek-LLM's cut.
const DEEPSEEK_LLM_PUNCTUATION: &str =
    "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";

/// A cut, and what else a name decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Cut {
    /// The patterns, in order.
    pub(super) patterns: Vec<String>,
    /// Whether a word that is a token is taken whole, whatever merges say.
    pub(super) ignore_merges: bool,
    /// Whether text is composed (NFC) first.
    pub(super) compose: bool,
    /// Whether a text begins with bos where the file does not say.
    pub(super) add_bos: bool,
}

fn cut<const N: usize>(patterns: [&str; N]) -> Cut {
    let patterns = patterns.map(str::to_owned).to_vec();
    Cut { patterns, ignore_merges: false, compose: false, add_bos: false }
}

/// Words with one character before them, numbers, punctuation with the line ends behind it.
fn words(numbers: &str) -> String {
    format!(
        r"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{LINES_AND_SPACES}"
    )
}

/// Words cut where lower case becomes upper case.
fn cased(contractions: &str, numbers: &str) -> String {
    format!(
        r"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{contractions}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{contractions}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES_AND_SPACES}"
    )
}

/// Names in the order in which one is chosen for writing; the first of a line is the one that is written.
const NAMES: [&[&str]; 17] = [
    &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
    &["qwen2"],
    &["stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "solar-open", "kormo"],
    &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
    &[
        "gpt-2",
        "phi-2",
        "mpt",
        "olmo",
        "jais",
        "exaone4",
        "trillion",
        "granite-docling",
        "modern-bert",
        "roberta-bpe",
    ],
    &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
    &["default"],
    &["dbrx", "smaug-bpe", "chatglm-bpe"],
    &["glm4", "glm5"],
    &["tekken"],
    &["gpt-4o", "llama4", "kanana2", "minimax-m2"],
    &["deepseek-llm"],
    &["deepseek-coder"],
    &["falcon"],
    &["qwen35"],
    &["seed-coder"],
    &["kimi-k2"],
];

/// The cut that a name stands for.
pub(super) fn named(name: &str) -> Option<Cut> {
    let line = NAMES.iter().find(|line| line.contains(&name))?;
    Some(match line[0] {
        "llama-bpe" => Cut { ignore_merges: true, add_bos: true, ..cut([&words(r"\p{N}{1,3}")]) },
        "qwen2" => Cut { compose: true, ..cut([&words(r"\p{N}")]) },
        "stablelm2" => cut([&words(r"\p{N}")]),
        "deepseek-v3" => cut([r"\p{N}{1,3}", CJK, DEEPSEEK_WORDS]),
        "gpt-2" => cut([GPT2]),
        "smollm" => cut([r"\p{N}", GPT2]),
        "default" => cut([r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
        "dbrx" => cut([&words(r"\p{N}{1,3}")]),
        "glm4" => Cut { ignore_merges: true, ..cut([&words(r"\p{N}{1,3}")]) },
        "tekken" => Cut { ignore_merges: true, add_bos: true, ..cut([&cased("", r"\p{N}")]) },
        "gpt-4o" => cut([&cased(&format!("{CONTRACTIONS}?"), r"\p{N}{1,3}")]),
        "deepseek-llm" => {
            cut([r"[\r\n]", DEEPSEEK_LLM_LETTERS, DEEPSEEK_LLM_PUNCTUATION, r"\s+$", DEEPSEEK_HAN, r"\p{N}+"])
        }
        "deepseek-coder" => cut([r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_HAN, r"\p{N}"]),
        "falcon" => cut([r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
        "qwen35" => cut([&format!(
            r"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{LINES_AND_SPACES}"
        )]),
        "seed-coder" => cut([&format!(
            r"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LINES_AND_SPACES}"
        )]),
        // as tiktoken does, which this one is of
        "kimi-k2" => Cut { ignore_merges: true, ..cut([&kimi()]) },
        _ => return None,
    })
}

/// Runs of Chinese characters, and words of all others.
fn kimi() -> String {
    let outside = |letters: &str| format!(r"{}&&[^\p{{Han}}]]", &letters[..letters.len() - 1]);
    let (upper, lower, contractions) = (outside(UPPER), outside(LOWER), format!("{CONTRACTIONS}?"));
    format!(
        r"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{contractions}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{contractions}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{LINES_AND_SPACES}"
    )
}

/// All names, for messages.
pub(super) fn known() -> String {
    NAMES.map(|line| line.join(", ")).join(", ")
}

/// The name of a cut: one with the same patterns, and as far as there is one the same of the rest.
pub(super) fn name_of(patterns: &[String], ignore_merges: bool, compose: bool) -> Option<&'static str> {
    let fits = |line: &&&[&'static str]| {
        named(line[0]).is_some_and(|cut| cut.patterns == patterns && cut.ignore_merges == ignore_merges)
    };
    let composes = |line: &&&[&'static str]| named(line[0]).is_some_and(|cut| cut.compose == compose);
    let found = NAMES.iter().filter(fits).find(composes).or_else(|| NAMES.iter().find(fits));
    found.map(|line| line[0])
}

impl Cut {
    /// As a `tokenizer.json` says it.
    pub(super) fn json(&self) -> Value {
        let split = |pattern: &String| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let bytes =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let parts: Vec<Value> = self.patterns.iter().map(split).chain([bytes]).collect();
        json!({"type": "Sequence", "pretokenizers": parts})
    }
}

/// The patterns of the `pre_tokenizer` of a `tokenizer.json`, if it is made of nothing but patterns and bytes.
///
/// # Errors
/// What is in it that is something else.
pub(super) fn patterns_of(pre_tokenizer: &Value) -> Result<Vec<String>, String> {
    let mut patterns = Vec::new();
    gather(pre_tokenizer, &mut patterns, 0)?;
    Ok(patterns)
}

fn gather(part: &Value, patterns: &mut Vec<String>, depth: usize) -> Result<(), String> {
    let short = || part.to_string().chars().take(200).collect::<String>();
    match part["type"].as_str() {
        Some("Sequence") if depth < 8 => {
            for inner in part["pretokenizers"].as_array().into_iter().flatten() {
                gather(inner, patterns, depth + 1)?;
            }
        }
        Some("Split") if part["behavior"] == "Isolated" && part["invert"] != true => {
            let pattern = part["pattern"]["Regex"].as_str().ok_or_else(short)?;
            // files write line ends as themselves or as escapes
            patterns.push(pattern.replace('\r', "\\r").replace('\n', "\\n"));
        }
        Some("Digits") if part["individual_digits"] == true => patterns.push(r"\p{N}".to_owned()),
        Some("Digits") => patterns.push(r"\p{N}+".to_owned()),
        Some("ByteLevel") if part["add_prefix_space"] != true => {
            if part["use_regex"] != false {
                patterns.push(GPT2.to_owned());
            }
        }
        _ => return Err(short()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_cut_that_the_library_takes_and_that_is_found_again() {
        for line in NAMES {
            for name in line {
                let cut = named(name).unwrap();
                let json = cut.json();
                serde_json::from_value::<tokenizers::PreTokenizerWrapper>(json.clone()).unwrap();
                assert_eq!(patterns_of(&json).unwrap(), cut.patterns, "{name}");
                let found = name_of(&cut.patterns, cut.ignore_merges, cut.compose).unwrap();
                assert_eq!(named(found).unwrap().patterns, cut.patterns, "{name}");
            }
            let cut = named(line[0]).unwrap();
            let found = name_of(&cut.patterns, cut.ignore_merges, cut.compose).unwrap();
            assert_eq!(
                named(found).unwrap(),
                Cut { add_bos: named(found).unwrap().add_bos, ..cut },
                "{line:?}"
            );
        }
        assert_eq!(named("kimi-k9"), None);
    }

    /// Texts as another engine of patterns cuts them, by llama.cpp's table: `scripts/cut_vectors.py`.
    #[test]
    fn cuts_are_those_of_another_implementation() {
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
        let vectors: Value = serde_json::from_str(include_str!("../../../tests/vectors/cuts.json")).unwrap();
        let texts: Vec<&str> =
            vectors["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        let mut wrong = Vec::new();
        for name in NAMES.concat() {
            let mut json = named(name).unwrap().json();
            // without the bytes, which are written as other letters
            json["pretokenizers"].as_array_mut().unwrap().pop();
            let cut: tokenizers::PreTokenizerWrapper = serde_json::from_value(json).unwrap();
            let told =
                vectors["cuts"][name].as_array().unwrap_or_else(|| panic!("{name} is not in the vectors"));
            for (text, told) in texts.iter().zip(told) {
                let mut pieces = PreTokenizedString::from(*text);
                cut.pre_tokenize(&mut pieces).unwrap();
                let got: Vec<&str> = pieces
                    .get_splits(OffsetReferential::Original, OffsetType::Byte)
                    .into_iter()
                    .map(|(piece, ..)| piece)
                    .collect();
                if json!(got) != *told {
                    wrong.push(format!("{name}: there {told}\n  here {}", json!(got)));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    fn the_cut_that_training_uses_is_deepseek_v3s() {
        let ours = crate::tokenizer::skeleton(3);
        let name = name_of(&patterns_of(&ours["pre_tokenizer"]).unwrap(), false, false);
        assert_eq!(name, Some("deepseek-v3"));
    }

    #[test]
    fn what_is_no_pattern_is_named() {
        for part in [
            json!({"type": "Metaspace", "replacement": "▁"}),
            json!({"type": "ByteLevel", "add_prefix_space": true}),
            json!({"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated"}),
            json!({"type": "Split", "pattern": {"Regex": " "}, "behavior": "Removed"}),
            json!(null),
        ] {
            let text = patterns_of(&json!({"type": "Sequence", "pretokenizers": [part]})).unwrap_err();
            assert_eq!(text, part.to_string());
        }
    }
}
