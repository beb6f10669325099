//! The loop behind all data parallelism, by hand: hand each worker a batch, train, gather the results, update the
//! model. (`DistributedDataParallel` does this while backward runs.)
//!
//! How many steps does a pass over the data take? With `b` batches and `w` workers, `b / w` rounded up: it grows as
//! the batches, and shrinks as the workers. Both are counted here, printed beside the expected number, and drawn.
//!
//! `cargo run --release --example train_gather_update -- --nproc 4`

#[path = "common/plot.rs"]
mod plot;

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use tch::{Device, Kind, Tensor};
use tch_distributed::{self as dist, ProcessGroup};

#[derive(Parser)]
struct Args {
    /// The largest number of workers; every smaller one is tried too.
    #[arg(long, default_value_t = 4)]
    nproc: usize,
    /// The largest number of batches; a quarter, a half and three quarters of it are tried too.
    #[arg(long, default_value_t = 32)]
    batches: usize,
    /// Passes over the batches.
    #[arg(long, default_value_t = 12)]
    epochs: usize,
    /// Where the pictures go.
    #[arg(long, default_value = "target/train_gather_update")]
    out: PathBuf,
}

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const ROWS: i64 = 64;

/// What a worker has done in one pass.
#[derive(Default)]
struct Work {
    steps: usize,
    trained: usize,
}

/// One pass over the batches, which rank 0 has.
fn pass(group: &ProcessGroup, data: &[Tensor], weight: &mut Tensor, batches: usize) -> dist::Result<Work> {
    let options = (Kind::Float, Device::Cpu);
    let mut work = Work::default();
    for first in (0..batches).step_by(group.size()) {
        // Distribute: one batch to each worker, as long as there are some.
        let has = first + group.rank() < batches;
        let nothing = || Tensor::zeros([ROWS, 2], options);
        let deal = |worker: usize| data.get(first + worker).map_or_else(nothing, Tensor::shallow_clone);
        let dealt: Option<Vec<_>> = (group.rank() == 0).then(|| (0..group.size()).map(deal).collect());
        let mut batch = nothing();
        group.scatter(&mut batch, dealt.as_deref(), 0)?;

        // Train: the gradient of the mean squared error of `y = weight * x`, and how many batches it is of.
        let (x, y) = (batch.select(1, 0), batch.select(1, 1));
        let gradient = ((&x * &*weight - y) * x).mean(Kind::Float) * 2.0;
        let mine = Tensor::stack(&[gradient, Tensor::from(f32::from(u8::from(has)))], 0);
        work.trained += usize::from(has);

        // Gather, and update the same way everywhere.
        let mut all: Vec<Tensor> = (0..group.size()).map(|_| mine.zeros_like()).collect();
        group.all_gather(&mut all, &mine)?;
        let sum = Tensor::stack(&all, 0).sum_dim_intlist([0_i64].as_slice(), false, Kind::Float);
        *weight -= sum.get(0) / sum.get(1) * 0.5;
        work.steps += 1;
    }
    Ok(work)
}

fn run(args: &Args) -> Outcome {
    let world = dist::init_process_group("native", dist::InitOptions::new())?;
    let quarters: Vec<usize> = (1..=4).map(|q| (args.batches * q / 4).max(1)).collect();
    let (mut measured, mut expected) = (Vec::new(), Vec::new());
    if world.rank() == 0 {
        println!(
            "{:>8} {:>8} {:>6} {:>9} {:>12} {:>8}",
            "workers", "batches", "steps", "expected", "ms a pass", "weight"
        );
    }
    for workers in 1..=world.size() {
        let Some(group) = dist::new_group(&(0..workers).collect::<Vec<_>>())? else { continue };
        for &batches in &quarters {
            // Rank 0 has the data: y = 3 x.
            let x = |b: usize| (Tensor::arange(ROWS, (Kind::Float, Device::Cpu)) * 0.37 + b as f64).sin();
            let data: Vec<_> = match group.rank() {
                0 => (0..batches).map(|b| Tensor::stack(&[x(b), x(b) * 3.0], 1)).collect(),
                _ => Vec::new(),
            };
            let mut weight = Tensor::from(0f32);
            let start = Instant::now();
            let mut work = Work::default();
            for _ in 0..args.epochs {
                work = pass(&group, &data, &mut weight, batches)?;
            }
            let time = start.elapsed().as_secs_f64() * 1e3 / args.epochs as f64;
            let steps = batches.div_ceil(workers);
            assert_eq!(work.steps, steps, "a pass takes as many steps as batches / workers, rounded up");
            assert!(work.trained <= steps, "a worker trains its share and no more");
            if group.rank() == 0 {
                let weight = weight.double_value(&[]);
                println!("{workers:>8} {batches:>8} {:>6} {steps:>9} {time:>12.3} {weight:>8.3}", work.steps);
            }
            measured.push((workers, batches, work.steps as f64));
            expected.push((workers, batches, steps as f64));
            if workers == world.size() && batches == args.batches {
                println!("rank {}: the weight is {:.3}", group.rank(), weight.double_value(&[]));
            }
        }
    }
    if world.rank() == 0 {
        println!("expected: steps grow as batches, and shrink as 1 / workers");
        draw(args, &quarters, world.size(), &measured, &expected)?;
    }
    Ok(dist::destroy_process_group()?)
}

type Points = [(usize, usize, f64)];

/// Steps against batches for some workers, and against workers for all batches.
fn draw(args: &Args, quarters: &[usize], most: usize, measured: &Points, expected: &Points) -> Outcome {
    let batches = |points: &Points, w: usize| -> Vec<(f64, f64)> {
        points.iter().filter(|p| p.0 == w).map(|p| (p.1 as f64, p.2)).collect()
    };
    let workers = |points: &Points, b: usize| -> Vec<(f64, f64)> {
        points.iter().filter(|p| p.1 == b).map(|p| (p.0 as f64, p.2)).collect()
    };
    let mut series = Vec::new();
    for w in (1..=most).filter(|w| w.is_power_of_two()) {
        series.push(plot::Series::line(&format!("{w} workers, expected"), batches(expected, w)));
        series.push(plot::Series::dots(&format!("{w} workers, counted"), batches(measured, w)));
    }
    let labels = plot::Labels { title: "Steps of a pass against batches", x: "batches", y: "steps" };
    let [one, _] = plot::lines(&args.out.with_file_name(stem(args, "batches")), labels, &series)?;
    let mut series = Vec::new();
    for &b in quarters {
        series.push(plot::Series::line(&format!("{b} batches, expected"), workers(expected, b)));
        series.push(plot::Series::dots(&format!("{b} batches, counted"), workers(measured, b)));
    }
    let labels = plot::Labels { title: "Steps of a pass against workers", x: "workers", y: "steps" };
    let [two, _] = plot::lines(&args.out.with_file_name(stem(args, "workers")), labels, &series)?;
    println!("pictures: {} and {}", one.display(), two.display());
    Ok(())
}

fn stem(args: &Args, against: &str) -> String {
    let name = args.out.file_name().unwrap_or_default().to_string_lossy();
    format!("{name}_{against}")
}

fn main() -> Outcome {
    let args = Args::parse();
    Ok(dist::launch::local(args.nproc, || run(&args).map_err(|e| e.to_string()))?)
}
