//! Weights that run from a map of their file: copied into memory in huge pages, beside the model's work, once it is in use;
//! in panels where products read those faster.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use minke_cpu::stored::{Bytes, Multiplied, Stored, bring_near, lay};
use minke_cpu::{Cpu, Level};

use crate::forward::Model;

/// Calls after which a copy pays: one reads the weights once, a copy reads and writes them on one core.
const CALLS: usize = 64;

/// The same for codes of FP8, which are three times as fast in panels.
const CALLS_OF_CODES: usize = 1;

/// How far a model's weights are on their way.
#[derive(Default)]
pub(crate) enum Near {
    /// They stay in their file.
    #[default]
    Never,
    /// They are copied after so many calls.
    After(usize),
    /// They are being copied, or have been.
    Coming(#[expect(dead_code, reason = "ends the copy when the model goes")] Stop),
}

/// Ends a copy.
pub(crate) struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Model {
    /// Bytes of the weights that products read from a map of their file.
    pub fn mapped_bytes(&self) -> usize {
        self.mapped().map(|part| part.bytes.len()).sum()
    }

    /// Lets the weights that products read from a map of their file be copied, a while after the model began to be used, if
    /// there is memory for them: huge pages are read faster, and panels. No bit of what the model computes depends on it.
    pub fn copy_mapped_weights(&mut self) {
        let codes = self.mapped().any(|part| part.multiplied() == Multiplied::Codes);
        self.near = Near::After(if codes { CALLS_OF_CODES } else { CALLS });
    }

    /// Leaves the weights in their file, where they have not begun to be copied.
    pub fn leave_mapped_weights(&mut self) {
        if let Near::After(_) = self.near {
            self.near = Near::Never;
        }
    }

    /// Begins to copy at once what would be copied after a while: for a program that will run the model for long.
    pub fn copy_mapped_weights_now(&mut self, cpu: &Cpu) {
        if let Near::After(calls) = &mut self.near {
            *calls = 0;
            self.come_near(cpu);
        }
    }

    /// Copies at once what would be copied after a while, and waits: for who measures how fast the model is from then on.
    pub fn copy_mapped_weights_first(&mut self, cpu: &Cpu) {
        if let Near::After(_) = self.near {
            let stop = Arc::new(AtomicBool::new(false));
            copy(&self.all_mapped(), cpu.level(), &stop);
            self.near = Near::Coming(Stop(stop));
        }
    }

    /// A call of the model.
    pub(crate) fn come_near(&mut self, cpu: &Cpu) {
        match &mut self.near {
            Near::Never | Near::Coming(_) => {}
            Near::After(0) => {
                let all = self.all_mapped();
                let stop = Arc::new(AtomicBool::new(false));
                self.near = Near::Coming(Stop(stop.clone()));
                if !all.is_empty() {
                    // (without a thread they stay where they are)
                    let thread = std::thread::Builder::new().name("weights".to_owned());
                    let level = cpu.level();
                    let _ = thread.spawn(move || copy(&all, level, &stop));
                }
            }
            Near::After(calls) => *calls -= 1,
        }
    }

    fn all_mapped(&self) -> Vec<Stored> {
        self.mapped().cloned().collect()
    }

    /// The matrices that products read from a map: all but an embedding that is not the head, of which a call reads few rows.
    fn mapped(&self) -> impl Iterator<Item = &Stored> {
        let looked_up = (self.net.embedding != self.net.head.w).then_some(self.net.embedding);
        let weights = self.params.all_stored().filter(move |(id, _)| Some(*id) != looked_up);
        weights.flat_map(|(_, weight)| weight.parts())
    }
}

/// Copies matrices, until told to stop: in panels where that is faster, others in their place.
fn copy(all: &[Stored], level: Level, stop: &AtomicBool) {
    let others = lay(&all.iter().collect::<Vec<_>>(), level, stop);
    let others: Vec<Bytes> = others.into_iter().map(|stored| stored.bytes.clone()).collect();
    bring_near(&others, stop);
}
