//! Drawing: lines over a common axis and maps of heat, as SVG on a white panel, so that they read on light and dark
//! pages alike.

use std::borrow::Cow;
use std::error::Error;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

const SIZE: (u32, u32) = (880, 420);
/// More points than pixels say nothing; longer series are averaged down to this many.
const MAX_POINTS: usize = 400;
/// More lines than this cannot be told apart by colour.
pub const MAX_LINES: usize = 7;
/// Where the plot itself begins.
const LEFT: i32 = 98;

// told apart in every kind of colour blindness (Okabe and Ito)
const COLORS: [RGBColor; MAX_LINES] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 130, 95),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
];
const INK: RGBColor = RGBColor(40, 40, 40);
const GRID: RGBColor = RGBColor(225, 225, 225);

/// Why a plot cannot be drawn.
pub type DrawError = Box<dyn Error + Send + Sync>;

/// One line of a plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// What it shows.
    pub name: Cow<'static, str>,
    /// Its points, in order of x.
    pub points: Vec<(f64, f64)>,
}

/// The bounds of the vertical axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bounds {
    /// Around the values.
    Values,
    /// From zero, or from the values where these are negative.
    Zero,
    /// From 0 to 1, in percent.
    Share,
}

/// What stands around the lines.
#[derive(Debug, Clone, Copy)]
pub struct Axes<'a> {
    /// Above the plot.
    pub title: &'a str,
    /// What goes to the right.
    pub x: &'a str,
    /// What goes up.
    pub y: &'a str,
    /// How far up and down.
    pub bounds: Bounds,
}

impl Line {
    /// A line through the finite ones of the points.
    pub fn new(name: impl Into<Cow<'static, str>>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let finite = |(x, y): &(f64, f64)| x.is_finite() && y.is_finite();
        Self { name: name.into(), points: thinned(points.into_iter().filter(finite).collect()) }
    }
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

/// `1.5M` and the like; exact enough for an axis.
pub(crate) fn short_count(number: f64) -> String {
    let (value, suffix) = match number.abs() {
        size if size >= 1e9 => (number / 1e9, "B"),
        size if size >= 1e6 => (number / 1e6, "M"),
        size if size >= 1e3 => (number / 1e3, "k"),
        _ => (number, ""),
    };
    let digits = format!("{value:.2}");
    format!("{}{suffix}", digits.trim_end_matches('0').trim_end_matches('.'))
}

/// A value of the vertical axis, with as many digits as tell it from its neighbours, `step` or more apart.
fn axis_value(number: f64, step: f64) -> String {
    if number.abs() < step / 2.0 {
        return "0".to_owned();
    }
    let digits = (-step.log10()).ceil().clamp(0.0, 12.0) as usize;
    let text = match number.abs() {
        size if size >= 1e3 => return short_count(number),
        size if size < 1e-4 => format!("{number:.1e}"),
        _ => format!("{number:.digits$}"),
    };
    match text.split_once('e') {
        Some((digits, power)) => format!("{}e{power}", digits.trim_end_matches(".0")),
        None if text.contains('.') => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        None => text,
    }
}

/// The range of the horizontal axis: from nothing, unless that would leave most of it empty.
fn across(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    let from = if low > 0.3 * high && high > low { low - 0.02 * (high - low) } else { 0.0 };
    from..if high > 0.0 { high + 0.01 * (high - from) } else { 1.0 }
}

/// A range around the values that is never empty.
fn around(values: impl Iterator<Item = f64>, bounds: Bounds) -> Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    let from_zero = match bounds {
        Bounds::Values => false,
        Bounds::Zero => true,
        // a line along the top or the bottom stays visible
        Bounds::Share => return low.min(-0.02)..high.max(1.02),
    };
    let low = if from_zero { low.min(0.0) } else { low };
    let room = if high > low { (high - low) * 0.05 } else { high.abs().max(1.0) * 0.1 };
    (if from_zero && low >= 0.0 { low } else { low - room })..high + room
}

fn titled<'a>(
    root: &DrawingArea<SVGBackend<'a>, Shift>,
    title: &str,
) -> Result<DrawingArea<SVGBackend<'a>, Shift>, DrawError> {
    root.fill(&WHITE).map_err(drawing)?;
    root.margin(8, 0, 0, 0).titled(title, ("sans-serif", 20).into_font().color(&INK)).map_err(drawing)
}

/// Where the name of each line stands above the plot, and how high all of them are together.
fn legend(lines: &[&Line]) -> (Vec<(i32, i32)>, u32) {
    let (mut at, mut places) = ((LEFT, 12), Vec::new());
    for line in lines {
        let width = 60 + 10 * shown(&line.name).chars().count() as i32;
        if at.0 > LEFT && at.0 + width > SIZE.0 as i32 {
            at = (LEFT, at.1 + 24);
        }
        places.push(at);
        at.0 += width;
    }
    (places, if lines.len() > 1 { at.1 as u32 + 12 } else { 0 })
}

/// A name that is not too long for a legend.
fn shown(name: &str) -> String {
    name.chars().take(32).collect()
}

fn drawing(error: impl std::fmt::Display) -> DrawError {
    error.to_string().into()
}

/// Draws the lines that have points, at most [`MAX_LINES`] of them.
///
/// # Errors
/// When there is nothing to draw, or the picture cannot be made.
pub fn line_plot(axes: &Axes<'_>, lines: &[Line]) -> Result<String, DrawError> {
    let lines: Vec<&Line> = lines.iter().filter(|line| !line.points.is_empty()).take(MAX_LINES).collect();
    if lines.is_empty() {
        return Err(format!("`{}` has no points", axes.title).into());
    }
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let area = titled(&root, axes.title)?;
        let points = || lines.iter().flat_map(|line| line.points.iter().copied());
        let x = across(points().map(|point| point.0));
        let y = around(points().map(|point| point.1), axes.bounds);
        // labels are at least this far apart
        let step = (y.end - y.start) / 14.0;
        let (names, height) = legend(&lines);
        let (above, plot) = area.split_vertically(height);
        let mut chart = ChartBuilder::on(&plot)
            .margin(14)
            .margin_right(28)
            .x_label_area_size(52)
            .y_label_area_size(84)
            .build_cartesian_2d(x, y)
            .map_err(drawing)?;
        let label = |value: &f64| match axes.bounds {
            Bounds::Values | Bounds::Zero => axis_value(*value, step),
            Bounds::Share => format!("{:.0} %", 100.0 * value),
        };
        chart
            .configure_mesh()
            .x_desc(axes.x)
            .y_desc(axes.y)
            .x_labels(8)
            .y_labels(7)
            .x_label_formatter(&|x| short_count(*x))
            .y_label_formatter(&label)
            .label_style(("sans-serif", 16).into_font().color(&INK))
            .axis_desc_style(("sans-serif", 17).into_font().color(&INK))
            .axis_style(INK)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .draw()
            .map_err(drawing)?;
        // the first line is what matters most: it is drawn last, over the others
        for (line, color) in lines.iter().zip(COLORS).rev() {
            chart
                .draw_series(LineSeries::new(line.points.iter().copied(), color.stroke_width(2)))
                .map_err(drawing)?;
            // a line through few points does not show where they are
            if line.points.len() <= 40 {
                let dots = line.points.iter().map(|point| Circle::new(*point, 3, color.filled()));
                chart.draw_series(dots).map_err(drawing)?;
            }
        }
        for ((line, color), (x, y)) in lines.iter().zip(COLORS).zip(names).filter(|_| height > 0) {
            let stroke = PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3));
            above.draw(&stroke).map_err(drawing)?;
            let style = ("sans-serif", 16).into_font().color(&INK);
            above.draw(&Text::new(shown(&line.name), (x + 32, y - 8), style)).map_err(drawing)?;
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

/// Draws the load of each expert as a multiple of its layer's mean, `[layers][e]`.
///
/// # Errors
/// When the picture cannot be made.
pub fn heat_map(title: &str, load: &[Vec<f64>]) -> Result<String, DrawError> {
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
