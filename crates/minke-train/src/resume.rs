//! Whether a run may go on: what it was started with against what it is given now.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Result, TrainError};
use crate::recipe::Resolved;

/// Keys that change no weight in any kind of run, so that they may differ: what it is called, where it lies, and when it
/// shows and saves something.
pub fn is_free_everywhere(key: &str) -> bool {
    const FREE: [&str; 8] = [
        "run.name",
        "run.out",
        "run.baseline",
        "train.eval_every",
        "train.sample_every",
        "train.checkpoint_every",
        "train.keep",
        "train.recompute",
    ];
    FREE.contains(&key)
}

/// Keys that change no weight of pretraining. What `data` says beyond how documents are cut is judged by the
/// fingerprint of the prepared data.
fn is_free(key: &str) -> bool {
    is_free_everywhere(key)
        || key == "train.eval_tokens"
        || key.starts_with("sample.")
        || key.starts_with("data.")
            && !matches!(key, "data.document_borders" | "data.packing" | "data.random")
}

fn leaves(text: &str) -> Result<BTreeMap<String, String>, String> {
    let table: toml::Table = toml::from_str(text).map_err(|error| error.to_string())?;
    let mut leaves = BTreeMap::new();
    flatten("", &toml::Value::Table(table), &mut leaves);
    Ok(leaves)
}

/// Keys that recipes did not always have, and what they were before.
const LATER: [(&str, &str); 1] = [("train.moments", "\"auto\"")];

/// The leaves of both recipes.
fn both(folder: &Path, stored: &str, now: &str) -> Result<[BTreeMap<String, String>; 2]> {
    let mut stored = leaves(stored).map_err(|why| TrainError::Changed {
        path: folder.to_owned(),
        differences: format!("  recipe.toml in it is no recipe any more: {why}"),
    })?;
    let now = leaves(now).expect("a resolved recipe is TOML");
    for (key, before) in LATER {
        if now.contains_key(key) {
            stored.entry(key.to_owned()).or_insert_with(|| before.to_owned());
        }
    }
    Ok([stored, now])
}

/// Whether the section `data` is the same, so that the prepared data must be.
///
/// # Errors
/// A stored file that is no recipe.
pub(crate) fn same_data(folder: &Path, stored: &str, now: &Resolved) -> Result<bool> {
    let [stored, now] = both(folder, stored, &now.to_toml())?;
    let data = |leaves: BTreeMap<String, String>| -> Vec<_> {
        leaves.into_iter().filter(|(key, _)| key.starts_with("data.")).collect()
    };
    Ok(data(stored) == data(now))
}

/// Compares a stored recipe with the one given now.
///
/// # Errors
/// Each key that would lead to other weights, with both values; or a stored file that is no recipe.
pub(crate) fn check_recipe(folder: &Path, stored: &str, now: &Resolved) -> Result<()> {
    check(folder, stored, &now.to_toml(), |key, _, _| is_free(key))
}

/// Whether a key may differ as it does: the key, and its two values in TOML.
pub type Free = fn(&str, &str, &str) -> bool;

/// Compares the text of a stored recipe with that of the one given now, but for differences that are `free`.
///
/// # Errors
/// Each key that differs otherwise, with both values; or a stored file that is no recipe.
pub fn check(folder: &Path, stored: &str, now: &str, free: Free) -> Result<()> {
    let [stored, now] = both(folder, stored, now)?;
    let keys: std::collections::BTreeSet<&String> = stored.keys().chain(now.keys()).collect();
    let mut lines = Vec::new();
    for key in keys {
        let shown = |leaves: &BTreeMap<String, String>| {
            leaves.get(key).cloned().unwrap_or_else(|| "nothing".to_owned())
        };
        let (was, is) = (shown(&stored), shown(&now));
        if was != is && !free(key, &was, &is) {
            lines.push(format!("  {key}: was {was}, is {is}"));
        }
    }
    if lines.is_empty() {
        return Ok(());
    }
    Err(TrainError::Changed { path: folder.to_owned(), differences: lines.join("\n") })
}

fn flatten(prefix: &str, value: &toml::Value, leaves: &mut BTreeMap<String, String>) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let dot = if prefix.is_empty() { "" } else { "." };
                flatten(&format!("{prefix}{dot}{key}"), value, leaves);
            }
        }
        leaf => {
            leaves.insert(prefix.to_owned(), leaf.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    fn recipe(overrides: &[&str]) -> Resolved {
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        let text = "[model]\ndepth = 2\n[data]\nvocab_size = 512\nsources = [{ path = \"/text\" }]\n";
        Recipe::parse("a.toml", text, &overrides).unwrap().resolve().unwrap()
    }

    #[test]
    fn what_changes_weights_must_be_the_same() {
        let stored = recipe(&[]).to_toml();
        let free = recipe(&["train.keep=7", "run.out=elsewhere", "train.eval_every=3", "sample.tokens=5"]);
        check_recipe(Path::new("runs/a"), &stored, &free).unwrap();
        let older = stored.replace("moments = \"auto\"", "");
        assert_ne!(older, stored);
        check_recipe(Path::new("runs/a"), &older, &free).unwrap();
        let other = recipe(&["train.lr=0.5", "run.seed=3", "precision=f32"]);
        let error = check_recipe(Path::new("runs/a"), &stored, &other).unwrap_err().to_string();
        for part in ["runs/a", "run.seed: was 0, is 3", "train.lr: was", "is 0.5", "precision", "--out"] {
            assert!(error.contains(part), "{error}");
        }
        let whole = recipe(&["data.packing=whole"]);
        let error = check_recipe(Path::new("runs/a"), &stored, &whole).unwrap_err().to_string();
        assert!(error.contains("data.packing: was \"stream\", is \"whole\""), "{error}");
        let error = check_recipe(Path::new("runs/a"), "[[[", &free).unwrap_err().to_string();
        assert!(error.contains("no recipe any more"), "{error}");
    }
}
