//! How tokens are chosen: the settings, and the filters over a row of logits. The draw is in `minke_cpu::policy`.

use std::cmp::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// Candidates that are brought into order at first; of most rows a filter keeps fewer.
const FIRST_SORTED: usize = 256;

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

/// Filters rows of logits, on any threads; keeps its memory between calls. What is left is drawn from by
/// `minke_cpu::policy::draw`.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// Memory that no row is filtered in.
    free: Mutex<Vec<Filter>>,
}

impl Sampler {
    /// What the filters leave of those tokens of a row that may come; the temperature is not 0.
    ///
    /// Filters run on probabilities in f64. Where none is on, what may come is left, ascending.
    pub fn kept(&self, sampling: &Sampling, logits: &[f32], allowed: &Allowed) -> Left {
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
        let free = || self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut filter = free().pop().unwrap_or_default();
        filter.weigh(sampling.temperature, logits, allowed, max);
        let left = filter.run(sampling);
        free().push(filter);
        Left::Some(left)
    }
}

/// A row while it is filtered.
#[derive(Debug, Default)]
struct Filter {
    /// Ids that are still in the race and their unnormalised probabilities.
    candidates: Vec<(u32, f64)>,
    /// How far each is from being typical; beside the candidates.
    typical: Vec<(f64, u32, f64)>,
}

impl Filter {
    /// Takes the tokens of a row that may come, the likeliest with a weight of 1.
    fn weigh(&mut self, temperature: f32, logits: &[f32], allowed: &Allowed, max: f32) {
        let scale = 1.0 / f64::from(temperature);
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
    }

    /// What all filters leave.
    fn run(&mut self, sampling: &Sampling) -> Vec<u32> {
        let top_k = sampling.top_k;
        if top_k > 0 && top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(top_k - 1, likeliest_first);
            self.candidates.truncate(top_k);
            self.candidates.sort_unstable_by(likeliest_first);
        }
        if sampling.top_p < 1.0 {
            self.keep_top(f64::from(sampling.top_p));
        }
        if sampling.min_p > 0.0 {
            // the likeliest token's weight is 1
            self.candidates.retain(|(_, weight)| *weight >= f64::from(sampling.min_p));
        }
        if sampling.typical_p < 1.0 {
            self.keep_typical(f64::from(sampling.typical_p));
        }
        self.candidates.iter().map(|(id, _)| *id).collect()
    }

    /// Keeps the likeliest candidates that together reach `share` of all, summed up the likeliest first.
    ///
    /// That sum of all would take them all in order. Summed up as they lie it is off by at most a rounding for each, so
    /// few are put in order unless a sum of the first comes that close to the share.
    fn keep_top(&mut self, share: f64) {
        let about = self.total();
        let off = 2.0 * self.candidates.len() as f64 * f64::EPSILON;
        let (low, high) = (share * about * (1.0 - off), share * about * (1.0 + off));
        let mut sum = 0.0;
        let last = first_in_order(&mut self.candidates, likeliest_first, |(_, weight)| {
            sum += weight;
            sum >= low
        });
        let last = if sum >= high {
            last
        } else {
            self.candidates.sort_unstable_by(likeliest_first);
            let enough = share * self.total();
            let mut sum = 0.0;
            self.candidates.iter().position(|(_, weight)| {
                sum += weight;
                sum >= enough
            })
        };
        self.candidates.truncate(last.map_or(self.candidates.len(), |last| last + 1));
    }

    /// Keeps the candidates with the smallest `|-ln p - H|`, H the entropy, until their p reach `share`.
    fn keep_typical(&mut self, share: f64) {
        let total = self.total();
        let entropy: f64 =
            self.candidates.iter().map(|(_, weight)| weight / total).map(|p| -p * p.ln()).sum();
        let distance = |&(id, weight): &(u32, f64)| (((weight / total).ln() + entropy).abs(), id, weight);
        self.typical.clear();
        self.typical.extend(self.candidates.iter().map(distance));
        let closest_first =
            |a: &(f64, u32, f64), b: &(f64, u32, f64)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        let enough = share * total;
        let mut sum = 0.0;
        let last = first_in_order(&mut self.typical, closest_first, |(_, _, weight)| {
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

fn likeliest_first(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The place, in order, of the first for which `is_last`, which sees them in that order; those up to it are brought there,
/// and of the others no more than that takes.
fn first_in_order<T>(
    all: &mut [T],
    order: impl Fn(&T, &T) -> Ordering,
    mut is_last: impl FnMut(&T) -> bool,
) -> Option<usize> {
    let (mut from, mut n) = (0, FIRST_SORTED);
    while from < all.len() {
        let rest = &mut all[from..];
        n = n.min(rest.len());
        if n < rest.len() {
            rest.select_nth_unstable_by(n - 1, &order);
        }
        rest[..n].sort_unstable_by(&order);
        if let Some(at) = rest[..n].iter().position(&mut is_last) {
            return Some(from + at);
        }
        (from, n) = (from + n, 4 * n);
    }
    None
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

    /// All candidates in order, and then the share: what top-p and typical-p were before they looked at a few.
    fn naive(sampling: &Sampling, logits: &[f32]) -> Vec<u32> {
        let mut filter = Filter::default();
        let (_, max) = argmax(logits).unwrap();
        filter.weigh(sampling.temperature, logits, &Allowed::All, max);
        let share = |all: &mut Vec<(u32, f64)>, share: f64, total: f64| {
            let mut sum = 0.0;
            let last = all.iter().position(|(_, weight)| {
                sum += weight;
                sum >= share * total
            });
            all.truncate(last.map_or(all.len(), |last| last + 1));
        };
        if sampling.top_p < 1.0 {
            filter.candidates.sort_by(likeliest_first);
            let total = filter.total();
            share(&mut filter.candidates, f64::from(sampling.top_p), total);
        }
        if sampling.typical_p < 1.0 {
            let total = filter.total();
            let p = |weight: f64| weight / total;
            let entropy: f64 = filter.candidates.iter().map(|(_, w)| -p(*w) * p(*w).ln()).sum();
            let distance = |weight: f64| (p(weight).ln() + entropy).abs();
            filter.candidates.sort_by(|a, b| distance(a.1).total_cmp(&distance(b.1)).then(a.0.cmp(&b.0)));
            share(&mut filter.candidates, f64::from(sampling.typical_p), total);
        }
        filter.candidates.iter().map(|(id, _)| *id).collect()
    }

    /// The same ids in the same order, whether few are kept, nearly all, or where sums and share are equal.
    #[test]
    fn what_is_kept_does_not_depend_on_how_many_are_put_in_order() {
        let draw = |seed: u64, i: u64| minke_num::rng::uniform_f64(seed, 1, i) as f32;
        let rows: [Vec<f32>; 5] = [
            (0..20_000).map(|i| 12.0 * draw(1, i)).collect(),
            (0..20_000).map(|i| 0.01 * draw(2, i)).collect(),
            // many alike
            (0..5_000).map(|i| (8.0 * draw(3, i)).floor()).collect(),
            // all alike: the sums are the shares themselves
            vec![1.5; 4096],
            (0..300).map(|i| 30.0 * draw(4, i)).collect(),
        ];
        let sampler = Sampler::default();
        for (at, row) in rows.iter().enumerate() {
            for share in [1e-4, 0.125, 0.25, 0.5, 0.75, 0.9, 0.999, 0.999_999_9] {
                for temperature in [0.6, 1.0] {
                    let one = Sampling { temperature, ..Sampling::default() };
                    for sampling in [
                        Sampling { top_p: share, ..one },
                        Sampling { typical_p: share, ..one },
                        Sampling { top_p: share, typical_p: 0.7, ..one },
                    ] {
                        let Left::Some(ids) = sampler.kept(&sampling, row, &Allowed::All) else {
                            panic!("row {at}: {sampling:?}")
                        };
                        assert!(ids == naive(&sampling, row), "row {at}: {sampling:?}");
                    }
                }
            }
        }
    }

    /// `cargo test --release -p minke-infer --lib -- --ignored --nocapture filters_over`
    #[test]
    #[ignore = "measures"]
    fn filters_over_a_large_vocabulary() {
        let row: Vec<f32> = (0..129_280)
            .map(|i| {
                // a sum of uniforms is close to a normal distribution
                let sum: f64 = (0..4).map(|n| minke_num::rng::uniform_f64(9, n, i)).sum();
                (sum * 5.0) as f32
            })
            .collect();
        let sampler = Sampler::default();
        for (name, sampling) in [
            ("top-p 0.9", Sampling { top_p: 0.9, ..Sampling::default() }),
            ("top-p 0.9, temperature 0.6", Sampling { top_p: 0.9, temperature: 0.6, ..Sampling::default() }),
            ("top-p 0.95, top-k 20", Sampling { top_p: 0.95, top_k: 20, ..Sampling::default() }),
            ("min-p 0.05", Sampling { min_p: 0.05, ..Sampling::default() }),
            ("typical-p 0.9", Sampling { typical_p: 0.9, ..Sampling::default() }),
        ] {
            let mut best = std::time::Duration::MAX;
            let mut kept = 0;
            for _ in 0..20 {
                let begin = std::time::Instant::now();
                if let Left::Some(ids) = sampler.kept(&sampling, &row, &Allowed::All) {
                    kept = ids.len();
                }
                best = best.min(begin.elapsed());
            }
            let before = std::time::Instant::now();
            let all = naive(&sampling, &row).len();
            println!("{name}: {best:?} a row, {kept} kept; all in order: {:?}, {all}", before.elapsed());
        }
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
