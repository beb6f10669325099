//! The results, as a table and as JSON.

use std::path::Path;

use serde_json::json;

use super::cases::{Case, kind_name};
use super::crew::Engine;

#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) collective: &'static str,
    pub(crate) bytes: usize,
    pub(crate) count: usize,
    pub(crate) kind: &'static str,
    pub(crate) world: usize,
    pub(crate) engine: &'static str,
    pub(crate) transport: &'static str,
    pub(crate) median_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) algbw_gbs: f64,
    pub(crate) busbw_gbs: f64,
    /// How many times faster than Gloo in the same rounds; `None` without Gloo.
    pub(crate) ratio_gloo: Option<f64>,
    /// How many times the floor of the same rounds.
    pub(crate) ratio_floor: f64,
    /// How many times the staged model of the same rounds; in the table only.
    pub(crate) ratio_model: Option<f64>,
    /// How much of the loopback's raw rate in the same rounds; in the table only.
    pub(crate) ratio_wire: Option<f64>,
    pub(crate) wrong: u64,
}

impl Row {
    pub(crate) fn new(
        case: &Case,
        world: usize,
        engine: Engine,
        median_us: f64,
        p99_us: f64,
        ratio_floor: f64,
        wrong: u64,
    ) -> Self {
        let (engine, transport) = engine.names();
        let algbw_gbs = case.bytes as f64 / median_us / 1000.0;
        Self {
            collective: case.collective.name(),
            bytes: case.bytes,
            count: case.count(),
            kind: kind_name(case.kind),
            world,
            engine,
            transport,
            median_us,
            p99_us,
            algbw_gbs,
            busbw_gbs: algbw_gbs * case.collective.bus_factor(world),
            ratio_gloo: None,
            ratio_floor,
            ratio_model: None,
            ratio_wire: None,
            wrong,
        }
    }
}

impl Row {
    /// A step of training; `ratio_floor` is over stepping alone at the same time (for tensor-parallel layers: and
    /// then doing the collectives).
    pub(crate) fn training(model: &str, world: usize, engine: Engine, bytes: usize, steps: &Steps) -> Self {
        let (engine, transport) = engine.names();
        let median_us = median(&steps.medians);
        let algbw_gbs = bytes as f64 / median_us / 1000.0;
        Self {
            collective: match model {
                "mlp_25m" => "ddp_mlp_25m",
                "gpt_10m" => "ddp_gpt_10m",
                _ => "tp_mlp",
            },
            bytes,
            count: bytes / 4,
            kind: "f32",
            world,
            engine,
            transport,
            median_us,
            p99_us: percentile(&steps.all, 0.99),
            algbw_gbs,
            busbw_gbs: algbw_gbs * 2.0 * (world as f64 - 1.0) / world as f64,
            ratio_gloo: steps.over_gloo,
            ratio_floor: median(&steps.over_alone),
            ratio_model: None,
            ratio_wire: None,
            wrong: steps.wrong,
        }
    }
}

/// What was measured of training on one engine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps {
    /// The medians of the rounds, in microseconds.
    pub(crate) medians: Vec<f64>,
    pub(crate) all: Vec<f64>,
    pub(crate) over_alone: Vec<f64>,
    pub(crate) over_gloo: Option<f64>,
    pub(crate) wrong: u64,
}

pub(crate) fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// The value below which that part of them lies; 0 where there are none.
pub(crate) fn percentile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() as f64 * part) as usize;
    sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

pub(crate) fn print(rows: &[Row]) {
    println!(
        "{:<14} {:>10} {:>10} {:>5} {:>5} {:<20} {:>11} {:>11} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7} {:>5}",
        "collective",
        "bytes",
        "count",
        "kind",
        "ranks",
        "engine",
        "median us",
        "p99 us",
        "alg GB/s",
        "bus GB/s",
        "x gloo",
        "/ floor",
        "/ model",
        "of wire",
        "wrong"
    );
    let mut before = None;
    for row in rows {
        let this = (row.collective, row.bytes, row.kind, row.world);
        if before.is_some_and(|before| before != this) {
            println!();
        }
        before = Some(this);
        let gloo = row.ratio_gloo.map_or_else(|| "-".to_owned(), |r| format!("{r:.1}"));
        let model = row.ratio_model.map_or_else(|| "-".to_owned(), |r| format!("{r:.2}"));
        let wire = row.ratio_wire.map_or_else(|| "-".to_owned(), |r| format!("{r:.2}"));
        println!(
            "{:<14} {:>10} {:>10} {:>5} {:>5} {:<20} {:>11.2} {:>11.2} {:>8.2} {:>8.2} {:>7} {:>7.2} {:>7} {:>7} {:>5}",
            row.collective,
            row.bytes,
            row.count,
            row.kind,
            row.world,
            format!("{}/{}", row.engine, row.transport),
            row.median_us,
            row.p99_us,
            row.algbw_gbs,
            row.busbw_gbs,
            gloo,
            row.ratio_floor,
            model,
            wire,
            row.wrong,
        );
    }
}

pub(crate) fn write_json(path: &Path, rows: &[Row]) -> Result<(), String> {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            json!({
                "collective": row.collective,
                "bytes": row.bytes,
                "kind": row.kind,
                "world": row.world,
                "engine": row.engine,
                "transport": row.transport,
                "median_us": row.median_us,
                "p99_us": row.p99_us,
                "algbw_gbs": row.algbw_gbs,
                "busbw_gbs": row.busbw_gbs,
                "ratio_gloo": row.ratio_gloo,
                "ratio_floor": row.ratio_floor,
                "wrong": row.wrong,
            })
        })
        .collect();
    let text = serde_json::to_string_pretty(&rows).map_err(|e| e.to_string())?;
    std::fs::write(path, text + "\n").map_err(|e| format!("{}: {e}", path.display()))
}
