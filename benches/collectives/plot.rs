//! The results as curves: time over size, one panel a collective, one line an engine.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::report::Row;

const COLORS: [RGBColor; 7] = [
    RGBColor(214, 39, 40),
    RGBColor(127, 127, 127),
    RGBColor(140, 86, 75),
    RGBColor(31, 119, 180),
    RGBColor(23, 190, 207),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
];

pub(crate) fn write(path: &Path, rows: &[Row]) -> Result<(), String> {
    draw(path, rows).map_err(|e| format!("{}: {e}", path.display()))
}

fn draw(path: &Path, rows: &[Row]) -> Result<(), Box<dyn std::error::Error>> {
    let mut panels: Vec<(&str, &str, usize)> = Vec::new();
    for row in rows.iter().filter(|r| r.bytes > 0) {
        let panel = (row.collective, row.kind, row.world);
        if !panels.contains(&panel) {
            panels.push(panel);
        }
    }
    if panels.is_empty() {
        return Err("there is nothing to plot".into());
    }
    // A font of its own, so that a machine without any can draw.
    let _ = register_font("sans-serif", FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    let columns = panels.len().min(3);
    let lines = panels.len().div_ceil(columns);
    let root = SVGBackend::new(path, (460 * columns as u32, 320 * lines as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, (collective, kind, world)) in root.split_evenly((lines, columns)).iter().zip(panels) {
        let of_panel: Vec<&Row> = rows
            .iter()
            .filter(|r| (r.collective, r.kind, r.world) == (collective, kind, world) && r.bytes > 0)
            .collect();
        let x = of_panel.iter().map(|r| r.bytes as f64);
        let y = of_panel.iter().map(|r| r.median_us);
        let (x0, x1) = (x.clone().fold(f64::MAX, f64::min), x.fold(0.0, f64::max));
        let (y0, y1) = (y.clone().fold(f64::MAX, f64::min), y.fold(0.0, f64::max));
        let mut chart = ChartBuilder::on(area)
            .caption(format!("{collective}, {kind}, {world} ranks"), ("sans-serif", 16))
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(56)
            .build_cartesian_2d((x0 * 0.8..x1 * 1.25).log_scale(), (y0 * 0.7..y1 * 1.4).log_scale())?;
        chart.configure_mesh().x_desc("bytes").y_desc("microseconds").draw()?;
        let mut engines: Vec<(&str, &str)> = of_panel.iter().map(|r| (r.engine, r.transport)).collect();
        engines.dedup();
        engines.sort_unstable();
        engines.dedup();
        for (engine, color) in engines.into_iter().zip(COLORS) {
            let points: Vec<(f64, f64)> = of_panel
                .iter()
                .filter(|r| (r.engine, r.transport) == engine)
                .map(|r| (r.bytes as f64, r.median_us))
                .collect();
            chart
                .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
                .label(format!("{}/{}", engine.0, engine.1))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
            chart.draw_series(points.iter().map(|&p| Circle::new(p, 3, color.filled())))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .draw()?;
    }
    root.present()?;
    Ok(())
}
