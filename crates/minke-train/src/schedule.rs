//! The learning rate over a run: warm-up, stable, decay.
//!
//! One pure function of the step and the number of steps, so that a resumed run and an uninterrupted one have
//! the same rates bit for bit.

/// Shape of the last part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// A straight line.
    Linear,
    /// `1 - sqrt(x)`: falls fast, lands slowly.
    OneMinusSqrt,
}

/// Warm-up, stable, decay (WSD).
///
/// Paper: Hu et al. 2024, `MiniCPM`, section 4; Hägele et al. 2024 for the `1 - sqrt` decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Share of all steps over which the rate rises linearly.
    pub warmup_share: f64,
    /// Share of all steps over which it falls.
    pub decay_share: f64,
    /// How it falls.
    pub decay: Decay,
    /// Share of the peak that it falls to.
    pub final_share: f64,
}

impl Schedule {
    /// The multiplier of the peak rate at step `step` (from 0) of `total`.
    ///
    /// `(step + 1) / warmup` in warm-up, so that the first step already learns; 1 while stable; then
    /// `final + (1 - final) (1 - x)` or `final + (1 - final) (1 - sqrt(x))` with x from 0 to just below 1, so
    /// that the last step still learns. Where the two parts overlap, the smaller value holds.
    pub fn factor(&self, step: u64, total: u64) -> f64 {
        if step >= total {
            return self.final_share;
        }
        let warmup = steps(self.warmup_share, total);
        let rise = if step < warmup { (step + 1) as f64 / warmup as f64 } else { 1.0 };
        let decay = steps(self.decay_share, total);
        let start = total - decay;
        let fall = if step < start {
            1.0
        } else {
            let x = (step - start) as f64 / decay as f64;
            let left = match self.decay {
                Decay::Linear => 1.0 - x,
                Decay::OneMinusSqrt => 1.0 - x.sqrt(),
            };
            self.final_share + (1.0 - self.final_share) * left
        };
        rise.min(fall)
    }
}

fn steps(share: f64, total: u64) -> u64 {
    ((share * total as f64).ceil() as u64).min(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(decay: Decay) -> Schedule {
        Schedule { warmup_share: 0.1, decay_share: 0.4, decay, final_share: 0.1 }
    }

    #[test]
    fn rises_stays_and_falls() {
        let linear = schedule(Decay::Linear);
        let at = |step| (linear.factor(step, 20) * 1000.0).round() / 1000.0;
        assert_eq!((at(0), at(1), at(2), at(11), at(12)), (0.5, 1.0, 1.0, 1.0, 1.0));
        // 0.1 + 0.9 (1 - x), x = 4/8 and 7/8
        assert_eq!((at(16), at(19), at(20), at(1 << 40)), (0.55, 0.213, 0.1, 0.1));
        let root = schedule(Decay::OneMinusSqrt);
        assert_eq!(root.factor(14, 20), 0.1 + 0.9 * 0.5);
        assert!((12..20).all(|step| root.factor(step, 20) <= linear.factor(step, 20)));
    }

    #[test]
    fn holds_for_every_length_and_share() {
        for decay in [Decay::Linear, Decay::OneMinusSqrt] {
            for (warmup_share, decay_share) in [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.5), (0.02, 0.3)] {
                let schedule = Schedule { warmup_share, decay_share, decay, final_share: 0.0 };
                for total in [1, 2, 3, 7, 100] {
                    let factors: Vec<f64> = (0..total).map(|step| schedule.factor(step, total)).collect();
                    assert!(factors.iter().all(|factor| *factor > 0.0 && *factor <= 1.0), "{factors:?}");
                    let peak = factors.iter().position(|factor| *factor == 1.0).unwrap_or(0);
                    if decay_share + warmup_share <= 1.0 {
                        assert!(factors[..peak].is_sorted());
                        assert!(factors[peak..].is_sorted_by(|a, b| a >= b));
                    }
                }
            }
        }
        assert_eq!(schedule(Decay::Linear).factor(0, 0), 0.1);
    }
}
