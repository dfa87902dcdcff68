//! Typed reading of a section. The keys that are asked for are the keys that exist: there is no second list.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use super::error::{Frame, RecipeError};
use super::sections::located;
use super::tree::{Entry, Kind, Node, Place, Texts};

/// Where each key that the recipe gives stands, by dotted name.
pub(super) type Places = BTreeMap<String, Place>;

/// What becomes of a string, by its key and whether an option said it; or what is expected in its place.
type Settle<'f> = &'f mut dyn FnMut(&str, &str, bool) -> Result<String, String>;

/// A table of the recipe, or an absent one.
pub struct Section<'a> {
    texts: &'a Texts,
    places: &'a RefCell<Places>,
    path: String,
    entries: &'a [Entry],
    asked: Vec<&'static str>,
}

impl<'a> Section<'a> {
    pub(super) fn root(node: &'a Node, texts: &'a Texts, places: &'a RefCell<Places>) -> Self {
        let entries = if let Kind::Table(entries) = &node.kind { entries.as_slice() } else { &[] };
        Self { texts, places, path: String::new(), entries, asked: Vec::new() }
    }

    fn dotted(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The value of a key, which thereby exists.
    pub(super) fn take(&mut self, key: &'static str) -> Option<&'a Node> {
        self.asked.push(key);
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        let place = match entry.node.kind {
            Kind::Table(_) => entry.place.clone(),
            _ => entry.node.place.clone(),
        };
        self.places.borrow_mut().insert(self.dotted(key), place);
        Some(&entry.node)
    }

    /// Where a key stands, if it was given and asked for; the section itself where the key is empty.
    pub(super) fn frame(&self, key: &str) -> Option<Box<Frame>> {
        let key = if key.is_empty() { self.path.clone() } else { self.dotted(key) };
        self.places.borrow().get(&key).map(|place| self.texts.frame(place))
    }

    /// The section's dotted name.
    pub(super) fn name(&self) -> &str {
        &self.path
    }

    /// An error about the value of a key.
    pub(super) fn invalid(&self, key: &str, node: &Node, expected: &str, hint: &str) -> RecipeError {
        RecipeError::Invalid {
            key: self.dotted(key),
            expected: expected.to_owned(),
            got: node.describe(),
            frame: Some(self.texts.frame(&node.place)),
            hint: hint.to_owned(),
        }
    }

    /// An error about a key that is absent.
    pub fn missing(&self, key: &str, expected: &str) -> RecipeError {
        RecipeError::Missing {
            key: self.dotted(key),
            name: self.texts.name().to_owned(),
            expected: expected.to_owned(),
            hint: String::new(),
        }
    }

    /// An error about a key that another one excludes.
    pub fn conflict(&self, key: &str, got: &str, expected: &str) -> RecipeError {
        let place = self.places.borrow().get(&self.dotted(key)).cloned();
        RecipeError::Invalid {
            key: self.dotted(key),
            expected: expected.to_owned(),
            got: got.to_owned(),
            frame: place.map(|place| self.texts.frame(&place)),
            hint: String::new(),
        }
    }

    /// A table within this one; an absent one reads as empty.
    pub fn section(&mut self, key: &'static str) -> Result<Section<'a>, RecipeError> {
        let entries = match self.take(key) {
            None => &[],
            Some(Node { kind: Kind::Table(entries), .. }) => entries.as_slice(),
            Some(node) => return Err(self.invalid(key, node, &format!("a table [{key}]"), "")),
        };
        Ok(self.child(self.dotted(key), entries))
    }

    fn child(&self, path: String, entries: &'a [Entry]) -> Section<'a> {
        Section { texts: self.texts, places: self.places, path, entries, asked: Vec::new() }
    }

    /// An array of tables.
    pub fn sections(&mut self, key: &'static str) -> Result<Vec<Section<'a>>, RecipeError> {
        let Some(node) = self.take(key) else { return Ok(Vec::new()) };
        let expected = "an array of tables";
        let Kind::Array(nodes) = &node.kind else { return Err(self.invalid(key, node, expected, "")) };
        let path = self.dotted(key);
        let child = |(index, node): (usize, &'a Node)| match &node.kind {
            Kind::Table(entries) => Ok(self.child(format!("{path}.{index}"), entries)),
            _ => Err(self.invalid(key, node, expected, "")),
        };
        nodes.iter().enumerate().map(child).collect()
    }

    /// An integer within bounds.
    pub fn integer(&mut self, key: &'static str, low: u64, high: u64) -> Result<Option<u64>, RecipeError> {
        let Some(node) = self.take(key) else { return Ok(None) };
        match node.kind {
            Kind::Integer(number) if (i128::from(low)..=i128::from(high)).contains(&number) => {
                Ok(Some(number as u64))
            }
            _ => Err(self.invalid(key, node, &format!("an integer from {low} to {high}"), "")),
        }
    }

    /// A finite number that is `ok`, also in the 32 bits that it is used in; `expected` says which are.
    pub fn float(
        &mut self,
        key: &'static str,
        expected: &str,
        ok: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, RecipeError> {
        let Some(node) = self.take(key) else { return Ok(None) };
        let ok = |number: f64| number.is_finite() && ok(number);
        match number(node).filter(|number| ok(*number)) {
            Some(number) if ok(in_32_bits(number)) => Ok(Some(number)),
            Some(number) => {
                let hint = format!("it is used in 32 bits, where it is {}", in_32_bits(number));
                Err(self.invalid(key, node, expected, &hint))
            }
            None => Err(self.invalid(key, node, expected, "")),
        }
    }

    /// A number above 0.
    pub fn positive(&mut self, key: &'static str) -> Result<Option<f64>, RecipeError> {
        self.float(key, "a number above 0", |number| number > 0.0)
    }

    /// A number not below 0.
    pub fn not_negative(&mut self, key: &'static str) -> Result<Option<f64>, RecipeError> {
        self.float(key, "a number not below 0", |number| number >= 0.0)
    }

    /// A number from 0 to 1.
    pub fn share(&mut self, key: &'static str) -> Result<Option<f64>, RecipeError> {
        self.float(key, "a number from 0 to 1", |number| (0.0..=1.0).contains(&number))
    }

    /// A temperature that sampling takes; 0 for the likeliest token.
    pub fn temperature(&mut self, key: &'static str) -> Result<Option<f64>, RecipeError> {
        self.float(key, "a number from 0 to 100", |number| (0.0..=100.0).contains(&number))
    }

    /// A temperature that is not 0, as what is learned from needs it.
    pub fn positive_temperature(&mut self, key: &'static str) -> Result<Option<f64>, RecipeError> {
        self.float(key, "a number above 0, up to 100", |number| number > 0.0 && number <= 100.0)
    }

    /// The share of probability that tokens are chosen from.
    pub fn top_p(&mut self) -> Result<Option<f64>, RecipeError> {
        self.float("top_p", "a number above 0, up to 1", |share| share > 0.0 && share <= 1.0)
    }

    /// A pair of numbers from 0 to below 1.
    pub fn decays(&mut self, key: &'static str) -> Result<Option<[f64; 2]>, RecipeError> {
        let Some(node) = self.take(key) else { return Ok(None) };
        let pair = match &node.kind {
            Kind::Array(nodes) if nodes.len() == 2 => number(&nodes[0]).zip(number(&nodes[1])),
            _ => None,
        };
        let ok = |number: f64| (0.0..1.0).contains(&in_32_bits(number));
        match pair.filter(|(a, b)| ok(*a) && ok(*b)) {
            Some((a, b)) => Ok(Some([a, b])),
            None => Err(self.invalid(key, node, "two numbers from 0 to below 1, such as [0.9, 0.95]", "")),
        }
    }

    /// True or false.
    pub fn flag(&mut self, key: &'static str) -> Result<Option<bool>, RecipeError> {
        match self.take(key) {
            None => Ok(None),
            Some(Node { kind: Kind::Boolean(flag), .. }) => Ok(Some(*flag)),
            Some(node) => Err(self.invalid(key, node, "true or false", "")),
        }
    }

    /// A string that is not empty.
    pub fn text(&mut self, key: &'static str) -> Result<Option<String>, RecipeError> {
        match self.take(key) {
            None => Ok(None),
            Some(Node { kind: Kind::Text(text), .. }) if !text.is_empty() => Ok(Some(text.clone())),
            Some(node) => Err(self.invalid(key, node, "a string that is not empty", "")),
        }
    }

    /// Where relative paths in the value of a key start, if it was given and asked for.
    pub fn folder(&self, key: &str) -> Option<&Path> {
        self.texts.folder(self.places.borrow().get(&self.dotted(key))?)
    }

    /// A path, from where relative ones start.
    pub fn path(&mut self, key: &'static str) -> Result<Option<String>, RecipeError> {
        Ok(self.text(key)?.map(|path| located(path, self.folder(key))))
    }

    /// An array of strings.
    pub fn texts(&mut self, key: &'static str) -> Result<Option<Vec<String>>, RecipeError> {
        let Some(node) = self.take(key) else { return Ok(None) };
        let expected = "an array of strings";
        let Kind::Array(nodes) = &node.kind else { return Err(self.invalid(key, node, expected, "")) };
        let text = |node: &Node| match &node.kind {
            Kind::Text(text) => Ok(text.clone()),
            _ => Err(self.invalid(key, node, expected, "")),
        };
        nodes.iter().map(text).collect::<Result<_, _>>().map(Some)
    }

    /// One of a few words.
    pub fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, RecipeError> {
        let Some(node) = self.take(key) else { return Ok(None) };
        match one_of(node, choices) {
            Some(choice) => Ok(Some(choice)),
            None => Err(self.invalid(key, node, &listed(choices), "")),
        }
    }

    /// A number of things: an integer, or a string with a suffix of `units`.
    pub fn count(&mut self, key: &'static str, units: &Units) -> Result<Option<u64>, RecipeError> {
        let Some(node) = self.take(key) else { return Ok(None) };
        let found = match &node.kind {
            Kind::Integer(number) => u64::try_from(*number).ok(),
            Kind::Text(text) => units.parse(text),
            _ => None,
        };
        match found.filter(|count| (1..=1 << 53).contains(count)) {
            Some(count) => Ok(Some(count)),
            None => Err(self.invalid(key, node, units.expected, "")),
        }
    }

    /// Every key that was not asked for, as plain TOML: what another reader will read. `settle` makes of a string what
    /// it is to be, from its key and whether an option said it, or says what is expected in its place.
    ///
    /// # Errors
    /// What `settle` says, dates, and integers beyond 64 bits.
    pub fn rest(&mut self, settle: Settle<'_>) -> Result<toml::Table, RecipeError> {
        let rest = self.entries.iter().filter(|entry| !self.asked.contains(&entry.key.as_str()));
        rest.map(|entry| Ok((entry.key.clone(), self.plain(&entry.key, &entry.node, settle)?))).collect()
    }

    fn plain(&self, key: &str, node: &Node, settle: Settle<'_>) -> Result<toml::Value, RecipeError> {
        Ok(match &node.kind {
            Kind::Boolean(flag) => toml::Value::Boolean(*flag),
            Kind::Integer(number) => match i64::try_from(*number) {
                Ok(number) => toml::Value::Integer(number),
                Err(_) => return Err(self.invalid(key, node, "an integer of at most 64 bits", "")),
            },
            Kind::Float(number) => toml::Value::Float(*number),
            Kind::Text(text) => match settle(key, text, node.place.is_set()) {
                Ok(text) => toml::Value::String(text),
                Err(expected) => return Err(self.invalid(key, node, &expected, "")),
            },
            Kind::Datetime => return Err(self.invalid(key, node, "a value that is no date", "")),
            Kind::Array(nodes) => {
                let values = nodes.iter().enumerate();
                let values = values.map(|(index, node)| self.plain(&format!("{key}.{index}"), node, settle));
                toml::Value::Array(values.collect::<Result<_, _>>()?)
            }
            Kind::Table(entries) => {
                let mut table = toml::Table::new();
                for entry in entries {
                    let value = self.plain(&format!("{key}.{}", entry.key), &entry.node, settle)?;
                    table.insert(entry.key.clone(), value);
                }
                toml::Value::Table(table)
            }
        })
    }

    /// Refuses the keys that nobody asked for.
    pub fn finish(self) -> Result<(), RecipeError> {
        let Some(entry) = self.entries.iter().find(|entry| !self.asked.contains(&entry.key.as_str())) else {
            return Ok(());
        };
        let hint = if let Some(near) = nearest(&entry.key, &self.asked) {
            format!("did you mean `{near}`?")
        } else {
            let mut known = self.asked.clone();
            known.sort_unstable();
            known.dedup();
            format!("known keys: {}", known.join(", "))
        };
        Err(RecipeError::UnknownKey {
            key: entry.key.clone(),
            section: if self.path.is_empty() { "the recipe".to_owned() } else { format!("[{}]", self.path) },
            frame: self.texts.frame(&entry.place),
            hint,
        })
    }
}

fn number(node: &Node) -> Option<f64> {
    match node.kind {
        Kind::Float(number) => Some(number),
        Kind::Integer(number) => Some(number as f64),
        _ => None,
    }
}

fn in_32_bits(number: f64) -> f64 {
    f64::from(number as f32)
}

/// The choice that a value names.
pub(super) fn one_of<T: Copy>(node: &Node, choices: &[(&str, T)]) -> Option<T> {
    let Kind::Text(text) = &node.kind else { return None };
    choices.iter().find(|(name, _)| name == text).map(|(_, choice)| *choice)
}

/// `"a", "b" or "c"`.
pub(super) fn listed<T>(choices: &[(&str, T)]) -> String {
    let names: Vec<String> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
    match names.as_slice() {
        [] => String::new(),
        [one] => one.clone(),
        [rest @ .., last] => format!("{} or {last}", rest.join(", ")),
    }
}

/// Suffixes of counts.
pub struct Units {
    expected: &'static str,
    suffixes: &'static [(&'static str, u64)],
}

/// Tokens: K, M, B and T are powers of a thousand.
pub const TOKENS: Units = Units {
    expected: "a number of tokens, such as 4000000 or \"4M\"",
    suffixes: &[("K", 1_000), ("M", 1_000_000), ("B", 1_000_000_000), ("T", 1_000_000_000_000)],
};

/// Bytes: MB is a million, `MiB` is 2^20.
pub const BYTES: Units = Units {
    expected: "a number of bytes, such as 1000000, \"64MB\" or \"64MiB\"",
    suffixes: &[
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("B", 1),
    ],
};

impl Units {
    fn parse(&self, text: &str) -> Option<u64> {
        let text = text.trim();
        let suffix = self.suffixes.iter().find(|(suffix, _)| text.ends_with(suffix));
        let (digits, unit) = match suffix {
            Some((suffix, unit)) => (&text[..text.len() - suffix.len()], *unit),
            None => (text, 1),
        };
        let number: f64 = digits.trim().replace('_', "").parse().ok()?;
        let count = number * unit as f64;
        // a fraction of a unit is fine, a fraction of one is not
        (count >= 0.0 && count <= (1_u64 << 53) as f64 && count.fract() == 0.0).then_some(count as u64)
    }
}

/// The known key nearest to `key`, if it is near enough to be meant.
pub fn nearest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    let allowed = match key.chars().count() {
        0..=4 => 1,
        5..=7 => 2,
        longer => (longer / 3).min(4),
    };
    let near = known.iter().map(|known| (distance(key, known), *known)).min()?;
    (near.0 <= allowed).then_some(near.1)
}

/// Levenshtein's distance, with the key cut where it could not be near anything.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}
