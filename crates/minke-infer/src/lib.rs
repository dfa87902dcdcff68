//! Inference: a model folder or file in, text or log-probabilities out.
//!
//! The way of a generated token:
//!
//! ```text
//! load_model(folder) -> Loaded { model, tokenizer, ... }
//! Engine::generate(requests) -> Model::infer(steps) -> logits -> filters, draw -> id
//!                                                       StreamDecoder -> StopMatcher -> text to the caller
//! ```
//!
//! [`Assistant`] is all of it in a few lines: a conversation with a model.
//!
//! [`Engine`] borrows the model, so that a trainer that wants to see what its model writes hands over the very
//! weights that it trains. A call of [`minke_model::Model::infer`] carries whatever is ready: chunks of prompts
//! and single tokens of many sequences together. By the bit contract of the kernels none of that shows in the
//! result: a request gives the same tokens, text and log-probabilities alone and in any batch, at any number
//! of threads, with its prompt in one piece or in many. Draws are named by (seed, sequence, position), so
//! they do not depend on the batch either.
//!
//! What is deliberately not here: files are read through `minke_data`, nothing is printed, and nothing
//! waits for a network.

mod assistant;
mod choose;
mod compiler;
mod constrain;
mod engine;
mod files;
pub mod gguf;
mod guide;
mod load;
pub mod machine;
mod penalties;
pub mod quantize;
mod sampling;
mod scheduler;
mod sequence;
mod speculate;
mod step;
mod stop;
mod thinking;

pub use assistant::{
    Answer, Assistant, AssistantError, Builder, Piece, Settings, Splitter, TEMPERATURE, Whole,
};
pub use compiler::Form;
pub use constrain::{Constraint, ConstraintError};
pub use engine::{Delta, Engine, EngineError, Generation, Request, StopReason, Timing, Trace, can_draft};
pub use files::{ModelFiles, Weights};
pub use load::{GenerationDefaults, LoadModelError, Loaded, WeightFolder, end_ids, load_model, read_config};
pub use sampling::{Sampling, SettingError};
pub use scheduler::{
    Done, Event, Handle, Order, Service, ServiceError, ServiceOptions, Sink, Stats, Stream, SubmitError,
    Ticket, Times, Usage,
};
pub use sequence::Session;
pub use speculate::{Speculated, Speculation};
pub use step::Token;
pub use stop::StopMatcher;
pub use thinking::{ThinkingBudget, Thought, begins_thought, form_waits, without_thought};
