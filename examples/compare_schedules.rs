//! GPipe, 1F1B or interleaved? The same model through a pipeline by each schedule, planned and measured:
//!
//! ```text
//! cargo run --release --example compare_schedules
//! ```
//!
//! prints for each schedule, as micro-batches grow, the bubble that its plan predicts and the one that was measured,
//! how many micro-batches a rank holds, and the peak memory of activations; and draws every step as a timeline and the
//! memory as a chart. Zero-bubble exists as a plan: its bubble is predicted. Each run is a world of processes.

#[path = "common/plot.rs"]
mod plot;

use std::error::Error;
use std::path::{Path, PathBuf};

use clap::Parser;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Reduction, Tensor, nn};
use tch_distributed as dist;
use tch_distributed::model_parallel::pipeline::{Costs, Pipeline, Plan, Schedule, Stage};

#[derive(Clone, Debug, Parser)]
struct Args {
    /// Ranks of the pipeline.
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// The most micro-batches; a quarter and a half of it are tried too. A multiple of four times the ranks.
    #[arg(long, default_value_t = 16)]
    micro_batches: usize,
    /// Layers on each rank; two stages share them where stages are interleaved.
    #[arg(long, default_value_t = 8)]
    layers: usize,
    #[arg(long, default_value_t = 256)]
    width: i64,
    /// Rows of a micro-batch.
    #[arg(long, default_value_t = 256)]
    rows: i64,
    #[arg(long, default_value = "target/compare_schedules")]
    out: PathBuf,
}

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// What a run showed, of the rank that has most of it where ranks differ.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Measured {
    bubble: f64,
    held: usize,
    planned_held: usize,
    /// Inputs and outputs of stages that are held, in MiB.
    held_mib: f64,
    /// By how much resident memory was larger at its peak than before the first step, in MiB.
    peak_mib: f64,
}

fn chunks(schedule: Schedule) -> usize {
    if schedule == Schedule::Interleaved { 2 } else { 1 }
}

/// What a rank does.
fn measure(args: &Args, schedule: Schedule, micro_batches: usize, file: &Path) -> Outcome {
    tch::set_num_threads(1);
    let group = dist::init_process_group("native", dist::InitOptions::new())?;
    let vs = nn::VarStore::new(Device::Cpu);
    let chunks = chunks(schedule);
    let stages = (0..chunks).map(|chunk| {
        let layers = (0..args.layers / chunks)
            .map(|layer| nn::linear(vs.root() / chunk / layer, args.width, args.width, Default::default()));
        Stage::new(layers.fold(nn::seq(), |net, layer| net.add(layer).add_fn(|x| x.gelu("none"))))
    });
    let pipeline = Pipeline::new(stages.collect(), micro_batches, schedule, &group)?.fixed_shapes(true);
    let xs = Tensor::ones([args.rows * micro_batches as i64, args.width], (Kind::Float, Device::Cpu));
    let step = || -> dist::Result<()> {
        vs.trainable_variables().iter_mut().for_each(Tensor::zero_grad);
        pipeline
            .step(Some(&xs), Some(&xs), |ys: &Tensor, ts: &Tensor| ys.mse_loss(ts, Reduction::Mean))
            .map(drop)
    };
    let before = memory("VmRSS:")?;
    for _ in 0..3 {
        step()?;
    }
    let stats = pipeline.last_step();
    let peak = memory("VmHWM:")? - before;
    let timeline = pipeline.measured()?;
    let plan = pipeline.plan();
    let own = (stats.peak_in_flight, stats.peak_held_bytes, peak.max(0.0));
    let all = group.all_gather_object(&own)?;
    if group.rank() == 0 {
        let most = |of: &dyn Fn(&(usize, usize, f64)) -> f64| all.iter().map(of).fold(0.0, f64::max);
        let measured = Measured {
            bubble: timeline.bubble_share(),
            held: most(&|a| a.0 as f64) as usize,
            planned_held: (0..plan.ranks()).map(|rank| plan.peak_in_flight(rank)).max().unwrap_or(0),
            held_mib: most(&|a| a.1 as f64) / f64::from(1 << 20),
            peak_mib: most(&|a| a.2),
        };
        std::fs::write(file, serde_json::to_vec(&measured)?)?;
        std::fs::write(args.out.join(format!("{schedule}_{micro_batches}.svg")), timeline.svg())?;
        std::fs::write(args.out.join(format!("{schedule}_{micro_batches}.txt")), timeline.to_string())?;
    }
    Ok(dist::destroy_process_group()?)
}

/// A line of this process's status, in MiB.
fn memory(name: &str) -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("0 kB");
    let kib: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib / 1024.0)
}

fn main() -> Outcome {
    let args = Args::parse();
    std::fs::create_dir_all(&args.out)?;
    let counts = [args.micro_batches / 4, args.micro_batches / 2, args.micro_batches];
    let mut rows = Vec::new();
    for schedule in Schedule::ALL {
        for count in counts {
            let plan = Plan::new(schedule, args.ranks, chunks(schedule), count)?;
            let predicted = schedule.predicted_bubble(args.ranks, chunks(schedule), count, &Costs::default());
            let measured = match schedule {
                Schedule::ZeroBubble => {
                    let drawn = plan.timeline(&Costs::default());
                    std::fs::write(args.out.join(format!("{schedule}_{count}.svg")), drawn.svg())?;
                    None
                }
                _ => {
                    let file = args.out.join("measured.json");
                    dist::launch::local(args.ranks, || measure(&args, schedule, count, &file))?;
                    Some(serde_json::from_slice::<Measured>(&std::fs::read(&file)?)?)
                }
            };
            rows.push((schedule, count, predicted, measured));
        }
    }
    // Behind the last launch: ranks never come here.
    println!("{:<26} | bubble of the step  | micro-batches    | memory of a rank", "");
    println!(
        "{:<12} {:>13} | {:>9} {:>9} | {:>7} {:>8} | {:>9} {:>9}",
        "schedule", "micro-batches", "predicted", "measured", "planned", "held", "held MiB", "peak MiB"
    );
    for (schedule, count, predicted, measured) in &rows {
        print!("{:<12} {count:>13} | {:>7.1} %", schedule.to_string(), predicted * 100.0);
        match measured {
            None => println!(" {:>9} | it exists as a plan", ""),
            Some(m) => {
                assert_eq!(m.held, m.planned_held, "a rank holds what the plan says");
                println!(
                    " {:>7.1} % | {:>7} {:>8} | {:>9.1} {:>9.1}",
                    m.bubble * 100.0,
                    m.planned_held,
                    m.held,
                    m.held_mib,
                    m.peak_mib
                );
            }
        }
    }
    println!("expected: gpipe holds all micro-batches, 1f1b at most as many as there are ranks");
    let mut series = Vec::new();
    for schedule in [Schedule::GPipe, Schedule::OneFOneB, Schedule::Interleaved] {
        let points = rows.iter().filter(|r| r.0 == schedule);
        let points = points.filter_map(|r| Some((r.1 as f64, r.3.as_ref()?.peak_mib))).collect();
        series.push(plot::Series::line(&schedule.to_string(), points));
    }
    let labels =
        plot::Labels { title: "Peak memory of activations", x: "micro-batches", y: "resident memory (MiB)" };
    let [svg, png] = plot::lines(&args.out.join("memory"), labels, &series)?;
    println!("pictures: {} and {}, timelines beside them", svg.display(), png.display());
    Ok(())
}
