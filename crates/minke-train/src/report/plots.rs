//! The plots of a report.

use super::draw::{Axes, Bounds, DrawError, Line, heat_map, line_plot};
use crate::metrics::{Record, Step};

/// A finished plot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plot {
    /// File name.
    pub file: &'static str,
    /// What it shows, for the report's text and for those who cannot see it.
    pub caption: &'static str,
    /// The picture.
    pub svg: String,
}

/// More cells than this across cannot be told apart; neighbours are averaged.
const MAX_COLUMNS: usize = 256;

/// All plots for which the records hold anything.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn plots(records: &[Record]) -> Result<Vec<Plot>, DrawError> {
    let steps: Vec<&Step> = records
        .iter()
        .filter_map(|record| match record {
            Record::Step(step) => Some(step),
            Record::Evaluation(_) | Record::Sample(_) => None,
        })
        .collect();
    let series = |value: fn(&Step) -> Option<f64>| -> Vec<(f64, f64)> {
        let point = |step: &&Step| value(step).map(|value| (step.tokens as f64, value));
        steps.iter().filter_map(point).collect()
    };
    let held_out = records
        .iter()
        .filter_map(|record| match record {
            Record::Evaluation(evaluation) => Some((evaluation.tokens as f64, evaluation.loss)),
            Record::Step(_) | Record::Sample(_) => None,
        })
        .collect();
    let line = |name: &'static str, points: Vec<(f64, f64)>| Line::new(name, points);
    let candidates = [
        (
            "loss.svg",
            "Loss: training, held out, and multi-token prediction",
            "loss (nats per token)",
            vec![
                line("training", series(|step| Some(step.loss))),
                line("held out", held_out),
                line("multi-token prediction", series(|step| step.mtp_loss)),
            ],
            Bounds::Values,
        ),
        (
            "learning-rate.svg",
            "Learning rate",
            "learning rate",
            vec![line("learning rate", series(|step| Some(step.lr)))],
            Bounds::Zero,
        ),
        (
            "speed.svg",
            "Tokens per second",
            "tokens per second",
            vec![line("tokens per second", series(|step| Some(step.tok_s)))],
            Bounds::Zero,
        ),
        (
            "balance.svg",
            "Balance of the experts: largest load over the mean, minus one",
            "maximal violation",
            vec![line(
                "maximal violation",
                series(|step| step.balance.as_ref().map(|balance| balance.max_violation)),
            )],
            Bounds::Zero,
        ),
    ];
    let mut plots = Vec::new();
    for (file, caption, y, lines, bounds) in candidates {
        if lines.iter().any(|line| !line.points.is_empty()) {
            let axes = Axes { title: caption, x: "tokens", y, bounds };
            plots.push(Plot { file, caption, svg: line_plot(&axes, &lines)? });
        }
    }
    let load = late_load(&steps);
    if !load.is_empty() {
        let caption = "Load of each expert over the last tenth of training (1 is even)";
        plots.push(Plot { file: "expert-load.svg", caption, svg: heat_map(caption, &load)? });
    }
    Ok(plots)
}

/// Mean load per layer and expert over the last tenth of the steps that carry one.
fn late_load(steps: &[&Step]) -> Vec<Vec<f64>> {
    let loads: Vec<_> = steps.iter().filter_map(|step| step.balance.as_ref()).map(|b| &b.load).collect();
    let Some(last) = loads.last() else { return Vec::new() };
    let late = &loads[loads.len() - loads.len().div_ceil(10)..];
    let row = |layer: usize, experts: usize| {
        let mean = |expert: usize| {
            let of = |load: &&&Vec<Vec<f32>>| load.get(layer).and_then(|row| row.get(expert)).copied();
            let values: Vec<f64> = late.iter().filter_map(|load| of(&load)).map(f64::from).collect();
            values.iter().sum::<f64>() / values.len().max(1) as f64
        };
        let values: Vec<f64> = (0..experts).map(mean).collect();
        let width = values.len().div_ceil(MAX_COLUMNS).max(1);
        values.chunks(width).map(|chunk| chunk.iter().sum::<f64>() / chunk.len() as f64).collect()
    };
    let rows = last.iter().enumerate().map(|(layer, load)| row(layer, load.len()));
    rows.filter(|row: &Vec<f64>| !row.is_empty()).collect()
}
