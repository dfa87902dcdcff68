//! Training: recipes, optimizers, the loop, checkpoints, reports

pub mod metrics;
pub mod recipe;
pub mod report;
pub mod schedule;
