use insta::assert_snapshot;

use super::*;
use crate::metrics::{Balance, Evaluation, Step};
use crate::schedule::{Decay, Schedule};

/// A run that looks like one: a falling noisy loss, experts that even out, and samples.
fn records(steps: u64) -> Vec<Record> {
    let schedule =
        Schedule { warmup_share: 0.05, decay_share: 0.3, decay: Decay::OneMinusSqrt, final_share: 0.0 };
    let mut records = Vec::new();
    for step in 1..=steps {
        let noise = ((step * 7919) % 101) as f64 / 101.0 - 0.5;
        let loss = 2.0 + 6.5 * (-(step as f64) / (steps as f64 / 6.0)).exp() + 0.25 * noise;
        let experts = |layer: u64| -> Vec<u64> {
            (0..16).map(|expert| 1000 + 1600 * ((expert * 7 + layer * 5) % 16) / (2 + step / 20)).collect()
        };
        records.push(Record::Step(Step {
            step,
            tokens: step * 4096,
            loss,
            mtp_loss: Some(loss + 0.7),
            balance_loss: Some(1e-4),
            lr: 0.003 * schedule.factor(step - 1, steps),
            grad_norm: 1.0,
            skipped: false,
            tok_s: 9000.0 + 800.0 * noise,
            gemm_share: Some(0.5),
            elapsed_s: step as f64 * 0.5,
            balance: Some(Balance::from_counts(&(0..5).map(experts).collect::<Vec<_>>())),
        }));
        if step % (steps / 10).max(1) == 0 {
            let loss = loss + 0.1;
            let bits_per_byte = loss / 3.2 / std::f64::consts::LN_2;
            records.push(Record::Evaluation(Evaluation { step, tokens: step * 4096, loss, bits_per_byte }));
        }
    }
    for (prompt, text) in [("fn ", "main() {\n    ```rust\n}\n"), ("# ", "Title | with a bar")] {
        records.push(Record::Sample(SampleText { step: steps, prompt: prompt.into(), text: text.into() }));
    }
    records
}

fn report(steps: u64) -> Report {
    Report {
        name: "quickstart".into(),
        parameters: 8_123_456,
        active_parameters: 4_012_345,
        held_out_bytes: 1_234_567,
        yardsticks: vec![
            Yardstick { name: "xz -9".into(), bits_per_byte: 1.5 },
            Yardstick { name: "zstd -22".into(), bits_per_byte: 1.6 },
        ],
        facts: vec![("vocabulary".into(), "4,096".into())],
        records: records(steps),
        baseline: None,
    }
}

#[test]
fn a_baseline_stands_beside_the_run() {
    let mut other = records(40);
    for record in &mut other {
        if let Record::Evaluation(evaluation) = record {
            evaluation.loss *= 1.25;
        }
    }
    let with = Report { baseline: Some(Baseline { name: "b|f16".into(), records: other }), ..report(40) };
    let text = with.markdown(&[]);
    let last = with.last_evaluation().unwrap().0;
    assert!(text.contains("| step | this run | `b\\|f16` | gap |"), "{text}");
    assert!(text.contains(&format!("| {last:.4} | {:.4} | -20.00 % |", 1.25 * last)), "{text}");
    assert!(!report(40).markdown(&[]).contains("-20.00 %"));
}

#[test]
fn the_text_says_what_was_reached() {
    let report = report(40);
    let plots = plots(&report.records).unwrap();
    assert_snapshot!(report.markdown(&plots));
}

#[test]
fn plots_are_drawn_for_long_short_and_empty_runs() {
    for steps in [1, 2, 40, 1500] {
        let plots = plots(&records(steps)).unwrap();
        let names: Vec<_> = plots.iter().map(|plot| plot.file).collect();
        assert_eq!(names, ["loss.svg", "learning-rate.svg", "speed.svg", "balance.svg", "expert-load.svg"]);
        for plot in &plots {
            assert!(plot.svg.starts_with("<svg") && plot.svg.trim_end().ends_with("</svg>"), "{}", plot.file);
            assert!(!plot.svg.contains("NaN") && !plot.svg.contains("inf"), "{}", plot.file);
            // thinned: a picture, not a data dump
            assert!(plot.svg.len() < 100_000, "{}: {}", plot.file, plot.svg.len());
        }
    }
    assert_eq!(plots(&[]).unwrap(), []);
}

#[test]
fn diverged_and_dense_runs_have_fewer_plots() {
    let mut dense = records(10);
    for record in &mut dense {
        if let Record::Step(step) = record {
            step.balance = None;
            step.loss = f64::NAN;
            step.mtp_loss = None;
        }
    }
    dense.retain(|record| !matches!(record, Record::Evaluation(_)));
    let names: Vec<_> = plots(&dense).unwrap().iter().map(|plot| plot.file).collect();
    assert_eq!(names, ["learning-rate.svg", "speed.svg"]);
}

#[test]
fn labels_lie_within_the_picture() {
    for plot in plots(&records(700)).unwrap() {
        let number = |tag: &str, name: &str| -> f64 {
            let from = tag.find(&format!(" {name}=\"")).unwrap() + name.len() + 3;
            tag[from..].split('"').next().unwrap().parse().unwrap()
        };
        let (width, height) = (number(&plot.svg, "width"), number(&plot.svg, "height"));
        let mut lines = plot.svg.lines();
        while let Some(line) = lines.next() {
            if !line.starts_with("<text") {
                continue;
            }
            let length = lines.next().unwrap().trim().chars().count() as f64;
            let size = number(line, "font-size");
            // sans-serif letters are about half as wide as high; 0.6 is the wide end
            let extent = length * size * 0.6;
            let (x, y) = (number(line, "x"), number(line, "y"));
            let start = match line {
                line if line.contains("text-anchor=\"middle\"") => -extent / 2.0,
                line if line.contains("text-anchor=\"end\"") => -extent,
                _ => 0.0,
            };
            let inside = if line.contains("rotate") {
                y + start >= 0.0 && y + start + extent <= height
            } else {
                x + start >= 0.0 && x + start + extent <= width
            };
            assert!(inside, "{}: {line}", plot.file);
        }
    }
}

#[test]
fn a_report_is_written_and_replaced() {
    let folder = tempfile::tempdir().unwrap();
    for steps in [40, 20] {
        let path = report(steps).write(folder.path()).unwrap();
        assert!(fs::read_to_string(path).unwrap().contains(&format!("| steps | {steps} |")));
    }
    let mut names: Vec<_> = fs::read_dir(folder.path().join("plots"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["balance.svg", "expert-load.svg", "learning-rate.svg", "loss.svg", "speed.svg"]);
    let missing = folder.path().join("plots/loss.svg/none");
    assert!(matches!(report(5).write(&missing), Err(ReportError::Io { .. })));
}

#[test]
fn labels_of_an_axis_differ() {
    for highest in [0.0003, 0.000_071, 0.012, 0.35, 1.0, 7.0, 950.0, 2e-7] {
        let points = (0..50).map(|x| (f64::from(x), highest * f64::from(x) / 49.0));
        let line = draw::Line::new("rate", points);
        let axes = draw::Axes { title: "t", x: "steps", y: "rate", bounds: draw::Bounds::Zero };
        let svg = draw::line_plot(&axes, &[line]).unwrap();
        let labels: Vec<&str> = svg
            .split("text-anchor=\"end\"")
            .skip(1)
            .filter_map(|rest| rest.split(['>', '<']).nth(1).map(str::trim))
            .collect();
        let different: std::collections::BTreeSet<&&str> = labels.iter().collect();
        assert!(labels.len() > 3 && different.len() == labels.len(), "{labels:?}");
        assert!(labels.iter().all(|label| label.len() < 9), "{labels:?}");
    }
}

#[test]
fn numbers_read_well() {
    assert_eq!([0, 12, 1234, 1_234_567].map(grouped), ["0", "12", "1,234", "1,234,567"]);
    assert_eq!([3.44, 61.0, 3725.0].map(duration), ["3.4 s", "1 min 1 s", "1 h 2 min"]);
    assert_eq!([0.0, 999.0, 1500.0, 3e6].map(draw::short_count), ["0", "999", "1.5k", "3M"]);
}
