//! Model folders as Hugging Face lays them out.
//!
//! A folder with `config.json`, one `model.safetensors` or several with an index, and the tokenizer's files is a
//! model everywhere in Minke. Reading ([`WeightFiles`]) validates each header itself before a single
//! offset is used; writing ([`SafetensorsWriter`], [`write_folder_atomic`]) makes a file or folder appear whole or
//! not at all; [`resolve_model`] finds a folder by what a person typed.
//!
//! The format of a safetensors file: eight bytes of header length, a JSON header of names with dtype, shape and
//! byte range, the bytes. What is checked of it is listed in [`header`](self) code beside each check: the length
//! against the file and a cap, the JSON against a fixed form (so no depth to exhaust), names against
//! duplicates, `shape x dtype` against the range with checked products, ranges against gaps and overlaps.
//!
//! Weights may be stored in FP8 as DeepSeek publishes them: codes with a scale per square of 128
//! ([`WeightFiles::quantized_view`]).
//!
//! A downloaded checkpoint may be an attack; a truncated one is the common case. Both give an error that
//! names the file, the tensor, what was expected and what is there.

mod folder;
mod header;
mod quantized;
mod read;
mod resolve;
mod write;

pub use folder::{recover_folder, write_folder_atomic};
pub use header::Dtype;
pub use quantized::{QuantizedView, scales_name, weight_of_scales};
pub use read::{TensorView, WeightFiles};
pub(crate) use resolve::cached_snapshot;
pub use resolve::resolve_model;
pub use write::{SafetensorsWriter, TensorSpec, write_safetensors};
