//! How tokens are chosen: the settings, and the filters over a row of logits. The draw is in `minke_cpu::policy`.

use std::sync::Arc;

/// How tokens are chosen.
///
/// What is on runs in this order, which is that of Hugging Face transformers. First what changes logits, for the
/// likeliest token as well as for a draw: logit bias ([`crate::Request::logit_bias`]), repetition penalty, presence and
/// frequency penalties; what may not come at all (bans, stop tokens before [`crate::Request::min_tokens`], a
/// [`crate::Constraint`]). Then, for a draw, temperature and the filters: top-k, top-p, min-p, typical-p. Each filter
/// looks at the probabilities that the one before left, and at every step ties go to the lower id.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token and makes the filters and the seed moot.
    pub temperature: f32,
    /// Keeps the k likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest tokens that together reach this share, at least one; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens with at least this share of the likeliest one's probability; 0 keeps all.
    pub min_p: f32,
    /// Keeps the tokens whose surprise is closest to the expected one and that together reach this share, at least one;
    /// 1 keeps all. Meister et al. 2022, "Locally Typical Sampling".
    pub typical_p: f32,
    /// Divides positive logits of tokens that came before, prompt included, and multiplies negative ones; 1 changes
    /// nothing. Keskar et al. 2019, "CTRL", section 4.1.
    pub repetition_penalty: f32,
    /// Is taken off the logits of tokens that the answer has already.
    pub presence_penalty: f32,
    /// Is taken off the logits of the answer's tokens as often as each came.
    pub frequency_penalty: f32,
    /// Names the random numbers, together with the sequence and the position.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
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
        let penalty = |x: f32| (-2.0..=2.0).contains(&x);
        let checks = [
            (
                "temperature",
                self.temperature,
                (0.0..=100.0).contains(&self.temperature),
                "a number from 0 to 100",
            ),
            ("top-p", self.top_p, share(self.top_p) && self.top_p > 0.0, "a share above 0, at most 1"),
            ("min-p", self.min_p, share(self.min_p), "a share from 0 to 1"),
            (
                "typical-p",
                self.typical_p,
                share(self.typical_p) && self.typical_p > 0.0,
                "a share above 0, at most 1",
            ),
            (
                "repetition penalty",
                self.repetition_penalty,
                (0.01..=100.0).contains(&self.repetition_penalty),
                "a number from 0.01 to 100, where 1 changes nothing",
            ),
            (
                "presence penalty",
                self.presence_penalty,
                penalty(self.presence_penalty),
                "a number from -2 to 2",
            ),
            (
                "frequency penalty",
                self.frequency_penalty,
                penalty(self.frequency_penalty),
                "a number from -2 to 2",
            ),
        ];
        match checks.into_iter().find(|(_, _, good, _)| !good) {
            Some((name, got, _, expected)) => Err(SettingError { name, expected, got: got.to_string() }),
            None => Ok(()),
        }
    }

    /// Whether tokens that came before weigh on those to come.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// What may come next, before any filter looks; ids ascend.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Allowed {
    /// Every token.
    #[default]
    All,
    /// Every token but these.
    Except(Arc<[u32]>),
    /// These alone.
    Only(Arc<[u32]>),
}

impl Allowed {
    /// Whether a token is among them.
    pub fn has(&self, id: u32) -> bool {
        match self {
            Self::All => true,
            Self::Except(ids) => ids.binary_search(&id).is_err(),
            Self::Only(ids) => ids.binary_search(&id).is_ok(),
        }
    }

    /// The ids of a vocabulary that are among them, ascending.
    fn ids(&self, vocabulary: usize) -> Box<dyn Iterator<Item = u32> + '_> {
        let all = 0..vocabulary as u32;
        match self {
            Self::All => Box::new(all),
            Self::Except(ids) => {
                let mut ids = ids.iter().copied().peekable();
                Box::new(all.filter(move |id| ids.next_if_eq(id).is_none()))
            }
            Self::Only(ids) => {
                Box::new(ids.iter().copied().take_while(move |id| (*id as usize) < vocabulary))
            }
        }
    }
}

/// What is left of a row to draw from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Left {
    /// The whole row: nothing was asked to take any away, or the row has no finite logit to look at.
    All,
    /// These ids, at least one.
    Some(Vec<u32>),
    /// Of what may come none has a chance.
    Nothing,
}

/// Filters rows of logits; keeps its memory between calls. What is left is drawn from by `minke_cpu::policy::draw`.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// Ids that are still in the race and their unnormalised probabilities.
    candidates: Vec<(u32, f64)>,
    /// How far each is from being typical; beside the candidates.
    typical: Vec<(f64, u32, f64)>,
}

impl Sampler {
    /// What the filters leave of those tokens of a row that may come; the temperature is not 0.
    ///
    /// Filters run on probabilities in f64. Where none is on, what may come is left, ascending.
    pub fn kept(&mut self, sampling: &Sampling, logits: &[f32], allowed: &Allowed) -> Left {
        let on = sampling.top_k > 0 && sampling.top_k < logits.len()
            || sampling.top_p < 1.0
            || sampling.min_p > 0.0
            || sampling.typical_p < 1.0;
        if !on && *allowed == Allowed::All {
            return Left::All;
        }
        let Some((_, max)) = likeliest(logits, allowed) else {
            return if *allowed == Allowed::All { Left::All } else { Left::Nothing };
        };
        if !max.is_finite() {
            // an infinite logit: the caller takes the likeliest
            return if *allowed == Allowed::All {
                Left::All
            } else {
                Left::Some(allowed.ids(logits.len()).collect())
            };
        }
        if !on {
            return Left::Some(allowed.ids(logits.len()).collect());
        }
        let scale = 1.0 / f64::from(sampling.temperature);
        let max = f64::from(max);
        // a NaN compares false and drops out, as do tokens whose probability is nothing
        let weigh = |id: u32| {
            let weight = ((f64::from(logits[id as usize]) - max) * scale).exp();
            (weight > 0.0).then_some((id, weight))
        };
        self.candidates.clear();
        match allowed {
            Allowed::All => self.candidates.extend((0..logits.len() as u32).filter_map(weigh)),
            some => self.candidates.extend(some.ids(logits.len()).filter_map(weigh)),
        }
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
        if sampling.typical_p < 1.0 {
            self.keep_typical(f64::from(sampling.typical_p));
        }
        Left::Some(self.candidates.iter().map(|(id, _)| *id).collect())
    }

    /// Keeps the candidates with the smallest `|-ln p - H|`, H the entropy, until their p reach `share`.
    fn keep_typical(&mut self, share: f64) {
        let total = self.total();
        let entropy: f64 =
            self.candidates.iter().map(|(_, weight)| weight / total).map(|p| -p * p.ln()).sum();
        let distance = |&(id, weight): &(u32, f64)| (((weight / total).ln() + entropy).abs(), id, weight);
        self.typical.clear();
        self.typical.extend(self.candidates.iter().map(distance));
        self.typical.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let enough = share * total;
        let mut sum = 0.0;
        let last = self.typical.iter().position(|(_, _, weight)| {
            sum += weight;
            sum >= enough
        });
        self.typical.truncate(last.map_or(self.typical.len(), |last| last + 1));
        self.candidates.clear();
        self.candidates.extend(self.typical.iter().map(|&(_, id, weight)| (id, weight)));
    }

    fn total(&self) -> f64 {
        self.candidates.iter().map(|(_, weight)| weight).sum()
    }
}

/// The first of the largest logits among those that may come, unless all are minus infinity or no number.
pub(crate) fn likeliest(logits: &[f32], allowed: &Allowed) -> Option<(u32, f32)> {
    if *allowed == Allowed::All {
        return argmax(logits);
    }
    let mut best = None;
    let mut max = f32::NEG_INFINITY;
    for id in allowed.ids(logits.len()) {
        let logit = logits[id as usize];
        if logit > max {
            (best, max) = (Some(id), logit);
        }
    }
    best.map(|id| (id, max))
}

/// The first of the largest logits that are numbers, unless all are minus infinity.
fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
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
        left(sampling, logits, &Allowed::All)
    }

    fn left(sampling: Sampling, logits: &[f32], allowed: &Allowed) -> Vec<u32> {
        let Left::Some(mut ids) = Sampler::default().kept(&sampling, logits, allowed) else {
            return Vec::new();
        };
        assert!(!ids.is_empty());
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
        // surprises 2.30, 0.92, 1.61, 1.61, 2.30 around 1.47: the most typical are not the likeliest
        assert_eq!(kept(Sampling { typical_p: 0.1, ..all }, &logits()), [2]);
        assert_eq!(kept(Sampling { typical_p: 0.3, ..all }, &logits()), [2, 3]);
        assert_eq!(kept(Sampling { typical_p: 0.5, ..all }, &logits()), [1, 2, 3]);
        assert_eq!(kept(Sampling { typical_p: 0.85, ..all }, &logits()), [0, 1, 2, 3]);
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
    fn filters_look_at_what_may_come() {
        let all = Sampling::default();
        let except = Allowed::Except([1, 3].into());
        let only = Allowed::Only([0, 3, 4, 9].into());
        assert_eq!(left(all, &logits(), &except), [0, 2, 4]);
        assert_eq!(left(all, &logits(), &only), [0, 3, 4], "9 is no token");
        assert_eq!(left(Sampling { top_k: 1, ..all }, &logits(), &except), [2]);
        assert_eq!(left(Sampling { top_p: 0.6, ..all }, &logits(), &only), [0, 3]);
        assert_eq!(likeliest(&logits(), &except).map(|best| best.0), Some(2));
        assert_eq!([0, 1, 2, 3].map(|id| except.has(id)), [true, false, true, false]);
        assert_eq!([0, 1, 2, 3].map(|id| only.has(id)), [true, false, false, true]);
        let nothing = [Allowed::Only([].into()), Allowed::Only([7].into()), Allowed::Except([0, 1].into())];
        for (nothing, logits) in nothing.iter().zip([&logits()[..], &logits(), &[1.0, 2.0]]) {
            assert_eq!(Sampler::default().kept(&all, logits, nothing), Left::Nothing);
            assert_eq!(likeliest(logits, nothing), None);
        }
        // a token without a chance is none
        let rows = [f32::NEG_INFINITY, 0.0];
        assert_eq!(Sampler::default().kept(&all, &rows, &Allowed::Only([0].into())), Left::Nothing);
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
            Sampling { typical_p: 0.0, ..good },
            Sampling { repetition_penalty: 0.0, ..good },
            Sampling { presence_penalty: 2.5, ..good },
            Sampling { frequency_penalty: f32::NAN, ..good },
        ];
        let names = [
            "temperature",
            "temperature",
            "top-p",
            "min-p",
            "typical-p",
            "repetition penalty",
            "presence penalty",
            "frequency penalty",
        ];
        for (sampling, name) in bad.into_iter().zip(names) {
            assert_eq!(sampling.validate().unwrap_err().name, name);
        }
    }
}
