//! `ARCHITECTURE.md` against the code: a map that drifts is worse than none.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.canonicalize().expect("the workspace is where the crate says")
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The part of the map under a heading.
fn section<'a>(map: &'a str, heading: &str) -> &'a str {
    let start = map.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no section {heading:?}"));
    let body = &map[start + heading.len() + 2..];
    &body[..body.find("\n## ").unwrap_or(body.len())]
}

/// The texts between backticks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Rows of tables whose first cell holds something in backticks, as cells.
fn rows(text: &str) -> Vec<Vec<&str>> {
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    rows.map(|line| line.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

/// Sources below a folder of the workspace.
fn sources(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "no sources in {folder}");
    found
}

/// Code without comments and without what stands behind `#[cfg(test)]`, which ends the files that have it.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text);
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or(line));
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether `word` stands in `text` as a whole word.
fn has_word(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|found| found == word)
}

fn defines(file: &str, function: &str) -> bool {
    let text = read(file);
    let code = code(&text);
    [format!("fn {function}("), format!("fn {function}<")].iter().any(|head| code.contains(head))
}

#[test]
fn every_file_on_the_map_exists() {
    let map = read("ARCHITECTURE.md");
    let paths: Vec<_> = quoted(&map).into_iter().filter(|text| text.contains('/')).collect();
    assert!(paths.len() > 40, "the map names {} files", paths.len());
    for path in paths {
        assert!(root().join(path).exists(), "ARCHITECTURE.md names {path}, which is not there");
    }
}

#[test]
fn every_hop_of_a_walk_is_a_function_of_its_file() {
    let map = read("ARCHITECTURE.md");
    for heading in [
        "## Walk: a training token",
        "## Walk: a rewarded token",
        "## Walk: a generated token",
        "## Walk: a served request",
    ] {
        let is_hop = |line: &&str| line.starts_with(|c: char| c.is_ascii_digit());
        let hops: Vec<_> = section(&map, heading).lines().filter(is_hop).collect();
        assert!((4..=8).contains(&hops.len()), "{heading}: {} hops", hops.len());
        for hop in hops {
            let [file, function, ..] = quoted(hop)[..] else { panic!("{hop:?} names no file and function") };
            assert!(defines(file, function), "{heading}: {file} has no function {function}");
        }
    }
}

#[test]
fn operations_have_their_rooms() {
    let map = read("ARCHITECTURE.md");
    let cases = read("crates/minke-tensor/src/ops/tests/cases.rs");
    let rooms = rows(section(&map, "## The map").split("### Equal rooms").nth(1).expect("the rooms"));
    let mut named = BTreeSet::new();
    for row in &rooms {
        let file = quoted(row[2])[0];
        for op in quoted(row[0]) {
            assert!(defines(file, op), "{file} has no operation {op}");
            assert!(cases.contains(&format!("ops::{op}(")), "no test case calls {op}");
            named.insert(op.to_owned());
        }
    }
    // and the other way: what records a backward pass stands in the table
    for path in sources("crates/minke-tensor/src/ops") {
        let text = std::fs::read_to_string(&path).unwrap();
        let code = code(&text);
        for item in code.split("\npub fn ").skip(1) {
            let name: String = item.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let body = item.split("\n}").next().unwrap_or(item);
            if body.contains("cx.record(") || matches!(&*name, "head_loss" | "head_policy") {
                assert!(named.contains(&name), "{} records {name}, which has no rooms", path.display());
            }
        }
    }
}

/// What each crate uses of the others, by its manifest.
fn manifests() -> BTreeMap<String, BTreeSet<String>> {
    let folders = std::fs::read_dir(root().join("crates")).unwrap().map(|e| e.unwrap().path());
    let of = |folder: PathBuf| {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let manifest = read(folder.join("Cargo.toml"));
        let mut uses = BTreeSet::new();
        let mut table = "";
        for line in manifest.lines() {
            if line.starts_with('[') {
                table = line;
            } else if table == "[dependencies]" && line.starts_with("minke") {
                let end = line.find(['.', ' ', '=']).unwrap_or(line.len());
                uses.insert(line[..end].to_owned());
            }
        }
        (name, uses)
    };
    folders.filter(|folder| folder.join("Cargo.toml").exists()).map(of).collect()
}

#[test]
fn crates_use_what_the_map_says() {
    let map = read("ARCHITECTURE.md");
    let table = section(&map, "## The map").split("### Where things are").next().expect("the table");
    let mut drawn = BTreeMap::new();
    for row in rows(table) {
        let (name, uses) = (quoted(row[0])[0].to_owned(), quoted(row[2]));
        for used in &uses {
            assert!(drawn.contains_key(*used), "{name} uses {used}, which does not stand above it");
        }
        drawn.insert(name, uses.into_iter().map(str::to_owned).collect());
    }
    assert_eq!(manifests(), drawn, "left: manifests; right: ARCHITECTURE.md");
}

#[test]
fn what_must_be_absent_is_absent() {
    let text_of = |path: &PathBuf| code(&std::fs::read_to_string(path).unwrap());
    let shown = |path: &PathBuf| path.strip_prefix(root()).unwrap().display().to_string();
    for name in manifests().keys() {
        let manifest = read(format!("crates/{name}/Cargo.toml"));
        assert!(!manifest.contains("[features]"), "{name} has cargo features");
        let folder = format!("crates/{name}/src");
        for path in sources(&folder) {
            let (text, file) = (text_of(&path), shown(&path));
            let kernels = name == "minke-cpu" || file == "crates/minke-data/src/map.rs";
            assert!(kernels || !has_word(&text, "unsafe"), "{file} has unsafe code");
            let prints =
                ["println!", "eprintln!", "print!", "eprint!"].iter().any(|print| text.contains(print));
            assert!(name == "minke" || !prints, "{file} prints");
            let environment = [
                "crates/minke-data/src/paths.rs",
                "crates/minke-data/src/hf/resolve.rs",
                "crates/minke-gym/src/verifier/program.rs",
                "crates/minke/src/output.rs",
                "crates/minke/src/main.rs",
            ];
            let reads = ["env::var", "env::args", "from_env"].iter().any(|read| text.contains(read));
            assert_eq!(
                environment.contains(&&*file),
                reads,
                "{file}: the map says where the environment is read"
            );
        }
    }
    for crate_name in ["minke-num", "minke-cpu", "minke-tensor", "minke-model"] {
        for path in sources(&format!("crates/{crate_name}/src")) {
            let test = path.components().any(|part| part.as_os_str().to_string_lossy().starts_with("tests"));
            let text = text_of(&path);
            let opens = ["std::fs", "std::net", "File::"].iter().any(|file| text.contains(file));
            assert!(test || !opens, "{} opens files", shown(&path));
            let tensor = crate_name == "minke-cpu" && has_word(&text, "Tensor");
            assert!(test || !tensor, "{} knows tensors", shown(&path));
        }
    }
    let config = root().join(".cargo/config.toml");
    let settings = std::fs::read_to_string(config).unwrap_or_default() + &read("Cargo.toml");
    assert!(!settings.contains("target-cpu"), "a committed setting chooses the processor");
}
