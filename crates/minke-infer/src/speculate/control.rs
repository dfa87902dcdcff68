//! Whether a draft is worth its rows: how often drafts were right, and what rows cost on this machine.

use std::time::Duration;

/// What a row more is taken to cost before it was measured, as a share of a call of one row.
const ROW_BEFORE: f64 = 0.25;
/// How much of the past a call leaves behind.
const KEEP: f64 = 0.95;
/// How much of what a row was seen to cost a call without drafts forgets: a row that was dear once, since somebody else was
/// computing, would never be tried again.
const FORGET: f64 = 0.02;
/// A draft must promise so much more than it costs.
const MARGIN: f64 = 1.1;

/// How often the next drafted token is the next token, over a request's last drafts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    share: f64,
    /// What is believed without evidence, and again after a long time without any.
    before: f64,
}

impl Rate {
    /// So believed at first.
    pub fn new(before: f64) -> Self {
        Self { share: before, before }
    }

    /// Learns from a token that was drafted and is known now.
    pub fn learn(&mut self, right: bool) {
        self.share += 0.12 * (f64::from(u8::from(right)) - self.share);
    }

    /// A token went by without a draft.
    pub fn forget(&mut self) {
        self.share += 0.005 * (self.before - self.share);
    }

    pub fn share(self) -> f64 {
        self.share.clamp(0.0, 0.99)
    }
}

/// What calls of the model cost, by their rows: a line through the last ones.
#[derive(Debug, Clone, Default)]
pub(crate) struct Costs {
    /// Decayed sums over calls: of 1, rows, rows squared, seconds, rows times seconds.
    sums: [f64; 5],
    /// Seconds of a row, as last seen.
    row: Option<f64>,
    /// Seconds of drafting a token, where a model drafts.
    draft: Option<f64>,
}

impl Costs {
    /// Learns from a call of single tokens and drafts.
    pub fn learn(&mut self, rows: usize, took: Duration) {
        let (r, mut t) = (rows as f64, took.as_secs_f64());
        if let Some(usual) = self.call(r) {
            // somebody else was computing
            t = t.min(4.0 * usual);
        }
        for (sum, x) in self.sums.iter_mut().zip([1.0, r, r * r, t, r * t]) {
            *sum = KEEP * *sum + x;
        }
        let [n, sr, srr, st, srt] = self.sums;
        let spread = srr - sr * sr / n;
        if n > 3.0 && spread > 0.5 {
            let slope = (srt - sr * st / n) / spread;
            let mean = st / sr;
            self.row = Some(slope.clamp(0.02 * mean, 1.5 * mean));
        } else if let Some(row) = &mut self.row {
            *row += FORGET * (ROW_BEFORE * st / sr - *row);
        }
    }

    /// Learns from the drafting of so many tokens.
    pub fn learn_draft(&mut self, tokens: usize, took: Duration) {
        let each = took.as_secs_f64() / tokens.max(1) as f64;
        let before = self.draft.unwrap_or(each);
        self.draft = Some(before + 0.2 * (each.min(4.0 * before) - before));
    }

    /// Seconds of a call of so many rows, once there was one.
    fn call(&self, rows: f64) -> Option<f64> {
        let [n, sr, _, st, _] = self.sums;
        (n > 0.0).then(|| (st / n + self.row.unwrap_or(0.0) * (rows - sr / n)).max(0.2 * st / n))
    }

    /// How fast a call is that gives `tokens` tokens without drafts, and what drafts cost beside it; none before there
    /// was a call.
    pub fn pace(&self, tokens: usize) -> Option<Pace> {
        let tokens = tokens.max(1) as f64;
        let seconds = self.call(tokens)?;
        let guess = ROW_BEFORE * seconds / tokens;
        let (row, draft) = (self.row.unwrap_or(guess), self.draft.unwrap_or(guess));
        Some(Pace { tokens, seconds, row, draft })
    }
}

/// The tokens that a call is expected to give, and its seconds: both grow with each draft.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Pace {
    tokens: f64,
    seconds: f64,
    /// Seconds that the row of a draft costs, and making it with a model.
    row: f64,
    draft: f64,
}

impl Pace {
    /// Tokens a second.
    pub fn rate(self) -> f64 {
        self.tokens / self.seconds
    }

    /// Whether a draft that is there, and right with the probability `right`, is worth its row: tokens a second grow where
    /// `(N + p) / (t + b) > N / t`, that is `p > b N / t`.
    pub fn is_worth_reading(self, right: f64) -> bool {
        right > MARGIN * self.row * self.rate()
    }

    /// Whether one is worth being made by a model, too.
    pub fn is_worth_making(self, right: f64) -> bool {
        right > MARGIN * (self.row + self.draft) * self.rate()
    }

    /// With the row of such a draft.
    pub fn read(self, right: f64) -> Self {
        Self { tokens: self.tokens + right, seconds: self.seconds + self.row, ..self }
    }

    /// With the making of a draft.
    pub fn made(self) -> Self {
        Self { seconds: self.seconds + self.draft, ..self }
    }
}

/// How many tokens to draft of a source whose tokens are right with probability `share` each, and the pace with them.
pub(crate) fn length(share: f64, mut pace: Pace, by_model: bool, most: usize) -> (usize, Pace) {
    let (mut k, mut right) = (0, share);
    while k < most && if by_model { pace.is_worth_making(right) } else { pace.is_worth_reading(right) } {
        k += 1;
        pace = pace.read(right);
        if by_model {
            pace = pace.made();
        }
        right *= share;
    }
    (k, pace)
}

/// How often a model's drafts are right, by how likely it takes them to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trust([Rate; SURE.len() + 1]);

/// Probabilities between which drafts are counted together.
const SURE: [f32; 6] = [0.1, 0.3, 0.5, 0.7, 0.85, 0.95];

impl Default for Trust {
    /// Drafts are as likely as the model says.
    fn default() -> Self {
        Self([0.05, 0.2, 0.4, 0.6, 0.78, 0.9, 0.98].map(Rate::new))
    }
}

impl Trust {
    /// Of drafts that are taken to be so likely.
    pub fn rate(&mut self, sure: f32) -> &mut Rate {
        &mut self.0[SURE.partition_point(|edge| *edge <= sure)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(row: f64, base: f64) -> Costs {
        let mut costs = Costs::default();
        for rows in [1, 1, 4, 2, 1, 5, 3, 1, 1, 4] {
            costs.learn(rows, Duration::from_secs_f64(base + row * rows as f64));
        }
        costs
    }

    fn worth(costs: &Costs, right: f64) -> bool {
        costs.pace(1).unwrap().is_worth_reading(right)
    }

    #[test]
    fn a_line_is_found_and_an_outlier_is_not_believed() {
        let mut costs = calls(0.001, 0.009);
        assert!((costs.row.unwrap() - 0.001).abs() < 1e-6, "{costs:?}");
        assert!(worth(&costs, MARGIN * 0.102) && !worth(&costs, MARGIN * 0.098));
        costs.learn_draft(2, Duration::from_millis(4));
        let pace = costs.pace(1).unwrap();
        assert!(pace.is_worth_reading(0.25) && !pace.is_worth_making(0.25));
        costs.learn(1, Duration::from_secs(100));
        assert!(costs.call(1.0).unwrap() < 0.02);
        assert_eq!(Costs::default().pace(1), None);
    }

    #[test]
    fn a_row_that_was_dear_is_tried_again() {
        let mut costs = calls(0.001, 0.009);
        for _ in 0..3 {
            costs.learn(5, Duration::from_millis(100));
        }
        assert!(!worth(&costs, 0.99), "{costs:?}");
        for _ in 0..300 {
            costs.learn(1, Duration::from_millis(10));
        }
        assert!(worth(&costs, 0.4), "{costs:?}");
    }

    /// No other number of drafts gives more tokens a second.
    #[test]
    fn drafts_are_as_long_as_they_pay() {
        let (base, row) = (0.0095, 0.0005);
        let (cheap, dear) = (calls(row, base).pace(1).unwrap(), calls(0.01, 0.0001).pace(1).unwrap());
        assert_eq!(length(0.9, dear, false, 8), (0, dear));
        assert_eq!(length(0.0, cheap, false, 8), (0, cheap));
        assert_eq!(length(0.99, cheap, false, 8).0, 8);
        for share in [0.3_f64, 0.5, 0.7, 0.9] {
            let rate = |k: usize| {
                let tokens: f64 = (0..=k as i32).map(|i| share.powi(i)).sum();
                tokens / (base + row * (k + 1) as f64)
            };
            let (k, pace) = length(share, cheap, false, 64);
            assert!((pace.rate() / rate(k) - 1.0).abs() < 1e-6);
            assert!((0..64).all(|other| rate(other) < 1.02 * rate(k)), "{share}: {k}");
            assert!(length(share, cheap, true, 64).0 < k);
        }
        // many sequences share the cost of a call: a row of one is a larger part of what a token costs
        let of_many = calls(row, base).pace(16).unwrap();
        assert!(cheap.is_worth_reading(0.3) && !of_many.is_worth_reading(0.3));
    }

    #[test]
    fn trust_goes_by_what_the_model_says() {
        let mut trust = Trust::default();
        assert!(trust.rate(0.0).share() < trust.rate(0.4).share() && trust.rate(1.0).share() > 0.95);
        (0..40).for_each(|_| trust.rate(0.97).learn(false));
        assert!(trust.rate(1.0).share() < 0.05 && trust.rate(0.9).share() > 0.85);
        assert!(trust.rate(f32::NAN).share() < 1.0);
    }

    #[test]
    fn rates_learn_and_forget() {
        let mut rate = Rate::new(0.5);
        (0..40).for_each(|_| rate.learn(true));
        assert!(rate.share() > 0.95);
        (0..40).for_each(|_| rate.learn(false));
        assert!(rate.share() < 0.05);
        (0..1000).for_each(|_| rate.forget());
        assert!((rate.share() - 0.5).abs() < 0.01);
    }
}
