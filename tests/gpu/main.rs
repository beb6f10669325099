//! What takes a GPU: checks of NCCL and of CUDA tensors, and what calls and steps cost there.
//!
//! `cargo test --features nccl --test gpu -- checks [RANKS [NAME]]`, on a machine without cargo as `cargo xtask gpu-bundle`
//! packs it. Not part of the ordinary tests: without a CUDA device nothing is run, and that is a failure.

mod calls;
mod checks;
mod failures;
mod models;
mod models_apart;
mod training;

use std::process::ExitCode;
use std::time::Duration;

use tch::{Cuda, Device};
use tch_distributed as dist;

const USAGE: &str = "usage: gpu checks [RANKS [PART OF A NAME]] | gpu timing";

/// The exit status where nothing could be run.
const NOT_RUN: u8 = 3;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ranks = words.get(1).map_or(Ok(1), |text| text.parse());
    let part = words.get(2).copied().unwrap_or_default();
    let (what, Ok(ranks)) = (words.first().copied(), ranks) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    if Cuda::device_count() <= 0 {
        eprintln!("not run: this libtorch finds no CUDA device");
        return ExitCode::from(NOT_RUN);
    }
    if !dist::is_backend_available("nccl") {
        eprintln!("not run: {}", dist::init_process_group("nccl", one_rank()).unwrap_err());
        return ExitCode::from(NOT_RUN);
    }
    let result = match what {
        Some("checks") => dist::launch::local(ranks, || checks_of_a_rank(part)),
        Some("timing") => dist::launch::local(1, timing_of_a_rank),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn one_rank() -> dist::InitOptions {
    dist::InitOptions::new().rank(0).world_size(1)
}

/// The device of this rank: the one of its number, or one that several share.
pub(crate) fn device(local_rank: usize) -> Device {
    Device::Cuda(local_rank % Cuda::device_count() as usize)
}

fn options() -> dist::Result<dist::InitOptions> {
    let local: usize = std::env::var("LOCAL_RANK").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok(dist::InitOptions::new().timeout(Duration::from_secs(120)).device(device(local)))
}

/// Every check with this in its name, one line each; an error when one failed.
fn checks_of_a_rank(part: &str) -> dist::Result<()> {
    let group = dist::init_process_group("cpu:native,cuda:nccl", options()?)?;
    let device = device(dist::local_rank()?);
    let mut failed = 0;
    let all = checks::ALL.iter().chain(training::ALL).chain(models_apart::ALL);
    for (name, least, check) in all.chain(failures::ALL) {
        if group.size() < *least || !name.contains(part) {
            continue;
        }
        let result = check(&group, device);
        // Through the CPU: a check of failures leaves NCCL behind in any state.
        let results = group.all_gather_object(&result.as_ref().err().map(ToString::to_string))?;
        if group.rank() == 0 {
            let said = results.iter().enumerate().find_map(|(rank, r)| r.as_ref().map(|e| (rank, e)));
            match said {
                None => println!("ok      {name}"),
                Some((rank, error)) => println!("FAILED  {name}: rank {rank}: {error}"),
            }
        }
        failed += usize::from(results.iter().any(Option::is_some));
    }
    let size = group.size();
    dist::destroy_process_group()?;
    match failed {
        0 => Ok(()),
        _ => Err(std::io::Error::other(format!("{failed} checks failed with {size} ranks")).into()),
    }
}

fn timing_of_a_rank() -> dist::Result<()> {
    let group = dist::init_process_group("nccl", options()?)?;
    let device = device(dist::local_rank()?);
    calls::time(&group, device)?;
    training::time(&group, device)?;
    dist::destroy_process_group()
}
