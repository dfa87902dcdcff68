//! The one transformer, built from `config.json`.
//!
//! A [`Model`] is a [`config::Config`], its weights ([`Params`]) and a forward pass that reads as a list of calls
//! ([`forward`](Model)): embedding; per layer norm, attention, norm, feed-forward; final norm; head. Training
//! ([`Model::train_step`]), evaluation and generation ([`Model::infer`]) run that same list over the same kernels, so
//! they agree to the bit; they differ in whether calls are recorded and where keys come from.
//!
//! Nothing here opens a file: weights come through [`WeightSource`], names from [`spec`].

pub mod config;
mod draft;
mod forward;
mod infer;
pub mod load;
mod near;
mod params;
mod policy;
mod rotary;
pub mod spec;
mod train;

pub use config::{Config, ConfigError};
pub use draft::{DraftCache, DraftStep, Drafted};
pub use forward::{Model, Recompute};
pub use infer::{Cache, CacheKind, Inferred, PAGE, Page, Step, Want};
pub use load::{LoadError, Loading, Purpose, Unmoved, WeightSource, running_bytes};
pub use minke_cpu::DType;
pub use minke_cpu::attention::KvFormat;
pub use minke_cpu::attention::Segment;
pub use minke_cpu::fp8::Fp8;
pub use minke_cpu::policy::{Divergence, Kept, Teacher};
pub use minke_tensor::Made;
pub use params::{Coded, Param, Params, Precision};
pub use policy::{PolicyBatch, PolicyStats};
pub use train::{ExpertLoad, IGNORE, LossOptions, MtpTargets, StepStats, TrainBatch};
