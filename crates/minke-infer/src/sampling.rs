//! How tokens are chosen: the settings, and the filters over a row of logits. The draw is in `minke_cpu::policy`.

/// How tokens are chosen.
///
/// The filters run in this order, which is that of Hugging Face transformers: temperature, top-k, top-p, min-p.
/// Each looks at the probabilities that the one before left. At every step ties go to the lower id.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token and makes the other settings moot.
    pub temperature: f32,
    /// Keeps the k likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest tokens that together reach this share, at least one; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the likeliest one's probability; 0 keeps all.
    pub min_p: f32,
    /// Names the random numbers, together with the sequence and the position.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

/// A setting that is out of its bounds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}: expected {expected}, got {got}")]
pub struct SettingError {
    /// The setting.
    pub name: &'static str,
    /// What may stand there.
    pub expected: &'static str,
    /// What stands there.
    pub got: String,
}

impl Sampling {
    /// The likeliest token each time.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks the bounds.
    ///
    /// # Errors
    /// The first setting that is out of its bounds, or no number.
    pub fn validate(&self) -> Result<(), SettingError> {
        let share = |x: f32| (0.0..=1.0).contains(&x);
        let checks = [
            (
                "temperature",
                self.temperature,
                (0.0..=100.0).contains(&self.temperature),
                "a number from 0 to 100",
            ),
            ("top-p", self.top_p, share(self.top_p) && self.top_p > 0.0, "a share above 0, at most 1"),
            ("min-p", self.min_p, share(self.min_p), "a share from 0 to 1"),
        ];
        match checks.into_iter().find(|(_, _, good, _)| !good) {
            Some((name, got, _, expected)) => Err(SettingError { name, expected, got: got.to_string() }),
            None => Ok(()),
        }
    }
}

/// Filters rows of logits; keeps its memory between calls. What is left is drawn from by `minke_cpu::policy::draw`.
#[derive(Debug, Default)]
pub struct Sampler {
    /// Ids that are still in the race and their unnormalised probabilities.
    candidates: Vec<(u32, f64)>,
}

impl Sampler {
    /// The ids that the filters leave of a row, the likeliest first or ascending; empty where no filter is on.
    ///
    /// Filters run on probabilities in f64. A row without a finite logit leaves nothing to filter.
    pub fn kept(&mut self, sampling: &Sampling, logits: &[f32]) -> Vec<u32> {
        let on = sampling.top_k > 0 && sampling.top_k < logits.len()
            || sampling.top_p < 1.0
            || sampling.min_p > 0.0;
        let Some((_, max)) = argmax(logits).filter(|(_, max)| on && max.is_finite()) else {
            return Vec::new();
        };
        let scale = 1.0 / f64::from(sampling.temperature);
        let max = f64::from(max);
        self.candidates.clear();
        // a NaN compares false and drops out, as do tokens whose probability is nothing
        self.candidates.extend(logits.iter().enumerate().filter_map(|(id, &logit)| {
            let weight = ((f64::from(logit) - max) * scale).exp();
            (weight > 0.0).then_some((id as u32, weight))
        }));
        let likeliest_first = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let top_k = sampling.top_k;
        if top_k > 0 && top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(top_k - 1, likeliest_first);
            self.candidates.truncate(top_k);
            self.candidates.sort_unstable_by(likeliest_first);
        }
        if sampling.top_p < 1.0 {
            self.candidates.sort_unstable_by(likeliest_first);
            let enough = f64::from(sampling.top_p) * self.total();
            let mut sum = 0.0;
            let kept = self.candidates.iter().position(|(_, weight)| {
                sum += weight;
                sum >= enough
            });
            self.candidates.truncate(kept.map_or(self.candidates.len(), |last| last + 1));
        }
        if sampling.min_p > 0.0 {
            // the likeliest token's weight is 1
            self.candidates.retain(|(_, weight)| *weight >= f64::from(sampling.min_p));
        }
        self.candidates.iter().map(|(id, _)| *id).collect()
    }

    fn total(&self) -> f64 {
        self.candidates.iter().map(|(_, weight)| weight).sum()
    }
}

/// The first of the largest logits that are numbers, unless all are minus infinity.
pub(crate) fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let mut best = None;
    let mut max = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > max {
            (best, max) = (Some(id as u32), logit);
        }
    }
    best.map(|id| (id, max))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(sampling: Sampling, logits: &[f32]) -> Vec<u32> {
        let mut ids = Sampler::default().kept(&sampling, logits);
        ids.sort_unstable();
        ids
    }

    /// Probabilities 0.1, 0.4, 0.2, 0.2, 0.1.
    fn logits() -> Vec<f32> {
        [0.1f32, 0.4, 0.2, 0.2, 0.1].iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn filters_keep_what_they_say_and_ties_go_to_the_lower_id() {
        let all = Sampling::default();
        assert!(kept(all, &logits()).is_empty(), "no filter, nothing to say");
        assert_eq!(kept(Sampling { top_k: 2, ..all }, &logits()), [1, 2]);
        assert_eq!(kept(Sampling { top_k: 4, ..all }, &logits()), [0, 1, 2, 3]);
        assert_eq!(kept(Sampling { top_p: 0.55, ..all }, &logits()), [1, 2]);
        assert_eq!(kept(Sampling { top_p: 0.75, ..all }, &logits()), [1, 2, 3]);
        assert_eq!(kept(Sampling { top_p: 1e-6, ..all }, &logits()), [1]);
        assert_eq!(kept(Sampling { min_p: 0.4, ..all }, &logits()), [1, 2, 3]);
        // after top-k = 2 the shares are 2/3 and 1/3
        assert_eq!(kept(Sampling { top_k: 2, top_p: 0.6, ..all }, &logits()), [1]);
        // a low temperature sharpens before top-p looks
        assert_eq!(kept(Sampling { temperature: 0.2, top_p: 0.9, ..all }, &logits()), [1]);
    }

    #[test]
    fn odd_rows_do_no_harm() {
        let filtered = Sampling { top_k: 1, ..Sampling::default() };
        assert_eq!(kept(filtered, &[f32::NAN, 1.0, f32::NEG_INFINITY]), [1]);
        for odd in [&[0.0, f32::INFINITY][..], &[f32::NAN, f32::NAN], &[f32::NEG_INFINITY; 2], &[]] {
            assert!(kept(filtered, odd).is_empty(), "{odd:?}");
            assert_eq!(
                argmax(odd).map(|best| best.0),
                (odd.len() == 2 && odd[1] == f32::INFINITY).then_some(1)
            );
        }
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some((1, 3.0)));
    }

    #[test]
    fn bounds_are_checked() {
        let good = Sampling::default();
        assert_eq!(good.validate(), Ok(()));
        let bad = [
            Sampling { temperature: -1.0, ..good },
            Sampling { temperature: f32::NAN, ..good },
            Sampling { top_p: 0.0, ..good },
            Sampling { min_p: 1.5, ..good },
        ];
        for (sampling, name) in bad.into_iter().zip(["temperature", "temperature", "top-p", "min-p"]) {
            assert_eq!(sampling.validate().unwrap_err().name, name);
        }
    }
}
