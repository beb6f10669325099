//! The side of a crew: one process with one rank, or with all of them as threads.

use std::io::BufRead;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use tch_distributed as dist;

use dist::{InitOptions, ProcessGroup};

use super::cases::{Case, Tensors};
use super::model;
use super::training::{Mode, Training};

/// Says that each rank stays on a core of its own.
pub(crate) const PIN: &str = "TCH_DISTRIBUTED_BENCH_PIN";

/// Says that tensors come from the engine.
pub(crate) const ALLOCATE: &str = "TCH_DISTRIBUTED_BENCH_ALLOCATE";

/// Keeps the calling rank on a core if that was asked for.
fn pin(rank: usize, world: usize) {
    if std::env::var_os(PIN).is_some() {
        pin_to(rank, world);
    }
}

/// Keeps the calling thread on a core, where there are enough: as MPI's launchers do.
pub(crate) fn pin_to(rank: usize, world: usize) {
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return };
    let cores: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&c| allowed.is_set(c)).collect();
    if world <= cores.len() {
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
        Some(ranks) if backend == "model" => {
            let lines = distribute(ranks);
            let shared = model::Shared::new(ranks);
            std::thread::scope(|scope| {
                for (rank, lines) in lines.into_iter().enumerate() {
                    let shared = &shared;
                    scope.spawn(move || play_model(model::Rank::new(shared, rank), rank, ranks, &lines));
                }
            });
            ExitCode::SUCCESS
        }
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

/// Answers commands as [`serve`] does, with times for each size of slots, one after the other.
fn play_model(mut model: model::Rank<'_>, rank: usize, ranks: usize, lines: &Receiver<String>) {
    pin(rank, ranks);
    println!("ready");
    for line in lines {
        let parsed =
            line.split_once(' ').and_then(|(n, words)| Some((n.parse().ok()?, Case::parse(words).ok()?)));
        let Some((iterations, case)) = parsed else { return println!("error not a command") };
        let (times, wrong) = model.run(case.bytes, iterations);
        let times: Vec<String> = times.iter().map(ToString::to_string).collect();
        println!("{rank} {} {}", u64::from(wrong), times.join(" "));
    }
}

/// What the last command used, in case the next uses it again.
#[derive(Default)]
struct Kept {
    tensors: Option<(Case, Tensors)>,
    training: Option<Training>,
}

/// Answers each command: `ITERATIONS COLLECTIVE BYTES KIND` with `RANK WRONG NANOSECONDS…`, and
/// `ITERATIONS train MODEL parallel|alone|exchange` with `RANK WRONG BYTES NANOSECONDS…`.
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
        kept.tensors = Some((case, Tensors::new(case, group, std::env::var_os(ALLOCATE).is_some())?));
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
    let mode = Mode::ALL.into_iter().find(|m| m.name() == mode).ok_or("not a command")?;
    if kept.as_ref().is_none_or(|t| !t.is(model, mode)) {
        *kept = None;
        let mut training = Training::new(model, mode, group)?;
        training.step(group)?;
        *kept = Some(training);
    }
    let Some(training) = kept else { return Err("no model".into()) };
    let times: Vec<String> =
        (0..steps).map(|_| training.step(group).map(|t| t.to_string())).collect::<Result<_, _>>()?;
    let wrong = u64::from(!training.agrees(group)?);
    Ok(format!("{} {wrong} {} {}", group.rank(), training.bytes(), times.join(" ")))
}
