//! From a model to a smaller one: formats, and what decides on their scales.
//!
//! [`Mix`] says which tensor is stored in what; [`Importance`] how much an error of each column of a matrix matters, measured
//! over a text; `minke_num::blocks` finds the scales; [`Quantizer`] puts them together for
//! [`write_gguf`](crate::gguf::write_gguf).

mod importance;
mod mix;
mod storage;

pub use importance::{ExpertRows, Importance, ImportanceError, LayerRows};
pub use mix::{Facts, Mix};
pub use storage::{Quantizer, Share};
