//! Recipes: a run as a TOML file, complete and typed.
//!
//! A recipe goes through three steps. [`Recipe::load`] parses the text and the `--set` options into a tree
//! that knows where each value stands, and reads the sections from it, so that every wrong key or type is
//! shown in place. [`Recipe::resolve`] derives what was not said (the module `model` has the formulas) and
//! checks the model as a whole. [`Resolved::to_toml`] writes the result, itself a recipe that resolves to the
//! same, which is stored with the run.

mod document;
mod error;
mod model;
mod reader;
mod sections;
#[cfg(test)]
mod tests;
mod tree;
mod write;

use std::collections::BTreeSet;
use std::path::Path;

pub use document::Document;
pub use error::{Frame, RecipeError};
use minke_model::config::Config;
pub use model::{GivenModel, model};
use reader::Places;
pub use reader::{BYTES, Section, TOKENS, Units, nearest};
use sections::GivenTrain;
pub use sections::{
    Data, Dtype, Moments, Optim, Optimizer, Precision, Recompute, Run, Sample, Scales, Scaling, Source,
    Train, located, optim, precision, run,
};
use tree::Texts;

use crate::schedule::Schedule;

/// Vocabulary that is trained when nothing says otherwise.
const VOCABULARY: usize = 4096;
/// Smallest vocabulary that can be trained: every byte and some special tokens.
const SMALLEST_VOCABULARY: usize = 272;

/// A recipe as given: parsed and typed, not yet completed.
#[derive(Debug, Clone)]
pub struct Recipe {
    run: Run,
    model: GivenModel,
    data: Data,
    train: GivenTrain,
    precision: Precision,
    sample: Sample,
    baseline: Option<String>,
    texts: Texts,
    places: Places,
}

/// A recipe with everything said.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// Name, seed and folder.
    pub run: Run,
    /// The dial.
    pub depth: usize,
    /// The model.
    pub config: Config,
    /// The text.
    pub data: Data,
    /// The loop.
    pub train: Train,
    /// Types of products.
    pub precision: Precision,
    /// Text written during training.
    pub sample: Sample,
    /// The folder of another run, whose losses the report puts beside this one's.
    pub baseline: Option<String>,
    /// Dotted keys that the recipe gave itself; the rest was derived.
    pub given: BTreeSet<String>,
}

impl Recipe {
    /// Reads a recipe file and applies `a.b=v` options in order.
    ///
    /// Relative paths in it are taken from its folder, and those of options from the working directory.
    ///
    /// # Errors
    /// Unreadable or overlong files, invalid TOML, unknown keys, wrong types and values out of bounds, each
    /// with its place.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, RecipeError> {
        Self::read(&Document::load(path, overrides)?)
    }

    /// Reads a recipe from text; `name` is what messages call it. Relative paths stay as they are.
    pub fn parse(name: &str, text: &str, overrides: &[String]) -> Result<Self, RecipeError> {
        Self::read(&Document::parse(name, text, overrides)?)
    }

    /// Reads a parsed recipe.
    ///
    /// # Errors
    /// Unknown keys, wrong types and values out of bounds, each with its place.
    pub fn read(document: &Document) -> Result<Self, RecipeError> {
        document.is_for("pretrain")?;
        let mut root = document.root();
        let mut run_section = root.section("run")?;
        let model_section = root.section("model")?;
        let data_section = root.section("data")?;
        let train_section = root.section("train")?;
        let sample_section = root.section("sample")?;
        let precision = sections::precision(&mut root)?;
        // an unknown section first: what stands in it explains other errors
        root.finish()?;
        let run = sections::run(&mut run_section, document)?;
        let baseline = run_section.path("baseline")?;
        run_section.finish()?;
        let model = model(model_section)?;
        let train = sections::train(train_section)?;
        let sample = sections::sample(sample_section)?;
        let data = sections::data(data_section)?;
        let (texts, places) = document.texts_and_places();
        Ok(Self { run, model, data, train, precision, sample, baseline, texts, places })
    }

    /// The run's section, for taking its folder before anything else is done.
    pub fn run(&self) -> &Run {
        &self.run
    }

    /// The data section, for opening the tokenizer before the model is known.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// Completes the recipe where it says the size of the vocabulary itself.
    ///
    /// # Errors
    /// As [`Self::resolve_with_vocabulary`]; and a recipe that names a tokenizer without `model.vocab_size`
    /// cannot be completed before that is opened.
    pub fn resolve(&self) -> Result<Resolved, RecipeError> {
        self.complete(None)
    }

    /// Completes the recipe for a tokenizer with `vocabulary` tokens; a larger `model.vocab_size` pads.
    ///
    /// # Errors
    /// An impossible model is reported at the key that says so, or at the one that it was derived from.
    pub fn resolve_with_vocabulary(&self, vocabulary: usize) -> Result<Resolved, RecipeError> {
        self.complete(Some(vocabulary))
    }

    fn complete(&self, vocabulary: Option<usize>) -> Result<Resolved, RecipeError> {
        let given_size = self.model.fields.get("vocab_size").and_then(serde_json::Value::as_u64);
        let given_size = given_size.map(|size| size as usize);
        let mut data = self.data.clone();
        let needed = vocabulary.or(data.vocab_size);
        if data.tokenizer.is_none() && !data.random {
            // the tokenizer to train is as large as the model's table unless said otherwise
            if let (None, Some(size)) = (data.vocab_size, given_size)
                && size < SMALLEST_VOCABULARY
            {
                let expected =
                    format!("at least {SMALLEST_VOCABULARY}, for every byte and some special tokens");
                return Err(self.invalid("model.vocab_size", size, expected));
            }
            data.vocab_size = data.vocab_size.or(given_size).or(Some(VOCABULARY));
        }
        if let (Some(size), Some(needed)) = (given_size, needed)
            && size < needed
        {
            return Err(self.invalid("model.vocab_size", size, format!("at least the tokenizer's {needed}")));
        }
        let Some(vocab_size) = given_size.or(needed).or(data.vocab_size) else {
            return Err(RecipeError::Missing {
                key: "model.vocab_size".to_owned(),
                name: self.texts.name().to_owned(),
                expected: "the number of tokens".to_owned(),
                hint: "no tokenizer is trained here that could tell it".to_owned(),
            });
        };
        let GivenTrain { mut train, tokens } = self.train.clone();
        let config = self.model.config(vocab_size, train.sequence_length)?;
        train.tokens = tokens.unwrap_or_else(|| model::tokens(&config));
        let optim = &mut train.optim;
        // a recipe cannot say 0
        if optim.lr == 0.0 {
            optim.lr = model::lr(&config);
        }
        if optim.muon_lr == 0.0 {
            optim.muon_lr = model::MUON_LR;
        }
        let resolved = Resolved {
            run: self.run.clone(),
            depth: self.model.depth,
            config,
            data,
            train,
            precision: self.precision,
            sample: self.sample.clone(),
            baseline: self.baseline.clone(),
            given: self.places.keys().cloned().collect(),
        };
        self.check(&resolved)?;
        Ok(resolved)
    }

    /// What the sections demand of each other.
    fn check(&self, resolved: &Resolved) -> Result<(), RecipeError> {
        let Resolved { config, train, .. } = resolved;
        if train.sequence_length > config.max_position_embeddings {
            let expected =
                format!("at most model.max_position_embeddings = {}", config.max_position_embeddings);
            return Err(self.invalid("train.sequence_length", train.sequence_length, expected));
        }
        if train.sequence_length < 2 + config.num_nextn_predict_layers {
            let expected = format!(
                "at least {} tokens for {} multi-token-prediction modules",
                2 + config.num_nextn_predict_layers,
                config.num_nextn_predict_layers
            );
            return Err(self.invalid("train.sequence_length", train.sequence_length, expected));
        }
        let step = resolved.tokens_per_step();
        if step > 1 << 31 {
            let expected = "at most 2^31 tokens a step (sequence_length * batch_size * accumulation)";
            return Err(self.invalid("train.batch_size", format!("{step} tokens"), expected.to_owned()));
        }
        if train.tokens < step {
            return Err(self.invalid(
                "train.tokens",
                train.tokens,
                format!("at least one step of {step} tokens"),
            ));
        }
        Ok(())
    }

    #[expect(clippy::needless_pass_by_value, reason = "callers hand over numbers and fresh strings")]
    fn invalid(&self, key: &str, got: impl ToString, expected: String) -> RecipeError {
        RecipeError::Invalid {
            key: key.to_owned(),
            expected,
            got: got.to_string(),
            frame: self.places.get(key).map(|place| self.texts.frame(place)),
            hint: String::new(),
        }
    }
}

impl Resolved {
    /// Tokens that one step trains on.
    pub fn tokens_per_step(&self) -> u64 {
        let Train { sequence_length, batch_size, accumulation, .. } = &self.train;
        *sequence_length as u64 * *batch_size as u64 * *accumulation as u64
    }

    /// Steps of the run: the token budget in whole steps.
    pub fn steps(&self) -> u64 {
        self.train.tokens / self.tokens_per_step()
    }

    /// The learning rate's course.
    pub fn schedule(&self) -> Schedule {
        self.train.optim.schedule()
    }

    /// The whole recipe as TOML, derived values marked; reading it gives the same.
    pub fn to_toml(&self) -> String {
        write::recipe(self)
    }

    /// The same as JSON.
    ///
    /// # Panics
    /// Never: what is written is TOML.
    pub fn to_json(&self) -> serde_json::Value {
        toml::from_str(&self.to_toml()).expect("a written recipe is TOML")
    }
}
