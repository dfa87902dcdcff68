//! Names that people write: `~/notes`, `${CARGO_HOME:-~/.cargo}/registry/src`, `docs/**/*.md`.
//!
//! Patterns are few on purpose. A bare word (`rs`, `.rs`, `Makefile`, `target`) matches an extension or the
//! whole name of a file or folder. A pattern without a slash matches names, one with a slash matches the path
//! below the source's root. `*` and `?` stay within one name, `**` crosses folders, `{a,b}` is a choice.

use std::path::PathBuf;

/// Expands `~`, `$VAR`, `${VAR}` and `${VAR:-default}`.
///
/// # Errors
/// A variable that is not set and has no default, or braces that do not close: the text says which.
pub fn expand_path(text: &str) -> Result<PathBuf, String> {
    expand_with(text, &|name| std::env::var(name).ok()).map(PathBuf::from)
}

pub(crate) fn expand_with(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let value = if let Some(inner) = rest.strip_prefix('{') {
            let end = closing_brace(inner).ok_or_else(|| format!("`${{` is not closed in `{text}`"))?;
            rest = &inner[end + 1..];
            let (name, default) = match inner[..end].split_once(":-") {
                Some((name, default)) => (name, Some(default)),
                None => (&inner[..end], None),
            };
            match (lookup(name).filter(|value| !value.is_empty()), default) {
                (Some(value), _) => value,
                (None, Some(default)) => expand_with(default, lookup)?,
                (None, None) => return Err(format!("the environment variable `{name}` is not set")),
            }
        } else {
            let end = rest.find(|c: char| c != '_' && !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
            if end == 0 {
                return Err(format!("`$` without a name in `{text}`"));
            }
            let name = &rest[..end];
            rest = &rest[end..];
            lookup(name).ok_or_else(|| format!("the environment variable `{name}` is not set"))?
        };
        out.push_str(&value);
    }
    out.push_str(rest);
    if out == "~" || out.starts_with("~/") {
        let home = lookup("HOME").ok_or("`~` is used but the environment variable `HOME` is not set")?;
        out.replace_range(..1, &home);
    }
    Ok(out)
}

/// Where the brace closes that was opened before `text`, minding nested ones.
fn closing_brace(text: &str) -> Option<usize> {
    let mut depth = 0usize;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// A list of patterns, any of which may match.
#[derive(Debug, Clone, Default)]
pub(crate) struct Patterns {
    patterns: Vec<String>,
}

impl Patterns {
    pub(crate) fn new(texts: &[String]) -> Self {
        Self { patterns: texts.iter().flat_map(|text| expand_choices(text)).collect() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Whether `relative`, a path with `/` below the root, matches.
    pub(crate) fn matches(&self, relative: &str) -> bool {
        let name = relative.rsplit('/').next().unwrap_or(relative);
        let extension = name.rsplit_once('.').map(|(_, extension)| extension);
        self.patterns.iter().any(|pattern| {
            let pattern = pattern.trim_end_matches('/');
            if pattern.contains('/') {
                glob(pattern.trim_start_matches('/'), relative)
            } else {
                glob(pattern, name) || extension == Some(pattern.strip_prefix('.').unwrap_or(pattern))
            }
        })
    }
}

/// `a.{b,c}` to `a.b` and `a.c`; several braces multiply, up to a bound that no honest pattern reaches.
fn expand_choices(pattern: &str) -> Vec<String> {
    let mut done = Vec::new();
    let mut todo = vec![pattern.to_owned()];
    while let Some(next) = todo.pop() {
        let span = next.find('{').and_then(|a| next[a..].find('}').map(|b| (a, a + b)));
        match span {
            Some((open, close)) if done.len() + todo.len() < 256 => {
                for choice in next[open + 1..close].split(',') {
                    todo.push(format!("{}{choice}{}", &next[..open], &next[close + 1..]));
                }
            }
            _ => done.push(next),
        }
    }
    done
}

/// Matches with a table over (pattern, text): the time is their product, whatever the stars.
fn glob(pattern: &str, text: &str) -> bool {
    enum Piece {
        Char(char),
        One,
        Star,
        Folders,
        Any,
    }
    let mut pieces = Vec::new();
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        let (piece, taken) = if rest.starts_with("**/") {
            (Piece::Folders, 3)
        } else if rest.starts_with("**") {
            (Piece::Any, 2)
        } else if c == '*' {
            (Piece::Star, 1)
        } else if c == '?' {
            (Piece::One, 1)
        } else {
            (Piece::Char(c), c.len_utf8())
        };
        pieces.push(piece);
        rest = &rest[taken..];
    }
    let text: Vec<char> = text.chars().collect();
    // reach[j]: the pieces so far match the first j characters
    let mut reach = vec![false; text.len() + 1];
    reach[0] = true;
    for piece in &pieces {
        let mut next = vec![false; text.len() + 1];
        match piece {
            Piece::Char(c) => {
                for j in 0..text.len() {
                    next[j + 1] = reach[j] && text[j] == *c;
                }
            }
            Piece::One => {
                for j in 0..text.len() {
                    next[j + 1] = reach[j] && text[j] != '/';
                }
            }
            Piece::Star | Piece::Any => {
                let crosses = matches!(piece, Piece::Any);
                let mut open = false;
                for j in 0..=text.len() {
                    if j > 0 && text[j - 1] == '/' && !crosses {
                        open = false;
                    }
                    open |= reach[j];
                    next[j] = open;
                }
            }
            Piece::Folders => {
                // nothing at all, or anything that ends in a slash
                let mut open = false;
                for j in 0..=text.len() {
                    next[j] = reach[j] || (open && j > 0 && text[j - 1] == '/');
                    open |= reach[j];
                }
            }
        }
        reach = next;
    }
    reach[text.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(name: &str) -> Option<String> {
        match name {
            "HOME" => Some("/home/u".into()),
            "SET" => Some("value".into()),
            "EMPTY" => Some(String::new()),
            _ => None,
        }
    }

    #[test]
    fn paths_expand() {
        let cases = [
            ("~/a", "/home/u/a"),
            ("~", "/home/u"),
            ("a~b", "a~b"),
            ("$SET/x", "value/x"),
            ("${SET}x", "valuex"),
            ("${NO:-~/.cargo}/registry", "/home/u/.cargo/registry"),
            ("${EMPTY:-d}", "d"),
            ("${NO:-${SET}/y}/z", "value/y/z"),
            ("/plain/ä", "/plain/ä"),
        ];
        for (text, expected) in cases {
            assert_eq!(expand_with(text, &lookup).unwrap(), expected, "{text}");
        }
        for text in ["$NO/x", "${NO}", "${SET", "a$"] {
            assert!(expand_with(text, &lookup).is_err(), "{text}");
        }
        assert!(expand_with("$NO/x", &lookup).unwrap_err().contains("`NO`"));
    }

    #[test]
    fn patterns_match() {
        let cases = [
            ("rs", "a/b/lib.rs", true),
            (".rs", "lib.rs", true),
            ("*.rs", "a/lib.rs", true),
            ("*.rs", "a/lib.rst", false),
            ("Makefile", "x/Makefile", true),
            ("target", "a/target", true),
            ("src/**/*.rs", "src/lib.rs", true),
            ("src/**/*.rs", "src/a/b/lib.rs", true),
            ("src/**/*.rs", "tests/lib.rs", false),
            ("src/*.rs", "src/a/lib.rs", false),
            ("**/tests/**", "a/tests/b/c", true),
            ("**/tests/**", "a/contests/b", false),
            ("*.{md,txt}", "a/read.txt", true),
            ("*.{md,txt}", "a/read.rs", false),
            ("?.c", "a.c", true),
            ("?.c", "ab.c", false),
        ];
        for (pattern, path, expected) in cases {
            assert_eq!(Patterns::new(&[pattern.to_owned()]).matches(path), expected, "{pattern} on {path}");
        }
    }

    #[test]
    fn many_stars_stay_fast() {
        let pattern = "*a".repeat(100);
        assert!(!glob(&pattern, &"a".repeat(99)));
        assert!(glob(&pattern, &"a".repeat(5000)));
    }
}
