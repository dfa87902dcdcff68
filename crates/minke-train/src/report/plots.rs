//! The plots of a report, as SVG on a white panel, so that they read on light and dark pages alike.

use std::error::Error;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

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

const SIZE: (u32, u32) = (880, 420);
/// More points than pixels say nothing; longer series are averaged down to this many.
const MAX_POINTS: usize = 400;
/// More cells than this across cannot be told apart; neighbours are averaged.
const MAX_COLUMNS: usize = 256;

// told apart in every kind of colour blindness (Okabe and Ito)
const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 130, 95);
const INK: RGBColor = RGBColor(40, 40, 40);
const GRID: RGBColor = RGBColor(225, 225, 225);

/// One line of a plot: tokens and values.
struct Line {
    name: &'static str,
    color: RGBColor,
    points: Vec<(f64, f64)>,
}

/// All plots for which the records hold anything.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn plots(records: &[Record]) -> Result<Vec<Plot>, Box<dyn Error + Send + Sync>> {
    let steps: Vec<&Step> = records
        .iter()
        .filter_map(|record| match record {
            Record::Step(step) => Some(step),
            Record::Evaluation(_) | Record::Sample(_) => None,
        })
        .collect();
    let series = |value: fn(&Step) -> Option<f64>| -> Vec<(f64, f64)> {
        let point = |step: &&Step| value(step).map(|value| (step.tokens as f64, value));
        thinned(steps.iter().filter_map(point).filter(|(_, value)| value.is_finite()).collect())
    };
    let held_out = records
        .iter()
        .filter_map(|record| match record {
            Record::Evaluation(evaluation) => Some((evaluation.tokens as f64, evaluation.loss)),
            Record::Step(_) | Record::Sample(_) => None,
        })
        .filter(|(_, loss)| loss.is_finite())
        .collect();
    let line = |name, color, points| Line { name, color, points };
    let candidates = [
        (
            "loss.svg",
            "Loss: training, held out, and multi-token prediction",
            "loss (nats per token)",
            vec![
                line("training", BLUE, series(|step| Some(step.loss))),
                line("multi-token prediction", GREEN, series(|step| step.mtp_loss)),
                line("held out", ORANGE, held_out),
            ],
            false,
        ),
        (
            "learning-rate.svg",
            "Learning rate",
            "learning rate",
            vec![line("learning rate", BLUE, series(|step| Some(step.lr)))],
            true,
        ),
        (
            "speed.svg",
            "Tokens per second",
            "tokens per second",
            vec![line("tokens per second", BLUE, series(|step| Some(step.tok_s)))],
            true,
        ),
        (
            "balance.svg",
            "Balance of the experts: largest load over the mean, minus one",
            "maximal violation",
            vec![line(
                "maximal violation",
                BLUE,
                series(|step| step.balance.as_ref().map(|balance| balance.max_violation)),
            )],
            true,
        ),
    ];
    let mut plots = Vec::new();
    for (file, caption, axis, lines, from_zero) in candidates {
        if lines.iter().any(|line| !line.points.is_empty()) {
            plots.push(Plot { file, caption, svg: line_plot(caption, axis, &lines, from_zero)? });
        }
    }
    let load = late_load(&steps);
    if !load.is_empty() {
        let caption = "Load of each expert over the last tenth of training (1 is even)";
        plots.push(Plot { file: "expert-load.svg", caption, svg: heat_map(caption, &load)? });
    }
    Ok(plots)
}

/// At most [`MAX_POINTS`] means of neighbouring points.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points;
    }
    let mean = |chunk: &[(f64, f64)]| {
        let (x, y) = chunk.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (x / chunk.len() as f64, y / chunk.len() as f64)
    };
    points.chunks(points.len().div_ceil(MAX_POINTS)).map(mean).collect()
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

/// `1.5M` and the like; exact enough for an axis.
pub(super) fn short_count(number: f64) -> String {
    let (value, suffix) = match number.abs() {
        size if size >= 1e9 => (number / 1e9, "B"),
        size if size >= 1e6 => (number / 1e6, "M"),
        size if size >= 1e3 => (number / 1e3, "k"),
        _ => (number, ""),
    };
    let digits = format!("{value:.2}");
    format!("{}{suffix}", digits.trim_end_matches('0').trim_end_matches('.'))
}

/// A value of the vertical axis in at most five characters or so.
fn axis_value(number: f64) -> String {
    match number.abs() {
        0.0 => "0".to_owned(),
        size if size >= 1e3 => short_count(number),
        size if size >= 0.1 => format!("{number:.2}"),
        size if size >= 1e-4 => format!("{number:.4}"),
        _ => format!("{number:.0e}"),
    }
}

/// A range around the values that is never empty.
fn around(values: impl Iterator<Item = f64>, from_zero: bool) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    let low = if from_zero { low.min(0.0) } else { low };
    let room = if high > low { (high - low) * 0.05 } else { high.abs().max(1.0) * 0.1 };
    (if from_zero && low >= 0.0 { low } else { low - room })..high + room
}

fn titled<'a>(
    root: &DrawingArea<SVGBackend<'a>, Shift>,
    title: &str,
) -> Result<DrawingArea<SVGBackend<'a>, Shift>, Box<dyn Error + Send + Sync>> {
    root.fill(&WHITE).map_err(drawing)?;
    root.margin(8, 0, 0, 0).titled(title, ("sans-serif", 20).into_font().color(&INK)).map_err(drawing)
}

fn drawing(error: impl std::fmt::Display) -> Box<dyn Error + Send + Sync> {
    error.to_string().into()
}

fn line_plot(
    title: &str,
    axis: &str,
    lines: &[Line],
    from_zero: bool,
) -> Result<String, Box<dyn Error + Send + Sync>> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let area = titled(&root, title)?;
        let points = || lines.iter().flat_map(|line| line.points.iter().copied());
        let x = 0.0..points().map(|point| point.0).fold(1.0, f64::max) * 1.01;
        let y = around(points().map(|point| point.1), from_zero);
        let mut chart = ChartBuilder::on(&area)
            .margin(14)
            .margin_right(28)
            .x_label_area_size(52)
            .y_label_area_size(84)
            .build_cartesian_2d(x, y)
            .map_err(drawing)?;
        chart
            .configure_mesh()
            .x_desc("tokens")
            .y_desc(axis)
            .x_labels(8)
            .y_labels(7)
            .x_label_formatter(&|tokens| short_count(*tokens))
            .y_label_formatter(&|value| axis_value(*value))
            .label_style(("sans-serif", 16).into_font().color(&INK))
            .axis_desc_style(("sans-serif", 17).into_font().color(&INK))
            .axis_style(INK)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(drawing)?;
        for line in lines.iter().filter(|line| !line.points.is_empty()) {
            let color = line.color;
            let drawn = chart
                .draw_series(LineSeries::new(line.points.iter().copied(), color.stroke_width(2)))
                .map_err(drawing)?;
            if lines.len() > 1 {
                drawn
                    .label(line.name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3)));
            }
            // a line through few points does not show where they are
            if line.points.len() <= 40 {
                let dots = line.points.iter().map(|point| Circle::new(*point, 3, color.filled()));
                chart.draw_series(dots).map_err(drawing)?;
            }
        }
        if lines.len() > 1 {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .margin(12)
                .legend_area_size(34)
                .background_style(WHITE.mix(0.9))
                .border_style(GRID)
                .label_font(("sans-serif", 16).into_font().color(&INK))
                .draw()
                .map_err(drawing)?;
        }
        root.present().map_err(drawing)?;
    }
    Ok(svg)
}

/// White at no load, blue at the mean, dark at twice the mean and beyond.
fn load_color(load: f64) -> RGBColor {
    let mix = |from: RGBColor, to: RGBColor, t: f64| {
        let channel = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * t).round() as u8;
        RGBColor(channel(from.0, to.0), channel(from.1, to.1), channel(from.2, to.2))
    };
    let dark = RGBColor(68, 1, 84);
    let middle = RGBColor(86, 160, 206);
    match load {
        load if load <= 1.0 => mix(WHITE, middle, load.max(0.0)),
        load => mix(middle, dark, (load - 1.0).min(1.0)),
    }
}

fn heat_map(title: &str, load: &[Vec<f64>]) -> Result<String, Box<dyn Error + Send + Sync>> {
    let mut svg = String::new();
    {
        let height = (load.len() as u32 * 28 + 150).clamp(220, 900);
        let root = SVGBackend::with_string(&mut svg, (SIZE.0, height)).into_drawing_area();
        let area = titled(&root, title)?;
        let (map, scale) = area.split_horizontally(SIZE.0 - 110);
        let columns = load.iter().map(Vec::len).max().unwrap_or(1);
        let mut chart = ChartBuilder::on(&map)
            .margin(14)
            .x_label_area_size(52)
            .y_label_area_size(64)
            .build_cartesian_2d(-0.5..columns as f64 - 0.5, -0.5..load.len() as f64 - 0.5)
            .map_err(drawing)?;
        // a label in the middle of every row or column where there is room
        chart
            .configure_mesh()
            .disable_mesh()
            .x_desc("expert")
            .y_desc("layer with experts")
            .x_labels(columns.min(16) + 1)
            .y_labels(load.len().min(12) + 1)
            .x_label_formatter(&|x| whole(*x))
            .y_label_formatter(&|y| whole(*y))
            .label_style(("sans-serif", 16).into_font().color(&INK))
            .axis_desc_style(("sans-serif", 17).into_font().color(&INK))
            .axis_style(INK)
            .draw()
            .map_err(drawing)?;
        for (layer, row) in load.iter().enumerate() {
            let cells = row.iter().enumerate().flat_map(|(expert, value)| {
                let (x, y) = (expert as f64, layer as f64);
                let corners = [(x - 0.5, y - 0.5), (x + 0.5, y + 0.5)];
                [
                    Rectangle::new(corners, load_color(*value).filled()),
                    Rectangle::new(corners, GRID.stroke_width(1)),
                ]
            });
            chart.draw_series(cells).map_err(drawing)?;
        }
        let mut legend = ChartBuilder::on(&scale)
            .margin_top(14)
            .margin_bottom(66)
            .y_label_area_size(0)
            .right_y_label_area_size(44)
            .margin_right(8)
            .build_cartesian_2d(0.0..1.0, 0.0..2.0)
            .map_err(drawing)?;
        let shades = (0..40).map(|shade| {
            let (low, high) = (f64::from(shade) / 20.0, f64::from(shade + 1) / 20.0);
            Rectangle::new([(0.0, low), (1.0, high)], load_color(f64::midpoint(low, high)).filled())
        });
        legend.draw_series(shades).map_err(drawing)?;
        legend
            .configure_mesh()
            .disable_mesh()
            .disable_x_axis()
            .y_labels(5)
            .y_label_formatter(&|value| if *value >= 2.0 { "2+".to_owned() } else { format!("{value:.1}") })
            .label_style(("sans-serif", 16).into_font().color(&INK))
            .axis_style(INK)
            .draw()
            .map_err(drawing)?;
        root.present().map_err(drawing)?;
    }
    Ok(svg)
}

/// Whole numbers only: experts and layers have no fractions.
fn whole(number: f64) -> String {
    if number.fract() == 0.0 { format!("{number}") } else { String::new() }
}
