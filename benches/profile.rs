//! What a profile costs in a data-parallel step of the MLP of 25 million parameters, two ranks as processes:
//! `cargo bench --bench profile`.
//!
//! Events of a step times the measured nanoseconds of one, beside the step; and steps with the profile on and off in
//! turns.

#[allow(dead_code, reason = "a part of the other bench, of which one model is needed here")]
#[path = "collectives/training.rs"]
mod training;

use std::time::Instant;

use tch_distributed as dist;
use tch_distributed::profile::{ProfileOptions, Profiler};

type Failure = Box<dyn std::error::Error>;

const ROUNDS: usize = 5;
const STEPS: usize = 4;

fn main() -> Result<(), Failure> {
    Ok(dist::launch::local(2, || run().map_err(|e| e.to_string()))?)
}

fn run() -> Result<(), Failure> {
    tch::set_num_threads(1);
    let group = dist::init_process_group("native", dist::InitOptions::new())?;
    let mut training = training::Training::new("mlp_25m", training::Mode::Parallel, &group)?;
    training.step(&group)?;
    let mut times = [Vec::new(), Vec::new()];
    let mut last = None;
    for _ in 0..ROUNDS {
        for (on, times) in [false, true].into_iter().zip(&mut times) {
            let profiler = Profiler::new(&group, ProfileOptions::new().enabled(on))?;
            for _ in 0..STEPS {
                let start = Instant::now();
                profiler.step(|| training.step(&group))?;
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
            last = profiler.finish()?.or(last);
        }
    }
    let report = last.ok_or("no profile was made")?;
    if group.rank() == 0 {
        let [off, on] = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        println!("{report}");
        println!("median step: {off:.2} ms without a profile, {on:.2} ms with it");
        let cost = report.overhead;
        println!(
            "cost: {:.1} events a step x {:.0} ns = {:.2} us, {:.4} % of a step (the aim: below 2 %)",
            cost.events_per_step,
            cost.nanoseconds_per_event,
            cost.events_per_step * cost.nanoseconds_per_event / 1e3,
            cost.share * 100.0
        );
    }
    Ok(dist::destroy_process_group()?)
}
