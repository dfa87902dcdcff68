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

    /// How right a drafted token must be to be worth its row, in a call that gives `tokens` tokens without drafts; and
    /// what drafting it with a model must add to that.
    ///
    /// A call of t seconds gives N tokens; a row more, of b seconds, gives p tokens more: more a second where
    /// `(N + p) / (t + b) > N / t`, that is `p > b N / t`.
    pub fn threshold(&self, tokens: usize, by_model: bool) -> f64 {
        let n = tokens.max(1) as f64;
        let Some(call) = self.call(n) else { return 1.0 };
        let row = self.row.unwrap_or(ROW_BEFORE * call / n);
        let draft = if by_model { self.draft.unwrap_or(ROW_BEFORE * call / n) } else { 0.0 };
        MARGIN * (row + draft) * n / call
    }
}

/// How many tokens to draft, and how many more tokens that promises beyond what they cost, of a source whose tokens are
/// right with probability `share` each, where a token is worth its row from `threshold` on.
pub(crate) fn length(share: f64, threshold: f64, most: usize) -> (usize, f64) {
    let (mut k, mut right, mut gain) = (0, share, 0.0);
    while k < most && right > threshold {
        k += 1;
        gain += right - threshold;
        right *= share;
    }
    (k, gain)
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

    #[test]
    fn a_line_is_found_and_an_outlier_is_not_believed() {
        let mut costs = calls(0.001, 0.009);
        assert!((costs.row.unwrap() - 0.001).abs() < 1e-6, "{costs:?}");
        assert!((costs.threshold(1, false) - MARGIN * 0.1).abs() < 1e-3);
        costs.learn(1, Duration::from_secs(100));
        assert!(costs.call(1.0).unwrap() < 0.02);
        costs.learn_draft(2, Duration::from_millis(4));
        assert!(costs.threshold(1, true) > costs.threshold(1, false));
        assert_eq!(Costs::default().threshold(1, false), 1.0);
    }

    #[test]
    fn a_row_that_was_dear_is_tried_again() {
        let mut costs = calls(0.001, 0.009);
        for _ in 0..3 {
            costs.learn(5, Duration::from_millis(100));
        }
        assert!(costs.threshold(1, false) > 1.0, "{costs:?}");
        for _ in 0..300 {
            costs.learn(1, Duration::from_millis(10));
        }
        assert!(costs.threshold(1, false) < 0.4, "{costs:?}");
    }

    #[test]
    fn drafts_are_as_long_as_they_pay() {
        let cheap = calls(0.0005, 0.0095);
        let dear = calls(0.01, 0.0001);
        assert_eq!(length(0.9, dear.threshold(1, false), 8).0, 0);
        assert_eq!(length(0.99, cheap.threshold(1, false), 8).0, 8);
        let (k, gain) = length(0.5, cheap.threshold(1, false), 8);
        assert!((3..=5).contains(&k) && gain > 0.5, "{k} {gain}");
        // many sequences share the cost of a call: a row of one is a larger part of what a token costs
        assert!(cheap.threshold(16, false) > cheap.threshold(1, false));
        assert_eq!(length(0.0, 0.1, 8), (0, 0.0));
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
