//! TOML text and `--set` options as one tree of values that know where they stand.

use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::error::{Frame, RecipeError};

/// A range of one of the texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    source: usize,
    span: Range<usize>,
}

impl Place {
    /// Whether an option said it, rather than the recipe.
    pub fn is_set(&self) -> bool {
        self.source > 0
    }
}

/// The recipe's text and, behind it, those of the options.
#[derive(Debug, Clone)]
pub(super) struct Texts {
    texts: Vec<(String, String)>,
    /// The folder of the recipe's file, if it is one.
    pub folder: Option<PathBuf>,
}

impl Texts {
    /// The frame of a place, boxed since errors are moved about.
    #[expect(clippy::unnecessary_box_returns, reason = "its only use is in errors, which hold it boxed")]
    pub fn frame(&self, place: &Place) -> Box<Frame> {
        let (name, text) = &self.texts[place.source];
        Box::new(Frame::new(name, text, place.span.clone()))
    }

    /// Where relative paths start that stand there: in the recipe's folder, and those of options where the user is.
    pub fn folder(&self, place: &Place) -> Option<&Path> {
        if place.is_set() { Some(Path::new(".")) } else { self.folder.as_deref() }
    }

    /// The recipe's own name.
    pub fn name(&self) -> &str {
        &self.texts[0].0
    }
}

#[derive(Debug, Clone)]
pub(super) struct Node {
    pub kind: Kind,
    pub place: Place,
}

#[derive(Debug, Clone)]
pub(super) enum Kind {
    Boolean(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    Datetime,
    Array(Vec<Node>),
    Table(Vec<Entry>),
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub key: String,
    pub place: Place,
    pub node: Node,
}

impl Node {
    /// The entry of a dotted key.
    pub fn entry(&self, key: &str) -> Option<&Entry> {
        let Kind::Table(entries) = &self.kind else { return None };
        let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
        let entry = entries.iter().find(|entry| entry.key == first)?;
        rest.map_or(Some(entry), |rest| entry.node.entry(rest))
    }

    /// The value for a message.
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Boolean(flag) => flag.to_string(),
            Kind::Integer(number) => number.to_string(),
            Kind::Float(number) => format!("{number:?}"),
            Kind::Text(text) if text.chars().count() <= 60 => format!("the string {text:?}"),
            Kind::Text(_) => "a long string".to_owned(),
            Kind::Datetime => "a date".to_owned(),
            Kind::Array(_) => "an array".to_owned(),
            Kind::Table(_) => "a table".to_owned(),
        }
    }
}

/// Parses a recipe.
pub(super) fn parse(name: &str, text: &str) -> Result<(Node, Texts), RecipeError> {
    let texts = Texts { texts: vec![(name.to_owned(), text.to_owned())], folder: None };
    let table = DeTable::parse(text).map_err(|error| {
        let span = error.span().unwrap_or(0..0);
        RecipeError::Syntax {
            message: error.message().to_owned(),
            frame: Box::new(Frame::new(name, text, span)),
        }
    })?;
    let span = table.span();
    Ok((Node { kind: self::table(table.get_ref(), 0, 0), place: Place { source: 0, span } }, texts))
}

/// The keys that the keys of an option mean, or what is wrong with them.
pub(super) type Meaning<'f> = &'f dyn Fn(&[&str]) -> Result<Vec<String>, String>;

/// Applies an option, whose place is its text as it was given.
pub(super) fn set(
    root: &mut Node,
    texts: &mut Texts,
    option: &str,
    meaning: Meaning<'_>,
) -> Result<(), RecipeError> {
    texts.texts.push(("--set".to_owned(), option.to_owned()));
    apply(root, option, meaning, texts.texts.len() - 1)
}

fn table(table: &DeTable<'_>, source: usize, offset: usize) -> Kind {
    let shift = |span: Range<usize>| Place { source, span: span.start + offset..span.end + offset };
    let mut entries: Vec<Entry> = table
        .iter()
        .map(|(key, value)| Entry {
            key: key.get_ref().to_string(),
            place: shift(key.span()),
            node: Node { kind: kind(value.get_ref(), source, offset), place: shift(value.span()) },
        })
        .collect();
    // the parser sorts by name; errors should come in reading order
    entries.sort_by_key(|entry| entry.place.span.start);
    Kind::Table(entries)
}

fn kind(value: &DeValue<'_>, source: usize, offset: usize) -> Kind {
    match value {
        DeValue::String(text) => Kind::Text(text.to_string()),
        // beyond 128 bits it is out of every bound anyway
        DeValue::Integer(number) => {
            Kind::Integer(i128::from_str_radix(number.as_str(), number.radix()).unwrap_or(i128::MAX))
        }
        DeValue::Float(number) => Kind::Float(number.as_str().parse().unwrap_or(f64::NAN)),
        DeValue::Boolean(flag) => Kind::Boolean(*flag),
        DeValue::Datetime(_) => Kind::Datetime,
        DeValue::Array(values) => Kind::Array(
            values
                .iter()
                .map(|value| Node {
                    kind: kind(value.get_ref(), source, offset),
                    place: Place { source, span: value.span().start + offset..value.span().end + offset },
                })
                .collect(),
        ),
        DeValue::Table(inner) => table(inner, source, offset),
    }
}

/// Applies `a.b=v`: a TOML value, or a bare word as a string.
fn apply(root: &mut Node, option: &str, meaning: Meaning<'_>, source: usize) -> Result<(), RecipeError> {
    let refuse = |reason: String| RecipeError::Override { text: option.to_owned(), reason };
    let (path, value) = option
        .split_once('=')
        .ok_or_else(|| refuse("expected KEY=VALUE, such as train.lr=0.001".to_owned()))?;
    let offset = path.len() + 1;
    let given: Vec<&str> = path.split('.').map(str::trim).collect();
    if given.iter().any(|key| key.is_empty()) {
        return Err(refuse("expected dotted keys before the equals sign, such as train.lr".to_owned()));
    }
    let keys = meaning(&given).map_err(refuse)?;
    // as they were given, the first of them so far that `depth` keys are behind them
    let told = |depth: usize| given.split_at((depth + given.len()).saturating_sub(keys.len()));
    let whole = Place { source, span: offset..option.len() };
    let parsed = match DeValue::parse(value.trim()) {
        Ok(parsed) => {
            let lead = value.len() - value.trim_start().len();
            Node { kind: kind(parsed.get_ref(), source, offset + lead), place: whole.clone() }
        }
        Err(error) if value.trim_start().starts_with(['[', '{', '"', '\'']) => {
            return Err(refuse(format!("the value is not valid TOML: {}", error.message())));
        }
        Err(_) => Node { kind: Kind::Text(value.trim().to_owned()), place: whole.clone() },
    };
    let key_place = Place { source, span: 0..path.len() };
    let mut node = root;
    for (depth, key) in keys.iter().enumerate() {
        let last = depth + 1 == keys.len();
        node = match &mut node.kind {
            Kind::Table(entries) => {
                let found = entries.iter().position(|entry| entry.key == *key);
                let index = found.unwrap_or_else(|| {
                    let node = Node { kind: Kind::Table(Vec::new()), place: key_place.clone() };
                    entries.push(Entry { key: key.clone(), place: key_place.clone(), node });
                    entries.len() - 1
                });
                let entry = &mut entries[index];
                if last {
                    entry.place = key_place.clone();
                }
                &mut entry.node
            }
            Kind::Array(nodes) => {
                let length = nodes.len();
                key.parse().ok().and_then(|index: usize| nodes.get_mut(index)).ok_or_else(|| {
                    refuse(format!(
                        "`{}` is an array of {length}, `{key}` is no index",
                        told(depth).0.join(".")
                    ))
                })?
            }
            Kind::Boolean(_) | Kind::Integer(_) | Kind::Float(_) | Kind::Text(_) | Kind::Datetime => {
                let value = match &parsed.kind {
                    Kind::Text(text) => format!("{text:?}"),
                    _ => value.trim().to_owned(),
                };
                let (whole, part) = told(depth);
                let (whole, part) = (whole.join("."), part.join("."));
                return Err(refuse(format!(
                    "`{whole}` is a single value, not a section; to give it parts, give all of them at once: \
                     --set '{whole}={{{part}={value}, ...}}'"
                )));
            }
        };
    }
    *node = parsed;
    Ok(())
}
