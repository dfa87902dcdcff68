//! A recipe's text, parsed, whatever it is a recipe for.

use std::cell::RefCell;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::RecipeError;
use super::reader::{Places, Section};
use super::tree::{self, Node, Texts};

/// No recipe is longer.
pub(super) const MAX_BYTES: u64 = 1 << 20;

/// TOML text with `--set` options applied, whose values know where they stand.
///
/// Reading goes by [`Section`]s from [`Document::root`]; the keys that are asked for are the keys that exist.
#[derive(Debug)]
pub struct Document {
    tree: Node,
    texts: Texts,
    places: RefCell<Places>,
    folder: Option<PathBuf>,
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
        let folder = folder.unwrap_or(Path::new(".")).to_owned();
        Ok(Self { folder: Some(folder), ..Self::parse(&path.display().to_string(), &text, overrides)? })
    }

    /// Reads a recipe from text; `name` is what messages call it. Relative paths in it have no folder to start from.
    ///
    /// # Errors
    /// Invalid TOML, with the place.
    pub fn parse(name: &str, text: &str, overrides: &[String]) -> Result<Self, RecipeError> {
        let (tree, texts) = tree::parse(name, text, overrides)?;
        Ok(Self { tree, texts, places: RefCell::default(), folder: None })
    }

    /// The outermost table.
    pub fn root(&self) -> Section<'_> {
        Section::root(&self.tree, &self.texts, &self.places)
    }

    /// The recipe's file, or what messages call it.
    pub fn name(&self) -> &str {
        self.texts.name()
    }

    /// Where its relative paths start: the folder of its file.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// The dotted keys that were asked for and found so far.
    pub fn given(&self) -> std::collections::BTreeSet<String> {
        self.places.borrow().keys().cloned().collect()
    }

    pub(super) fn texts_and_places(&self) -> (Texts, Places) {
        (self.texts.clone(), self.places.borrow().clone())
    }
}
