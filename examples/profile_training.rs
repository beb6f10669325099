//! Where does the time of a step go, and which rank is late?
//!
//! Trains a small net data-parallel under [`dist::profile`], with one rank made late on purpose, prints the table of
//! all ranks, which names the late one, and writes the trace of all of them for <https://ui.perfetto.dev> or
//! chrome://tracing.
//!
//! `cargo run --release --example profile_training -- --nproc 3 --slow-rank 1`

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use dist::data_parallel::{DdpOptions, DistributedDataParallel};
use dist::profile::{ProfileOptions, Profiler};
use tch::nn::OptimizerConfig;
use tch::{Device, Kind, Tensor, nn};
use tch_distributed as dist;

#[derive(Parser)]
struct Args {
    /// How many processes train together.
    #[arg(long, default_value_t = 2)]
    nproc: usize,
    /// This rank computes longer than the others.
    #[arg(long)]
    slow_rank: Option<usize>,
    /// By how much, in milliseconds a step.
    #[arg(long, default_value_t = 20)]
    slow_ms: u64,
    /// Steps that are profiled, after one that is not.
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Where the trace goes.
    #[arg(long, default_value = "target/profile_training")]
    out: PathBuf,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    std::fs::create_dir_all(&args.out)?;
    Ok(dist::launch::local(args.nproc, || run(&args).map_err(|e| e.to_string()))?)
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let group = dist::init_process_group("native", dist::InitOptions::new())?;
    let vs = nn::VarStore::new(Device::Cpu);
    let linear = |name: &str, from, to| nn::linear(vs.root() / name, from, to, Default::default());
    let net = nn::seq().add(linear("up", 256, 1024)).add_fn(Tensor::relu).add(linear("down", 1024, 256));
    let model = DistributedDataParallel::new(net, &vs, &group, DdpOptions::new())?;
    let mut optimizer = nn::Sgd::default().build(&vs, 1e-3)?;
    let x = Tensor::randn([64, 256], (Kind::Float, Device::Cpu));

    let mut step = || -> dist::Result<()> {
        if args.slow_rank == Some(group.rank()) {
            std::thread::sleep(Duration::from_millis(args.slow_ms));
        }
        let loss = model.forward(&x)?.mse_loss(&x, tch::Reduction::Mean);
        optimizer.zero_grad();
        model.backward(&loss)?;
        optimizer.step();
        Ok(())
    };
    step()?; // the first one learns the order of the gradients

    // Without `enabled`, the variable TCH_DISTRIBUTED_PROFILE decides.
    let trace = args.out.join("trace.json");
    let profiler = Profiler::new(&group, ProfileOptions::new().enabled(true).trace_file(&trace))?;
    for _ in 0..args.steps {
        profiler.step(&mut step)?;
    }
    if let Some(report) = profiler.finish()?.filter(|_| group.rank() == 0) {
        print!("{report}");
        println!("trace: {}", trace.display());
    }
    Ok(dist::destroy_process_group()?)
}
