//! The side of a crew: one process with one rank, or with all of them as threads.

use std::io::BufRead;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver};
use std::time::Instant;

use tch_distributed as dist;

use dist::{InitOptions, ProcessGroup};

use super::cases::{Case, Tensors};

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

/// Answers each command: `ITERATIONS COLLECTIVE BYTES KIND` with `RANK WRONG NANOSECONDS…`.
fn serve(group: &ProcessGroup, lines: &Receiver<String>) {
    println!("ready");
    let mut last: Option<(Case, Tensors)> = None;
    for line in lines {
        match answer(group, &line, &mut last) {
            Ok(text) => println!("{text}"),
            Err(error) => return println!("error {error}"),
        }
    }
}

fn answer(
    group: &ProcessGroup,
    line: &str,
    last: &mut Option<(Case, Tensors)>,
) -> Result<String, Box<dyn std::error::Error>> {
    let (iterations, words) = line.split_once(' ').ok_or("not a command")?;
    let iterations: usize = iterations.parse()?;
    let case = Case::parse(words)?;
    if last.as_ref().is_none_or(|(c, _)| *c != case) {
        *last = None;
        *last = Some((case, Tensors::new(case, group.size())));
    }
    let Some((_, tensors)) = last else { return Err("no tensors".into()) };
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
