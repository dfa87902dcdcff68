//! Which problems come next: those that are sometimes solved teach the most.

use std::collections::BTreeMap;

use minke_gym::{Draw, Part, Split, Suite, SuiteError, Task, problem};
use serde_json::{Value, json};

use crate::error::{PostError, Result};
use crate::metrics::Values;

/// How fast the estimate of a cell's success follows.
const FOLLOW: f64 = 0.1;
/// Kinds and levels that checkpoints have room for.
const MOST_CELLS: usize = 30_000;
/// Kinds and levels that a step tells of, at most.
const MOST_SHOWN: usize = 64;
/// What a cell is taken to succeed at before it was tried.
const UNTRIED: f64 = 0.5;

/// Problems of one kind and difficulty.
enum Source {
    /// As many as wanted.
    Family(&'static dyn minke_gym::Family),
    /// Those of a file.
    Tasks(Vec<Task>),
}

struct Cell {
    name: String,
    level: u32,
    source: Source,
    success: f64,
}

/// Draws tasks by how well each kind and level is solved.
pub struct Curriculum {
    cells: Vec<Cell>,
    /// The share of draws that goes to all cells alike.
    floor: f64,
    seed: u64,
}

impl Curriculum {
    /// A curriculum over the training side of a suite; `floor` of 1 draws all kinds and levels alike.
    ///
    /// # Errors
    /// A file of tasks that cannot be read; a suite without tasks, or of more kinds and levels than can be followed.
    pub fn new(suite: &Suite, floor: f64, seed: u64) -> Result<Self> {
        let unsuitable = |error: SuiteError| PostError::unsuitable("tasks.suite", error.to_string());
        let mut cells = Vec::new();
        for part in suite.parts() {
            if let Part::Family { family, levels } = part {
                cells.extend(levels.clone().map(|level| Cell {
                    name: family.name().to_owned(),
                    level,
                    source: Source::Family(*family),
                    success: UNTRIED,
                }));
            }
        }
        let mut of_files: BTreeMap<(String, u32), Vec<Task>> = BTreeMap::new();
        for task in suite.tasks(Split::Train, 0, seed).map_err(unsuitable)? {
            of_files.entry((task.name.clone(), task.level)).or_default().push(task);
        }
        cells.extend(of_files.into_iter().map(|((name, level), tasks)| Cell {
            name,
            level,
            source: Source::Tasks(tasks),
            success: UNTRIED,
        }));
        if cells.is_empty() {
            return Err(unsuitable(SuiteError::Empty));
        }
        if cells.len() > MOST_CELLS {
            let reason = format!(
                "its tasks have {} names and levels, and at most {MOST_CELLS} can be followed",
                cells.len()
            );
            return Err(PostError::unsuitable("tasks.suite", reason));
        }
        Ok(Self { cells, floor, seed })
    }

    /// Task number `index` of turn `turn`, and the cell that it comes from.
    ///
    /// A cell's chance is `floor / cells + (1 - floor) p (1 - p) / sum of p (1 - p)`, p its success so far: the spread
    /// of a reward of 0 and 1 is largest at one half.
    pub fn draw(&self, turn: u64, index: u64) -> (usize, Task) {
        let mut draw = Draw::new(self.seed ^ 0x0005_EED0_F7A5_C5ED, turn << 20 | index);
        let spread = |cell: &Cell| cell.success * (1.0 - cell.success) + 1e-3;
        let total: f64 = self.cells.iter().map(spread).sum();
        let even = self.floor / self.cells.len() as f64;
        let mut target = draw.below(1 << 53) as f64 / (1_u64 << 53) as f64;
        let chosen = self.cells.iter().position(|cell| {
            target -= even + (1.0 - self.floor) * spread(cell) / total;
            target < 0.0
        });
        let chosen = chosen.unwrap_or(self.cells.len() - 1);
        let cell = &self.cells[chosen];
        let task = match &cell.source {
            Source::Family(family) => {
                // a number that no other draw of the run has
                Task::of(problem(*family, cell.level, Split::Train, self.seed, turn << 20 | index))
            }
            Source::Tasks(tasks) => draw.pick(tasks).clone(),
        };
        (chosen, task)
    }

    /// Notes the share of right answers to a task of a cell.
    pub fn note(&mut self, cell: usize, share: f64) {
        let success = &mut self.cells[cell].success;
        *success += FOLLOW * (share - *success);
    }

    /// Kinds and levels.
    pub fn cells(&self) -> usize {
        self.cells.len()
    }

    /// Adds the success of each kind and level so far, where they are few enough to be looked at.
    pub fn put_into(&self, values: &mut Values) {
        if self.cells.len() <= MOST_SHOWN {
            for Cell { name, level, success, .. } in &self.cells {
                values.put(format!("success/{name}:{level}"), *success);
            }
        }
    }

    /// What must be found again, bit for bit.
    pub fn state(&self) -> Value {
        json!(self.cells.iter().map(|cell| cell.success.to_bits()).collect::<Vec<_>>())
    }

    /// Takes back what [`Curriculum::state`] gave.
    ///
    /// # Errors
    /// It is of another curriculum.
    pub fn restore(&mut self, state: &Value) -> std::result::Result<(), String> {
        let values: Vec<u64> = serde_json::from_value(state.clone()).map_err(|error| error.to_string())?;
        if values.len() != self.cells.len() {
            return Err(format!("{} kinds of tasks instead of {}", values.len(), self.cells.len()));
        }
        for (cell, bits) in self.cells.iter_mut().zip(values) {
            cell.success = f64::from_bits(bits);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sometimes_solved_comes_most() {
        let suite = Suite::parse("chain:1-3").unwrap();
        let mut curriculum = Curriculum::new(&suite, 0.3, 1).unwrap();
        for _ in 0..200 {
            curriculum.note(0, 1.0);
            curriculum.note(2, 0.0);
        }
        let mut counts = [0; 3];
        for index in 0..1000 {
            let (cell, task) = curriculum.draw(7, index);
            assert_eq!(task.level as usize, cell + 1);
            counts[cell] += 1;
        }
        assert!(counts[1] > 700 && counts[0] > 60 && counts[2] > 60, "{counts:?}");
        let again = Curriculum::new(&suite, 0.3, 1).unwrap();
        let mut restored = again;
        restored.restore(&curriculum.state()).unwrap();
        for index in 0..50 {
            assert_eq!(restored.draw(8, index).1.id, curriculum.draw(8, index).1.id);
        }
        assert!(restored.restore(&json!([1, 2])).is_err());
        assert!(restored.restore(&json!("x")).is_err());
    }

    #[test]
    fn kinds_and_levels_are_as_many_as_checkpoints_and_metrics_have_room_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tasks.jsonl");
        let of = |cells: usize| {
            let line = |at| format!("{{\"prompt\": \"{at}\", \"answer\": \"1\", \"level\": {at}}}\n");
            std::fs::write(&path, (1..=cells).map(line).collect::<String>()).unwrap();
            Curriculum::new(&Suite::parse(path.to_str().unwrap()).unwrap(), 0.3, 1)
        };
        let told = |cells: usize| {
            let mut values = Values::default();
            of(cells).unwrap().put_into(&mut values);
            values.values.len()
        };
        assert_eq!([told(MOST_SHOWN), told(MOST_SHOWN + 1)], [MOST_SHOWN, 0]);
        // as long as they can be, and as deep as distillation has them
        let mut most = of(MOST_CELLS).unwrap();
        most.cells.iter_mut().for_each(|cell| cell.success = 0.9);
        let state = json!({ "more": { "tasks": { "success": most.state() } } });
        assert!(serde_json::to_vec_pretty(&state).unwrap().len() < (1 << 20) - (1 << 12));
        let error = of(MOST_CELLS + 1).err().unwrap().to_string();
        assert!(error.contains("tasks.suite") && error.contains("30000"), "{error}");
    }
}
