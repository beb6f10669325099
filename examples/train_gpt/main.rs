//! A GPT trained data-, tensor- and pipeline-parallel at once, each rank a process of this machine:
//!
//! ```text
//! cargo run --release --example train_gpt -- --dp 2 --tp 2 --pp 2
//! ```
//!
//! learns what Rust looks like from the sources of this crate, byte by byte. `--dp 1 --tp 1 --pp 1` trains the same
//! model on the same batches in one process, with the same losses.
//!
//! The model is in `examples/common/gpt.rs`; what makes it parallel is the function [`train`].

#[path = "../common/gpt.rs"]
mod gpt;
#[path = "../common/plot.rs"]
mod plot;
mod sample;

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use tch::nn::{self, OptimizerConfig};
use tch::{Device, Tensor};
use tch_distributed as dist;
use tch_distributed::data_parallel::DdpOptions;
use tch_distributed::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use tch_distributed::model_parallel::tensor::Layout;
use tch_distributed::model_parallel::{DeviceMesh, clip_grad_norm};

#[derive(Clone, Debug, Parser)]
struct Args {
    /// Copies of the model, each with its part of the batch.
    #[arg(long, default_value_t = 1)]
    dp: usize,
    /// Ranks that share each layer.
    #[arg(long, default_value_t = 1)]
    tp: usize,
    /// Stages that the layers are cut into.
    #[arg(long, default_value_t = 1)]
    pp: usize,
    /// Split the sequence over the `tp` ranks between the layers.
    #[arg(long)]
    sp: bool,
    /// gpipe, 1f1b or interleaved (two stages on each rank).
    #[arg(long, default_value_t = Schedule::OneFOneB)]
    schedule: Schedule,
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Sequences in a batch, over all copies of the model.
    #[arg(long, default_value_t = 32)]
    batch: i64,
    #[arg(long, default_value_t = 4)]
    micro_batches: usize,
    #[arg(long, default_value_t = gpt::Config::default().context)]
    context: i64,
    #[arg(long, default_value_t = gpt::Config::default().width)]
    width: i64,
    #[arg(long, default_value_t = gpt::Config::default().layers)]
    layers: usize,
    #[arg(long, default_value_t = gpt::Config::default().heads)]
    heads: i64,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// The probability of dropout in training.
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// A text file to learn from, instead of the crate's own sources.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Characters to write at the end.
    #[arg(long, default_value_t = 160)]
    sample: usize,
    /// Where the losses, the weights and the pictures of the schedule are put.
    #[arg(long, default_value = "target/train_gpt")]
    out: PathBuf,
}

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Everything that is parallel.
fn train(args: &Args) -> Outcome {
    let world = dist::init_process_group(dist::Backend::Auto, dist::InitOptions::new())?;
    let mesh = DeviceMesh::new(&world, &[("dp", args.dp), ("pp", args.pp), ("tp", args.tp)])?;
    let [dp, pp, tp] = [mesh.group("dp")?, mesh.group("pp")?, mesh.group("tp")?];
    let model_ranks = mesh.flatten(&["pp", "tp"])?;

    // This rank's layers, and its share of each.
    let config = gpt::Config {
        context: args.context,
        width: args.width,
        layers: args.layers,
        heads: args.heads,
        sequence_parallel: args.sp,
        dropout: args.dropout,
        dropout_seed: 1_000_000 * (dp.rank() as u64 + 1),
        ..Default::default()
    };
    let vs = nn::VarStore::new(Device::Cpu);
    let chunks = if args.schedule == Schedule::Interleaved && args.pp > 1 { 2 } else { 1 };
    let stages = args.pp * chunks;
    let (parts, mut layout) = Layout::record(&tp, || {
        let mine = (0..chunks).map(|chunk| chunk * args.pp + pp.rank());
        mine.map(|s| gpt::Part::new(&vs.root(), config, s, stages, &tp)).collect::<dist::Result<Vec<_>>>()
    });
    let parts = parts?;
    let tied = parts.iter().find_map(gpt::Part::tied);
    if pp.rank() > 0 {
        layout.mark_copy("wte.weight");
    }

    // The pipeline, which averages gradients over the copies of the model; head and embedding stay one weight.
    let parts = parts.into_iter().map(Stage::new_t).collect();
    let pipeline = Pipeline::new(parts, args.micro_batches, args.schedule, &pp)?
        .fixed_shapes(true)
        .data_parallel(&vs, &dp, DdpOptions::new())?;
    pipeline.tie(&[0, stages - 1], tied.as_ref())?;

    let text = match &args.text {
        Some(path) => gpt::Text::new(&std::fs::read(path)?),
        None => gpt::Text::of_this_crate()?,
    };
    let mut optimizer = nn::AdamW { wd: 0.01, ..Default::default() }.build(&vs, args.lr)?;
    let rows = args.batch / args.dp as i64;
    let reports = dp.rank() == 0 && tp.rank() == 0 && pipeline.ends().1;
    let mut log = Log::new(args, reports)?;
    for step in 0..args.steps {
        // Every rank knows the whole batch; a copy of the model takes its rows.
        let (xs, targets) = text.batch(step, args.batch, args.context);
        let own = |t: &Tensor| t.narrow(0, dp.rank() as i64 * rows, rows);
        let (xs, targets) = (own(&xs), own(&targets));

        optimizer.set_lr(args.lr * ((step + 1) as f64 / 20.0).min(1.0));
        optimizer.zero_grad();
        let loss =
            pipeline.step(Some(&xs), Some(&targets), |logits, targets| gpt::loss(logits, targets, &tp))?;
        clip_grad_norm(&vs, &layout, 1.0, &model_ranks)?;
        optimizer.step();

        if let Some(mut loss) = loss {
            dp.all_reduce(&mut loss, dist::ReduceOp::Avg)?;
            log.step(step, loss.double_value(&[]))?;
        }
    }

    let timeline = pipeline.measured()?;
    if let Some(sample) = sample::write(&pipeline, &text, args, &model_ranks, &tp)? {
        log.end(&timeline, &sample)?;
    }
    Ok(dist::destroy_process_group()?)
}

/// What one rank tells about the training.
struct Log<'a> {
    args: &'a Args,
    reports: bool,
    begun: Instant,
    losses: Vec<f64>,
}

impl<'a> Log<'a> {
    fn new(args: &'a Args, reports: bool) -> Outcome<Self> {
        std::fs::create_dir_all(&args.out)?;
        Ok(Self { args, reports, begun: Instant::now(), losses: Vec::new() })
    }

    fn step(&mut self, step: usize, loss: f64) -> Outcome {
        self.losses.push(loss);
        if self.reports && (step.is_multiple_of(20) || step + 1 == self.args.steps) {
            let tokens = (step as i64 + 1) * self.args.batch * self.args.context;
            let rate = tokens as f64 / self.begun.elapsed().as_secs_f64();
            println!("step {step:4}  loss {loss:.3}  {rate:.0} tokens/s");
        }
        Ok(())
    }

    fn end(&self, timeline: &dist::model_parallel::pipeline::Timeline, sample: &str) -> Outcome {
        if !self.reports {
            return Ok(());
        }
        let lines: Vec<_> = self.losses.iter().map(|l| format!("{l:.9}\n")).collect();
        std::fs::write(self.args.out.join("losses.txt"), lines.concat())?;
        let points = self.losses.iter().enumerate().map(|(step, &loss)| (step as f64, loss)).collect();
        let labels = plot::Labels { title: "Loss of the GPT", x: "step", y: "loss (nats a byte)" };
        plot::lines(&self.args.out.join("loss"), labels, &[plot::Series::line("loss", points)])?;
        std::fs::write(self.args.out.join("last_step.svg"), timeline.svg())?;
        std::fs::write(self.args.out.join("sample.txt"), sample)?;
        Ok(())
    }
}

fn main() -> Outcome {
    let args = Args::parse();
    if args.batch % (args.dp * args.micro_batches) as i64 != 0 {
        return Err("--batch must be a multiple of --dp times --micro-batches".into());
    }
    dist::launch::local(args.dp * args.tp * args.pp, || train(&args))?;
    let read = |name| std::fs::read_to_string(args.out.join(name));
    println!("\na sample:\n{}\n", read("sample.txt")?);
    let [curve, schedule] = ["loss.png", "last_step.svg"].map(|name| args.out.join(name));
    println!("the loss: {}; the schedule of the last step: {}", curve.display(), schedule.display());
    let losses = read("losses.txt")?;
    let last: f64 = losses.lines().last().ok_or("no step was made")?.parse()?;
    println!("final loss: {last:.3}");
    Ok(())
}
