//! How far does adding workers help? Measured, predicted, and where the time goes.
//!
//! Trains one model data-parallel on 1 … N workers, the same batch in all, and beside it fits the cost
//! model ([`dist::cost`]) from a short calibration; both are interleaved in rounds, because the machine
//! changes its mind. Prints measured and predicted step time, speed-up and efficiency, and the number of
//! workers past which one more makes the step longer.
//!
//! `cargo run --release --example scaling_report -- --nproc 2`

#[path = "common/plot.rs"]
mod plot;

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use dist::cost::{Calibration, Parallelism, Workload, calibrate};
use dist::data_parallel::{DdpOptions, DistributedDataParallel};
use tch::nn::{Module, OptimizerConfig};
use tch::{Device, Kind, Tensor, nn};
use tch_distributed as dist;

#[derive(Parser)]
struct Args {
    /// The largest number of workers; as many as there are cores where not given.
    #[arg(long)]
    nproc: Option<usize>,
    /// How many times everything is measured.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Training steps each time.
    #[arg(long, default_value_t = 4)]
    steps: usize,
    /// The width of the model's four layers.
    #[arg(long, default_value_t = 512)]
    width: i64,
    /// Rows of the batch that all workers share.
    #[arg(long, default_value_t = 960)]
    batch: i64,
    /// Predict up to so many workers.
    #[arg(long, default_value_t = 16)]
    predict: usize,
    /// Where the pictures go.
    #[arg(long, default_value = "target/scaling_report")]
    out: PathBuf,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let cores = std::thread::available_parallelism()?.get();
    let workers = args.nproc.unwrap_or(cores).max(1);
    dist::launch::local(workers, || run(&args, cores).map_err(|e| e.to_string()))?;
    Ok(())
}

/// Seconds, one for each round.
#[derive(Clone, Default)]
struct Times(Vec<f64>);

impl Times {
    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

struct Trainer {
    vs: nn::VarStore,
    optimizer: nn::Optimizer,
    x: Tensor,
    y: Tensor,
}

impl Trainer {
    fn new(width: i64, rows: i64) -> Result<(Self, nn::Sequential), Box<dyn Error>> {
        let vs = nn::VarStore::new(Device::Cpu);
        let mut net = nn::seq();
        for layer in 0..4 {
            net =
                net.add(nn::linear(vs.root() / layer, width, width, Default::default())).add_fn(|x| x.relu());
        }
        let optimizer = nn::Sgd::default().build(&vs, 1e-3)?;
        let options = (Kind::Float, Device::Cpu);
        let (x, y) = (Tensor::randn([rows, width], options), Tensor::randn([rows, width], options));
        Ok((Self { vs, optimizer, x, y }, net))
    }

    /// Seconds a step of `steps`, forward and backward apart from the whole step.
    fn time(
        &mut self,
        steps: usize,
        mut loss: impl FnMut(&Tensor, &Tensor) -> dist::Result<Tensor>,
        mut backward: impl FnMut(&Tensor) -> dist::Result<()>,
    ) -> Result<f64, Box<dyn Error>> {
        let mut times = Vec::new();
        for step in 0..=steps {
            let start = Instant::now();
            let loss = loss(&self.x, &self.y)?;
            self.optimizer.zero_grad();
            backward(&loss)?;
            self.optimizer.step();
            if step > 0 {
                times.push(start.elapsed().as_secs_f64()); // the first warms up
            }
        }
        Ok(Times(times).median())
    }

    fn alone(width: i64, rows: i64, steps: usize) -> Result<f64, Box<dyn Error>> {
        let (mut trainer, net) = Self::new(width, rows)?;
        trainer.time(
            steps,
            |x, y| Ok(net.forward(x).mse_loss(y, tch::Reduction::Mean)),
            dist::autograd::backward,
        )
    }

    fn data_parallel(
        group: &dist::ProcessGroup,
        width: i64,
        rows: i64,
        steps: usize,
    ) -> Result<f64, Box<dyn Error>> {
        let (mut trainer, net) = Self::new(width, rows)?;
        let ddp = DistributedDataParallel::new(net, &trainer.vs, group, DdpOptions::new())?;
        trainer.time(
            steps,
            |x, y| Ok(ddp.forward(x)?.mse_loss(y, tch::Reduction::Mean)),
            |loss| ddp.backward(loss),
        )
    }
}

fn run(args: &Args, cores: usize) -> Result<(), Box<dyn Error>> {
    let world = dist::init_process_group("native", dist::InitOptions::new())?;
    let workers = world.size();
    let groups =
        (1..=workers).map(|n| dist::new_group(&(0..n).collect::<Vec<_>>())).collect::<Result<Vec<_>, _>>()?;
    let smallest = (args.batch / workers as i64).max(1);

    let (mut whole, mut small, mut busy) = (Times::default(), Times::default(), Times::default());
    let mut measured = vec![Times::default(); workers];
    let mut calibration: Option<Calibration> = None;
    for _ in 0..args.rounds {
        match &mut calibration {
            None => calibration = Some(calibrate(&world)?),
            Some(calibration) => calibration.extend(calibrate(&world)?.samples)?,
        }
        if world.rank() == 0 {
            whole.0.push(Trainer::alone(args.width, args.batch, args.steps)?);
            small.0.push(Trainer::alone(args.width, smallest, args.steps)?);
        }
        world.barrier()?;
        // As many as there are cores train at once, each alone: what sharing the memory costs.
        if world.rank() < cores {
            busy.0.push(Trainer::alone(args.width, args.batch, args.steps)?);
        }
        for (n, group) in groups.iter().enumerate() {
            world.barrier()?;
            if let Some(group) = group {
                let rows = args.batch / (n as i64 + 1);
                measured[n].0.push(Trainer::data_parallel(group, args.width, rows, args.steps)?);
            }
        }
        world.barrier()?;
    }
    let calibration = calibration.ok_or("at least one round is needed")?;
    if world.rank() == 0 {
        // A step is `fixed + rows · slope`: two batch sizes give both.
        let (b, s) = (args.batch as f64, smallest as f64);
        let slope =
            if b > s { ((whole.median() - small.median()) / (b - s)).max(0.0) } else { whole.median() / b };
        let work = Workload {
            compute: slope * b,
            fixed: (whole.median() - slope * b).max(0.0),
            gradient_bytes: (4 * (args.width * args.width + args.width) * 4) as usize,
            activation_bytes: (args.batch * args.width * 4) as usize,
            layers: 4,
            cores,
            contention: (busy.median() / whole.median()).max(1.0),
        };
        report(args, &work, &calibration, &measured)?;
    }
    world.barrier()?;
    dist::destroy_process_group()?;
    Ok(())
}

fn report(
    args: &Args,
    work: &Workload,
    calibration: &Calibration,
    measured: &[Times],
) -> Result<(), Box<dyn Error>> {
    let link = &calibration.link;
    println!(
        "link: {:.1} us, {:.2} GB/s, combining {:.2} GB/s; {} samples, median error {:.0} %",
        link.latency * 1e6,
        link.bandwidth / 1e9,
        link.combine / 1e9,
        calibration.samples.len(),
        calibration.median_error() * 100.0
    );
    println!(
        "one worker: {:.2} ms that shrink with the batch, {:.2} ms that do not; all {} cores busy: x {:.2}",
        work.compute * 1e3,
        work.fixed * 1e3,
        work.cores,
        work.contention
    );
    println!(
        "{:>7} {:>13} {:>13} {:>7} | {:>9} {:>9} {:>10} | {:>11} {:>12}",
        "workers",
        "measured (ms)",
        "predicted",
        "error",
        "speed-up",
        "predicted",
        "efficiency",
        "computing",
        "exposed (ms)"
    );
    let alone = measured.first().map_or(f64::NAN, Times::median);
    let predict = |n: usize| work.predict(Parallelism::data(n), link);
    let predicted_alone = predict(1)?.total();
    let mut errors = Vec::new();
    for (i, times) in measured.iter().enumerate() {
        let (n, time, p) = (i + 1, times.median(), predict(i + 1)?);
        let error = (p.total() - time) / time;
        if n <= work.cores {
            errors.push(error.abs());
        }
        println!(
            "{n:>7} {:>13.2} {:>13.2} {:>6.0} % | {:>9.2} {:>9.2} {:>8.0} % | {:>9.2} ms {:>12.2}",
            time * 1e3,
            p.total() * 1e3,
            error * 100.0,
            alone / time,
            predicted_alone / p.total(),
            100.0 * alone / time / n as f64,
            p.compute * 1e3,
            p.exposed * 1e3
        );
    }
    println!(
        "median error of the prediction up to {} workers (the cores): {:.0} %",
        work.cores,
        Times(errors).median() * 100.0
    );
    let best = work.best_data_parallel(args.predict.max(measured.len()), link)?;
    println!("past {best} workers, one more makes the step longer (on {} cores)", work.cores);

    let line = (1..=args.predict.max(measured.len()))
        .map(|n| Ok((n as f64, predicted_alone / predict(n)?.total())))
        .collect::<dist::Result<Vec<_>>>()?;
    let ideal = line.iter().map(|&(n, _)| (n, n.min(work.cores as f64))).collect();
    let dots = measured.iter().enumerate().map(|(i, t)| (i as f64 + 1.0, alone / t.median())).collect();
    let labels = plot::Labels {
        title: "Speed-up by data parallelism",
        x: "workers",
        y: "speed-up (step time of 1 / of n)",
    };
    let series = [
        plot::Series::line(&format!("ideal on {} cores", work.cores), ideal),
        plot::Series::line("predicted", line),
        plot::Series::dots("measured", dots),
    ];
    let [svg, png] = plot::lines(&args.out, labels, &series)?;
    println!("picture: {} and {}", svg.display(), png.display());
    Ok(())
}
