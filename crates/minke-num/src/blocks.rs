//! Block formats: a few bits per weight, and scales for every block of weights along a row.
//!
//! The formats are those of GGUF, byte for byte (ggml, `ggml-common.h`: the `block_*` structures). Two kinds: blocks of 32
//! with a scale (and for some a minimum) in f16, and super-blocks of 256 whose sub-blocks of 16 or 32 have small integer
//! scales under one or two f16.
//!
//! [`decode`] gives the numbers that other programs see in a block; [`encode`] looks for the scales under which they are
//! nearest to what they were.

mod bits;
mod decode;
mod encode;
mod search;
mod super_blocks;

pub use decode::decode;
pub use encode::{EncodeError, encode};

/// The levels of IQ4_NL and IQ4_XS (ggml: `kvalues_iq4nl`): denser about zero, as weights are.
const IQ4_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// How blocks of weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockFormat {
    /// 4 bits, a scale for 32.
    Q4_0,
    /// 4 bits, a scale and a minimum for 32.
    Q4_1,
    /// 5 bits, a scale for 32.
    Q5_0,
    /// 5 bits, a scale and a minimum for 32.
    Q5_1,
    /// 8 bits, a scale for 32.
    Q8_0,
    /// 2 bits; scales and minima of 4 bits for 16.
    Q2K,
    /// 3 bits; scales of 6 bits for 16.
    Q3K,
    /// 4 bits; scales and minima of 6 bits for 32.
    Q4K,
    /// 5 bits; scales and minima of 6 bits for 32.
    Q5K,
    /// 6 bits; scales of 8 bits for 16.
    Q6K,
    /// 4 bits that name one of sixteen levels, a scale for 32.
    Iq4Nl,
    /// 4 bits that name one of sixteen levels; scales of 6 bits for 32.
    Iq4Xs,
}

impl BlockFormat {
    /// All formats, in the order of their numbers in GGUF.
    pub const ALL: [Self; 12] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Iq4Xs,
    ];

    /// The name, as GGUF tools print it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Iq4Nl => "IQ4_NL",
            Self::Iq4Xs => "IQ4_XS",
        }
    }

    /// Its number in GGUF (`ggml_type`).
    pub fn ggml_type(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Iq4Nl => 20,
            Self::Iq4Xs => 23,
        }
    }

    /// The format of a number in GGUF.
    pub fn from_ggml_type(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.ggml_type() == number)
    }

    /// Weights of a block.
    pub fn block_len(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Iq4Nl => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::Iq4Xs => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Iq4Xs => 136,
        }
    }

    /// Bytes of a row of `cols` weights; `None` where blocks do not fill it.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        cols.is_multiple_of(self.block_len()).then(|| cols / self.block_len() * self.block_bytes())
    }
}

#[cfg(test)]
mod tests;
