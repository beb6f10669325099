//! A fleet of deployed models, updated on new data: models × batches of work, and how to spread it.
//!
//! For each model and each new batch: preprocess, predict, evaluate; then the model is retrained. On one
//! process that is models × batches. Sub-groups of ranks share the models; and where one model can serve
//! all deployments, retraining once for all saves the factor "models" of the retraining.
//!
//! `cargo run --release --example update_fleet -- --nproc 2`

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
use tch::{Device, nn};
use tch_distributed as dist;
use tch_distributed::metrics::{Accuracy, Metric};

#[derive(Parser)]
struct Args {
    /// How many processes share the fleet.
    #[arg(long, default_value_t = 2)]
    nproc: usize,
    /// The largest number of models; a quarter and a half of it run before.
    #[arg(long, default_value_t = 8)]
    models: usize,
    /// How many batches of new data there are.
    #[arg(long, default_value_t = 8)]
    batches: usize,
    /// Where the picture goes.
    #[arg(long, default_value = "target/update_fleet")]
    out: PathBuf,
}

/// Work done and what it found.
#[derive(Clone, Default, serde::Serialize, serde::Deserialize)]
struct Work {
    evaluations: u64,
    retraining_steps: u64,
    before: Accuracy,
    after: Accuracy,
}

impl Metric for Work {
    fn merge(&mut self, other: &Self) -> dist::Result<()> {
        self.evaluations += other.evaluations;
        self.retraining_steps += other.retraining_steps;
        self.before.merge(&other.before)?;
        self.after.merge(&other.after)
    }
}

/// One deployed model.
struct Deployed {
    vs: nn::VarStore,
    net: nn::Linear,
}

impl Deployed {
    fn new() -> Self {
        let vs = nn::VarStore::new(Device::Cpu);
        let config = nn::LinearConfig {
            ws_init: Init::Const(0.0),
            bs_init: Some(Init::Const(0.0)),
            ..Default::default()
        };
        let net = nn::linear(vs.root(), 64, 10, config);
        Self { vs, net }
    }

    /// Preprocess, predict, evaluate: one unit of work.
    fn evaluate(&self, batch: &digits::Digits, accuracy: &mut Accuracy, count: &mut u64) -> dist::Result<()> {
        let _guard = tch::no_grad_guard();
        accuracy.update(&self.net.forward(&prepare(batch)), &batch.labels)?;
        *count += 1;
        Ok(())
    }

    /// One pass over the new batches: `batches` units of work.
    fn retrain(&mut self, batches: &[digits::Digits], count: &mut u64) -> Result<(), Box<dyn Error>> {
        let mut optimizer = nn::Adam::default().build(&self.vs, 0.02)?;
        for batch in batches {
            let loss = self.net.forward(&prepare(batch)).cross_entropy_for_logits(&batch.labels);
            optimizer.zero_grad();
            dist::autograd::backward(&loss)?;
            optimizer.step();
            *count += 1;
        }
        Ok(())
    }
}

fn prepare(batch: &digits::Digits) -> tch::Tensor {
    batch.images.flatten(1, -1) - 0.3
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    dist::launch::local(args.nproc, || run(&args).map_err(|e| e.to_string()))?;
    Ok(())
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let world = dist::init_process_group("native", dist::InitOptions::new())?;
    // Each sub-group has a share of the fleet; here a sub-group is one rank.
    let (group, groups) = dist::new_subgroups(1)?;
    let number =
        groups.iter().position(|g| g.as_slice() == group.ranks()).ok_or("this rank is in no sub-group")?;

    let data = digits::load()?;
    let (train, _) = data.split();
    let size = train.len() / args.batches as i64;
    let batches: Vec<_> = (0..args.batches).map(|b| train.narrow(b as i64 * size, size)).collect();

    let sizes = [args.models / 4, args.models / 2, args.models];
    let (mut one, mut spread, mut shared) = (Vec::new(), Vec::new(), Vec::new());
    for models in sizes.into_iter().filter(|m| *m > 0) {
        let units = (models * args.batches) as u64;

        let (work, seconds) = timed(&world, || fleet(models, &batches, 0, 1))?;
        assert_eq!((work.evaluations, work.retraining_steps), (2 * units, units), "models × batches");
        report(&world, "one process", models, &work, [2 * units, units], seconds);
        one.push((models as f64, (work.evaluations + work.retraining_steps) as f64));

        let (own, seconds) = timed(&world, || fleet(models, &batches, number, groups.len()))?;
        let all = own.reduce(&world)?;
        assert_eq!(
            all.evaluations, work.evaluations,
            "spreading changes where the work is done, not how much"
        );
        assert!(own.retraining_steps <= (models.div_ceil(groups.len()) * args.batches) as u64);
        assert_eq!(all.after, work.after, "and the fleet ends in the same state");
        let share = (models.div_ceil(groups.len()) * args.batches) as u64;
        report(&world, "spread over sub-groups", models, &own, [2 * share, share], seconds);
        spread.push((models as f64, (own.evaluations + own.retraining_steps) as f64));

        let (own, seconds) = timed(&world, || once_for_all(models, &batches))?;
        assert_eq!((own.evaluations, own.retraining_steps), (2 * units, args.batches as u64));
        report(&world, "retrained once for all", models, &own, [2 * units, args.batches as u64], seconds);
        shared.push((models as f64, (own.evaluations + own.retraining_steps) as f64));
    }
    if world.rank() == 0 {
        println!(
            "expected: work grows as models × batches; spread, as models × batches / sub-groups on each"
        );
        let labels = plot::Labels {
            title: "Updating a fleet of models",
            x: "models",
            y: "work of one rank (batches processed)",
        };
        let series = [
            plot::Series::line("one process", one),
            plot::Series::line(&format!("spread over {} sub-groups", groups.len()), spread),
            plot::Series::line("retrained once for all (one process)", shared),
        ];
        let [svg, png] = plot::lines(&args.out, labels, &series)?;
        println!("picture: {} and {}", svg.display(), png.display());
    }
    dist::destroy_process_group()?;
    Ok(())
}

/// Models `first, first + step, …` of the fleet, each judged, retrained and judged again.
fn fleet(
    models: usize,
    batches: &[digits::Digits],
    first: usize,
    step: usize,
) -> Result<Work, Box<dyn Error>> {
    let mut work = Work::default();
    for _ in (first..models).step_by(step) {
        let mut model = Deployed::new();
        for batch in batches {
            model.evaluate(batch, &mut work.before, &mut work.evaluations)?;
        }
        model.retrain(batches, &mut work.retraining_steps)?;
        for batch in batches {
            model.evaluate(batch, &mut work.after, &mut work.evaluations)?;
        }
    }
    Ok(work)
}

/// Every deployed model is judged, one model is retrained, and its weights are rolled out to all.
fn once_for_all(models: usize, batches: &[digits::Digits]) -> Result<Work, Box<dyn Error>> {
    let mut work = Work::default();
    let mut deployed: Vec<_> = (0..models).map(|_| Deployed::new()).collect();
    for model in &deployed {
        for batch in batches {
            model.evaluate(batch, &mut work.before, &mut work.evaluations)?;
        }
    }
    let mut retrained = Deployed::new();
    retrained.retrain(batches, &mut work.retraining_steps)?;
    for model in &mut deployed {
        model.vs.copy(&retrained.vs)?;
        for batch in batches {
            model.evaluate(batch, &mut work.after, &mut work.evaluations)?;
        }
    }
    Ok(work)
}

fn timed<T>(
    group: &dist::ProcessGroup,
    f: impl FnOnce() -> Result<T, Box<dyn Error>>,
) -> Result<(T, f64), Box<dyn Error>> {
    group.barrier()?;
    let start = Instant::now();
    let result = f()?;
    group.barrier()?;
    Ok((result, start.elapsed().as_secs_f64()))
}

/// Rank 0's work beside what is expected of it.
fn report(
    group: &dist::ProcessGroup,
    how: &str,
    models: usize,
    work: &Work,
    expected: [u64; 2],
    seconds: f64,
) {
    if group.rank() == 0 {
        println!(
            "{how:>24}: {models} models, {} evaluations (expected {}), {} retraining steps (expected {}), \
             {seconds:.3} s, accuracy {:.1} % -> {:.1} %",
            work.evaluations,
            expected[0],
            work.retraining_steps,
            expected[1],
            100.0 * work.before.value().unwrap_or(0.0),
            100.0 * work.after.value().unwrap_or(0.0),
        );
    }
}
