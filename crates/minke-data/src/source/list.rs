//! Which files a source has: walking, patterns, caps, groups.

use std::fs;
use std::path::{Path, PathBuf};

use super::SourceSpec;
use crate::hf::cached_snapshot;
use crate::paths::{Patterns, expand_path};
use crate::split::group_key;
use crate::{Error, Result};

/// More files than any data set of one machine has; past it the path is surely a mistake.
const MAX_FILES: usize = 5_000_000;
const MAX_DEPTH: usize = 64;

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    Text,
    /// A text file that the recipe names by itself.
    TextAlone,
    JsonLines,
    Parquet,
}

#[derive(Debug, Clone)]
pub(crate) struct ListedFile {
    pub(crate) source: usize,
    pub(crate) path: PathBuf,
    pub(crate) relative: String,
    pub(crate) bytes: u64,
    pub(crate) kind: FileKind,
    pub(crate) group: Option<String>,
}

pub(crate) fn list_files(source: usize, spec: &SourceSpec) -> Result<Vec<ListedFile>> {
    let fail = |reason: String| Error::source(&spec.path, reason);
    let hub_name = spec.path.strip_prefix("hf:");
    let root = match hub_name {
        Some(name) => cached_snapshot("datasets", name).map_err(|error| fail(error.to_string()))?,
        None => expand_path(&spec.path).map_err(fail)?,
    };
    // the source is named by what was written, which need not be where it is
    let is_named = root == Path::new(&spec.path);
    let it = || if is_named { "it".to_owned() } else { root.display().to_string() };
    let metadata = fs::metadata(&root).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => fail(format!("{} does not exist", it())),
        _ => fail(format!("cannot read {}: {error}", it())),
    })?;
    if metadata.is_file() {
        let name = root.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let kind = match kind_of(&name) {
            FileKind::Text => FileKind::TextAlone,
            kind => kind,
        };
        let bytes = metadata.len();
        return Ok(vec![ListedFile { source, path: root, relative: name, bytes, kind, group: None }]);
    }
    let mut walk = Walk {
        include: Patterns::new(&spec.include),
        exclude: Patterns::new(&spec.exclude),
        source,
        files: Vec::new(),
        seen: 0,
    };
    walk.folder(&root, "", 0).map_err(fail)?;
    let mut files = walk.files;
    if hub_name.is_some() && files.iter().any(|file| file.kind != FileKind::Text) {
        // beside the tables of a hub data set lie only its card and its licence
        files.retain(|file| file.kind != FileKind::Text);
    }
    if files.is_empty() {
        let seen = walk.seen;
        return Err(fail(format!("{} has no file to read ({seen} looked at, none fits)", it())));
    }
    files.sort_by(|a, b| a.relative.cmp(&b.relative));
    let shared = shared_prefix(&files);
    apply_caps(&mut files, spec, shared);
    for file in &mut files {
        if file.kind == FileKind::Text {
            file.group = Some(group_key(&file.relative[shared..]));
        }
    }
    Ok(files)
}

fn kind_of(name: &str) -> FileKind {
    let extension = name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase());
    match extension.as_deref() {
        Some("jsonl" | "ndjson") => FileKind::JsonLines,
        Some("parquet") => FileKind::Parquet,
        _ => FileKind::Text,
    }
}

struct Walk {
    include: Patterns,
    exclude: Patterns,
    source: usize,
    files: Vec<ListedFile>,
    seen: u64,
}

impl Walk {
    fn folder(&mut self, folder: &Path, prefix: &str, depth: usize) -> Result<(), String> {
        if depth > MAX_DEPTH {
            return Err(format!("{} lies more than {MAX_DEPTH} folders deep", folder.display()));
        }
        let cannot = |error: std::io::Error| format!("cannot read {}: {error}", folder.display());
        for entry in fs::read_dir(folder).map_err(cannot)? {
            let entry = entry.map_err(cannot)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') {
                continue;
            }
            let relative = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
            let file_type = entry.file_type().map_err(cannot)?;
            if self.exclude.matches(&relative) {
                self.seen += u64::from(!file_type.is_dir());
                continue;
            }
            if file_type.is_dir() {
                self.folder(&entry.path(), &relative, depth + 1)?;
                continue;
            }
            self.seen += 1;
            if !self.include.is_empty() && !self.include.matches(&relative) {
                continue;
            }
            // links to files are followed (the hub's cache is made of them), links to folders may be cycles
            let Ok(metadata) = fs::metadata(entry.path()) else { continue };
            if !metadata.is_file() {
                continue;
            }
            if self.files.len() >= MAX_FILES {
                return Err(format!("more than {MAX_FILES} files; name a smaller folder"));
            }
            self.files.push(ListedFile {
                source: self.source,
                path: entry.path(),
                bytes: metadata.len(),
                kind: kind_of(&name),
                relative,
                group: None,
            });
        }
        Ok(())
    }
}

/// How many bytes of every relative path are folders that all files share.
fn shared_prefix(files: &[ListedFile]) -> usize {
    let (Some(first), Some(last)) = (files.first(), files.last()) else { return 0 };
    // sorted, so what the first and the last share is shared by all
    let same = first.relative.bytes().zip(last.relative.bytes()).take_while(|(a, b)| a == b).count();
    let same = same.min(first.relative.len().saturating_sub(1));
    first.relative.as_bytes()[..same].iter().rposition(|&b| b == b'/').map_or(0, |at| at + 1)
}

/// Keeps what fits under the caps, ranked by a hash of the path; stays sorted by path.
fn apply_caps(files: &mut Vec<ListedFile>, spec: &SourceSpec, shared: usize) {
    if spec.max_files.is_none() && spec.max_bytes.is_none() {
        return;
    }
    let mut ranks: Vec<([u8; 32], usize)> = files
        .iter()
        .enumerate()
        .map(|(at, file)| (*blake3::hash(&file.relative.as_bytes()[shared..]).as_bytes(), at))
        .collect();
    ranks.sort_unstable();
    let (mut count, mut bytes) = (0u64, 0u64);
    let mut keep = vec![false; files.len()];
    for (_, at) in ranks {
        let file = &files[at];
        // the size of a table says little about its text; the stream of documents stops at max_bytes anyway
        let counted = match file.kind {
            FileKind::Text | FileKind::TextAlone if file.bytes <= spec.max_file_bytes => file.bytes,
            _ => 0,
        };
        if spec.max_files.is_some_and(|most| count >= most)
            || spec.max_bytes.is_some_and(|most| bytes >= most)
        {
            break;
        }
        keep[at] = true;
        count += 1;
        bytes += counted;
    }
    let mut at = 0;
    files.retain(|_| {
        at += 1;
        keep[at - 1]
    });
}
