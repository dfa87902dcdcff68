//! The yardstick: how many bits per byte a good general compressor needs for the same text.
//!
//! A language model's bits per byte and a compressor's output are the same quantity, so the report of a run
//! sets them side by side. zstd runs at its highest level with the longest window that its decoder accepts by
//! default, so that it may copy from anywhere in the last 128 MiB. It has seen nothing of the training text,
//! the model has; the figure says what is cheap to have, not what is possible.

use std::io::{self, Read, Write};

/// Window of 2^27 bytes: the longest that decoders take without being asked.
const WINDOW_LOG: u32 = 27;
/// Inputs up to this size are announced, and the compressor's tables shrink to fit.
const ANNOUNCED_BYTES: u64 = 32 << 20;

/// Compresses a stream with zstd at level 22 and gives 8 times output bytes over input bytes.
///
/// # Errors
/// What the reader gives, or an empty input.
pub fn zstd_bits_per_byte(mut text: impl Read) -> io::Result<f64> {
    let mut head = Vec::new();
    text.by_ref().take(ANNOUNCED_BYTES + 1).read_to_end(&mut head)?;
    if head.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "nothing to compress"));
    }
    let mut encoder = zstd::stream::write::Encoder::new(Counter { bytes: 0 }, 22)?;
    encoder.long_distance_matching(true)?;
    encoder.window_log(WINDOW_LOG)?;
    encoder.include_checksum(false)?;
    if head.len() as u64 <= ANNOUNCED_BYTES {
        encoder.set_pledged_src_size(Some(head.len() as u64))?;
    }
    encoder.write_all(&head)?;
    let mut in_bytes = head.len() as u64;
    drop(head);
    in_bytes += io::copy(&mut text, &mut encoder)?;
    let out_bytes = encoder.finish()?.bytes;
    Ok(8.0 * out_bytes as f64 / in_bytes as f64)
}

/// Counts what it is given and keeps nothing.
struct Counter {
    bytes: u64,
}

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetition_is_cheap_and_noise_is_not() {
        let repeated = zstd_bits_per_byte("the whale ".repeat(5000).as_bytes()).unwrap();
        assert!(repeated < 0.05, "{repeated}");
        let mut noise = vec![0; 50_000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let noisy = zstd_bits_per_byte(&noise[..]).unwrap();
        assert!((8.0..8.1).contains(&noisy), "{noisy}");
        assert!(zstd_bits_per_byte(&[][..]).is_err());
    }
}
