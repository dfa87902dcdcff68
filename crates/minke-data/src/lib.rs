//! Files: sources, tokenizers, packed shards, safetensors.
//!
//! This crate is the border between what lies on a disk and what the engine may assume. Everything that
//! comes in here was written by somebody else and is hostile until it has been looked at; everything that
//! goes out is complete or not there at all.
//!
//! The way of a training token:
//!
//! ```text
//! SourceSpec -> source::Corpus -> Document -> split::Split -> Tokenizer -> shards::ShardWriter
//!                                                                             |
//!                 loader::Loader::batch(step) <- ShardSet (memory-mapped) <---+
//! ```
//!
//! [`prepare::prepare`] walks it from the first box to the shards and keeps the result in a cache folder,
//! so the second run of a recipe starts at once. [`loader`] is the rest: a batch is a pure function of
//! `(seed, step)`, so a resumed run needs no saved position.
//!
//! [`hf`] is the other half: model folders as Hugging Face lays them out, read and written, and the finding
//! of a model by the name that a person typed.
//!
//! [`gguf`] is the same in one file: a model with its tokenizer, read and written.
//!
//! [`template`] renders conversations as a model expects them, and knows which of their tokens the model wrote.
//!
//! What is deliberately not here: downloading (an absent data set is an error that says how to get it),
//! printing (long work calls back with a [`Progress`]), tensors (weights leave as bytes, dtype and shape).

pub mod compress;
mod error;
mod files;
pub mod gguf;
pub mod hf;
pub mod loader;
mod map;
mod paths;
pub mod prepare;
mod progress;
pub mod shards;
pub mod source;
pub mod split;
pub mod template;
pub mod tokenizer;

pub use error::{Error, Result};
pub use loader::{Batch, Evaluation, Loader, LoaderOptions, NO_LABEL, Packing, Segment};
pub use map::MappedFile;
pub use paths::expand_path;
pub use prepare::{DataSettings, Prepared, TokenizerSpec, prepare};
pub use progress::{Progress, Stage};
pub use shards::ShardSet;
pub use source::{Corpus, CorpusStats, Document, SourceSpec};
pub use template::{ChatTemplate, Message, RenderOptions, Role, Thinking, ToolCall, Transcript};
pub use tokenizer::{ControlToken, StreamDecoder, Tokenizer, TrainOptions};
