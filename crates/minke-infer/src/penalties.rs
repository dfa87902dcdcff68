//! What tokens that came before take off the logits of those to come, and what a request adds to them.

use std::collections::HashMap;

use crate::sampling::Sampling;

/// How often each token came.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    /// Times in the answer, by id; tokens of the prompt alone are there with 0.
    counts: HashMap<u32, u32>,
}

impl History {
    /// A sequence that has its prompt only.
    pub fn new(prompt: &[u32]) -> Self {
        Self { counts: prompt.iter().map(|&id| (id, 0)).collect() }
    }

    /// A token of the answer.
    pub fn push(&mut self, id: u32) {
        *self.counts.entry(id).or_insert(0) += 1;
    }
}

/// Adds a request's bias to a row of logits and takes off its penalties, as if the answer went on with `ahead`.
///
/// With c the times that a token is in the answer: `x = x + bias`; where it came before, prompt included,
/// `x = x / repetition` if x > 0 and `x * repetition` otherwise; `x = x - frequency c - presence [c > 0]`.
///
/// As Hugging Face transformers (`SequenceBiasLogitsProcessor`, `RepetitionPenaltyLogitsProcessor`) and OpenAI's API
/// reference (`logit_bias`, `frequency_penalty`, `presence_penalty`) have them.
pub(crate) fn adjust(
    row: &mut [f32],
    sampling: &Sampling,
    bias: &[(u32, f32)],
    history: Option<&History>,
    ahead: &[u32],
) {
    for &(id, bias) in bias {
        if let Some(x) = row.get_mut(id as usize) {
            *x += bias;
        }
    }
    let Some(history) = history else { return };
    let mut take_off = |id: u32, count: u32| {
        let Some(x) = row.get_mut(id as usize) else { return };
        *x = if *x > 0.0 { *x / sampling.repetition_penalty } else { *x * sampling.repetition_penalty };
        *x -= sampling.frequency_penalty * count as f32;
        if count > 0 {
            *x -= sampling.presence_penalty;
        }
    };
    let ahead_of = |id: u32| ahead.iter().filter(|&&other| other == id).count() as u32;
    for (&id, &count) in &history.counts {
        take_off(id, count + ahead_of(id));
    }
    for (at, &id) in ahead.iter().enumerate() {
        if !history.counts.contains_key(&id) && !ahead[..at].contains(&id) {
            take_off(id, ahead_of(id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: [f32; 6] = [1.0, -1.0, 2.0, 0.5, 0.0, 3.0];

    fn adjusted(sampling: Sampling, bias: &[(u32, f32)], history: &History, ahead: &[u32]) -> Vec<f32> {
        let mut row = ROW.to_vec();
        adjust(&mut row, &sampling, bias, Some(history), ahead);
        row
    }

    #[test]
    fn each_penalty_takes_off_what_it_says() {
        let plain = Sampling::default();
        let mut history = History::new(&[0, 1, 1]);
        for id in [2, 2, 1] {
            history.push(id);
        }
        assert_eq!(adjusted(plain, &[], &history, &[]), ROW);
        let repetition = Sampling { repetition_penalty: 2.0, ..plain };
        assert_eq!(adjusted(repetition, &[], &history, &[]), [0.5, -2.0, 1.0, 0.5, 0.0, 3.0]);
        // the prompt does not count
        let presence = Sampling { presence_penalty: 0.5, ..plain };
        assert_eq!(adjusted(presence, &[], &history, &[]), [1.0, -1.5, 1.5, 0.5, 0.0, 3.0]);
        let frequency = Sampling { frequency_penalty: 0.25, ..plain };
        assert_eq!(adjusted(frequency, &[], &history, &[]), [1.0, -1.25, 1.5, 0.5, 0.0, 3.0]);
        assert_eq!(
            adjusted(plain, &[(3, 2.0), (4, -1.0), (77, 1.0)], &history, &[]),
            [1.0, -1.0, 2.0, 2.5, -1.0, 3.0]
        );
        // bias comes before repetition
        assert_eq!(adjusted(repetition, &[(1, 3.0)], &history, &[])[1], 1.0);
    }

    #[test]
    fn what_lies_ahead_counts_as_if_it_were_there() {
        let sampling = Sampling {
            repetition_penalty: 1.3,
            presence_penalty: 0.4,
            frequency_penalty: 0.7,
            ..Sampling::default()
        };
        let mut history = History::new(&[0, 3]);
        history.push(2);
        let ahead = [2, 4, 4, 3];
        let guessed = adjusted(sampling, &[], &history, &ahead);
        for id in ahead {
            history.push(id);
        }
        assert_eq!(guessed, adjusted(sampling, &[], &history, &[]));
    }
}
