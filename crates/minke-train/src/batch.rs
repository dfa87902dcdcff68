//! From the loader's rows to what the model trains on.

use minke_cpu::attention::Segment;
use minke_model::config::Config;
use minke_model::{IGNORE, MtpTargets, TrainBatch};
use minke_num::rng;

/// Flattens the segments of a loader's batch, one behind the other; positions in none, which whole documents left empty,
/// are left out, so they cost nothing and no expert is counted for them.
///
/// Where segments cover all, position i of row b becomes token `b t + i`. Module k of `mtp_depth` reads the token k
/// places on and is asked for the one after it.
pub fn from_rows(batch: &minke_data::Batch) -> TrainBatch {
    // both crates mark an absent label by the same number
    const { assert!(minke_data::NO_LABEL == IGNORE) };
    let (t, wide) = (batch.sequence_len, batch.sequence_len + 1 + batch.mtp_depth);
    // what lies in rows of `width`, from `shift` places on
    let gathered = |rows: &[u32], width: usize, shift: usize| -> Vec<u32> {
        let places = batch.segments.iter().map(|s| &rows[s.row * width + s.start + shift..][..s.len]);
        places.flatten().copied().collect()
    };
    let mut start = 0;
    let segments = batch.segments.iter().map(|&minke_data::Segment { len, .. }| {
        start += len;
        Segment { start: start - len, len }
    });
    TrainBatch {
        tokens: gathered(&batch.tokens_bt, t, 0),
        positions: gathered(&batch.positions_bt, t, 0),
        segments: segments.collect(),
        labels: gathered(&batch.labels_bt[0], t, 0),
        mtp: (1..=batch.mtp_depth)
            .map(|k| MtpTargets {
                tokens: gathered(&batch.windows_bt, wide, k),
                labels: gathered(&batch.labels_bt[k], t, 0),
            })
            .collect(),
    }
}

/// Uniform random tokens with every label there, for benchmarks: `rows` sequences of `len` tokens.
pub fn random(config: &Config, rows: usize, len: usize, seed: u64, step: u64) -> TrainBatch {
    let wide = len + 1 + config.num_nextn_predict_layers;
    let stream = rng::philox(seed, step, 0x6265_6e63_6800);
    let draw = |row: usize, i: usize| {
        let counter = (row * wide + i) as u64;
        rng::below(seed ^ 0x7261_6e64, u64::from(stream[0]) << 32 | step, counter, config.vocab_size as u64)
            as u32
    };
    let shifted = |by: usize| -> Vec<u32> {
        (0..rows).flat_map(|row| (0..len).map(move |i| draw(row, i + by))).collect()
    };
    TrainBatch {
        tokens: shifted(0),
        positions: (0..rows).flat_map(|_| 0..len as u32).collect(),
        segments: (0..rows).map(|row| Segment { start: row * len, len }).collect(),
        labels: shifted(1),
        mtp: (1..=config.num_nextn_predict_layers)
            .map(|k| MtpTargets { tokens: shifted(k), labels: shifted(k + 1) })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_side_by_side_and_modules_read_on() {
        let none = IGNORE;
        let batch = minke_data::Batch {
            rows: 2,
            sequence_len: 3,
            mtp_depth: 1,
            tokens_bt: vec![1, 2, 3, 6, 7, 8],
            windows_bt: vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
            labels_bt: vec![vec![2, none, 4, 7, 8, 9], vec![none, none, 5, 8, 9, none]],
            positions_bt: vec![0, 1, 0, 0, 1, 2],
            segments: vec![
                minke_data::Segment { row: 0, start: 0, len: 2 },
                minke_data::Segment { row: 0, start: 2, len: 1 },
                minke_data::Segment { row: 1, start: 0, len: 3 },
            ],
            text_bytes: 9,
        };
        let got = from_rows(&batch);
        let segments: Vec<_> = got.segments.iter().map(|s| (s.start, s.len)).collect();
        assert_eq!(segments, [(0, 2), (2, 1), (3, 3)]);
        assert_eq!(got.tokens, [1, 2, 3, 6, 7, 8]);
        assert_eq!(got.labels, batch.labels_bt[0]);
        assert_eq!(got.mtp[0].tokens, [2, 3, 4, 7, 8, 9]);
        assert_eq!(got.mtp[0].labels, batch.labels_bt[1]);
        // what is in no segment is not there
        let segments = vec![batch.segments[0], batch.segments[2]];
        let got = from_rows(&minke_data::Batch { segments, ..batch });
        let segments: Vec<_> = got.segments.iter().map(|s| (s.start, s.len)).collect();
        assert_eq!(segments, [(0, 2), (2, 3)]);
        assert_eq!((got.tokens, got.positions), (vec![1, 2, 6, 7, 8], vec![0, 1, 0, 1, 2]));
        assert_eq!(got.labels, [2, none, 7, 8, 9]);
        assert_eq!(
            (&got.mtp[0].tokens[..], &got.mtp[0].labels[..]),
            (&[2, 3, 7, 8, 9][..], &[none, none, 8, 9, none][..])
        );
    }
}
