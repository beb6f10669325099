//! Preprocess, train, evaluate each batch, then aggregate: one process, then several, the same figures.
//!
//! Each batch of digits trains a small classifier of its own and is judged on held-out digits; accuracy,
//! loss and confusion matrix of all of them are aggregated. Spread over ranks, each does its share of the
//! batches, and the aggregated metrics are the same to the last bit, because they reduce exactly.
//!
//! `cargo run --release --example aggregate_metrics -- --nproc 2`

#[path = "common/digits.rs"]
mod digits;
#[path = "common/plot.rs"]
mod plot;

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use tch::nn::init::Init;
use tch::nn::{Module, OptimizerConfig};
use tch::{Device, Kind, Tensor, nn};
use tch_distributed as dist;
use tch_distributed::metrics::{Accuracy, ConfusionMatrix, Mean, Metric};

#[derive(Parser)]
struct Args {
    /// How many processes share the batches.
    #[arg(long, default_value_t = 2)]
    nproc: usize,
    /// The largest number of batches; a quarter and a half of it run before.
    #[arg(long, default_value_t = 16)]
    batches: usize,
    /// Where the picture goes.
    #[arg(long, default_value = "target/aggregate_metrics")]
    out: PathBuf,
}

/// What all batches together say. Any serde value can be a metric: it only has to know how to merge.
#[derive(Clone, PartialEq, serde::Serialize, serde::Deserialize)]
struct Results {
    accuracy: Accuracy,
    loss: Mean,
    confusion: ConfusionMatrix,
    batches: u64,
}

impl Metric for Results {
    fn merge(&mut self, other: &Self) -> dist::Result<()> {
        self.accuracy.merge(&other.accuracy)?;
        self.loss.merge(&other.loss)?;
        self.confusion.merge(&other.confusion)?;
        self.batches += other.batches;
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    dist::launch::local(args.nproc, || run(&args).map_err(|e| e.to_string()))?;
    Ok(())
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let group = dist::init_process_group("native", dist::InitOptions::new())?;
    let data = digits::load()?;
    let (mut sequential, mut parallel) = (Vec::new(), Vec::new());
    process(&data, 1, 0, 1)?; // the first one warms up
    if group.rank() == 0 {
        println!(
            "{:>8} {:>6} {:>15} {:>9} {:>9} {:>10}",
            "batches", "ranks", "batches a rank", "expected", "seconds", "accuracy"
        );
    }
    for batches in [args.batches / 4, args.batches / 2, args.batches] {
        // One process does every batch. (All ranks do, so that the clock sees the same machine.)
        let start = Instant::now();
        let whole = process(&data, batches, 0, 1)?;
        let alone = start.elapsed().as_secs_f64();

        // Each rank does its share, then the results are aggregated.
        group.barrier()?;
        let start = Instant::now();
        let own = process(&data, batches, group.rank(), group.size())?;
        let all = own.reduce(&group)?;
        let together = start.elapsed().as_secs_f64();

        assert!(all == whole, "the aggregated metrics differ from those of one process");
        assert_eq!(whole.batches, batches as u64, "one process does every batch");
        assert!(own.batches <= batches.div_ceil(group.size()) as u64, "a rank does its share and no more");
        sequential.push((batches as f64, alone));
        parallel.push((batches as f64, together));
        if group.rank() == 0 {
            let accuracy = all.accuracy.value().unwrap_or(0.0);
            for (ranks, each, seconds) in [(1, whole.batches, alone), (group.size(), own.batches, together)] {
                let expected = batches.div_ceil(ranks);
                println!(
                    "{batches:>8} {ranks:>6} {each:>15} {expected:>9} {seconds:>9.3} {:>8.2} %",
                    100.0 * accuracy
                );
            }
        }
    }
    if group.rank() == 0 {
        println!("expected: time grows as batches on one process, as batches / ranks on several");
        let n = group.size();
        let labels = plot::Labels { title: "Time against batches", x: "batches", y: "time (s)" };
        // As the largest run of one process says, and as many ranks share it.
        let (most, longest) = sequential.last().copied().unwrap_or((1.0, 0.0));
        let expected = |ranks: usize| -> Vec<(f64, f64)> {
            let share = |batches: f64| (batches / ranks as f64).ceil() * longest / most;
            sequential.iter().map(|&(batches, _)| (batches, share(batches))).collect()
        };
        let series = [
            plot::Series::line("1 process, expected", expected(1)),
            plot::Series::dots("1 process, measured", sequential.clone()),
            plot::Series::line(&format!("{n} processes, expected"), expected(n)),
            plot::Series::dots(&format!("{n} processes, measured"), parallel),
        ];
        let [svg, png] = plot::lines(&args.out, labels, &series)?;
        println!("picture: {} and {}", svg.display(), png.display());
    }
    dist::destroy_process_group()?;
    Ok(())
}

/// Does the batches `first, first + step, …` and gives what they say.
fn process(
    data: &digits::Digits,
    batches: usize,
    first: usize,
    step: usize,
) -> Result<Results, Box<dyn Error>> {
    let (train, held_out) = data.split();
    let mut results = Results {
        accuracy: Accuracy::new(),
        loss: Mean::new(),
        confusion: ConfusionMatrix::new(10),
        batches: 0,
    };
    let size = train.len() / batches as i64;
    for batch in (first..batches).step_by(step) {
        // Preprocess: this batch's digits, centred.
        let images = train.images.narrow(0, batch as i64 * size, size).flatten(1, -1);
        let labels = train.labels.narrow(0, batch as i64 * size, size);
        let mean = images.mean(Kind::Float);

        // Train a classifier of its own, from weights that every process makes alike.
        let vs = nn::VarStore::new(Device::Cpu);
        let model = nn::linear(
            vs.root(),
            64,
            10,
            nn::LinearConfig {
                ws_init: Init::Const(0.0),
                bs_init: Some(Init::Const(0.0)),
                ..Default::default()
            },
        );
        let mut optimizer = nn::Adam::default().build(&vs, 0.05)?;
        for _ in 0..60 {
            let loss = model.forward(&(&images - &mean)).cross_entropy_for_logits(&labels);
            optimizer.zero_grad();
            dist::autograd::backward(&loss)?;
            optimizer.step();
        }

        // Evaluate on digits that nobody trains on.
        let _guard = tch::no_grad_guard();
        let logits: Tensor = model.forward(&(held_out.images.flatten(1, -1) - &mean));
        let loss = logits.cross_entropy_for_logits(&held_out.labels).double_value(&[]);
        results.accuracy.update(&logits, &held_out.labels)?;
        results.confusion.update(&logits, &held_out.labels)?;
        results.loss.update_weighted(loss, held_out.len() as f64);
        results.batches += 1;
    }
    Ok(results)
}
