//! A recipe's text, parsed, whatever it is a recipe for.

use std::cell::RefCell;
use std::io::Read;
use std::path::Path;

use super::error::RecipeError;
use super::reader::{Places, Section};
use super::tree::{self, Kind, Meaning, Node, Texts};

/// No recipe is longer.
pub(super) const MAX_BYTES: u64 = 1 << 20;

/// Keys that tell what a recipe is for, and the commands whose recipes may have them.
const TELLING: [(&str, &[&str]); 13] = [
    ("stage", &["make"]),
    ("data", &["pretrain", "sft", "distill"]),
    ("model.depth", &["pretrain"]),
    ("model.family", &["pretrain"]),
    ("model.path", &["sft", "grpo", "sample"]),
    ("tasks", &["grpo", "sample", "distill"]),
    ("rollout", &["grpo", "distill"]),
    ("objective", &["grpo"]),
    ("reward", &["grpo"]),
    ("keep", &["sample"]),
    ("teacher", &["distill"]),
    ("student", &["distill"]),
    ("distill", &["distill"]),
];

/// TOML text with `--set` options applied, whose values know where they stand.
///
/// Reading goes by [`Section`]s from [`Document::root`]; the keys that are asked for are the keys that exist.
#[derive(Debug, Clone)]
pub struct Document {
    tree: Node,
    texts: Texts,
    places: RefCell<Places>,
    out: Option<String>,
}

impl Document {
    /// Reads a recipe file and applies `a.b=v` options in order.
    ///
    /// # Errors
    /// Unreadable or overlong files and invalid TOML, with the place.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, RecipeError> {
        let unread = |reason: String| RecipeError::Read { path: path.to_owned(), reason };
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(|error| unread(error.to_string()))?;
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| unread(error.to_string()))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(unread(format!("it is longer than {MAX_BYTES} bytes, so it is no recipe")));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            unread(format!("it is not UTF-8 at byte {}", error.utf8_error().valid_up_to()))
        })?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut document = Self::parse(&path.display().to_string(), &text, overrides)?;
        document.texts.folder = Some(folder.unwrap_or(Path::new(".")).to_owned());
        Ok(document)
    }

    /// Reads a recipe from text; `name` is what messages call it. Relative paths in it have no folder to start from.
    ///
    /// # Errors
    /// Invalid TOML, with the place.
    pub fn parse(name: &str, text: &str, overrides: &[String]) -> Result<Self, RecipeError> {
        let (tree, texts) = tree::parse(name, text)?;
        let mut document = Self { tree, texts, places: RefCell::default(), out: None };
        for option in overrides {
            document.set(option, &|keys| Ok(keys.iter().map(|&key| key.to_owned()).collect()))?;
        }
        Ok(document)
    }

    /// Applies an option `a.b=v`, where `meaning` makes keys of the document of those that are given, or says what is wrong
    /// with them.
    ///
    /// # Errors
    /// What `meaning` says, values that are no TOML, and keys of what has no parts.
    pub fn set(&mut self, option: &str, meaning: Meaning<'_>) -> Result<(), RecipeError> {
        tree::set(&mut self.tree, &mut self.texts, option, meaning)
    }

    /// The same, written to this folder if one is given, whatever the recipe says.
    #[must_use]
    pub fn written_to(self, out: Option<&Path>) -> Self {
        Self { out: out.map(|out| out.display().to_string()), ..self }
    }

    /// The outermost table.
    pub fn root(&self) -> Section<'_> {
        Section::root(&self.tree, &self.texts, &self.places)
    }

    /// The recipe that the table at `index` of the array `key` is, but for some of its keys; it stands where it stands.
    pub fn within(&self, key: &str, index: usize, without: &[&str]) -> Option<Self> {
        let Kind::Array(nodes) = &self.tree.entry(key)?.node.kind else { return None };
        let mut tree = nodes.get(index)?.clone();
        if let Kind::Table(entries) = &mut tree.kind {
            entries.retain(|entry| !without.contains(&&entry.key[..]));
        }
        Some(Self { tree, texts: self.texts.clone(), places: RefCell::default(), out: None })
    }

    /// Refuses the recipe of another command: its own reader would say of every key that it is unknown.
    ///
    /// # Errors
    /// What it says is told by another command's keys, and by none of this one's.
    pub fn is_for(&self, command: &'static str) -> Result<(), RecipeError> {
        let given = TELLING.iter().filter(|(key, _)| self.tree.entry(key).is_some());
        let mut commands: Option<Vec<&str>> = None;
        for (_, known) in given {
            let all = commands.unwrap_or_else(|| known.to_vec());
            commands = Some(all.into_iter().filter(|command| known.contains(command)).collect());
        }
        match commands {
            // where keys contradict each other the reader says which it does not know
            Some(commands) if !commands.is_empty() && !commands.contains(&command) => {
                Err(RecipeError::OtherCommand {
                    name: self.name().to_owned(),
                    expected: command,
                    got: commands.join("` or `minke "),
                })
            }
            _ => Ok(()),
        }
    }

    /// The recipe's file, or what messages call it.
    pub fn name(&self) -> &str {
        self.texts.name()
    }

    /// The folder to write to, whatever the recipe says.
    pub(super) fn out(&self) -> Option<&str> {
        self.out.as_deref()
    }

    /// Where the relative paths of its text start: the folder of its file.
    pub fn folder(&self) -> Option<&Path> {
        self.texts.folder.as_deref()
    }

    /// The dotted keys that were asked for and found so far.
    pub fn given(&self) -> std::collections::BTreeSet<String> {
        self.places.borrow().keys().cloned().collect()
    }

    pub(super) fn texts_and_places(&self) -> (Texts, Places) {
        (self.texts.clone(), self.places.borrow().clone())
    }
}
