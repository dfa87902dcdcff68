//! The recipe of `minke distill`.

use minke_model::Divergence;
use minke_train::recipe::{self, Document, Dtype, GivenModel, Optim, Run, Section};
use serde::Serialize;

use super::logits::Telling;
use super::teacher::Known;
use crate::error::{PostError, Result};
use crate::grpo::{self, RolloutSettings, Tasks};
use crate::recipe::{model_path, precision, template, template_place};
use crate::session::{MOST_STEPS, Rhythm, Setup};
use crate::sft::recipe as sft;

/// Where fresh weights begin; those that were trained before take smaller steps.
const FRESH_LR: f64 = 1e-3;

/// What the student learns from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The teacher's answers.
    Sequences,
    /// What the teacher takes to be likely at each place of a text.
    Logits,
    /// What the teacher says of the student's answers.
    OnPolicy,
}

impl Mode {
    const CHOICES: [(&'static str, Self); 3] =
        [("sequences", Self::Sequences), ("logits", Self::Logits), ("on_policy", Self::OnPolicy)];
}

/// Which way the student is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// `KL(teacher || student)`.
    Forward,
    /// `KL(student || teacher)`.
    Reverse,
}

/// `[teacher]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Teacher {
    /// A model folder, a run, or a hub id.
    pub path: String,
    /// What its products run in; what its tensors are stored in when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<recipe::Precision>,
}

/// `[student]`: a model that is there, or one that is made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Student {
    /// A model folder, a run, or a hub id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// A template by its name, file or folder; the student's own when not given, or else the teacher's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// The sizes of one with fresh weights, complete once the teacher is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<toml::Table>,
    /// The same as it was given.
    #[serde(skip)]
    given: Option<GivenModel>,
}

/// What `logits` says of `[distill]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Asked {
    /// Tokens that the teacher names at each place.
    pub top_k: usize,
    /// Which way the student is drawn.
    pub divergence: Way,
    /// The temperature of both distributions.
    pub temperature: f64,
    /// The folder of what the teacher said before; it is asked at each step when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<String>,
}

/// `[distill]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Distill {
    /// What is learned from.
    pub mode: Mode,
    /// How the teacher is asked for what it takes to be likely.
    #[serde(flatten)]
    pub asked: Option<Asked>,
}

/// `[train]` of `on_policy`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RolloutTrain {
    /// Rollouts, each with one update.
    pub steps: u64,
    /// Rows of one pass, at most, but for a single answer that is longer; bounds the memory of activations.
    pub rows_per_pass: usize,
    /// How gradients become steps.
    #[serde(flatten)]
    pub optim: Optim,
    /// When things happen.
    #[serde(flatten)]
    pub rhythm: Rhythm,
}

/// The sections that the modes do not share.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
enum Lessons {
    Written { data: sft::Data, train: sft::Train, eval: Option<sft::Examination>, sample: sft::Asking },
    Rollouts { tasks: Tasks, rollout: RolloutSettings, train: RolloutTrain },
}

/// A recipe with everything said.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// What the student's products run in; what its tensors are stored in when not given, bf16 where they are fresh.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<recipe::Precision>,
    /// Name, seed, folder.
    pub run: Run,
    /// Who is learned from.
    pub teacher: Teacher,
    /// Who learns.
    pub student: Student,
    /// How.
    pub distill: Distill,
    #[serde(flatten)]
    lessons: Lessons,
}

/// What a fresh student computes in when the recipe does not say it.
pub fn fresh_precision() -> minke_model::Precision {
    recipe::Precision::all(Dtype::Bf16).into()
}

impl Recipe {
    /// Reads a parsed recipe.
    ///
    /// # Errors
    /// Unknown keys, wrong types and values out of bounds, each with its place.
    pub fn read(document: &Document) -> Result<Self> {
        document.is_for("distill")?;
        let mut root = document.root();
        let mut run_section = root.section("run")?;
        let teacher_section = root.section("teacher")?;
        let student_section = root.section("student")?;
        let distill = read_distill(root.section("distill")?, document)?;
        let precision = precision(document, &mut root)?;
        let train_section = root.section("train")?;
        let run = recipe::run(&mut run_section, document)?;
        run_section.finish()?;
        let teacher = read_teacher(teacher_section, document)?;
        let student = read_student(student_section, document)?;
        let begin = |optim: Optim| match student.given {
            Some(_) => Optim { lr: FRESH_LR, ..optim },
            None => optim,
        };
        let lessons = if distill.mode == Mode::OnPolicy {
            let (mut tasks, mut rollout) = (root.section("tasks")?, root.section("rollout")?);
            root.finish()?;
            let part = Lessons::Rollouts {
                tasks: grpo::read_tasks(&mut tasks)?,
                rollout: grpo::read_rollout(&mut rollout, 1)?,
                train: read_train(train_section, begin(grpo::OPTIM))?,
            };
            tasks.finish()?;
            rollout.finish()?;
            part
        } else {
            let (data, eval, sample) =
                (root.section("data")?, root.section("eval")?, root.section("sample")?);
            root.finish()?;
            let examined = document.given().contains("eval");
            Lessons::Written {
                data: sft::data(data)?,
                train: sft::train(train_section, begin(sft::OPTIM))?,
                eval: if examined { Some(sft::examination(eval)?) } else { None },
                sample: sft::asking(sample)?,
            }
        };
        Ok(Self { precision, run, teacher, student, distill, lessons })
    }

    /// Whether the teacher itself is asked during training, rather than what it wrote or said before.
    pub fn asks_teacher(&self) -> bool {
        match &self.distill {
            Distill { mode: Mode::OnPolicy, .. } => true,
            Distill { asked: Some(asked), .. } => asked.cache.is_none(),
            Distill { .. } => false,
        }
    }

    /// What the teacher's products run in.
    pub fn teacher_precision(&self) -> Option<minke_model::Precision> {
        self.teacher.precision.map(Into::into)
    }

    /// Looks at the student, or lays out a fresh one; afterwards the recipe says its sizes.
    ///
    /// # Errors
    /// It speaks in other tokens than the teacher, is not there, or is impossible.
    pub fn look(&mut self, teacher: &Known) -> Result<Known> {
        let student = match (&self.student.path, &self.student.given) {
            (Some(path), _) => Known::look("student.path", path)?,
            (None, Some(given)) => {
                let mut config = given.config(teacher.config.vocab_size, teacher.context())?;
                let (its, own) = (&teacher.config, &teacher.tokenizer);
                config.bos_token_id = config.bos_token_id.or(its.bos_token_id).or(own.bos());
                if config.eos_token_id.is_empty() {
                    config.eos_token_id.clone_from(&its.eos_token_id);
                    if config.eos_token_id.is_empty() {
                        config.eos_token_id.extend(own.eos());
                    }
                }
                self.student.model = Some(given.table(&config));
                let tokenizer = own.clone();
                Known { key: "student.model.vocab_size", folder: None, config, tokenizer, template: None }
            }
            (None, None) => unreachable!("a student has a path or a model"),
        };
        teacher.speaks_with(&student)?;
        Ok(student)
    }

    /// What the loop needs to know; the steps of written lessons are known when they are read.
    ///
    /// # Errors
    /// An unknown template.
    ///
    /// # Panics
    /// Never: these types have TOML.
    pub fn setup(&self) -> Result<Setup> {
        let template = template("student.template", self.student.template.as_deref())?;
        let (optim, steps, rhythm) = match &self.lessons {
            Lessons::Written { train, .. } => (train.optim, 0, train.rhythm),
            Lessons::Rollouts { train, .. } => (train.optim, train.steps, train.rhythm),
        };
        Ok(Setup {
            kind: "distill",
            run: self.run.clone(),
            model: self.student.path.clone().unwrap_or_default(),
            begins_with: self.student.path.as_ref().map(|_| "student.path"),
            precision: self.precision.map(Into::into),
            template,
            optim,
            steps,
            rhythm,
            recipe: toml::to_string(self).expect("a recipe is plain data"),
            free: is_free,
        })
    }

    /// How the teacher is asked for what it takes to be likely among `vocabulary` tokens.
    ///
    /// # Panics
    /// In other modes than `logits`.
    pub fn telling(&self, vocabulary: usize) -> Telling {
        let asked = self.distill.asked.as_ref().expect("the mode is logits");
        Telling {
            k: asked.top_k.min(vocabulary),
            vocabulary,
            temperature: asked.temperature as f32,
            divergence: match asked.divergence {
                Way::Forward => Divergence::Forward,
                Way::Reverse => Divergence::Reverse,
            },
            precision: self.teacher_precision(),
        }
    }

    /// The folder of what the teacher said before.
    pub fn cache(&self) -> Option<&str> {
        self.distill.asked.as_ref()?.cache.as_deref()
    }

    /// The recipe of fine-tuning that the examples come from.
    ///
    /// # Panics
    /// In mode `on_policy`.
    pub fn written(&self) -> sft::Recipe {
        let Lessons::Written { data, train, eval, sample } = self.lessons.clone() else {
            unreachable!("the mode has examples")
        };
        let model = sft::ModelGiven {
            path: self.student.path.clone().unwrap_or_default(),
            template: self.student.template.clone(),
        };
        sft::Recipe { precision: self.precision, run: self.run.clone(), model, data, train, eval, sample }
    }

    /// The recipe of reinforcement learning that tasks and rollouts come from.
    ///
    /// # Panics
    /// In other modes than `on_policy`.
    pub fn rollouts(&self) -> grpo::Recipe {
        let Lessons::Rollouts { tasks, rollout, train } = self.lessons.clone() else {
            unreachable!("the mode has tasks")
        };
        let RolloutTrain { steps, rows_per_pass, optim, rhythm } = train;
        grpo::Recipe {
            precision: self.precision,
            run: self.run.clone(),
            model: grpo::ModelPart { path: String::new(), template: None, reference: None },
            tasks,
            rollout,
            // shown beside the divergence, never learned from
            reward: grpo::Reward { right: 1.0, format: 0.0, overlong_buffer: 0, overlong: 0.0 },
            objective: grpo::Algorithm::Grpo.into(),
            train: grpo::Train { steps, minibatches: 1, epochs: 1, rows_per_pass, optim, rhythm },
        }
    }
}

/// Keys that change no weight; whether data and teacher are the same is judged by their fingerprints.
fn is_free(key: &str, was: &str, is: &str) -> bool {
    const FREE: [&str; 4] = ["teacher.path", "student.path", "student.template", "distill.cache"];
    FREE.contains(&key) || sft::is_free(key, was, is) || grpo::is_free(key, was, is)
}

fn read_teacher(mut s: Section, document: &Document) -> Result<Teacher> {
    let path = model_path(&mut s, "path")?;
    let path = path.ok_or_else(|| s.missing("path", "a model folder, a run, or a hub id"))?;
    let given = recipe::precision(&mut s)?;
    let said = document.given().iter().any(|key| key.starts_with("teacher.precision"));
    s.finish()?;
    Ok(Teacher { path, precision: said.then_some(given) })
}

fn read_student(mut s: Section, document: &Document) -> Result<Student> {
    let path = model_path(&mut s, "path")?;
    let template = template_place(&mut s)?;
    let section = s.section("model")?;
    let fresh = document.given().contains("student.model");
    if fresh && path.is_some() {
        return Err(s.conflict("path", "a path", "no value, since [student.model] makes a fresh one").into());
    }
    if !fresh && path.is_none() {
        return Err(s
            .missing("path", "a model to start from, or [student.model] with family and depth")
            .into());
    }
    let given = if fresh { Some(recipe::model(section)?) } else { None };
    s.finish()?;
    Ok(Student { path, template, model: None, given })
}

fn read_distill(mut s: Section, document: &Document) -> Result<Distill> {
    let modes = Mode::CHOICES;
    let mode = s
        .choice("mode", &modes)?
        .ok_or_else(|| s.missing("mode", "\"sequences\", \"logits\" or \"on_policy\""))?;
    let ways = [("forward", Way::Forward), ("reverse", Way::Reverse)];
    let asked = Asked {
        top_k: s.integer("top_k", 1, 1 << 16)?.unwrap_or(32) as usize,
        divergence: s.choice("divergence", &ways)?.unwrap_or(Way::Forward),
        temperature: s.positive_temperature("temperature")?.unwrap_or(1.0),
        cache: s.path("cache")?,
    };
    let given = document.given();
    let needless = ["top_k", "divergence", "temperature", "cache"]
        .into_iter()
        .find(|key| given.contains(&format!("distill.{key}")));
    if let (Some(key), true) = (needless, mode != Mode::Logits) {
        let expected = "no value, since only distill.mode = \"logits\" asks for it";
        return Err(s.conflict(key, "one", expected).into());
    }
    s.finish()?;
    Ok(Distill { mode, asked: (mode == Mode::Logits).then_some(asked) })
}

fn read_train(mut s: Section, defaults: Optim) -> Result<RolloutTrain, PostError> {
    let train = RolloutTrain {
        steps: s.integer("steps", 1, MOST_STEPS)?.unwrap_or(100),
        rows_per_pass: s.integer("rows_per_pass", 1, 1 << 24)?.unwrap_or(8192) as usize,
        optim: recipe::optim(&mut s, defaults)?,
        rhythm: Rhythm::read(&mut s, 20)?,
    };
    s.finish()?;
    Ok(train)
}
