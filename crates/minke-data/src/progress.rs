//! Progress: long work reports through a callback, and whoever called decides what a person sees.

/// The part of the work that a [`Progress`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Sources are read, hashed and deduplicated.
    Scan,
    /// The vocabulary is trained on a sample.
    TrainTokenizer,
    /// Documents are tokenised and written to shards.
    Tokenize,
}

/// How far a stage has come, in bytes of files read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Which part of the work.
    pub stage: Stage,
    /// Bytes done in this stage.
    pub done_bytes: u64,
    /// Bytes that the stage will take, as far as known; documents that are skipped make it an upper bound.
    pub total_bytes: u64,
}
