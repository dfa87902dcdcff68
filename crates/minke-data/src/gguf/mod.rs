//! GGUF: a model in one file, metadata and tensors, read over a memory map and written as a stream.
//!
//! The format (`docs/gguf.md` of ggml, version 3; version 2 has the same layout): magic `GGUF`, version, two counts, typed
//! metadata by key, then for each tensor its name, axes (the fastest first), type and offset, then the tensors, each at a
//! multiple of the alignment. Everything is little-endian.
//!
//! Reading ([`GgufFile`]) looks at every byte of the header before anything is trusted: counts against the bytes that are
//! left, so that none decides on an allocation; lengths, types, UTF-8; names and keys against duplicates; axes with checked
//! products; offsets against alignment, the file's end and each other. Arrays stay where they are in the map. Writing
//! ([`GgufWriter`]) takes a tensor's bytes in parts, so that a model larger than memory passes through.
//!
//! What keys mean for a tokenizer is in [`tokenizer`]; what they mean for a model, and how its tensors are called, is the
//! business of whoever knows models.

mod header;
mod read;
#[cfg(test)]
mod tests;
pub mod tokenizer;
mod value;
mod write;

use std::fmt;

use minke_num::blocks::BlockFormat;

pub use read::{GgufFile, GgufTensor, is_gguf};
pub use value::{Kind, Value};
pub use write::{GgufWriter, TensorPlan};

/// Axes of a tensor, at most (`GGML_MAX_DIMS`).
pub const MAX_AXES: usize = 4;
/// Bytes of a tensor's name that other programs read (`GGML_MAX_NAME`, less the end mark).
pub const MAX_NAME_BYTES: usize = 63;
/// Where tensors begin when a file does not say otherwise: at multiples of this.
pub const DEFAULT_ALIGNMENT: usize = 32;

/// What the elements of a tensor are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TensorType {
    /// f32.
    F32,
    /// f16.
    F16,
    /// bf16.
    Bf16,
    /// Blocks of a few bits per weight.
    Blocks(BlockFormat),
}

impl TensorType {
    /// The name, as GGUF tools print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Blocks(format) => format.name(),
        }
    }

    /// Its number in a file (`ggml_type`).
    pub fn number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 30,
            Self::Blocks(format) => format.ggml_type(),
        }
    }

    /// The type of a number, if it is one that is read.
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::F32),
            1 => Some(Self::F16),
            30 => Some(Self::Bf16),
            other => BlockFormat::from_ggml_type(other).map(Self::Blocks),
        }
    }

    /// Bytes of a row of `cols` elements; `None` where blocks do not fill it, or past 2^64.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        match self {
            Self::F32 => cols.checked_mul(4),
            Self::F16 | Self::Bf16 => cols.checked_mul(2),
            Self::Blocks(format) => cols
                .is_multiple_of(format.block_len())
                .then(|| (cols / format.block_len()).checked_mul(format.block_bytes()))
                .flatten(),
        }
    }

    /// Bytes of a tensor of this shape, outermost axis first; `None` as in [`TensorType::row_bytes`].
    pub fn bytes(self, shape: &[usize]) -> Option<usize> {
        let (cols, outer) = shape.split_last().map_or((1, &[][..]), |(cols, outer)| (*cols, outer));
        outer.iter().try_fold(self.row_bytes(cols)?, |bytes, &axis| bytes.checked_mul(axis))
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How types are called that exist and are not read here, for messages.
fn type_name(number: u32) -> String {
    let known = match number {
        4 | 5 | 31..=33 | 36..=38 => "a type that ggml gave up",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24..=27 => "integers",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        40 => "NVFP4",
        _ => return format!("type {number}"),
    };
    format!("{known} (type {number})")
}
