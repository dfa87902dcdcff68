//! From a model to a smaller one: formats, and what decides on their scales.
//!
//! [`Mix`] says which tensor is stored in what; [`Importance`] how much an error of each column of a matrix matters, measured
//! over a text; `minke_num::blocks` finds the scales.

mod importance;
mod mix;

pub use importance::{ExpertRows, Importance, ImportanceError, LayerRows};
pub use mix::{Facts, Mix};
