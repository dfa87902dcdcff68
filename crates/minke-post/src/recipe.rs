//! What recipes of several stages say in the same words.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use minke_data::template::{ChatTemplate, Thinking};
use minke_model::Precision;
use minke_train::recipe::{self, Document, RecipeError, Section, located};
use serde::Serialize;

use crate::error::{PostError, Result};
use crate::eval::Form;

/// How tasks are put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FormName {
    /// By the model's template.
    Chat,
    /// As worked problems stand in training text, for base models.
    Worked,
    /// The prompt and a line feed.
    Plain,
}

impl FormName {
    /// Names that recipes use.
    pub(crate) const CHOICES: [(&'static str, Self); 3] =
        [("chat", Self::Chat), ("worked", Self::Worked), ("plain", Self::Plain)];
}

/// The form of a name, the value of `key`; by the template where there is one when it is not given.
///
/// # Errors
/// A chat is asked for, and there is no template.
pub(crate) fn form(
    key: &str,
    name: Option<FormName>,
    template: Option<&ChatTemplate>,
    thinking: Thinking,
) -> Result<Form> {
    match (name, template) {
        (Some(FormName::Worked), _) => Ok(Form::Worked { think: thinking != Thinking::Empty }),
        (Some(FormName::Plain), _) | (None, None) => Ok(Form::Plain),
        (Some(FormName::Chat) | None, Some(template)) => {
            Ok(Form::Chat { template: template.clone(), thinking })
        }
        (Some(FormName::Chat), None) => {
            let reason = "the model has no chat template; name one with model.template, or take another form";
            Err(PostError::unsuitable(key, reason))
        }
    }
}

/// `precision`, if the recipe has it.
pub(crate) fn precision(document: &Document, root: &mut Section) -> Result<Option<recipe::Precision>> {
    let given = recipe::precision(root)?;
    let said = document.given().iter().any(|key| key == "precision" || key.starts_with("precision."));
    Ok(said.then_some(given))
}

/// Refuses a precision, named by its key, in which what is computed for a token depends on what else is in the call:
/// answers would depend on what is answered beside them, and no log-probability could be found again.
///
/// # Errors
/// It is FP8 with one scale per tensor.
pub(crate) fn refuse_coupled(key: &str, precision: Option<Precision>) -> Result<()> {
    if precision.is_some_and(|precision| precision.coded.couples_rows()) {
        let reason = "scaling = \"tensor\" gives all tokens of a call one scale, so that they depend on each other: \
                      expected \"block\" where answers are written or judged";
        return Err(PostError::unsuitable(key, reason));
    }
    Ok(())
}

/// A model's path: relative ones are located where they exist, else they stay as they stand, so that hub ids stay what
/// they are.
pub(crate) fn model_path(s: &mut Section, key: &'static str) -> Result<Option<String>, RecipeError> {
    let Some(path) = s.text(key)? else { return Ok(None) };
    let there = located(path.clone(), s.folder(key));
    Ok(Some(if Path::new(&there).exists() { there } else { path }))
}

/// The name of a suite, with those of its files located that are there.
pub(crate) fn suite_place(s: &mut Section, key: &'static str) -> Result<Option<String>, RecipeError> {
    let Some(suite) = s.text(key)? else { return Ok(None) };
    let there = |name: &str| {
        let there = located(name.trim().to_owned(), s.folder(key));
        Path::new(&there).is_file().then_some(there)
    };
    // a name may have commas in it
    Ok(Some(there(&suite).unwrap_or_else(|| {
        let parts = suite.split(',').map(|part| there(part).unwrap_or_else(|| part.trim().to_owned()));
        parts.collect::<Vec<_>>().join(",")
    })))
}

/// Whether two suites, as TOML, differ at most in where their files lie.
pub(crate) fn same_suite(was: &str, is: &str) -> bool {
    fn names(suite: &str) -> impl Iterator<Item = &str> {
        suite.trim_matches('"').split(',').map(|part| part.rsplit('/').next().unwrap_or(part))
    }
    names(was).eq(names(is))
}

/// `template`: the name of a built-in one, or a path.
pub(crate) fn template_place(s: &mut Section) -> Result<Option<String>, RecipeError> {
    Ok(s.text("template")?.map(|name| {
        if ChatTemplate::builtin_names().contains(&&name[..]) {
            name
        } else {
            located(name, s.folder("template"))
        }
    }))
}

/// The template that a recipe names under `key`: a built-in one, that of a model folder, or a file.
///
/// # Errors
/// There is none, or it is broken.
pub(crate) fn template(key: &str, name: Option<&str>) -> Result<Option<ChatTemplate>> {
    let Some(name) = name else { return Ok(None) };
    if ChatTemplate::builtin_names().contains(&name) {
        return Ok(Some(ChatTemplate::named(name)?));
    }
    let path = Path::new(name);
    if path.is_dir() {
        let found = ChatTemplate::load(path)?;
        return found.map(Some).ok_or_else(|| PostError::unsuitable(name, "the folder has no chat template"));
    }
    if path.is_file() {
        return Ok(Some(ChatTemplate::new(name, &text_of(path)?)?));
    }
    let known = ChatTemplate::builtin_names().join(", ");
    let reason = format!("expected one of {known}, a file or a folder; there is no `{name}`");
    Err(PostError::unsuitable(key, reason))
}

/// The text of a file of bounded length.
fn text_of(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(PostError::io("open", path))?;
    let mut text = String::new();
    // the template itself refuses what is longer
    file.take(2 << 20).read_to_string(&mut text).map_err(PostError::io("read", path))?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use minke_model::{DType, Fp8};

    use super::*;

    #[test]
    fn answers_that_depend_on_each_other_are_refused() {
        let fp8 = |per_tensor| Some(Precision::fp8(Fp8 { per_tensor, power_of_two: false }));
        for fine in [None, Some(Precision::uniform(DType::Bf16)), fp8(false)] {
            refuse_coupled("precision", fine).unwrap();
        }
        let text = refuse_coupled("teacher.precision", fp8(true)).unwrap_err().to_string();
        assert!(text.contains("teacher.precision") && text.contains("\"block\""), "{text}");
    }

    #[test]
    fn suites_are_known_by_the_names_of_their_files() {
        for (was, is, same) in [
            ("\"core:1-3,/a/b.jsonl\"", "\"core:1-3,/c/d/b.jsonl\"", true),
            ("\"/a/b.jsonl\"", "\"b.jsonl\"", true),
            ("\"core:1-3\"", "\"core:1-4\"", false),
            ("\"/a/b.jsonl\"", "\"/a/c.jsonl\"", false),
            ("\"/a/b.jsonl\"", "\"/a/b.jsonl,core\"", false),
        ] {
            assert_eq!(same_suite(was, is), same, "{was} {is}");
        }
    }

    /// The template that a recipe means, as its reader finds it.
    type Reader = fn(&Document) -> Result<Option<ChatTemplate>>;

    #[test]
    fn every_recipe_takes_a_template_by_name_file_or_folder() {
        use crate::{distill, grpo, sample, sft, stages::exam};
        let folder = tempfile::tempdir().unwrap();
        let source = "{% for message in messages %}{{ message.content }}{% endfor %}";
        std::fs::create_dir(folder.path().join("talks")).unwrap();
        for name in ["own.jinja", "talks/chat_template.jinja"] {
            std::fs::write(folder.path().join(name), source).unwrap();
        }
        let data = "[[data.sources]]\npath = \"a.jsonl\"\n";
        let distills = format!("[teacher]\npath = \"m\"\n[distill]\nmode = \"sequences\"\n{data}");
        let readers: [(&str, &str, Reader); 5] = [
            ("model", data, |document| sft::recipe::Recipe::read(document)?.template()),
            ("model", "[tasks]\nsuite = \"chain:1\"\n", |document| {
                Ok(grpo::Recipe::read(document)?.setup()?.template)
            }),
            ("model", "[tasks]\nsuite = \"chain:1\"\n[keep]\n", |document| {
                sample::Recipe::read(document)?.asking.template()
            }),
            ("model", "[eval]\nsuite = \"chain:1\"\n", |document| {
                exam::Recipe::read(document)?.asking.template()
            }),
            ("student", &distills, |document| Ok(distill::Recipe::read(document)?.setup()?.template)),
        ];
        for (section, more, read) in readers {
            let of = |name: &str| {
                let path = folder.path().join("recipe.toml");
                let text = format!("[{section}]\npath = \"m\"\ntemplate = {name:?}\n{more}");
                std::fs::write(&path, text).unwrap();
                read(&Document::load(&path, &[]).unwrap())
            };
            for name in ["own.jinja", "talks"] {
                let template = of(name).unwrap_or_else(|error| panic!("{section} {more}: {error}"));
                assert_eq!(template.unwrap().source(), source, "{section} {more}");
            }
            let builtin = of("chatml").unwrap().unwrap();
            assert_eq!(builtin.source(), ChatTemplate::named("chatml").unwrap().source());
            let error = of("chatlm").unwrap_err().to_string();
            assert!(error.contains("chatml") && error.contains("template"), "{error}");
        }
    }
}
