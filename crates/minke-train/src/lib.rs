//! Training: recipes, optimizers, the loop, checkpoints, reports.
//!
//! A run is walked in [`pretrain`]: a [`recipe`] is read and completed, data comes from `minke-data`, a
//! [`trainer::Trainer`] takes steps (forward and backward by the model, then [`optim`]), and on the way go out
//! [`events`], [`metrics`], samples and [`checkpoint`]s; a [`report`] ends it. [`bench`] measures the same step,
//! and [`export`] writes a model in another dtype.
//!
//! What decides a weight is a function of recipe, data and step. Nothing is drawn from a generator with state, nothing
//! depends on the clock or on threads, so a run that was killed and resumed ends in the same bits.

pub mod batch;
pub mod bench;
pub mod checkpoint;
pub mod error;
pub mod eval;
pub mod events;
pub mod export;
pub mod metrics;
pub mod optim;
pub mod plan;
pub mod pretrain;
pub mod recipe;
pub mod report;
pub mod resume;
pub mod run_folder;
pub mod schedule;
pub mod trainer;

pub use error::TrainError;
