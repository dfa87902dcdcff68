//! Rates and how sure they are.

use std::collections::HashMap;

/// The normal distribution's quantile of 97.5 %.
const Z: f64 = 1.959_963_984_540_054;

/// The chance that at least one of k answers is right, from n answers of which c are: `1 - C(n-c, k) / C(n, k)`,
/// without bias.
///
/// Paper: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1.
///
/// # Panics
/// When k is above n, or c is.
pub fn pass_at_k(n: usize, c: usize, k: usize) -> f64 {
    assert!(k <= n && c <= n, "pass_at_k: {k} of {n}, {c} right");
    if n - c < k {
        return 1.0;
    }
    1.0 - (n - c + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product::<f64>()
}

/// The chance that the most frequent of k answers is right: the mean over the blocks of k answers that follow one
/// another, where a tie goes to each of its answers with equal chance.
///
/// An answer is what it says and whether it is right; `None` is a sample without one, which has no vote. `None` for
/// fewer than k samples.
pub fn majority_at_k(answers: &[Option<(String, bool)>], k: usize) -> Option<f64> {
    if k == 0 || answers.len() < k {
        return None;
    }
    let blocks = answers.chunks_exact(k);
    let count = blocks.len() as f64;
    let sum: f64 = blocks
        .map(|block| {
            let mut votes: HashMap<&(String, bool), usize> = HashMap::new();
            for answer in block.iter().flatten() {
                *votes.entry(answer).or_default() += 1;
            }
            let most = votes.values().max().copied().unwrap_or(0);
            let first: Vec<bool> =
                votes.into_iter().filter(|(_, count)| *count == most).map(|((_, right), _)| *right).collect();
            let right = first.iter().filter(|right| **right).count();
            if first.is_empty() { 0.0 } else { right as f64 / first.len() as f64 }
        })
        .sum();
    Some(sum / count)
}

/// The mean of rates by task, and the 95 % interval of it: (mean, low, high).
///
/// Answers to one task are not independent, so the task is the unit: the squared standard error is that of the mean of
/// the tasks' rates, `SE^2 = sum (p_i - p)^2 / (T (T - 1))`. It is put as the number of independent answers that would
/// have it, `p (1 - p) / SE^2`, held between the number of tasks T and that of answers, and Wilson's interval of that
/// many is given: unlike `p +- 1.96 SE` it is right near 0 and 1 as well. With one answer a task it is Wilson's.
pub fn interval(rates: &[f64], answers: usize) -> (f64, f64, f64) {
    if rates.is_empty() {
        return (f64::NAN, 0.0, 1.0);
    }
    let tasks = rates.len() as f64;
    let p = rates.iter().sum::<f64>() / tasks;
    let squares: f64 = rates.iter().map(|rate| (rate - p).powi(2)).sum();
    let most = (answers as f64).max(tasks);
    // all right or all wrong: nothing is known of how alike the answers to one task are, so the worst is taken
    let n = if p <= 0.0 || p >= 1.0 || rates.len() < 2 {
        tasks
    } else {
        (p * (1.0 - p) * tasks * (tasks - 1.0) / squares).clamp(tasks, most)
    };
    let (low, high) = wilson(p, n);
    (p, low, high)
}

/// Wilson's score interval of 95 % for a rate p of n.
fn wilson(p: f64, n: f64) -> (f64, f64) {
    let z2 = Z * Z;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt() / (1.0 + z2 / n);
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn near(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-4, "{got}, expected {expected}");
    }

    #[test]
    fn pass_at_k_by_hand() {
        // 1 - C(7, 5) / C(10, 5) = 1 - 21 / 252
        near(pass_at_k(10, 3, 5), 1.0 - 21.0 / 252.0);
        near(pass_at_k(4, 1, 2), 0.5);
        near(pass_at_k(5, 2, 1), 0.4);
        assert_eq!(pass_at_k(4, 0, 4), 0.0);
        assert_eq!(pass_at_k(4, 1, 4), 1.0);
        assert_eq!(pass_at_k(8, 8, 1), 1.0);
        // against all choices
        for (n, c, k) in [(6, 2, 3), (7, 3, 2), (5, 4, 2)] {
            let (mut all, mut hit) = (0, 0);
            for set in 0_u32..1 << n {
                if set.count_ones() == k {
                    all += 1;
                    hit += u32::from(set & ((1 << c) - 1) != 0);
                }
            }
            near(pass_at_k(n, c, k as usize), f64::from(hit) / f64::from(all));
        }
    }

    #[test]
    fn majority_by_hand() {
        let said = |texts: &[&str]| -> Vec<Option<(String, bool)>> {
            let one = |text: &&str| (!text.is_empty()).then(|| ((*text).to_owned(), *text == "7"));
            texts.iter().map(one).collect()
        };
        assert_eq!(majority_at_k(&said(&["7", "8", "7"]), 3), Some(1.0));
        assert_eq!(majority_at_k(&said(&["7", "8", "8"]), 3), Some(0.0));
        // a tie of two
        assert_eq!(majority_at_k(&said(&["7", "8"]), 2), Some(0.5));
        // a sample without an answer does not vote
        assert_eq!(majority_at_k(&said(&["", "", "7"]), 3), Some(1.0));
        assert_eq!(majority_at_k(&said(&["", ""]), 2), Some(0.0));
        // blocks of two: a tie, then right; the fifth belongs to no block
        assert_eq!(majority_at_k(&said(&["7", "8", "7", "7", "8"]), 2), Some(0.75));
        assert_eq!(majority_at_k(&said(&["7"]), 2), None);
        assert_eq!(majority_at_k(&said(&["7"]), 0), None);
    }

    #[test]
    fn the_interval_is_wilsons_and_by_task() {
        let (p, low, high) = interval(&[1.0, 1.0, 1.0, 0.0], 4);
        near(p, 0.75);
        near(low, 0.3006);
        near(high, 0.9544);
        // 0 of 10
        let (p, low, high) = interval(&[0.0; 10], 10);
        assert_eq!((p, low), (0.0, 0.0));
        near(high, 0.2775);
        // the same answers eight times tell no more than once
        assert_eq!(interval(&[1.0, 0.0, 1.0, 1.0], 32), interval(&[1.0, 0.0, 1.0, 1.0], 4));
        // tasks that are half right each are as sure as all the answers: 8 of 16
        let (_, low, high) = interval(&[0.5; 4], 16);
        near(low, 0.2800);
        near(high, 0.7200);
        // between: p = 0.5, SE^2 = 4 * 0.0625 / 12, n = 0.25 / SE^2 = 12
        let (_, low, high) = interval(&[0.25, 0.75, 0.25, 0.75], 16);
        near(low, 0.2538);
        near(high, 0.7462);
        let (p, low, high) = interval(&[], 0);
        assert!(p.is_nan() && low == 0.0 && high == 1.0);
    }
}
