//! Data, tensor or pipeline parallel? The same GPT on the same batches, each way, measured and predicted:
//!
//! ```text
//! cargo run --release --example compare_parallelism
//! ```
//!
//! prints for each way where the time of a step goes, how many bytes move and how much memory a rank needs, and draws
//! how the step grows with workers, with the batch and with the model, beside what the formulas of
//! [`tch_distributed::cost`] say. Each run is a world of processes of its own.

#[path = "common/gpt.rs"]
mod gpt;
#[path = "common/plot.rs"]
mod plot;

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::Parser;
use serde::{Deserialize, Serialize};
use tch::nn::{self, OptimizerConfig};
use tch::{Device, Tensor};
use tch_distributed as dist;
use tch_distributed::cost::{Link, Parallelism, StepTime, Workload, calibrate};
use tch_distributed::data_parallel::DdpOptions;
use tch_distributed::model_parallel::DeviceMesh;
use tch_distributed::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use tch_distributed::model_parallel::tensor::Layout;
use tch_distributed::profile::{ProfileOptions, Profiler, Report};

#[derive(Clone, Debug, Parser)]
struct Args {
    /// The most workers; powers of two up to it are tried.
    #[arg(long, default_value_t = 4)]
    workers: usize,
    /// Steps that are timed, after one that is not.
    #[arg(long, default_value_t = 4)]
    steps: usize,
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Only the workers' sweep.
    #[arg(long)]
    quick: bool,
    #[arg(long, default_value = "target/compare_parallelism")]
    out: PathBuf,
}

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const CONTEXT: i64 = 64;
const MICRO_BATCHES: usize = 4;

/// One run.
#[derive(Clone, Copy, Debug)]
struct Case {
    how: Parallelism,
    batch: i64,
    width: i64,
}

/// What one run showed; times are those of the slowest rank, in seconds a step.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Measured {
    step: f64,
    compute: f64,
    exposed: f64,
    /// The share of the ranks' time that the pipeline's measured timeline leaves empty.
    bubble: f64,
    /// Bytes that one rank gives to its operations or gets from them, in a step.
    bytes: f64,
    /// By how much the resident memory of a rank was larger at its peak than before there was a model, in MiB.
    memory: f64,
    /// Bytes of the whole model's gradients.
    gradients: usize,
    link: Option<(f64, f64, f64)>,
}

/// What a rank does: the model, cut as the case says, and some steps under the profiler.
fn measure(args: &Args, case: Case, file: &Path) -> Outcome {
    // One core a worker, also for the one that is alone: the formulas count cores.
    tch::set_num_threads(1);
    let world = dist::init_process_group("native", dist::InitOptions::new())?;
    let Parallelism { data, tensor, pipeline, .. } = case.how;
    let mesh = DeviceMesh::new(&world, &[("dp", data), ("pp", pipeline), ("tp", tensor)])?;
    let [dp, pp, tp] = [mesh.group("dp")?, mesh.group("pp")?, mesh.group("tp")?];
    let link = calibrate(&world)?.link;
    let text = gpt::Text::of_this_crate()?;
    let before = memory("VmRSS:")?;

    let config =
        gpt::Config { context: CONTEXT, width: case.width, layers: args.layers, ..Default::default() };
    let vs = nn::VarStore::new(Device::Cpu);
    let (part, _) = Layout::record(&tp, || gpt::Part::new(&vs.root(), config, pp.rank(), pipeline, &tp));
    let part = part?;
    let tied = part.tied();
    let pipe = Pipeline::new(vec![Stage::new_t(part)], MICRO_BATCHES, Schedule::OneFOneB, &pp)?
        .fixed_shapes(true)
        .data_parallel(&vs, &dp, DdpOptions::new())?;
    pipe.tie(&[0, pipeline - 1], tied.as_ref())?;
    let mut optimizer = nn::AdamW::default().build(&vs, 1e-3)?;
    let rows = case.batch / data as i64;

    let mut step = |number: usize| -> dist::Result<()> {
        let (xs, targets) = text.batch(number, case.batch, CONTEXT);
        let own = |t: &Tensor| t.narrow(0, dp.rank() as i64 * rows, rows);
        optimizer.zero_grad();
        pipe.step(Some(&own(&xs)), Some(&own(&targets)), |ys, ts| gpt::loss(ys, ts, &tp))?;
        optimizer.step();
        Ok(())
    };
    step(0)?;
    world.barrier()?;
    let profiler = Profiler::new(&world, ProfileOptions::new().enabled(true))?;
    for number in 0..args.steps {
        profiler.step(|| step(number))?;
    }
    let report = profiler.finish()?;
    let bubble = pipe.measured()?.bubble_share();
    let mine: i64 = vs.trainable_variables().iter().map(|t| t.numel() as i64).sum();
    let all = world.all_gather_object(&((memory("VmHWM:")? - before).max(0.0), bubble, mine))?;
    if let Some(report) = report.filter(|_| world.rank() == 0) {
        let mut measured = summary(&report, args.steps);
        measured.memory = all.iter().map(|a| a.0).fold(0.0, f64::max);
        measured.bubble = if pipeline > 1 { all.iter().map(|a| a.1).fold(0.0, f64::max) } else { 0.0 };
        measured.gradients = all.iter().map(|a| a.2 as usize * 4).sum::<usize>() / data;
        // JSON has no infinity, and a fit may find one.
        let finite = |x: f64| x.min(f64::MAX);
        let parts = (link.latency, finite(link.bandwidth), finite(link.combine));
        measured.link = (world.size() > 1).then_some(parts);
        std::fs::write(file, serde_json::to_vec(&measured)?)?;
    }
    Ok(dist::destroy_process_group()?)
}

fn summary(report: &Report, steps: usize) -> Measured {
    let slowest = |of: fn(&dist::profile::RankReport) -> f64| {
        report.ranks.iter().map(of).fold(0.0, f64::max) / steps as f64
    };
    let moved: u64 = report.activities.iter().map(|a| a.bytes).sum();
    Measured {
        step: slowest(|r| r.wall),
        compute: slowest(|r| r.compute),
        exposed: slowest(|r| r.exposed),
        bytes: moved as f64 / (report.ranks.len() * steps) as f64,
        ..Default::default()
    }
}

/// A line of this process's status, in MiB.
fn memory(name: &str) -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("0 kB");
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}

/// Runs a case in a world of processes.
fn run(args: &Args, case: Case) -> Outcome<Measured> {
    let file = args.out.join("measured.json");
    dist::launch::local(case.how.workers(), || measure(args, case, &file))?;
    Ok(serde_json::from_slice(&std::fs::read(&file)?)?)
}

/// The ways to use `n` workers.
fn ways(n: usize) -> Vec<(&'static str, Parallelism)> {
    let mut ways = vec![
        ("data", Parallelism::data(n)),
        ("tensor", Parallelism::tensor(n)),
        ("pipeline", Parallelism::pipeline(n, MICRO_BATCHES)),
    ];
    if n >= 4 {
        let combined = Parallelism { data: n / 4, tensor: 2, pipeline: 2, micro_batches: MICRO_BATCHES };
        ways.push(("combined", combined));
    }
    for (_, way) in &mut ways {
        way.micro_batches = MICRO_BATCHES;
    }
    ways
}

/// What the formulas say.
struct Predicted {
    time: StepTime,
    bytes: f64,
    memory: f64,
}

/// From one worker's measured step and the measured link.
fn predict(args: &Args, case: Case, alone: &Measured, link: &Link) -> dist::Result<Predicted> {
    let activations = (case.batch * CONTEXT * case.width * 4) as usize;
    let workload = Workload {
        compute: alone.step,
        fixed: 0.0,
        gradient_bytes: alone.gradients,
        activation_bytes: activations,
        layers: args.layers,
        cores: std::thread::available_parallelism().map_or(1, Into::into),
        contention: 1.0,
    };
    let time = workload.predict(case.how, link)?;
    let Parallelism { data, tensor, pipeline, micro_batches } = case.how;
    let [data, tensor, stages, parts] = [data, tensor, pipeline, micro_batches].map(|n| n as f64);
    let (layers, activations) = (args.layers as f64, activations as f64);
    let weights = alone.gradients as f64 / (tensor * stages);
    // Gradients go round the copies; each layer sums activations four times over its ranks; and activations go to the
    // next stage and gradients back, on the average rank of a pipeline with two ends.
    let mut bytes = 4.0 * activations / data * (stages - 1.0) / stages;
    bytes += if data > 1.0 { weights } else { 0.0 };
    bytes += if tensor > 1.0 { 4.0 * layers / stages * activations / data } else { 0.0 };
    // Weights, gradients and two moments of Adam; and what forward keeps for backward, of as many micro-batches as a
    // stage has in flight: 17 times its activations in a layer, of which 5 are not split over ranks.
    let kept = activations / data / parts * stages.min(parts) * layers / stages * (5.0 + 12.0 / tensor);
    Ok(Predicted { time, bytes, memory: (4.0 * weights + kept) / f64::from(1 << 20) })
}

/// One row: a way, the place on the sweep's axis, what was measured and predicted.
struct Row {
    way: &'static str,
    at: f64,
    measured: Measured,
    predicted: Predicted,
}

fn print(title: &str, at: &str, rows: &[Row]) {
    println!("\n{title}: measured, predicted");
    println!(
        "{:<9} {at:>8} | {:^15} | {:^15} | {:^15} | {:^15} | {:^15} | {:^15}",
        "way", "step (ms)", "compute (ms)", "exposed (ms)", "bubble (%)", "moved (MB)", "memory (MiB)"
    );
    for row in rows {
        print!("{:<9} {:>8}", row.way, row.at);
        for chart in &CHARTS {
            print!(" | {:>7.1} {:>7.1}", (chart.measured)(row), (chart.predicted)(row));
        }
        println!();
    }
}

/// One chart: its file, title and axis, and what is drawn of a row.
struct Chart {
    file: &'static str,
    title: &'static str,
    y: &'static str,
    measured: fn(&Row) -> f64,
    predicted: fn(&Row) -> f64,
}

const CHARTS: [Chart; 6] = [
    Chart {
        file: "time",
        title: "Time of a step",
        y: "time (ms)",
        measured: |r| r.measured.step * 1e3,
        predicted: |r| r.predicted.time.total() * 1e3,
    },
    Chart {
        file: "compute",
        title: "Computing in a step",
        y: "time (ms)",
        measured: |r| r.measured.compute * 1e3,
        predicted: |r| r.predicted.time.compute * 1e3,
    },
    Chart {
        file: "exposed",
        title: "Communication in a step that computing does not hide",
        y: "time (ms)",
        measured: |r| r.measured.exposed * 1e3,
        predicted: |r| r.predicted.time.exposed * 1e3,
    },
    Chart {
        file: "bubble",
        title: "Bubble of the pipeline",
        y: "share of a step (%)",
        measured: |r| r.measured.bubble * 100.0,
        predicted: |r| 100.0 * r.predicted.time.bubble / r.predicted.time.total(),
    },
    Chart {
        file: "bytes",
        title: "What a rank moves in a step",
        y: "traffic (MB)",
        measured: |r| r.measured.bytes / 1e6,
        predicted: |r| r.predicted.bytes / 1e6,
    },
    Chart {
        file: "memory",
        title: "Memory for training on a rank, at its peak",
        y: "memory (MiB)",
        measured: |r| r.measured.memory,
        predicted: |r| r.predicted.memory,
    },
];

/// Measured dots and predicted lines of every way.
fn draw(args: &Args, stem: &str, x: &str, rows: &[Row]) -> Outcome {
    for chart in &CHARTS {
        let mut series = Vec::new();
        for (color, way) in ["data", "tensor", "pipeline", "combined"].into_iter().enumerate() {
            let has_bubble = chart.file != "bubble" || ["pipeline", "combined"].contains(&way);
            if !has_bubble || rows.iter().all(|r| r.way != way) {
                continue;
            }
            let points = |of: fn(&Row) -> f64| -> Vec<(f64, f64)> {
                rows.iter().filter(|r| r.way == way || r.way == "alone").map(|r| (r.at, of(r))).collect()
            };
            let color = Some(color);
            let dots = plot::Series::dots(&format!("{way}, measured"), points(chart.measured));
            let line = plot::Series::line(&format!("{way}, predicted"), points(chart.predicted));
            series.extend([plot::Series { color, ..dots }, plot::Series { color, ..line }]);
        }
        let labels = plot::Labels { title: chart.title, x, y: chart.y };
        plot::lines(&args.out.join(format!("{stem}_{}", chart.file)), labels, &series)?;
    }
    println!("drawn: {}_*.svg and .png", args.out.join(stem).display());
    Ok(())
}

fn main() -> Outcome {
    let args = Args::parse();
    std::fs::create_dir_all(&args.out)?;
    let base = Case { how: Parallelism::data(1), batch: 32, width: 64 };
    let mut link = Link { latency: 0.0, bandwidth: f64::INFINITY, combine: f64::INFINITY };

    let mut done = Vec::new();
    let mut sweep = |title: &str, axis: &str, stem: &str, cases: Vec<(f64, Vec<usize>, Case)>| -> Outcome {
        let mut rows = Vec::new();
        for (at, workers, case) in cases {
            let alone = run(&args, Case { how: Parallelism::data(1), ..case })?;
            for n in workers {
                for (way, how) in ways(n) {
                    let case = Case { how, ..case };
                    let measured = run(&args, case)?;
                    if let Some((latency, bandwidth, combine)) = measured.link {
                        link = Link { latency, bandwidth, combine };
                    }
                    let at = if at == 0.0 { n as f64 } else { at };
                    let predicted = predict(&args, case, &alone, &link)?;
                    rows.push(Row { way, at, measured, predicted });
                }
            }
            if at == 0.0 {
                let predicted = predict(&args, case, &alone, &link)?;
                rows.insert(0, Row { way: "alone", at: 1.0, measured: alone, predicted });
            }
        }
        done.push((title.to_owned(), axis.to_owned(), stem.to_owned(), rows));
        Ok(())
    };

    let counts = (1..).map(|i| 1 << i).take_while(|&n| n <= args.workers).collect();
    sweep("More workers, the same work", "workers", "workers", vec![(0.0, counts, base)])?;
    if !args.quick {
        let n = vec![args.workers];
        let batches = [16, 32, 64].map(|batch| (batch as f64, n.clone(), Case { batch, ..base }));
        sweep("Larger batches", "batch (sequences)", "batch", batches.to_vec())?;
        let widths = [32, 64, 128].map(|width| (width as f64, n.clone(), Case { width, ..base }));
        sweep("A larger model", "width (features)", "width", widths.to_vec())?;
    }
    // Behind the last launch: ranks never come here.
    for (title, axis, stem, rows) in &done {
        print(title, stem, rows);
        draw(&args, stem, axis, rows)?;
    }
    Ok(())
}
