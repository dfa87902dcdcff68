//! Constrained decoding: what a grammar lets come next, as ids of the model's vocabulary.
//!
//! `llguidance` knows grammars; the tokens are ours. A constraint comes from outside and is hostile: its size, its depth
//! and the work of every step are bounded, and what goes beyond is an error.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::{
    INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv,
};
use llguidance::{Matcher, ParserFactory};
use minke_data::Tokenizer;
use serde_json::{Value, json};

/// The largest schema, as text.
const MAX_SCHEMA_BYTES: usize = 256 << 10;
/// The deepest schema, brackets of regexes and of grammars.
const MAX_DEPTH: usize = 64;
/// The longest regex.
const MAX_REGEX_BYTES: usize = 16 << 10;
/// The longest grammar.
const MAX_GRAMMAR_BYTES: usize = 256 << 10;
/// What is said of a compiler's reason.
const MAX_REASON_CHARS: usize = 300;
/// White space between the parts of JSON: a space, or a new line with its indentation. Small models lose themselves in more.
const WHITE_SPACE: &str = r" |\r?\n[ \t]{0,40}";
/// The compiler recurses by the depth of what it reads.
///
/// What follows a grammar does not, so that any thread may: it derives regexes with lists of what is to be done, and looks
/// for what alternatives have in common to a depth of a hundred (`trie_rec` of `derivre`).
pub(crate) const STACK_BYTES: usize = 32 << 20;

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// JSON that satisfies a schema.
    JsonSchema(Value),
    /// A JSON object.
    JsonObject,
    /// All of it matches a regular expression, in the syntax of the `regex` crate.
    Regex(String),
    /// A context-free grammar, in the variant of Lark's syntax that `llguidance` documents; it begins at `start`.
    Grammar(String),
}

/// Why a constraint cannot be kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// Masks are over tokens, and nobody knows their text.
    #[error("a constraint needs a tokenizer, and the model folder has none")]
    NeedsTokenizer,
    /// The text of a token depends on its neighbours, or bytes are lacking.
    #[error(
        "constraint: expected a byte-level or SentencePiece vocabulary, got one whose tokens have no bytes of their own"
    )]
    Vocabulary,
    /// More than is looked at.
    #[error("{what}: expected at most {limit} bytes, got {got}")]
    TooLarge {
        /// Which kind of constraint.
        what: &'static str,
        /// Its bytes.
        got: usize,
        /// Bytes that are taken.
        limit: usize,
    },
    /// Deeper than is looked at.
    #[error("{what}: expected at most {limit} levels of nesting, got more")]
    TooDeep {
        /// Which kind of constraint.
        what: &'static str,
        /// Levels that are taken.
        limit: usize,
    },
    /// It says nothing that can be kept.
    #[error("{what}: {reason}")]
    Invalid {
        /// Which kind of constraint.
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A step took more work than is allowed.
    #[error("{what}: too complex to follow: {reason}")]
    TooComplex {
        /// Which kind of constraint.
        what: &'static str,
        /// What went beyond its bound.
        reason: String,
    },
    /// Nothing is wrong with it.
    #[error("a thread that constraints need could not run; try again later")]
    NoThread,
}

impl Constraint {
    fn name(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) => "JSON schema",
            Self::JsonObject => "JSON object",
            Self::Regex(_) => "regex",
            Self::Grammar(_) => "grammar",
        }
    }

    /// Whether the mark of a thought stands in it, and is then text of the answer; no JSON begins with one.
    pub(crate) fn names(&self, mark: &str) -> bool {
        match self {
            Self::JsonSchema(_) | Self::JsonObject => false,
            Self::Regex(text) | Self::Grammar(text) => text.contains(mark),
        }
    }

    /// Checks size and depth, before anything recurses.
    fn check(&self) -> Result<(), ConstraintError> {
        let what = self.name();
        let (got, limit, depth) = match self {
            Self::JsonObject => return Ok(()),
            Self::JsonSchema(schema) => {
                // the depth first: writing recurses too
                let depth = depth_of(schema);
                if depth > MAX_DEPTH {
                    return Err(ConstraintError::TooDeep { what, limit: MAX_DEPTH });
                }
                (schema.to_string().len(), MAX_SCHEMA_BYTES, depth)
            }
            Self::Regex(regex) => (regex.len(), MAX_REGEX_BYTES, brackets(regex)),
            Self::Grammar(grammar) => (grammar.len(), MAX_GRAMMAR_BYTES, brackets(grammar)),
        };
        if got > limit {
            return Err(ConstraintError::TooLarge { what, got, limit });
        }
        if depth > MAX_DEPTH {
            return Err(ConstraintError::TooDeep { what, limit: MAX_DEPTH });
        }
        if let Self::JsonSchema(schema) = self {
            check_schema(schema)?;
        }
        Ok(())
    }

    fn grammar(&self) -> TopLevelGrammar {
        match self {
            Self::JsonSchema(schema) => TopLevelGrammar::from_json_schema(with_white_space(schema.clone())),
            Self::JsonObject => {
                TopLevelGrammar::from_json_schema(with_white_space(json!({"type": "object"})))
            }
            Self::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Self::Grammar(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        }
    }
}

/// Levels of a value, counted without recursion; no more than one beyond the bound.
fn depth_of(value: &Value) -> usize {
    let mut level = vec![value];
    for depth in 0..=MAX_DEPTH {
        let next: Vec<&Value> = level
            .iter()
            .flat_map(|value| -> Box<dyn Iterator<Item = &Value>> {
                match value {
                    Value::Array(list) => Box::new(list.iter()),
                    Value::Object(map) => Box::new(map.values()),
                    _ => Box::new(std::iter::empty()),
                }
            })
            .collect();
        if next.is_empty() {
            return depth;
        }
        level = next;
    }
    MAX_DEPTH + 1
}

/// Open brackets at the deepest place; those behind a backslash do not count, those of a class count too much.
fn brackets(text: &str) -> usize {
    let (mut open, mut deepest, mut escaped) = (0_usize, 0, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'(' | b'[' | b'{' => {
                open += 1;
                deepest = deepest.max(open);
            }
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// What the compiler would take for a wish of its own, or say unclearly.
fn check_schema(schema: &Value) -> Result<(), ConstraintError> {
    let invalid = |reason: String| Err(ConstraintError::Invalid { what: "JSON schema", reason });
    if !schema.is_object() && !schema.is_boolean() {
        return invalid(format!("expected an object, got {}", short(&schema.to_string())));
    }
    let mut rest = vec![schema];
    while let Some(value) = rest.pop() {
        match value {
            Value::Array(list) => rest.extend(list),
            Value::Object(map) => {
                if let Some(Value::String(reference)) = map.get("$ref")
                    && reference != "#"
                    && !reference.starts_with("#/")
                {
                    return invalid(format!(
                        "`$ref`: expected a place in the schema itself such as #/$defs/NAME, got {}",
                        short(reference)
                    ));
                }
                rest.extend(map.values());
            }
            _ => {}
        }
    }
    Ok(())
}

/// The schema with our white space, unless it has a word of its own about that.
fn with_white_space(mut schema: Value) -> Value {
    if let Some(map) = schema.as_object_mut()
        && !map.contains_key("x-guidance")
    {
        map.insert("x-guidance".to_owned(), json!({"whitespace_pattern": WHITE_SPACE}));
    }
    schema
}

fn short(text: &str) -> String {
    let text = text.split("\n<state>").next().unwrap_or(text).replace("\n<non-verbose/>", "");
    // one line: without pointers into a text that is not shown
    let shown = |line: &&str| !line.trim_matches('^').is_empty() && !line.contains(" | ");
    let lines = text.lines().map(str::trim).filter(shown);
    let text = lines.map(|line| line.trim_start_matches("error: ")).collect::<Vec<_>>().join(" ");
    if text.chars().count() <= MAX_REASON_CHARS {
        return text;
    }
    text.chars().take(MAX_REASON_CHARS).chain("...".chars()).collect()
}

/// A vocabulary in the form in which grammars are followed over it, made once for all requests.
pub(crate) struct Grammars {
    factory: ParserFactory,
}

impl Grammars {
    /// The vocabulary of a model with so many rows.
    ///
    /// # Errors
    /// Its tokens have no bytes of their own.
    pub fn new(tokenizer: &Tokenizer, rows: usize) -> Result<Self, ConstraintError> {
        if !tokenizer.has_bytes() {
            return Err(ConstraintError::Vocabulary);
        }
        let environment: TokEnv = Arc::new(Vocabulary::new(tokenizer, rows));
        let capabilities = InferenceCapabilities {
            ff_tokens: environment.tokenize_is_canonical(),
            ..InferenceCapabilities::default()
        };
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, capabilities, &slices)
            .map_err(|_| ConstraintError::Vocabulary)?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_items_in_row: 2000,
            initial_lexer_fuel: 1_000_000,
            step_lexer_fuel: 200_000,
            step_max_items: 50_000,
            // some kilobytes each
            max_lexer_states: 20_000,
            max_grammar_size: 100_000,
            precompute_large_lexemes: false,
            verbose_errors: false,
        };
        Ok(Self { factory })
    }

    /// Compiles a constraint.
    ///
    /// # Errors
    /// It is too large, too deep, too complex, or wrong.
    pub fn compile(&self, constraint: &Constraint) -> Result<Grammar, ConstraintError> {
        constraint.check()?;
        let what = constraint.name();
        let mut matcher = std::thread::scope(|scope| {
            let compile = || Matcher::new(self.factory.create_parser(constraint.grammar()));
            // on a stack of its own, for it recurses
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, compile);
            let gave_up = |_| ConstraintError::Invalid { what, reason: "the compiler gave up".to_owned() };
            thread.map_err(|_| ConstraintError::NoThread)?.join().map_err(gave_up)
        })?;
        if let Some(reason) = matcher.get_error() {
            return Err(ConstraintError::Invalid { what, reason: short(&reason) });
        }
        let _ = matcher.grammar_warnings();
        // copies share what a lexer has found out, and its failures, unless they are deep
        Ok(Grammar { what, begin: matcher.deep_clone(), matcher, tokens: Vec::new() })
    }
}

/// Where a sequence stands in its grammar.
pub(crate) struct Grammar {
    what: &'static str,
    /// As it was at first, to begin again from.
    begin: Matcher,
    matcher: Matcher,
    /// Taken so far.
    tokens: Vec<TokenId>,
}

impl Clone for Grammar {
    /// A matcher's own copies share a lexer, and with it what its states may still cost.
    fn clone(&self) -> Self {
        Self {
            what: self.what,
            begin: self.begin.deep_clone(),
            matcher: self.matcher.deep_clone(),
            tokens: self.tokens.clone(),
        }
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar")
            .field("what", &self.what)
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

impl Grammar {
    /// Whether what was taken is complete and nothing may follow.
    pub fn is_complete(&self) -> bool {
        !self.matcher.is_error() && self.matcher.is_stopped()
    }

    /// Whether what was taken is complete, be it that more may follow.
    pub fn may_end(&mut self) -> bool {
        self.is_complete() || self.matcher.is_accepting().unwrap_or(false)
    }

    /// The tokens that may come next, ascending, without those that end an answer; and whether it may end.
    ///
    /// # Errors
    /// The step took more work than is allowed.
    pub fn allowed(&mut self) -> Result<(Vec<u32>, bool), ConstraintError> {
        if self.is_complete() {
            return Ok((Vec::new(), true));
        }
        let may_end = self.matcher.is_accepting().map_err(|error| self.failure(&error))?;
        match self.matcher.compute_mask() {
            Ok(mask) => Ok((ids(&mask), may_end)),
            // no token at all goes on
            Err(_) if self.refused() => {
                self.restore(self.tokens.len())?;
                Ok((Vec::new(), may_end))
            }
            Err(error) => Err(self.failure(&error)),
        }
    }

    /// Takes a token that may come.
    ///
    /// # Errors
    /// It may not, or it took more work than is allowed.
    pub fn push(&mut self, id: u32) -> Result<(), ConstraintError> {
        self.matcher.consume_token(id).map_err(|error| self.failure(&error))?;
        self.tokens.push(id);
        Ok(())
    }

    /// Tokens that the grammar forces to come next; none where there is a choice.
    pub fn forced_ahead(&mut self) -> Vec<u32> {
        if self.matcher.is_stopped() { Vec::new() } else { self.matcher.compute_ff_tokens() }
    }

    /// Takes back all tokens but the first `len`.
    ///
    /// # Errors
    /// What was taken cannot be taken again.
    pub fn truncate(&mut self, len: usize) -> Result<(), ConstraintError> {
        let back = self.tokens.len().saturating_sub(len);
        // it may have failed at a token that it did not take
        if self.matcher.is_error() || back > 0 && self.matcher.rollback(back).is_err() {
            return self.restore(len);
        }
        self.tokens.truncate(len);
        Ok(())
    }

    /// Tokens taken.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Begins again and takes the first `len` tokens: a matcher that has failed stays so.
    fn restore(&mut self, len: usize) -> Result<(), ConstraintError> {
        self.tokens.truncate(len);
        self.matcher = self.begin.deep_clone();
        self.matcher.consume_tokens(&self.tokens).map_err(|error| self.failure(&error))
    }

    /// Whether the mask was empty, which the matcher takes for an error.
    fn refused(&self) -> bool {
        self.matcher
            .get_error()
            .is_some_and(|error| error.starts_with(&StopReason::NoExtensionBias.to_string()))
    }

    fn failure(&self, error: &impl std::fmt::Display) -> ConstraintError {
        ConstraintError::TooComplex { what: self.what, reason: short(&error.to_string()) }
    }
}

fn ids(mask: &SimpleVob) -> Vec<u32> {
    let mut ids = Vec::with_capacity(mask.num_set());
    mask.iter_set_entries(|id| ids.push(id as u32));
    ids
}

/// A tokenizer as grammars see it.
struct Vocabulary {
    tokenizer: Tokenizer,
    trie: TokTrie,
    canonical: bool,
}

impl Vocabulary {
    fn new(tokenizer: &Tokenizer, rows: usize) -> Self {
        let control: HashSet<u32> = tokenizer.control_tokens().iter().map(|token| token.id).collect();
        let word = |id: u32| {
            let bytes = tokenizer.token_bytes(id);
            if control.contains(&id) {
                // no text is such a token
                [&[TokTrie::SPECIAL_TOKEN_MARKER][..], &bytes].concat()
            } else {
                bytes.into_owned()
            }
        };
        let words: Vec<Vec<u8>> = (0..rows as u32).map(word).collect();
        // what ends an answer is the request's to say: no token does so for the grammar
        let info = TokRxInfo::new(rows as u32, INVALID_TOKEN);
        let trie = TokTrie::from(&info, &words);
        let mut vocabulary = Self { tokenizer: tokenizer.clone(), trie, canonical: false };
        // SentencePiece begins every text with a space; what is forced is no text of its own
        let probes = ["{\"a\": 1, \"b c\": [true]}", "a", " a", "\n\n", "ä鯨"];
        vocabulary.canonical = probes.iter().all(|probe| vocabulary.encode(probe).is_some());
        vocabulary
    }

    /// The tokens of a text, if they spell it.
    fn encode(&self, text: &str) -> Option<Vec<TokenId>> {
        let ids = self.tokenizer.encode(text).ok()?;
        let bytes: Vec<u8> =
            ids.iter().map(|&id| self.tokenizer.token_bytes(id)).flat_map(Cow::into_owned).collect();
        (bytes == text.as_bytes() && ids.iter().all(|&id| (id as usize) < self.trie.vocab_size()))
            .then_some(ids)
    }
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let whole = std::str::from_utf8(bytes).ok().and_then(|text| self.encode(text));
        whole.unwrap_or_else(|| self.trie.greedy_tokenize(bytes))
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.canonical
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use minke_data::TrainOptions;

    use super::*;

    fn tokenizer() -> Tokenizer {
        let sample = vec!["the whale sings\n".repeat(20)];
        Tokenizer::train(&sample, &TrainOptions { vocab_size: 300, ..TrainOptions::default() }).unwrap()
    }

    /// A draft that a mask allows may be too much to follow: once it is taken back all is as before it.
    #[test]
    fn a_token_that_was_too_much_is_taken_back() {
        let tokenizer = tokenizer();
        let grammars = Grammars::new(&tokenizer, tokenizer.vocab_size()).unwrap();
        // behind `y` thousands of rules may begin
        let mut text = "start: \"x\" \"z\" | \"y\" many\nmany: ".to_owned();
        let names: Vec<String> = (0..2500).map(|i| format!("r{i}")).collect();
        text.push_str(&names.join(" | "));
        for name in &names {
            write!(text, "\n{name}: \"{name}\" many").unwrap();
        }
        let id = |text: &str| tokenizer.id_of(text).unwrap();
        let mut grammar = grammars.compile(&Constraint::Grammar(text)).unwrap();
        let before = grammar.allowed().unwrap();
        assert!(before.0.contains(&id("x")) && before.0.contains(&id("y")));
        let error = grammar.push(id("y")).unwrap_err();
        assert!(matches!(error, ConstraintError::TooComplex { .. }), "{error}");
        grammar.truncate(0).unwrap();
        assert_eq!(grammar.allowed().unwrap(), before);
        grammar.push(id("x")).unwrap();
        assert_eq!(grammar.allowed().unwrap(), (vec![id("z")], false));
    }

    /// See [`STACK_BYTES`].
    #[test]
    fn grammars_are_followed_on_any_stack() {
        let tokenizer = tokenizer();
        let grammars = Grammars::new(&tokenizer, tokenizer.vocab_size()).unwrap();
        let (long, deep) = ("a".repeat(4000), MAX_DEPTH - 4);
        let mut nested = json!({"type": "boolean"});
        for _ in 0..deep / 2 {
            nested = json!({"type": "array", "items": nested, "minItems": 1});
        }
        let words: Vec<String> = (1..80).map(|n| format!("x{}z", "ay".repeat(n))).collect();
        let constraints = [
            // alternatives that turn out to have much in common
            Constraint::Regex(format!("x{long}b|[xy]{long}c|[xyz]{long}[de]")),
            Constraint::Regex(format!("{}x{}", "(".repeat(deep), ")+y?".repeat(deep))),
            Constraint::Regex("(x|xa|xaa)*b(a|b){90}".to_owned()),
            Constraint::Regex(format!("{}|[xy]a*", words.join("|"))),
            Constraint::Regex("([a-z]{1,300}[0-9]{1,300}){1,30}".to_owned()),
            Constraint::JsonSchema(nested),
            Constraint::Grammar("start: \"x\" start \"y\" | \"x\" \"a\"".to_owned()),
        ];
        let follow = || {
            for constraint in &constraints {
                let mut grammar = grammars.compile(constraint).unwrap();
                for _ in 0..300 {
                    let (ids, _) = grammar.allowed().unwrap();
                    let Some(&id) = ids.first() else { break };
                    grammar.push(id).unwrap();
                    grammar.forced_ahead();
                    grammar.truncate(grammar.len() - 1).unwrap();
                    grammar.push(id).unwrap();
                }
                assert!(grammar.len() > 0, "{constraint:?}");
                grammar.restore(grammar.len()).unwrap();
            }
        };
        std::thread::scope(|scope| {
            let small = std::thread::Builder::new().stack_size(128 << 10);
            small.spawn_scoped(scope, follow).unwrap().join().unwrap();
        });
    }
}
