//! The recipe of a pipeline: `[run]`, and a recipe inside each `[[stage]]`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use minke_train::recipe::{Document, RecipeError, Section, located};
use toml::{Table, Value};

use super::{Kind, MakeError, Options};

/// What a reference to an earlier stage begins with.
const REFERENCE: &str = "stage:";
/// Names in the pipeline's folder, and first words of `--set`, that mean something else.
const RESERVED: [&str; 6] = ["run", "stage", "stages", "model", "plots", "report"];
/// No pipeline has more stages.
const MOST_STAGES: usize = 256;

/// Stages, in the order in which they are made.
#[derive(Debug, Clone)]
pub struct Pipeline {
    /// Its name; the recipe's file name by default.
    pub name: String,
    /// The seed of stages that do not say their own.
    pub seed: u64,
    /// The folder that it writes; `runs/NAME` by default.
    pub out: PathBuf,
    /// The stage whose model is published; by default the last one that makes a model.
    pub publish: Option<String>,
    /// The stages.
    pub stages: Vec<Stage>,
    /// Where relative paths start.
    pub folder: PathBuf,
}

/// One stage.
#[derive(Debug, Clone)]
pub struct Stage {
    /// Its name, and that of its folder.
    pub name: String,
    /// Its kind: the command that it is a recipe for.
    pub kind: Kind,
    /// Its recipe as given, `[run] seed` filled in; paths and references are as they were written.
    pub recipe: Table,
    /// The stages that it refers to.
    pub inputs: BTreeSet<String>,
    /// The same recipe where it stands in the pipeline's.
    pub given: Document,
}

impl Pipeline {
    /// Reads the pipeline of the options, where `STAGE.KEY=V` changes the recipe of that stage, `run.KEY=V` the pipeline's.
    ///
    /// # Errors
    /// An unreadable file, invalid TOML, unknown kinds and keys of the pipeline itself, names that occur twice or
    /// cannot be folders, references to stages that do not come earlier; each with its place.
    pub fn load(options: &Options, kinds: &[Kind]) -> Result<Self, MakeError> {
        let Options { recipe: path, overrides, out, .. } = options;
        let mut document = Document::load(path, &[])?.written_to(out.as_deref());
        document.is_for("make")?;
        let names = names(&document)?;
        for option in overrides {
            document.set(option, &|keys| translate(keys, &names))?;
        }
        let mut root = document.root();
        let mut section = root.section("run")?;
        let run = minke_train::recipe::run(&mut section, &document)?;
        let publish = section.text("publish")?;
        let after = section.path("after")?.map(PathBuf::from);
        let no_publish = |expected: &str, section: &Section<'_>, got: &str| {
            section.conflict("publish", &format!("the string {got:?}"), expected)
        };
        let mut stages: Vec<Stage> = Vec::new();
        for (index, stage) in root.sections("stage")?.into_iter().enumerate() {
            let given = document.within("stage", index, &["name", "kind"]).expect("there is such a stage");
            let stage = read(stage, given, run.seed, &stages, kinds, after.as_deref())?;
            stages.push(stage);
        }
        if stages.is_empty() {
            return Err(root.missing("stage", "at least one [[stage]]").into());
        }
        if stages.len() > MOST_STAGES {
            let expected = format!("at most {MOST_STAGES} stages");
            return Err(root.conflict("stage", &stages.len().to_string(), &expected).into());
        }
        if let Some(name) = &publish {
            let models: Vec<&str> =
                stages.iter().filter(|stage| stage.kind.makes_model).map(|stage| &stage.name[..]).collect();
            if !models.contains(&&name[..]) {
                let expected = format!("a stage that makes a model: {}", models.join(", "));
                return Err(no_publish(&expected, &section, name).into());
            }
        }
        section.finish()?;
        root.finish()?;
        let folder = document.folder().unwrap_or(Path::new(".")).to_owned();
        Ok(Self { name: run.name, seed: run.seed, out: PathBuf::from(run.out), publish, stages, folder })
    }

    /// The stage of a name.
    pub fn stage(&self, name: &str) -> Option<&Stage> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    /// The stage whose model is the pipeline's.
    pub fn published(&self) -> Option<&Stage> {
        match &self.publish {
            Some(name) => self.stage(name),
            None => self.stages.iter().rev().find(|stage| stage.kind.makes_model),
        }
    }

    /// The stage of this pipeline that the model of a stage, or the one that it asks, began with.
    pub fn origin<'a>(&'a self, stage: &'a Stage) -> &'a Stage {
        let before = stage.begins_with().and_then(|name| self.stage(name));
        before.map_or(stage, |before| self.origin(before))
    }

    /// The complete recipe of a stage of this pipeline in `out`: paths and references resolved, `[run]` filled in.
    pub fn resolved(&self, stage: &Stage, out: &Path) -> Table {
        // one name for it, from wherever it is made
        let out = std::fs::canonicalize(out).or_else(|_| std::path::absolute(out));
        let out = out.expect("a folder that was taken has a path");
        let mut recipe = stage.recipe.clone();
        let resolve = Resolve { folder: &self.folder, out: &out, kind: stage.kind };
        for (key, value) in &mut recipe {
            resolve.value(&mut vec![key.clone()], value);
        }
        let run = recipe.entry("run").or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(run) = run {
            run.insert("name".to_owned(), Value::String(format!("{}-{}", self.name, stage.name)));
            run.insert("out".to_owned(), Value::String(out.join(&stage.name).display().to_string()));
        }
        recipe
    }
}

impl Stage {
    /// The stage whose model it asks or goes on from.
    pub fn begins_with(&self) -> Option<&str> {
        let mut keys = self.kind.begins_with?.split('.');
        let first = self.recipe.get(keys.next()?)?;
        let model = keys.try_fold(first, |value, key| value.get(key))?;
        let name = model.as_str()?.strip_prefix(REFERENCE)?;
        // stages refer to earlier ones alone
        self.inputs.get(name).map(String::as_str)
    }

    /// The references that its recipe makes.
    pub fn references(&self) -> Vec<String> {
        let mut found = Vec::new();
        for value in self.recipe.values() {
            collect(value, &mut found);
        }
        found
    }
}

/// The path that a reference means, in a pipeline's folder; `None` for other texts.
pub(super) fn referred(text: &str, out: &Path) -> Option<PathBuf> {
    text.strip_prefix(REFERENCE).map(|rest| out.join(rest))
}

/// The names of the stages, for telling options apart.
fn names(document: &Document) -> Result<Vec<String>, RecipeError> {
    let mut root = document.root();
    root.sections("stage")?.into_iter().map(|mut stage| Ok(stage.text("name")?.unwrap_or_default())).collect()
}

/// The keys of an option that names a stage, with its place instead.
fn translate(keys: &[&str], names: &[String]) -> Result<Vec<String>, String> {
    let owned = |keys: &[&str]| keys.iter().map(|&key| key.to_owned()).collect();
    match (keys, names.iter().position(|name| name == keys[0])) {
        (["run", ..], _) => Ok(owned(keys)),
        ([_, rest @ ..], Some(index)) if !rest.is_empty() => {
            Ok(owned(&[&["stage", &index.to_string()], rest].concat()))
        }
        _ => {
            let stages = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            Err(format!("expected STAGE.KEY=VALUE or run.KEY=VALUE; the stages are {stages}"))
        }
    }
}

fn read(
    mut section: Section<'_>,
    given: Document,
    seed: u64,
    earlier: &[Stage],
    kinds: &[Kind],
    after: Option<&Path>,
) -> Result<Stage, RecipeError> {
    let expected = "a name of lower-case letters, digits, - and _";
    let Some(name) = section.text("name")? else { return Err(section.missing("name", expected)) };
    let got = format!("the string {name:?}");
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    if name.len() > 64 || !name.chars().all(plain) || name.starts_with(['-', '_']) {
        return Err(section.conflict("name", &got, expected));
    }
    if RESERVED.contains(&name.as_str()) {
        let expected = format!("another name, since {} have a meaning of their own", RESERVED.join(", "));
        return Err(section.conflict("name", &got, &expected));
    }
    if earlier.iter().any(|stage| stage.name == name) {
        return Err(section.conflict("name", &got, "a name that no other stage has"));
    }
    let choices: Vec<(&str, Kind)> = kinds.iter().map(|kind| (kind.name, *kind)).collect();
    let Some(kind) = section.choice("kind", &choices)? else {
        let names: Vec<&str> = kinds.iter().map(|kind| kind.name).collect();
        return Err(section.missing("kind", &format!("one of {}", names.join(", "))));
    };
    let mut inputs = BTreeSet::new();
    let mut recipe = section.rest(&mut |key, text, is_set| {
        if let Some(reference) = text.strip_prefix(REFERENCE) {
            inputs.extend(input(reference, earlier, after)?);
        } else if is_set {
            let any = |part: &str| if part.parse::<usize>().is_ok() { "*" } else { part }.to_owned();
            let key: Vec<String> = key.split('.').map(any).collect();
            return Ok(place(text.to_owned(), &key, kind, Path::new(".")));
        }
        Ok(text.to_owned())
    })?;
    if let Some(after) = after {
        recipe.iter_mut().for_each(|(_, value)| settle(value, &inputs, after));
    }
    let run = recipe.entry("run").or_insert_with(|| Value::Table(Table::new()));
    let Value::Table(run) = run else {
        return Err(section.conflict("run", "a value", "a table [stage.run]"));
    };
    if let Some(key) = ["name", "out"].into_iter().find(|key| run.contains_key(*key)) {
        let expected = "no such key, since the pipeline decides it";
        return Err(section.conflict("run", &format!("a table with `{key}`"), expected));
    }
    run.entry("seed").or_insert_with(|| Value::Integer(seed as i64));
    Ok(Stage { name, kind, recipe, inputs, given })
}

/// The stage that a reference means, which must come earlier or (then it is none of ours) be in the folder of the
/// pipeline that this one comes after; and what is wrong with others.
fn input(reference: &str, earlier: &[Stage], after: Option<&Path>) -> Result<Option<String>, String> {
    let (name, file) = reference.split_once('/').map_or((reference, None), |(name, file)| (name, Some(file)));
    let own = earlier.iter().any(|stage| stage.name == name);
    let inside = |part: &str| !matches!(part, "" | "." | "..");
    let foreign = after.filter(|after| inside(name) && after.join(name).is_dir());
    if !own && foreign.is_none() {
        let names: Vec<&str> = earlier.iter().map(|stage| &stage.name[..]).collect();
        let which = if names.is_empty() { "this is the first".to_owned() } else { names.join(", ") };
        let made = after.map(|after| format!(", or one in {}, which must be made before", after.display()));
        return Err(format!("stage:NAME of an earlier stage ({which}{})", made.unwrap_or_default()));
    }
    if file.is_some_and(|file| !file.split('/').all(inside) || file.contains('\\')) {
        return Err(format!("stage:{name}/FILE with a file inside that stage's folder"));
    }
    Ok(own.then(|| name.to_owned()))
}

/// Makes paths of references to stages of the pipeline that this one comes after.
fn settle(value: &mut Value, own: &BTreeSet<String>, after: &Path) {
    match value {
        Value::String(text) => {
            if let Some(reference) = text.strip_prefix(REFERENCE)
                && !own.contains(reference.split('/').next().unwrap_or_default())
            {
                let path = after.join(reference);
                *text = std::path::absolute(&path).unwrap_or(path).display().to_string();
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| settle(value, own, after)),
        Value::Table(table) => table.iter_mut().for_each(|(_, value)| settle(value, own, after)),
        _ => {}
    }
}

fn collect(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) if text.starts_with(REFERENCE) => found.push(text.clone()),
        Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
        Value::Table(table) => table.values().for_each(|value| collect(value, found)),
        _ => {}
    }
}

/// How strings of a recipe become paths.
struct Resolve<'a> {
    folder: &'a Path,
    out: &'a Path,
    kind: Kind,
}

impl Resolve<'_> {
    fn value(&self, key: &mut Vec<String>, value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Some(path) = referred(text, self.out) {
                    *text = path.display().to_string();
                } else {
                    *text = place(std::mem::take(text), key, self.kind, self.folder);
                }
            }
            Value::Array(values) => {
                for value in values {
                    key.push("*".to_owned());
                    self.value(key, value);
                    key.pop();
                }
            }
            Value::Table(table) => {
                for (name, value) in table {
                    key.push(name.clone());
                    self.value(key, value);
                    key.pop();
                }
            }
            _ => {}
        }
    }
}

/// A string of a stage's recipe, located in a folder where it is a path.
fn place(text: String, key: &[String], kind: Kind, folder: &Path) -> String {
    let key = key.join(".");
    let is_path = text.starts_with("./")
        || text.starts_with("../")
        || kind.paths.contains(&&key[..])
        || kind.models.contains(&&key[..]) && folder.join(&text).exists();
    if is_path { located(text, Some(folder)) } else { text }
}
