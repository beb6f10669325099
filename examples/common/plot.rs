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
}

impl Series {
    /// A line.
    pub fn line(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.to_owned(), points, dots: false }
    }

    /// Dots.
    #[allow(dead_code, reason = "each example includes this file and uses what it needs")]
    pub fn dots(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.to_owned(), points, dots: true }
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
    let size = (860, 540);
    draw(&SVGBackend::new(&svg, size).into_drawing_area(), labels, series)?;
    draw(&BitMapBackend::new(&png, size).into_drawing_area(), labels, series)?;
    Ok([svg, png])
}

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

/// Whether the highest point is in the left half: there the legend would hide it.
fn falls(series: &[Series]) -> bool {
    let points = || series.iter().flat_map(|s| &s.points);
    let highest = points().max_by(|a, b| a.1.total_cmp(&b.1)).map_or(0.0, |p| p.0);
    let (left, right) =
        points().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, r), p| (l.min(p.0), r.max(p.0)));
    highest < (left + right) / 2.0
}

fn draw<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    labels: Labels<'_>,
    series: &[Series],
) -> Result<(), Box<dyn Error>>
where
    B::ErrorType: 'static,
{
    area.fill(&WHITE)?;
    let points = || series.iter().flat_map(|s| &s.points);
    let range = |pick: fn(&(f64, f64)) -> f64| {
        let low = points().map(pick).fold(f64::INFINITY, f64::min);
        let high = points().map(pick).fold(f64::NEG_INFINITY, f64::max);
        if low.is_finite() { (low, high.max(low + 1e-9)) } else { (0.0, 1.0) }
    };
    let ((left, right), (low, high)) = (range(|p| p.0), range(|p| p.1));
    // Nobody has one and a half workers.
    let whole = points().all(|p| p.0.fract() == 0.0);
    let bottom = if low > 0.0 && low < high * 0.8 { 0.0 } else { low };
    let mut chart = ChartBuilder::on(area)
        .caption(labels.title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(48)
        .y_label_area_size(74)
        .build_cartesian_2d(left..right, bottom..high + (high - bottom) * 0.06)?;
    chart
        .configure_mesh()
        .x_desc(labels.x)
        .y_desc(labels.y)
        .light_line_style(WHITE)
        .x_label_formatter(&|x| if whole && x.fract().abs() > 1e-9 { String::new() } else { number(x) })
        .y_label_formatter(&number)
        .axis_desc_style(("sans-serif", 17))
        .label_style(("sans-serif", 14))
        .draw()?;
    let mut subjects: Vec<&str> = Vec::new();
    for s in series {
        let subject = s.name.split(',').next().unwrap_or_default();
        let known = subjects.iter().position(|&other| other == subject).unwrap_or_else(|| {
            subjects.push(subject);
            subjects.len() - 1
        });
        let color = COLORS[known % COLORS.len()];
        let dots = s.points.iter().map(|p| Circle::new(*p, 4, color.filled()));
        let legend = move |(x, y)| Circle::new((x + 10, y), 4, color.filled());
        if s.dots {
            chart.draw_series(dots)?.label(&s.name).legend(legend);
        } else {
            chart
                .draw_series(LineSeries::new(s.points.iter().copied(), color.stroke_width(2)))?
                .label(&s.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        }
    }
    chart
        .configure_series_labels()
        .position(if falls(series) {
            SeriesLabelPosition::UpperRight
        } else {
            SeriesLabelPosition::UpperLeft
        })
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 15))
        .draw()?;
    area.present()?;
    Ok(())
}
