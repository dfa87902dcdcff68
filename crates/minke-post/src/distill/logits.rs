//! Learning from what a teacher takes to be likely at each place of a text.

use minke_cpu::Cpu;
use minke_model::{Divergence, Model, Teacher, TrainBatch};
use minke_train::plan::Batch;
use serde_json::{Value, json};

use super::cache::Cache;
use crate::error::Result;
use crate::events::Event;
use crate::metrics::{Sample, Values};
use crate::session::{Stage, Workshop};
use crate::sft::Sft;

/// How a teacher is asked, and what is made of its answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Telling {
    /// Its k likeliest tokens.
    pub k: usize,
    /// Tokens that there are.
    pub vocabulary: usize,
    /// The temperature of both distributions.
    pub temperature: f32,
    /// Which way the student is drawn.
    pub divergence: Divergence,
    /// What the teacher's products run in; what it is stored in when not given.
    pub precision: Option<minke_model::Precision>,
}

impl Telling {
    /// What the teacher's answer depends on, beside teacher and text.
    pub fn key(&self) -> String {
        let Self { k, vocabulary, temperature, precision, divergence: _ } = self;
        format!("{k} of {vocabulary} at {:08x} in {precision:?}", temperature.to_bits())
    }

    /// Asks a teacher.
    pub fn ask(&self, cpu: &Cpu, model: &mut Model, batch: &TrainBatch) -> Teacher {
        model.likeliest(cpu, batch, self.k, self.temperature)
    }
}

/// Where the teacher's word comes from.
pub enum Source {
    /// From itself.
    Online(Box<Model>),
    /// From the disk.
    Cached(Cache),
}

/// The stage: the examples of SFT, with a teacher beside them.
pub struct Logits<'a> {
    sft: Sft<'a>,
    source: Source,
    telling: Telling,
    /// The teacher's fingerprint.
    teacher: String,
}

impl<'a> Logits<'a> {
    /// A stage on the examples of `sft`.
    pub fn new(sft: Sft<'a>, source: Source, telling: Telling, teacher: &str) -> Self {
        Self { sft, source, telling, teacher: teacher.to_owned() }
    }
}

impl Stage for Logits<'_> {
    fn batch(&self) -> Option<Batch> {
        self.sft.batch()
    }

    fn facts(&self) -> Vec<(String, String)> {
        let Telling { k, temperature, divergence, .. } = self.telling;
        let way = match divergence {
            Divergence::Forward => "KL(teacher||student)",
            Divergence::Reverse => "KL(student||teacher)",
        };
        let source = match self.source {
            Source::Online(_) => "asked at each step",
            Source::Cached(_) => "from the cache",
        };
        let mut facts =
            vec![("teacher".to_owned(), format!("{way} of {k} tokens at {temperature}, {source}"))];
        facts.extend(self.sft.facts());
        facts
    }

    fn turn(&mut self, shop: &mut Workshop, turn: u64, _: &mut dyn FnMut(Event<'_>)) -> Result<Values> {
        let step = self.sft.batches.step(turn);
        let cpu = shop.cpu.clone();
        let mut told = Vec::with_capacity(step.micro.len());
        for (batch, samples) in step.micro.iter().zip(&step.samples) {
            told.push(match &mut self.source {
                Source::Online(model) => self.telling.ask(&cpu, model, batch),
                Source::Cached(cache) => cache.tell(samples)?,
            });
        }
        let Telling { divergence, temperature, .. } = self.telling;
        let mut values = Sft::learn(shop, &step, &mut |model, at, options| {
            model.distill_step(&cpu, &step.micro[at], options, &told[at], divergence, temperature)
        })?;
        // evaluations give a cross entropy as `loss`, which this is not
        if let Some(loss) = values.values.remove("loss") {
            values.put("divergence", loss);
        }
        Ok(values)
    }

    fn evaluate(
        &mut self,
        shop: &mut Workshop,
        step: u64,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Option<Values>> {
        self.sft.evaluate(shop, step, on_event)
    }

    fn samples(&mut self, shop: &mut Workshop, step: u64) -> Result<Vec<Sample>> {
        self.sft.samples(shop, step)
    }

    fn state(&self) -> Value {
        json!({ "lessons": self.sft.state(), "teacher": self.teacher })
    }

    fn restore(&mut self, state: &Value) -> Result<(), String> {
        same_teacher(state, &self.teacher)?;
        self.sft.restore(&state["lessons"])
    }
}

/// Refuses to go on with another teacher.
pub fn same_teacher(state: &Value, teacher: &str) -> Result<(), String> {
    if state["teacher"] == json!(teacher) {
        return Ok(());
    }
    Err("it learned from another teacher than this; start a new run with --out".to_owned())
}
