//! Distillation: a student learns from a teacher, in one of three ways.
//!
//! ```text
//! sequences  answers of the teacher, as minke sample keeps them -> SFT of the student
//! logits     the same text; teacher's k likeliest tokens at each place (online, or from `cache`)
//!                -> Model::distill_step(student) -> Trainer::update
//! on_policy  tasks -> the student answers (rollout::roll) -> the teacher's log-probability of each token
//!                -> Model::policy_step(student) -> Trainer::update
//! ```
//!
//! Teacher and student must have one tokenizer; their architectures may differ. A student is a model of its own, or one
//! with fresh weights that takes over the teacher's tokenizer, template and context. Modules that predict several
//! tokens ahead learn beside it in every mode.

mod cache;
mod logits;
mod on_policy;
pub mod recipe;
mod teacher;
#[cfg(test)]
mod tests;

use std::sync::atomic::AtomicBool;

use minke_infer::machine::available_bytes;
use minke_infer::{GenerationDefaults, Loaded};
use minke_model::Model;
use minke_train::pretrain::Options;
pub use recipe::{Mode, Recipe};
pub use teacher::Known;

use crate::distill::cache::Built;
use crate::distill::logits::{Logits, Source};
use crate::distill::on_policy::OnPolicy;
use crate::error::{PostError, Result};
use crate::events::Event;
use crate::grpo::Grpo;
use crate::recipe::refuse_coupled;
use crate::session::{self, Base, Outcome, Setup};
use crate::sft::Sft;

/// Distils as a recipe says. `stop` ends the run after the step in work, with a checkpoint.
///
/// # Errors
/// Anything that [`PostError`] lists; what was on the disk before stays whole.
pub fn run(options: &Options, stop: &AtomicBool, on_event: &mut dyn FnMut(Event<'_>)) -> Result<Outcome> {
    let mut recipe = Recipe::read(&options.document()?)?;
    // what is cheap to know comes before what takes long to load
    let teacher = Known::look("teacher.path", &recipe.teacher.path)?;
    let student = recipe.look(&teacher)?;
    let mut setup = recipe.setup()?;
    refuse_coupled("teacher.precision", recipe.teacher_precision())?;
    if recipe.distill.mode == Mode::OnPolicy {
        refuse_coupled("precision", setup.precision)?;
    }
    let needs = [teacher.bytes_to_run(recipe.teacher_precision())?, student.bytes_to_train(&setup)?];
    if recipe.asks_teacher() {
        teacher::fits(needs, available_bytes())?;
    }
    if let (Some(own), Some(its)) = (setup.template.as_ref().or(student.template.as_ref()), &teacher.template)
        && own.source() != its.source()
    {
        let text = "the student's chat template is another one than the teacher's, which may not know it";
        on_event(Event::Warning { text });
    }
    if setup.template.is_none() && student.template.is_none() {
        setup.template.clone_from(&teacher.template);
    }
    match recipe.distill.mode {
        Mode::Sequences => {
            let lessons = recipe.written();
            let examination = lessons.examination()?;
            let base = open(&setup, options, &teacher, &student, on_event)?;
            let mut stage = Sft::new(&lessons, examination, &mut setup, &base, on_event)?;
            session::run(&setup, base, &mut stage, options.resume, stop, on_event)
        }
        Mode::Logits => {
            let lessons = recipe.written();
            let examination = lessons.examination()?;
            if lessons.train.sequence_length > teacher.context() {
                let reason = format!(
                    "expected at most the teacher's context of {}, got {}",
                    teacher.context(),
                    lessons.train.sequence_length
                );
                return Err(PostError::unsuitable("train.sequence_length", reason));
            }
            let base = open(&setup, options, &teacher, &student, on_event)?;
            let sft = Sft::new(&lessons, examination, &mut setup, &base, on_event)?;
            let fingerprint = teacher.fingerprint()?;
            let telling = recipe.telling(teacher.config.vocab_size);
            let source = match recipe.cache() {
                None => Source::Online(Box::new(teacher.load(
                    recipe.teacher_precision(),
                    base.cpu(),
                    on_event,
                )?)),
                Some(place) => {
                    let entry = cache::Entry::new(place, &fingerprint, &telling, sft.batches.samples())?;
                    match entry.open_or_build(base.cpu(), stop, on_event, &mut |on_event| {
                        // the student is there already
                        teacher::fits([needs[0], 0], available_bytes())?;
                        teacher.load(recipe.teacher_precision(), base.cpu(), on_event)
                    })? {
                        Built::Whole(cache) => Source::Cached(cache),
                        Built::Stopped => return Ok(stopped(&setup, &base)),
                    }
                }
            };
            let mut stage = Logits::new(sft, source, telling, &fingerprint);
            session::run(&setup, base, &mut stage, options.resume, stop, on_event)
        }
        Mode::OnPolicy => {
            let (own, its) = (student.context(), teacher.context());
            if its < own {
                let reason = format!(
                    "it reads at most {its} tokens, and the student may write up to {own}, which it could not judge"
                );
                return Err(PostError::unsuitable("teacher.path", reason));
            }
            let grpo = Grpo::new(recipe.rollouts())?;
            let base = open(&setup, options, &teacher, &student, on_event)?;
            let fingerprint = teacher.fingerprint()?;
            let model = teacher.load(recipe.teacher_precision(), base.cpu(), on_event)?;
            let mut stage = OnPolicy::new(grpo, model, &fingerprint);
            session::run(&setup, base, &mut stage, options.resume, stop, on_event)
        }
    }
}

/// Takes the run's folder, and loads or makes the student.
fn open(
    setup: &Setup,
    options: &Options,
    teacher: &Known,
    student: &Known,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Base> {
    if student.folder.is_some() {
        return session::open(setup, options, on_event);
    }
    session::fresh(setup, options, || {
        let precision = setup.precision.unwrap_or_else(recipe::fresh_precision);
        Ok(Loaded {
            model: Model::random(student.config.clone(), precision, setup.run.seed),
            tokenizer: Some(teacher.tokenizer.clone()),
            generation: GenerationDefaults::default(),
            notes: Vec::new(),
            folder: setup.run.out.clone().into(),
            files: None,
        })
    })
}

/// A run that was stopped before its first step: what the teacher told so far lies in the cache.
fn stopped(setup: &Setup, base: &Base) -> Outcome {
    Outcome {
        folder: base.folder().to_owned(),
        step: 0,
        steps: setup.steps,
        checkpoint: None,
        model: None,
        evaluation: None,
    }
}
