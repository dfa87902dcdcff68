//! Which plots there are, and what they are made of.

use std::collections::{BTreeMap, BTreeSet};

use minke_train::report::draw::{Axes, Bounds, DrawError, Line, MAX_LINES, line_plot};

use super::{evaluations, steps};
use crate::metrics::{Record, Values};

/// A finished plot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plot {
    /// File name.
    pub file: String,
    /// What it shows, for the report's text and for those who cannot see it.
    pub caption: String,
    /// The picture.
    pub svg: String,
}

/// A plot of named numbers of steps and evaluations.
struct Wanted {
    file: &'static str,
    caption: &'static str,
    axis: &'static str,
    bounds: Bounds,
    /// Names of numbers of steps, and what their lines are called.
    steps: &'static [(&'static str, &'static str)],
    /// The same of evaluations.
    evaluations: &'static [(&'static str, &'static str)],
}

const WANTED: [Wanted; 14] = [
    Wanted {
        file: "reward.svg",
        caption: "Reward of the answers that were learned from",
        axis: "mean reward",
        bounds: Bounds::Zero,
        steps: &[("reward", "reward"), ("right", "right answers")],
        evaluations: &[],
    },
    Wanted {
        file: "thought.svg",
        caption: "Length of thought",
        axis: "tokens",
        bounds: Bounds::Zero,
        steps: &[("thought", "training")],
        evaluations: &[("thought", "held out")],
    },
    Wanted {
        file: "entropy.svg",
        caption: "Entropy of the choice of a token",
        axis: "entropy (nats)",
        bounds: Bounds::Zero,
        steps: &[("entropy", "entropy")],
        evaluations: &[],
    },
    Wanted {
        file: "signal.svg",
        caption: "Groups with signal, whose answers differ in worth",
        axis: "share of groups",
        bounds: Bounds::Share,
        steps: &[("signal", "with signal"), ("all_right", "all right"), ("all_wrong", "all wrong")],
        evaluations: &[],
    },
    Wanted {
        file: "kl-rollout.svg",
        caption: "KL(rollout‖trainer) at the first update of each rollout: 0 is exactly on-policy",
        axis: "nats per token",
        bounds: Bounds::Zero,
        steps: &[("kl_rollout", "KL(rollout‖trainer)")],
        evaluations: &[],
    },
    Wanted {
        file: "kl-reference.svg",
        caption: "Distance from the reference model",
        axis: "KL (nats per token)",
        bounds: Bounds::Zero,
        steps: &[("kl_reference", "KL(policy‖reference)")],
        evaluations: &[],
    },
    Wanted {
        file: "clip.svg",
        caption: "Share of tokens whose ratio was clipped",
        axis: "share of tokens",
        bounds: Bounds::Zero,
        steps: &[("clipped", "clipped")],
        evaluations: &[],
    },
    Wanted {
        file: "balance.svg",
        caption: "Balance of the experts: largest load over the mean, minus one",
        axis: "maximal violation",
        bounds: Bounds::Zero,
        steps: &[("max_violation", "maximal violation")],
        evaluations: &[],
    },
    Wanted {
        file: "loss.svg",
        caption: "Loss",
        axis: "loss",
        bounds: Bounds::Values,
        steps: &[("loss", "training"), ("mtp_loss", "multi-token prediction")],
        evaluations: &[("loss", "held out"), ("held_out_loss", "held out")],
    },
    Wanted {
        file: "mtp-hits.svg",
        caption: "What the prediction modules would have drafted of what was sampled",
        axis: "share of tokens",
        bounds: Bounds::Share,
        steps: &[("mtp_hits", "drafted")],
        evaluations: &[],
    },
    Wanted {
        file: "divergence.svg",
        caption: "Distance of the student from its teacher",
        axis: "divergence (nats per token)",
        bounds: Bounds::Zero,
        steps: &[("divergence", "divergence")],
        evaluations: &[],
    },
    Wanted {
        file: "gradient.svg",
        caption: "Norm of the gradient before clipping",
        axis: "norm",
        bounds: Bounds::Zero,
        steps: &[("grad_norm", "norm")],
        evaluations: &[],
    },
    Wanted {
        file: "learning-rate.svg",
        caption: "Learning rate",
        axis: "learning rate",
        bounds: Bounds::Zero,
        steps: &[("lr", "learning rate")],
        evaluations: &[],
    },
    Wanted {
        file: "speed.svg",
        caption: "Tokens per second",
        axis: "tokens per second",
        bounds: Bounds::Zero,
        steps: &[("tok_s", "whole step"), ("rollout_tok_s", "rollout")],
        evaluations: &[],
    },
];

/// All plots for which the records hold anything.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn plots(records: &[Record]) -> Result<Vec<Plot>, DrawError> {
    let (steps, evaluations) = (steps(records), evaluations(records));
    let mut plots = Vec::new();
    for wanted in &WANTED {
        let of = |values: &[&Values], names: &'static [(&'static str, &'static str)]| -> Vec<Line> {
            let points = |name: &str| -> Vec<(f64, f64)> {
                values.iter().filter_map(|v| Some((v.step as f64, v.get(name)?))).collect()
            };
            names.iter().map(|(name, said)| Line::new(*said, points(name))).collect()
        };
        let mut lines = of(&steps, wanted.steps);
        // beside the line that it is compared with, so that it has one colour everywhere
        let first = lines.len().min(1);
        lines.splice(first..first, of(&evaluations, wanted.evaluations));
        lines.retain(|line| !line.points.is_empty());
        if !lines.is_empty() {
            let axes = Axes { title: wanted.caption, x: "steps", y: wanted.axis, bounds: wanted.bounds };
            let svg = line_plot(&axes, &lines)?;
            plots.push(Plot { file: wanted.file.to_owned(), caption: wanted.caption.to_owned(), svg });
        }
        // what it is all for comes second, after the reward
        match wanted.file {
            "reward.svg" => plots.extend(pass(&evaluations)?),
            "thought.svg" => plots.extend(thought(&evaluations)?),
            _ => {}
        }
    }
    Ok(plots)
}

/// Length of thought on held-out problems by level, where there are levels.
fn thought(evaluations: &[&Values]) -> Result<Option<Plot>, DrawError> {
    let lines = level_lines(evaluations, "thought", |values| values.step as f64);
    if lines.len() < 2 {
        return Ok(None);
    }
    let caption = "Length of thought on held-out problems by level";
    let axes = Axes { title: caption, x: "steps", y: "tokens", bounds: Bounds::Zero };
    let svg = line_plot(&axes, &lines)?;
    Ok(Some(Plot { file: "thought-levels.svg".to_owned(), caption: caption.to_owned(), svg }))
}

/// Right answers on held-out problems: by level, and by family where there are several.
fn pass(evaluations: &[&Values]) -> Result<Vec<Plot>, DrawError> {
    let at = |values: &Values| values.step as f64;
    let mut plots = Vec::new();
    let mut draw = |file: String, caption: String, lines: &[Line]| -> Result<(), DrawError> {
        let axes = Axes { title: &caption, x: "steps", y: "right answers", bounds: Bounds::Share };
        let svg = line_plot(&axes, lines)?;
        plots.push(Plot { file, caption, svg });
        Ok(())
    };
    let lines = level_lines(evaluations, "pass@1", at);
    if !lines.is_empty() {
        draw("pass.svg".to_owned(), "pass@1 on held-out problems".to_owned(), &lines)?;
    }
    let families: BTreeSet<&str> =
        names(evaluations, "pass@1").filter(|(_, level)| level.is_none()).map(|(f, _)| f).collect();
    let families: Vec<&str> = families.into_iter().collect();
    if families.len() > 1 {
        let parts = families.len().div_ceil(MAX_LINES);
        for (part, some) in families.chunks(families.len().div_ceil(parts)).enumerate() {
            let line = |family: &&str| {
                let name = format!("pass@1/{family}");
                let points = evaluations.iter().filter_map(|v| Some((at(v), v.get(&name)?)));
                Line::new((*family).to_owned(), points.collect::<Vec<_>>())
            };
            let lines: Vec<Line> = some.iter().map(line).collect();
            let number = if parts > 1 { format!("-{}", part + 1) } else { String::new() };
            let of = if parts > 1 { format!(" ({} of {parts})", part + 1) } else { String::new() };
            draw(format!("pass-families{number}.svg"), format!("pass@1 by family{of}"), &lines)?;
        }
    }
    Ok(plots)
}

/// Families and levels that `STEM/FAMILY` and `STEM/FAMILY:LEVEL` name.
fn names<'a>(evaluations: &'a [&Values], stem: &'a str) -> impl Iterator<Item = (&'a str, Option<u64>)> {
    let keys = evaluations.iter().flat_map(|values| values.values.keys());
    keys.filter_map(move |name| name.strip_prefix(stem)?.strip_prefix('/')).map(|name| {
        match name.rsplit_once(':').and_then(|(family, level)| Some((family, level.parse::<u64>().ok()?))) {
            Some((family, level)) => (family, Some(level)),
            None => (name, None),
        }
    })
}

/// A number overall and by level, the mean over the families that have it; `at` says where an evaluation stands.
pub(crate) fn level_lines(evaluations: &[&Values], stem: &str, at: impl Fn(&Values) -> f64) -> Vec<Line> {
    let mut levels: BTreeMap<u64, BTreeSet<&str>> = BTreeMap::new();
    for (family, level) in names(evaluations, stem) {
        if let Some(level) = level {
            levels.entry(level).or_default().insert(family);
        }
    }
    let overall = evaluations.iter().filter_map(|values| Some((at(values), values.get(stem)?)));
    let mut lines = vec![Line::new("all", overall.collect::<Vec<_>>())];
    // one level is all there is
    for (level, families) in levels.iter().filter(|_| levels.len() > 1).take(MAX_LINES - 1) {
        let mean = |values: &&Values| {
            let of = |family: &&str| values.get(&format!("{stem}/{family}:{level}"));
            let found: Vec<f64> = families.iter().filter_map(of).collect();
            (!found.is_empty()).then(|| (at(values), found.iter().sum::<f64>() / found.len() as f64))
        };
        lines.push(Line::new(
            format!("level {level}"),
            evaluations.iter().filter_map(mean).collect::<Vec<_>>(),
        ));
    }
    lines.retain(|line| !line.points.is_empty());
    lines
}
