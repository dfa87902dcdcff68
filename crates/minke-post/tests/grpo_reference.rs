//! Objectives beside what TRL's `GRPOTrainer` computes (`scripts/grpo_vectors.py`), loss, gradients and advantages.
//!
//! Where names or conventions differ, this is how one maps to the other:
//!
//! | TRL | here |
//! |---|---|
//! | `scale_rewards="group"`, `"none"` | `standardize` true, false: both divide by G - 1 and add 1e-4 |
//! | `epsilon`, `epsilon_high` | `clip_low`, `clip_high`; for `cispo` the largest ratio, `1 + clip_high` |
//! | `loss_type="dapo"` | `Normalization::Token`: tokens of all the answers of an update |
//! | `loss_type="bnpo"` | the same where an update is one micro-batch: tokens of each micro-batch |
//! | `loss_type="dr_grpo"`, `max_completion_length` | `Normalization::Constant`, `Totals::longest` |
//! | `loss_type="grpo"`, `importance_sampling_level="sequence"` | `Algorithm::Gspo` |
//! | an answer masked as a whole | an answer of no tokens: it counts among the answers |
//! | `clip_ratio/region_mean` | `Terms::clipped` over tokens; over answers where ratios are of sequences |
//! | `cispo_clip_ratio` | clipped tokens of answers with a positive advantage alone, over all tokens |
//! | `kl` | `Terms::kl` over tokens |
//! | `beta` with `use_bias_correction_kl=False` | `beta`: DeepSeekMath's equation 4 |
//!
//! TRL's default, `use_bias_correction_kl=True`, multiplies the divergence by the ratio and differentiates both
//! (DeepSeek-V3.2): another objective, on-policy too, which is not among those here.

use minke_post::grpo::{Algorithm, Objective, Sampled, Terms, Totals};
use serde::Deserialize;

const VECTORS: &str = include_str!("vectors/grpo.json");

#[derive(Deserialize)]
struct Vectors {
    advantages: Vec<Scaled>,
    batches: Vec<Batch>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Scaled {
    scale_rewards: String,
    rewards: Vec<Vec<f64>>,
    advantages: Vec<Vec<f64>>,
}

#[derive(Deserialize)]
struct Batch {
    log_probs: Vec<Vec<f32>>,
    old: Vec<Vec<f32>>,
    reference: Vec<Vec<f32>>,
    advantages: Vec<f64>,
    longest: usize,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    batch: usize,
    loss_type: String,
    importance_sampling_level: String,
    epsilon: f64,
    epsilon_high: f64,
    beta: f64,
    use_bias_correction_kl: bool,
    on_policy: bool,
    micro_batches: usize,
    loss: f64,
    gradients: Vec<Vec<f64>>,
    kl: Option<f64>,
    clip_ratio: Option<f64>,
}

/// What a batch amounts to here.
struct Outcome {
    terms: Vec<Terms>,
    gradients: Vec<Vec<f32>>,
}

impl Outcome {
    fn loss(&self) -> f64 {
        self.terms.iter().map(|terms| terms.loss).sum()
    }
}

fn vectors() -> Vectors {
    serde_json::from_str(VECTORS).unwrap()
}

/// The cases of objectives that are offered here.
fn offered(vectors: &Vectors) -> impl Iterator<Item = &Case> {
    vectors.cases.iter().filter(|case| !case.use_bias_correction_kl)
}

fn algorithm(case: &Case) -> Algorithm {
    match (case.loss_type.as_str(), case.importance_sampling_level.as_str()) {
        ("grpo", "token") => Algorithm::Grpo,
        ("grpo", "sequence") => Algorithm::Gspo,
        ("dr_grpo", "token") => Algorithm::DrGrpo,
        ("dapo" | "bnpo", "token") => Algorithm::Dapo,
        ("cispo", "token") => Algorithm::Cispo,
        other => panic!("no counterpart of {other:?}"),
    }
}

fn objective(case: &Case) -> Objective {
    let largest = if case.loss_type == "cispo" { case.epsilon_high - 1.0 } else { case.epsilon_high };
    Objective {
        clip_low: case.epsilon,
        clip_high: largest,
        beta: case.beta,
        ..Objective::from(algorithm(case))
    }
}

fn compute(case: &Case, batch: &Batch) -> Outcome {
    let objective = objective(case);
    let totals = Totals {
        answers: batch.log_probs.len(),
        tokens: batch.log_probs.iter().map(Vec::len).sum(),
        longest: batch.longest,
    };
    let mut outcome = Outcome { terms: Vec::new(), gradients: Vec::new() };
    for (i, now) in batch.log_probs.iter().enumerate() {
        let sampled = Sampled {
            advantage: batch.advantages[i],
            log_probs: if case.on_policy { now } else { &batch.old[i] },
            reference: (case.beta != 0.0).then_some(batch.reference[i].as_slice()),
        };
        let mut out = vec![0.0; now.len()];
        outcome.terms.push(objective.slopes(totals, &sampled, now, &mut out));
        outcome.gradients.push(out);
    }
    outcome
}

/// Equal to 1e-5 of the value; `size` is that of the terms that were added up, which may cancel.
fn close(what: &str, got: f64, expected: f64, size: f64) {
    let allowed = 1e-5 * expected.abs() + 1e-6 * size;
    assert!((got - expected).abs() <= allowed, "{what}: {got} instead of {expected}");
}

fn label(case: &Case) -> String {
    format!(
        "{} ({}, {}, clip {} {}, beta {}, batch {}, on policy {}, micro-batches {})",
        case.name,
        case.loss_type,
        case.importance_sampling_level,
        case.epsilon,
        case.epsilon_high,
        case.beta,
        case.batch,
        case.on_policy,
        case.micro_batches
    )
}

#[test]
fn advantages_are_those_of_the_reference() {
    for scaled in vectors().advantages {
        let algorithm = match scaled.scale_rewards.as_str() {
            "group" => Algorithm::Grpo,
            "none" => Algorithm::DrGrpo,
            other => panic!("no counterpart of {other}"),
        };
        for (rewards, expected) in scaled.rewards.iter().zip(&scaled.advantages) {
            let got = Objective::from(algorithm).advantages(rewards);
            assert_eq!(got.len(), expected.len());
            for (got, expected) in got.iter().zip(expected) {
                close(&scaled.scale_rewards, *got, *expected, 1e-4);
            }
        }
    }
}

#[test]
fn losses_and_gradients_are_those_of_the_reference() {
    let vectors = vectors();
    assert!(offered(&vectors).count() > 50);
    for case in offered(&vectors) {
        let batch = &vectors.batches[case.batch];
        let outcome = compute(case, batch);
        let label = label(case);
        // a loss is a sum of terms of both signs, a gradient of at most two
        let size: f64 = outcome.terms.iter().map(|terms| terms.loss.abs()).sum();
        close(&format!("{label}: loss"), outcome.loss(), case.loss, size);
        assert_eq!(outcome.gradients.len(), case.gradients.len());
        for (i, (got, expected)) in outcome.gradients.iter().zip(&case.gradients).enumerate() {
            assert_eq!(got.len(), expected.len());
            let size = expected.iter().fold(0.0_f64, |most, slope| most.max(slope.abs()));
            for (t, (got, expected)) in got.iter().zip(expected).enumerate() {
                close(&format!("{label}: answer {i} token {t}"), f64::from(*got), *expected, size);
            }
        }
    }
}

#[test]
fn what_is_reported_is_what_the_reference_reports() {
    let vectors = vectors();
    for case in offered(&vectors) {
        let batch = &vectors.batches[case.batch];
        let outcome = compute(case, batch);
        let tokens = batch.log_probs.iter().map(Vec::len).sum::<usize>() as f64;
        if let Some(kl) = case.kl {
            let got = outcome.terms.iter().map(|terms| terms.kl).sum::<f64>() / tokens;
            close(&format!("{}: kl", label(case)), got, kl, 1e-2);
        }
        if let Some(expected) = case.clip_ratio {
            let clipped = outcome.terms.iter().zip(&batch.advantages);
            let got = match algorithm(case) {
                Algorithm::Gspo => {
                    clipped.filter(|(terms, _)| terms.clipped > 0).count() as f64 / outcome.terms.len() as f64
                }
                Algorithm::Cispo => {
                    let good = clipped.filter(|(_, advantage)| **advantage > 0.0);
                    good.map(|(terms, _)| terms.clipped).sum::<usize>() as f64 / tokens
                }
                _ => clipped.map(|(terms, _)| terms.clipped).sum::<usize>() as f64 / tokens,
            };
            close(&format!("{}: share of clipped", label(case)), got, expected, 0.0);
        }
    }
}

#[test]
fn the_names_have_the_published_clips() {
    // the first case of a name has its paper's values
    let vectors = vectors();
    for name in ["grpo", "dr_grpo", "dapo", "gspo", "cispo"] {
        let case = vectors.cases.iter().find(|case| case.name == name).unwrap();
        let (published, own) = (objective(case), Objective::from(algorithm(case)));
        assert_eq!(own.name(), name);
        close(name, own.clip_low, published.clip_low, 0.0);
        close(name, own.clip_high, published.clip_high, 0.0);
    }
}

#[test]
fn the_divergence_is_not_weighed_by_the_ratio() {
    // with beta large, TRL's default is another loss off-policy and has another gradient on-policy
    let vectors = vectors();
    let cases: Vec<_> = vectors.cases.iter().filter(|case| case.use_bias_correction_kl).collect();
    assert!(cases.len() > 5);
    for case in cases {
        let outcome = compute(case, &vectors.batches[case.batch]);
        let same_loss = (outcome.loss() - case.loss).abs() < 1e-5;
        assert_eq!(same_loss, case.on_policy, "{}", label(case));
        let pairs = outcome.gradients.iter().flatten().zip(case.gradients.iter().flatten());
        let most = pairs.map(|(got, expected)| (f64::from(*got) - expected).abs()).fold(0.0, f64::max);
        assert!(most > 1e-4, "{}: {most}", label(case));
    }
}

#[test]
fn the_cases_tell_right_from_wrong() {
    // were clips, divisors or ratios mixed up, a case would show it
    let vectors = vectors();
    for (name, wrong) in [
        ("grpo", Algorithm::Dapo),
        ("dr_grpo", Algorithm::Grpo),
        ("dapo", Algorithm::Grpo),
        ("gspo", Algorithm::Grpo),
        ("cispo", Algorithm::Dapo),
    ] {
        let differs = offered(&vectors).filter(|case| case.name == name && !case.on_policy).any(|case| {
            let mistaken = Case {
                loss_type: match wrong {
                    Algorithm::Dapo => "dapo",
                    _ => "grpo",
                }
                .to_owned(),
                importance_sampling_level: "token".to_owned(),
                gradients: Vec::new(),
                name: String::new(),
                ..*case
            };
            let outcome = compute(&mistaken, &vectors.batches[case.batch]);
            (outcome.loss() - case.loss).abs() > 1e-3 * case.loss.abs()
        });
        assert!(differs, "{name}");
    }
}
