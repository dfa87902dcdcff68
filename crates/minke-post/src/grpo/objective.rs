//! What a policy is trained for: group-relative advantages and the objectives that differ in how they weigh tokens.
//!
//! With A the advantage of an answer, `r_t = exp(log p_t - log p_t at sampling)`, `s = exp(mean_t log r_t)`, T the
//! answer's tokens, N the answers and M all tokens of the batch:
//!
//! | name | advantage | term of a token | divided by |
//! |---|---|---|---|
//! | `grpo` | (R - mean) / (std + 1e-4) | min(r A, clip(r, 1-0.2, 1+0.2) A) | T N |
//! | `dr_grpo` | R - mean | the same | longest answer × N |
//! | `dapo` | as `grpo` | min(r A, clip(r, 1-0.2, 1+0.28) A) | M |
//! | `gspo` | as `grpo` | min(s A, clip(s, 1-0.0003, 1+0.0004) A), once an answer | N |
//! | `cispo` | as `grpo` | min(r, 1+0.28), held constant, times A log p | M |
//!
//! The standard deviation is the sample's (divided by G - 1), as in TRL. A reference adds `beta` times the unbiased
//! estimator `exp(d) - d - 1`, `d = log p_ref - log p`, of the KL divergence to every token's term (Schulman 2020).
//!
//! Papers: Shao et al. 2024 (DeepSeekMath, section 4.1); Liu et al. 2025 (Dr. GRPO); Yu et al. 2025 (DAPO); Zheng et
//! al. 2025 (GSPO); MiniMax 2025 (MiniMax-M1, section 3.1: CISPO).

use serde::Serialize;

/// What is added to a standard deviation before it divides.
const SMALLEST_STD: f64 = 1e-4;

/// Which objective, by its published name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// DeepSeekMath.
    Grpo,
    /// Without the biases of length and spread.
    DrGrpo,
    /// Clip-higher and token-level loss.
    Dapo,
    /// Ratios of whole sequences.
    Gspo,
    /// Clipped weights instead of clipped updates.
    Cispo,
}

impl Algorithm {
    /// All of them, by the names that recipes use.
    pub const CHOICES: [(&'static str, Self); 5] = [
        ("grpo", Self::Grpo),
        ("dr_grpo", Self::DrGrpo),
        ("dapo", Self::Dapo),
        ("gspo", Self::Gspo),
        ("cispo", Self::Cispo),
    ];
}

/// What a ratio compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ratio {
    /// Each token, clipped on the side where it would go further.
    Token,
    /// The answer, by the geometric mean of its tokens' ratios.
    Sequence,
    /// Each token, as a weight that is clipped above and held constant.
    Weight,
}

impl Ratio {
    /// All of them, by the names that recipes use.
    pub const CHOICES: [(&'static str, Self); 3] =
        [("token", Self::Token), ("sequence", Self::Sequence), ("weight", Self::Weight)];
}

/// What a token's term is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// The tokens of its answer, then the answers.
    Sequence,
    /// All tokens of the batch.
    Token,
    /// The longest answer that is allowed, then the answers.
    Constant,
}

impl Normalization {
    /// All of them, by the names that recipes use.
    pub const CHOICES: [(&'static str, Self); 3] =
        [("sequence", Self::Sequence), ("token", Self::Token), ("constant", Self::Constant)];
}

/// An objective in its parts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Objective {
    /// Where its defaults come from.
    pub algorithm: Algorithm,
    /// What ratios compare.
    pub ratio: Ratio,
    /// What terms are divided by.
    pub normalization: Normalization,
    /// Whether advantages are divided by the group's standard deviation.
    pub standardize: bool,
    /// How far below 1 a ratio counts.
    pub clip_low: f64,
    /// How far above 1 a ratio counts.
    pub clip_high: f64,
    /// Weight of the divergence from the reference.
    pub beta: f64,
}

impl From<Algorithm> for Objective {
    fn from(algorithm: Algorithm) -> Self {
        let grpo = Self {
            algorithm,
            ratio: Ratio::Token,
            normalization: Normalization::Sequence,
            standardize: true,
            clip_low: 0.2,
            clip_high: 0.2,
            beta: 0.0,
        };
        match algorithm {
            Algorithm::Grpo => grpo,
            Algorithm::DrGrpo => Self { normalization: Normalization::Constant, standardize: false, ..grpo },
            Algorithm::Dapo => Self { normalization: Normalization::Token, clip_high: 0.28, ..grpo },
            Algorithm::Gspo => Self { ratio: Ratio::Sequence, clip_low: 3e-4, clip_high: 4e-4, ..grpo },
            Algorithm::Cispo => {
                Self { ratio: Ratio::Weight, normalization: Normalization::Token, clip_high: 0.28, ..grpo }
            }
        }
    }
}

/// What the terms of a batch are divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Totals {
    /// Answers of the batch.
    pub answers: usize,
    /// Their tokens.
    pub tokens: usize,
    /// The most tokens that an answer may have.
    pub longest: usize,
}

/// An answer as it was sampled.
#[derive(Debug, Clone, Copy)]
pub struct Sampled<'a> {
    /// Its advantage.
    pub advantage: f64,
    /// The log-probability of each token when it was sampled.
    pub log_probs: &'a [f32],
    /// The reference's, if there is one.
    pub reference: Option<&'a [f32]>,
}

/// What an answer contributed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Terms {
    /// The loss, divided as [`Normalization`] says.
    pub loss: f64,
    /// Tokens whose ratio was clipped.
    pub clipped: usize,
    /// Sum of the estimates of the divergence from the reference, not weighted.
    pub kl: f64,
    /// Sum of `log p at sampling - log p now`, whose mean estimates the divergence of the sampler from the trainer.
    pub drift: f64,
}

impl Objective {
    /// Its published name.
    pub fn name(&self) -> &'static str {
        let named = Algorithm::CHOICES.iter().find(|(_, algorithm)| *algorithm == self.algorithm);
        named.map_or("", |(name, _)| name)
    }

    /// The advantages of a group's rewards; 0 for all when they are equal.
    pub fn advantages(&self, rewards: &[f64]) -> Vec<f64> {
        let n = rewards.len() as f64;
        let mean = rewards.iter().sum::<f64>() / n.max(1.0);
        let squares: f64 = rewards.iter().map(|r| (r - mean).powi(2)).sum();
        let std = (squares / (n - 1.0).max(1.0)).sqrt();
        let scale = if self.standardize { 1.0 / (std + SMALLEST_STD) } else { 1.0 };
        rewards.iter().map(|r| (r - mean) * scale).collect()
    }

    /// Writes dL/dlog p of each token of an answer, and gives its terms.
    ///
    /// # Panics
    /// When there are not as many log-probabilities as tokens were sampled.
    pub fn slopes(&self, totals: Totals, sampled: &Sampled<'_>, log_probs: &[f32], out: &mut [f32]) -> Terms {
        assert_eq!(
            log_probs.len(),
            sampled.log_probs.len(),
            "slopes: log-probabilities of the answer's tokens"
        );
        let length = log_probs.len();
        let mut terms = Terms::default();
        if length == 0 {
            return terms;
        }
        let share = match self.normalization {
            Normalization::Sequence => 1.0 / (length * totals.answers) as f64,
            Normalization::Token => 1.0 / totals.tokens.max(1) as f64,
            Normalization::Constant => 1.0 / (totals.longest * totals.answers).max(1) as f64,
        };
        let advantage = sampled.advantage;
        let log_ratios =
            || log_probs.iter().zip(sampled.log_probs).map(|(&now, &then)| f64::from(now - then));
        let whole = (log_ratios().sum::<f64>() / length as f64).exp();
        for (t, log_ratio) in log_ratios().enumerate() {
            terms.drift -= log_ratio;
            let ratio = if self.ratio == Ratio::Sequence { whole } else { log_ratio.exp() };
            let (mut value, mut slope);
            if self.ratio == Ratio::Weight {
                let most = 1.0 + self.clip_high;
                terms.clipped += usize::from(ratio > most);
                slope = ratio.min(most) * advantage;
                value = slope * f64::from(log_probs[t]);
            } else {
                let clipped = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high);
                let binds = clipped * advantage < ratio * advantage;
                terms.clipped += usize::from(binds);
                value = (ratio * advantage).min(clipped * advantage);
                // every token of an answer has the answer's ratio, of whose logarithm it is one part in T: the T terms
                // that are alike and the part cancel
                slope = if binds { 0.0 } else { ratio * advantage };
            }
            if let Some(reference) = sampled.reference {
                let d = f64::from(reference[t] - log_probs[t]);
                let kl = d.exp() - d - 1.0;
                terms.kl += kl;
                value -= self.beta * kl;
                slope -= self.beta * (1.0 - d.exp());
            }
            terms.loss -= value * share;
            out[t] = (-slope * share) as f32;
        }
        terms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTALS: Totals = Totals { answers: 4, tokens: 10, longest: 8 };

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-6 * (1.0 + b.abs()), "{a} instead of {b}");
    }

    #[test]
    fn advantages_are_relative_to_the_group() {
        let grpo = Objective::from(Algorithm::Grpo);
        // mean 0.25, squares 0.1875 * 4 = 0.75, sample variance 0.25
        let got = grpo.advantages(&[1.0, 0.0, 0.0, 0.0]);
        close(got[0], 0.75 / 0.5001);
        close(got[1], -0.25 / 0.5001);
        assert_eq!(grpo.advantages(&[1.0; 5]), [0.0; 5]);
        assert_eq!(Objective::from(Algorithm::DrGrpo).advantages(&[1.0, 0.0]), [0.5, -0.5]);
        assert!(grpo.advantages(&[]).is_empty());
    }

    #[test]
    fn on_policy_all_say_the_same_but_for_their_weights() {
        let log_probs = [-0.5, -1.0];
        let sampled = Sampled { advantage: 2.0, log_probs: &log_probs, reference: None };
        for ((_, algorithm), share) in
            Algorithm::CHOICES.iter().zip([1.0 / 8.0, 1.0 / 32.0, 0.1, 1.0 / 8.0, 0.1])
        {
            let mut out = [0.0; 2];
            let terms = Objective::from(*algorithm).slopes(TOTALS, &sampled, &log_probs, &mut out);
            for slope in out {
                close(f64::from(slope), -2.0 * share);
            }
            assert_eq!((terms.clipped, terms.kl, terms.drift), (0, 0.0, 0.0));
            let expected = if *algorithm == Algorithm::Cispo { -2.0 * -1.5 } else { -2.0 * 2.0 };
            close(terms.loss, expected * share);
        }
    }

    #[test]
    fn clipping_holds_back_what_went_far_enough() {
        // ratios e^0.25 = 1.284025, e^-0.5 = 0.606531
        let (then, now) = ([-1.0, -1.0], [-0.75, -1.5]);
        let slopes = |algorithm: Algorithm, advantage: f64| {
            let mut out = [0.0; 2];
            let sampled = Sampled { advantage, log_probs: &then, reference: None };
            let terms = Objective::from(algorithm).slopes(TOTALS, &sampled, &now, &mut out);
            (out, terms)
        };
        let (out, terms) = slopes(Algorithm::Grpo, 1.0);
        assert_eq!((out[0], terms.clipped), (0.0, 1));
        close(f64::from(out[1]), -0.606_531 / 8.0);
        close(terms.loss, -(1.2 + 0.606_531) / 8.0);
        // a bad answer: the unlikelier token went far enough, the likelier one must come back
        let (out, terms) = slopes(Algorithm::Grpo, -1.0);
        assert_eq!((out[1], terms.clipped), (0.0, 1));
        close(f64::from(out[0]), 1.284_025 / 8.0);
        close(terms.loss, (1.284_025 + 0.8) / 8.0);
        // clip-higher: 1.284025 is still beyond 1.28
        let (out, terms) = slopes(Algorithm::Dapo, 1.0);
        assert_eq!(out[0], 0.0);
        close(terms.loss, -(1.28 + 0.606_531) / 10.0);
        // the weight is clipped, the token learns
        let (out, terms) = slopes(Algorithm::Cispo, 1.0);
        close(f64::from(out[0]), -1.28 / 10.0);
        close(terms.loss, -(1.28 * -0.75 + 0.606_531 * -1.5) / 10.0);
        // s = e^-0.125 = 0.882497, below 1 - 0.0003: a good answer learns, a bad one does not
        let (out, terms) = slopes(Algorithm::Gspo, 1.0);
        close(f64::from(out[0]), -0.882_497 / 8.0);
        close(terms.loss, -0.882_497 / 4.0);
        let (out, terms) = slopes(Algorithm::Gspo, -1.0);
        assert_eq!((out, terms.clipped), ([0.0; 2], 2));
        close(terms.loss, 0.9997 / 4.0);
        close(terms.drift, 0.25);
    }

    #[test]
    fn slopes_are_the_losses_derivatives() {
        let (then, reference) = ([-1.0_f32, -0.2, -2.0], [-1.1_f32, -0.3, -1.5]);
        let now = [-0.9_f32, -0.25, -2.1];
        for (_, algorithm) in Algorithm::CHOICES {
            for advantage in [1.5, -0.7] {
                let objective = Objective { beta: 0.1, ..Objective::from(algorithm) };
                let sampled = Sampled { advantage, log_probs: &then, reference: Some(&reference) };
                let mut out = [0.0; 3];
                objective.slopes(TOTALS, &sampled, &now, &mut out);
                for t in 0..3 {
                    let loss = |step: f32| {
                        let mut moved = now;
                        moved[t] += step;
                        let sampled = match algorithm {
                            // its weight is held constant: only log p moves
                            Algorithm::Cispo => {
                                let mut held = then;
                                held[t] += step;
                                let mut values = [0.0; 3];
                                return objective
                                    .slopes(
                                        TOTALS,
                                        &Sampled { log_probs: &held, ..sampled },
                                        &moved,
                                        &mut values,
                                    )
                                    .loss;
                            }
                            _ => sampled,
                        };
                        objective.slopes(TOTALS, &sampled, &moved, &mut [0.0; 3]).loss
                    };
                    let step = 1.0 / 256.0;
                    let slope = (loss(step) - loss(-step)) / f64::from(2.0 * step);
                    assert!(
                        (slope - f64::from(out[t])).abs() < 2e-5 + 1e-3 * slope.abs(),
                        "{algorithm:?} {advantage} token {t}: {} instead of {slope}",
                        out[t]
                    );
                }
            }
        }
    }

    #[test]
    fn a_policy_does_not_diverge_from_itself() {
        let log_probs = [-0.5, -3.0];
        let sampled = Sampled { advantage: 0.0, log_probs: &log_probs, reference: Some(&log_probs) };
        let mut out = [1.0; 2];
        let objective = Objective { beta: 1.0, ..Objective::from(Algorithm::Grpo) };
        let terms = objective.slopes(TOTALS, &sampled, &log_probs, &mut out);
        assert_eq!((terms, out), (Terms::default(), [0.0; 2]));
    }
}
