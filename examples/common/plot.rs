//! Line charts for the examples, as SVG and PNG.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Once;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

/// One line of a chart. Series whose names agree up to a comma share a colour: `data, measured` are the dots on the line
/// `data, predicted`.
#[derive(Clone, Debug)]
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// Its points.
    pub points: Vec<(f64, f64)>,
    /// Drawn as dots alone: measured, beside what is predicted.
    pub dots: bool,
    /// The number of its colour, where several pictures are to agree on it.
    pub color: Option<usize>,
}

impl Series {
    /// A line.
    pub fn line(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.to_owned(), points, dots: false, color: None }
    }

    /// Dots.
    #[allow(dead_code, reason = "each example includes this file and uses what it needs")]
    pub fn dots(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.to_owned(), points, dots: true, color: None }
    }
}

/// What a chart says about itself. Axes carry their unit in their name.
#[derive(Clone, Copy, Debug)]
pub struct Labels<'a> {
    pub title: &'a str,
    pub x: &'a str,
    pub y: &'a str,
}

/// Draws the series into `stem.svg` and `stem.png` and gives the two paths.
pub fn lines(stem: &Path, labels: Labels<'_>, series: &[Series]) -> Result<[PathBuf; 2], Box<dyn Error>> {
    static FONT: Once = Once::new();
    FONT.call_once(|| {
        // The font is part of the program, so that pictures need nothing of the system.
        let _ = register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    });
    if let Some(folder) = stem.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let (svg, png) = (stem.with_extension("svg"), stem.with_extension("png"));
    draw(&SVGBackend::new(&svg, SIZE).into_drawing_area(), 1, labels, series)?;
    // Letters are put on whole pixels, of which a larger picture has enough.
    let large = (2 * SIZE.0, 2 * SIZE.1);
    draw(&BitMapBackend::new(&png, large).into_drawing_area(), 2, labels, series)?;
    Ok([svg, png])
}

/// Pixels of a picture, and of the parts of it around the chart.
const SIZE: (u32, u32) = (860, 540);
const MARGIN: i32 = 14;
const LEFT: i32 = 74;
const BELOW: i32 = 48;

/// Told apart by people who do not see red and green as different (M. Okabe, K. Ito).
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];

/// Whole numbers without decimals, others with as few as tell them apart.
fn number(value: &f64) -> String {
    if (value - value.round()).abs() < 1e-9 {
        format!("{value:.0}")
    } else {
        format!("{value:.3}").trim_end_matches('0').to_owned()
    }
}

/// The ranges of both axes, and the corner of the legend.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
    legend: SeriesLabelPosition,
}

impl Frame {
    fn new(series: &[Series]) -> Self {
        let points = || series.iter().flat_map(|s| &s.points);
        let range = |pick: fn(&(f64, f64)) -> f64| {
            let low = points().map(pick).fold(f64::INFINITY, f64::min);
            let high = points().map(pick).fold(f64::NEG_INFINITY, f64::max);
            if low.is_finite() { (low, high.max(low + 1e-9)) } else { (0.0, 1.0) }
        };
        let (x, (low, high)) = (range(|p| p.0), range(|p| p.1));
        let bottom = if low > 0.0 && low < high * 0.8 { 0.0 } else { low };
        let y = (bottom, high + (high - bottom) * 0.06);

        // The legend's share of the chart's width and height.
        let letters = series.iter().map(|s| s.name.chars().count()).max().unwrap_or(0) as f64;
        let wide = (letters * 7.2 + 70.0) / (f64::from(SIZE.0) - f64::from(2 * MARGIN + LEFT));
        let tall =
            (series.len() as f64 * 20.0 + 20.0) / (f64::from(SIZE.1) - f64::from(2 * MARGIN + BELOW + 30));
        // Where the lines go, in shares of width and height.
        let share = |(from, to): (f64, f64), at: f64| (at - from) / (to - from);
        let along = series.iter().flat_map(|s| s.points.windows(2)).flat_map(|ends| {
            let [a, b] = [ends[0], ends[1]];
            (0..=32)
                .map(move |i| f64::from(i) / 32.0)
                .map(move |t| (a.0 + (b.0 - a.0) * t, a.1 + (b.1 - a.1) * t))
        });
        let places: Vec<_> = along.chain(points().copied()).map(|p| (share(x, p.0), share(y, p.1))).collect();
        let hidden = |left: f64, bottom: f64| {
            let within = |from: f64, len: f64, at: f64| from <= at && at <= from + len;
            places.iter().filter(|p| within(left, wide, p.0) && within(bottom, tall, p.1)).count()
        };
        let corners = [
            (SeriesLabelPosition::UpperLeft, hidden(0.0, 1.0 - tall)),
            (SeriesLabelPosition::UpperRight, hidden(1.0 - wide, 1.0 - tall)),
            (SeriesLabelPosition::LowerRight, hidden(1.0 - wide, 0.0)),
            (SeriesLabelPosition::LowerLeft, hidden(0.0, 0.0)),
        ];
        match corners.into_iter().find(|(_, hidden)| *hidden == 0) {
            Some((legend, _)) => Self { x, y, legend },
            // No corner is free: the chart grows until there is room above the lines.
            None => {
                let top = y.0 + (y.1 - y.0) / (1.0 - tall.min(0.6));
                Self { x, y: (y.0, top), legend: SeriesLabelPosition::UpperLeft }
            }
        }
    }
}

/// Draws in units of so many pixels.
fn draw<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    unit: i32,
    labels: Labels<'_>,
    series: &[Series],
) -> Result<(), Box<dyn Error>>
where
    B::ErrorType: 'static,
{
    area.fill(&WHITE)?;
    let frame = Frame::new(series);
    // Nobody has one and a half workers.
    let whole = series.iter().flat_map(|s| &s.points).all(|p| p.0.fract() == 0.0);
    let ticks = if whole { (frame.x.1 - frame.x.0 + 1.0).clamp(2.0, 11.0) as usize } else { 11 };
    let font = |size: i32| ("sans-serif", size * unit);
    let mut chart = ChartBuilder::on(area)
        .caption(labels.title, font(22))
        .margin(MARGIN * unit)
        .x_label_area_size(BELOW * unit)
        .y_label_area_size(LEFT * unit)
        .build_cartesian_2d(frame.x.0..frame.x.1, frame.y.0..frame.y.1)?;
    chart
        .configure_mesh()
        .x_desc(labels.x)
        .y_desc(labels.y)
        .x_labels(ticks)
        .light_line_style(WHITE)
        .set_all_tick_mark_size(5 * unit)
        .x_label_formatter(&|x| if whole && x.fract().abs() > 1e-9 { String::new() } else { number(x) })
        .y_label_formatter(&number)
        .axis_desc_style(font(17))
        .label_style(font(14))
        .draw()?;
    let mut subjects: Vec<&str> = Vec::new();
    for s in series {
        let subject = s.name.split(',').next().unwrap_or_default();
        let known = subjects.iter().position(|&other| other == subject).unwrap_or_else(|| {
            subjects.push(subject);
            subjects.len() - 1
        });
        let color = COLORS[s.color.unwrap_or(known) % COLORS.len()];
        // Who shows an SVG has another font, often a wider one: the frame of the legend has room for it.
        let label = format!("{}{}", s.name, " ".repeat(2 + s.name.len() / 8));
        let dot = 4 * unit;
        let dots = s.points.iter().map(|p| Circle::new(*p, dot, color.filled()));
        let legend = move |(x, y)| Circle::new((x + 10 * unit, y), dot, color.filled());
        if s.dots {
            chart.draw_series(dots)?.label(label).legend(legend);
        } else {
            let stroke = color.stroke_width(2 * unit.unsigned_abs());
            chart
                .draw_series(LineSeries::new(s.points.iter().copied(), stroke))?
                .label(label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20 * unit, y)], stroke));
        }
    }
    chart
        .configure_series_labels()
        .position(frame.legend)
        .margin(6 * unit)
        .legend_area_size(30 * unit)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(font(15))
        .draw()?;
    area.present()?;
    Ok(())
}
