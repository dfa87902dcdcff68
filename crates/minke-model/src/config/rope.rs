//! Rotary position embedding: frequencies and scales, in the arithmetic of the reference.

use std::f64::consts::PI;

/// Rotary settings of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Whether pairs are neighbours (`DeepSeek`) or halves (Llama).
    pub interleaved: bool,
    /// Whether a yarn `mscale_all_dim` also scales the attention scores (the `DeepSeek` families).
    pub scales_softmax: bool,
    /// Extension of the context.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched for contexts beyond the pretrained one.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As pretrained.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Ratio of the new context to the old.
        factor: f64,
    },
    /// Frequencies by how often they turn in the pretrained context: divided below `low_freq_factor` turns, kept above
    /// `high_freq_factor`, mixed between (Llama 3.1).
    Llama3 {
        /// Ratio by which low frequencies are divided.
        factor: f64,
        /// Turns below which a frequency is low.
        low_freq_factor: f64,
        /// Turns above which it is high.
        high_freq_factor: f64,
        /// The pretrained context.
        original_max_position_embeddings: usize,
    },
    /// Low frequencies interpolated, high ones kept, a ramp between (`YaRN`, Peng et al. 2023).
    Yarn {
        /// Ratio of the new context to the old.
        factor: f64,
        /// The pretrained context.
        original_max_position_embeddings: usize,
        /// Rotations over the old context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is interpolated.
        beta_slow: f64,
        /// Weight of the numerator of the cos/sin scale.
        mscale: Option<f64>,
        /// Weight of its denominator, and of the softmax scale in the `DeepSeek` families.
        mscale_all_dim: Option<f64>,
        /// The cos/sin scale itself, overriding the two weights.
        attention_factor: Option<f64>,
        /// Whether the ramp's ends are rounded outward to whole dimensions.
        truncate: bool,
    },
}

/// `0.1 m ln(s) + 1` for s > 1, else 1.
fn yarn_mscale(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 }
}

/// A weight that is present and not zero, as the reference's truth test has it.
fn set(weight: Option<f64>) -> Option<f64> {
    weight.filter(|&value| value != 0.0)
}

impl Rope {
    /// The frequencies of the `rotary_dim / 2` pairs.
    ///
    /// `f_i = theta^(-2i / r)`, divided by the factor (linear), or mixed with the divided one along a ramp
    /// (yarn, llama3). Exponents, powers and mixing are rounded to f32 where the reference rounds; the ramp's ends
    /// are found in f64.
    ///
    /// Paper: `YaRN`, section 3.2.
    pub fn inv_freq(&self, rotary_dim: usize) -> Vec<f32> {
        // the power is taken in f64 of f32 operands and rounded once: at most one unit from torch's f32 power
        let base = f64::from(self.theta as f32);
        let powers =
            (0..rotary_dim / 2).map(|i| base.powf(f64::from((2 * i) as f32 / rotary_dim as f32)) as f32);
        match &self.scaling {
            RopeScaling::None => powers.map(|power| 1.0 / power).collect(),
            RopeScaling::Linear { factor } => powers.map(|power| (1.0 / power) / *factor as f32).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let (factor, context) = (*factor as f32, *original_max_position_embeddings as f32);
                let (low, high) = (*low_freq_factor as f32, *high_freq_factor as f32);
                powers
                    .map(|power| {
                        let frequency = 1.0 / power;
                        let turns = context / (std::f32::consts::TAU / frequency);
                        if turns < low {
                            frequency / factor
                        } else if turns > high {
                            frequency
                        } else {
                            let keep = (turns - low) / (high - low);
                            (1.0 - keep) * frequency / factor + keep * frequency
                        }
                    })
                    .collect()
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => {
                let context = *original_max_position_embeddings as f64;
                let correction_dim = |rotations: f64| {
                    (rotary_dim as f64 * (context / (rotations * 2.0 * PI)).ln()) / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (correction_dim(*beta_fast), correction_dim(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                low = low.max(0.0);
                high = high.min(rotary_dim as f64 - 1.0);
                if low == high {
                    high += 0.001;
                }
                powers
                    .enumerate()
                    .map(|(i, power)| {
                        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                        let keep = 1.0 - ramp;
                        (1.0 / (*factor as f32 * power)) * (1.0 - keep) + (1.0 / power) * keep
                    })
                    .collect()
            }
        }
    }

    /// The multiplier of cosines and sines: 1 without yarn, else the attention factor or what its weights give.
    pub fn cos_sin_scale(&self) -> f32 {
        match &self.scaling {
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
            RopeScaling::Yarn { factor, mscale, mscale_all_dim, attention_factor, .. } => {
                let scale = attention_factor.unwrap_or_else(|| match (set(*mscale), set(*mscale_all_dim)) {
                    (Some(up), Some(down)) => yarn_mscale(*factor, up) / yarn_mscale(*factor, down),
                    _ => yarn_mscale(*factor, 1.0),
                });
                scale as f32
            }
        }
    }

    /// The multiplier of attention scores: `qk_head_dim^(-1/2)`, in the `DeepSeek` families times
    /// `(0.1 mscale_all_dim ln(factor) + 1)^2` under yarn.
    pub fn softmax_scale(&self, qk_head_dim: usize) -> f32 {
        let scale = (qk_head_dim as f64).powf(-0.5);
        match &self.scaling {
            RopeScaling::Yarn { factor, mscale_all_dim, .. } if self.scales_softmax => {
                let mscale = set(*mscale_all_dim).map_or(1.0, |weight| yarn_mscale(*factor, weight));
                (scale * mscale * mscale) as f32
            }
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::Yarn { .. } => scale as f32,
        }
    }
}
