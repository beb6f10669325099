//! The side of a crew: one process with one rank, or with all of them as threads.

use std::io::BufRead;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use tch_distributed as dist;

use dist::{InitOptions, ProcessGroup};

use super::cases::{Case, Tensors};
use super::training::Training;

/// Says that each rank stays on a core of its own.
pub(crate) const PIN: &str = "TCH_DISTRIBUTED_BENCH_PIN";

/// Keeps the calling rank on a core, where there are enough: as MPI's launchers do.
fn pin(rank: usize, world: usize) {
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return };
    let cores: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&c| allowed.is_set(c)).collect();
    if std::env::var_os(PIN).is_some() && world <= cores.len() {
        let mut own = rustix::thread::CpuSet::new();
        own.set(cores[rank]);
        // A rank that floats measures all the same.
        let _ = rustix::thread::sched_setaffinity(None, &own);
    }
}

/// The first argument of a member's command line; then the backend, and the number of threads where
/// ranks are threads.
pub(crate) const COMMAND: &str = "member";

pub(crate) fn main(arguments: &[String]) -> ExitCode {
    let backend = arguments.first().map_or("native", String::as_str);
    let threads = arguments.get(1).and_then(|n| n.parse().ok());
    match threads {
        Some(threads) => {
            let lines = distribute(threads);
            let lines: Vec<_> = lines.into_iter().map(|l| Mutex::new(Some(l))).collect();
            dist::testing::run_threads(threads, |group| {
                let mine = lines[group.rank()].lock().map(|mut l| l.take());
                if let Ok(Some(mine)) = mine {
                    serve(&group, &mine);
                }
            });
            ExitCode::SUCCESS
        }
        None => {
            tch::set_num_threads(1);
            let lines = distribute(1);
            match dist::init_process_group(backend, InitOptions::new()) {
                Ok(group) => {
                    serve(&group, &lines[0]);
                    ExitCode::SUCCESS
                }
                Err(error) => {
                    println!("error {error}");
                    ExitCode::FAILURE
                }
            }
        }
    }
}

/// Every line of the standard input, to each rank of this process.
fn distribute(ranks: usize) -> Vec<Receiver<String>> {
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..ranks).map(|_| mpsc::channel()).unzip();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            senders.iter().for_each(|s| drop(s.send(line.clone())));
        }
    });
    receivers
}

/// What the last command used, in case the next uses it again.
#[derive(Default)]
struct Kept {
    tensors: Option<(Case, Tensors)>,
    training: Option<Training>,
}

/// Answers each command: `ITERATIONS COLLECTIVE BYTES KIND` with `RANK WRONG NANOSECONDS…`, and
/// `ITERATIONS train MODEL parallel|alone` with `RANK WRONG BYTES NANOSECONDS…`.
fn serve(group: &ProcessGroup, lines: &Receiver<String>) {
    pin(group.rank(), group.size());
    println!("ready");
    let mut kept = Kept::default();
    for line in lines {
        match answer(group, &line, &mut kept) {
            Ok(text) => println!("{text}"),
            Err(error) => return println!("error {error}"),
        }
    }
}

fn answer(group: &ProcessGroup, line: &str, kept: &mut Kept) -> Result<String, Box<dyn std::error::Error>> {
    let (iterations, words) = line.split_once(' ').ok_or("not a command")?;
    let iterations: usize = iterations.parse()?;
    if let Some(words) = words.strip_prefix("train ") {
        kept.tensors = None;
        return train(group, iterations, words, &mut kept.training);
    }
    kept.training = None;
    let case = Case::parse(words)?;
    if kept.tensors.as_ref().is_none_or(|(c, _)| *c != case) {
        // The old ones go first.
        kept.tensors = None;
        kept.tensors = Some((case, Tensors::new(case, group.size())));
    }
    let Some((_, tensors)) = &mut kept.tensors else { return Err("no tensors".into()) };
    let wrong = u64::from(!tensors.verify(group)?);
    let mut text = format!("{} {wrong}", group.rank());
    for _ in 0..iterations {
        group.barrier()?;
        let start = Instant::now();
        tensors.run(group)?;
        text += &format!(" {}", start.elapsed().as_nanos());
    }
    Ok(text)
}

fn train(
    group: &ProcessGroup,
    steps: usize,
    words: &str,
    kept: &mut Option<Training>,
) -> Result<String, Box<dyn std::error::Error>> {
    let (model, mode) = words.split_once(' ').ok_or("not a command")?;
    let parallel = mode == "parallel";
    if kept.as_ref().is_none_or(|t| !t.is(model, parallel)) {
        *kept = None;
        let mut training = Training::new(model, parallel, group)?;
        training.step(group)?;
        *kept = Some(training);
    }
    let Some(training) = kept else { return Err("no model".into()) };
    let times: Vec<String> =
        (0..steps).map(|_| training.step(group).map(|t| t.to_string())).collect::<Result<_, _>>()?;
    let wrong = u64::from(!training.agrees(group)?);
    Ok(format!("{} {wrong} {} {}", group.rank(), training.bytes(), times.join(" ")))
}
