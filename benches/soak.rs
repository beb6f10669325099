//! Does anything grow? Small collectives by the million and groups by the thousand, among threads and between
//! processes that share memory, with what each process holds looked at every tenth: `cargo xtask soak`, or
//! `cargo bench --bench soak -- [options]`.
//!
//! After the first tenth of each, resident memory may grow by less than 1 %, and descriptors, threads,
//! segments of shared memory and keys in the store by none.

#[path = "../tests/soak/life.rs"]
mod life;
#[path = "../tests/soak/meter.rs"]
mod meter;

use std::fmt::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use clap::Parser;
use parking_lot::Mutex;
use tch_distributed::backend::{BackendContext, native};
use tch_distributed::store::{Store, TcpStore};
use tch_distributed::{
    Error, InitOptions, ProcessGroup, Result, destroy_process_group, init_process_group, launch,
    register_backend, testing,
};

use self::meter::Holdings;

#[derive(Parser)]
#[command(name = "cargo xtask soak")]
struct Options {
    /// Small collectives in each of the two worlds.
    #[arg(long, default_value_t = 1_000_000)]
    collectives: usize,
    /// Groups made, used and given up in each of the two worlds; a tenth as many more that fail.
    #[arg(long, default_value_t = 10_000)]
    groups: usize,
    /// Ranks of each world.
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// `threads`, `processes`, or both.
    #[arg(long, value_delimiter = ',', default_value = "threads,processes")]
    worlds: Vec<String>,
    /// cargo says so.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let mut outcome = ExitCode::SUCCESS;
    for world in &options.worlds {
        let ended = match world.as_str() {
            "threads" => among_threads(&options),
            "processes" => between_processes(&options),
            other => Err(Error::Callback { reason: format!("there is no world of {other:?}") }),
        };
        if let Err(error) = ended {
            eprintln!("error: {error}");
            outcome = ExitCode::FAILURE;
        }
    }
    outcome
}

/// A timeout that no call here comes near.
fn patient() -> InitOptions {
    InitOptions::new().timeout(Duration::from_secs(120))
}

/// In a process of its own, so that nothing of the other world is in what it holds.
fn among_threads(options: &Options) -> Result<()> {
    launch::local(1, || -> Result<()> {
        let store: Arc<Mutex<Option<Arc<dyn Store>>>> = Arc::default();
        let seen = store.clone();
        register_backend("watched", move |context: BackendContext| {
            seen.lock().get_or_insert_with(|| context.store.clone());
            native::create(context)
        })?;
        let ended = testing::run_threads_on("watched", patient(), options.ranks, |group| -> Result<()> {
            let store = store.lock().clone().ok_or(Error::NotInitialized)?;
            // All ranks are this process: one report is enough.
            let report = live(&group, &*store, options)?;
            if group.rank() == 0 { report.show("threads of one process") } else { Ok(()) }
        });
        ended.into_iter().collect()
    })
}

fn between_processes(options: &Options) -> Result<()> {
    launch::local(options.ranks, || -> Result<()> {
        let group = init_process_group("native", patient())?;
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        let port = variable("MASTER_PORT").parse::<u16>().unwrap_or_default();
        let store = TcpStore::connect(variable("MASTER_ADDR"), port, Duration::from_secs(10))?;
        let report = live(&group, &store, options)?;
        let reports = group.all_gather_object(&report)?;
        let mut outcome = Ok(());
        for (rank, report) in reports.iter().enumerate() {
            if group.rank() == 0 {
                outcome = outcome.and(report.show(&format!("rank {rank}, a process that shares memory")));
            }
        }
        drop(store);
        destroy_process_group()?;
        outcome
    })
}

/// What one process held.
#[derive(serde::Serialize, serde::Deserialize)]
struct Report {
    phases: Vec<Phase>,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Phase {
    what: String,
    count: usize,
    seconds: f64,
    looks: Vec<Holdings>,
}

fn live(group: &ProcessGroup, store: &dyn Store, options: &Options) -> Result<Report> {
    type Body = fn(&ProcessGroup, usize) -> Result<()>;
    let phase = |what: &str, count: usize, body: Body| -> Result<Phase> {
        let begin = Instant::now();
        let looks = life::watched(group, store, count, body)?;
        Ok(Phase { what: what.to_owned(), count, seconds: begin.elapsed().as_secs_f64(), looks })
    };
    Ok(Report {
        phases: vec![
            phase("small collectives", options.collectives, life::collective)?,
            phase("groups", options.groups, life::one_group)?,
            phase("groups that fail", options.groups / 10, life::failed_group)?,
        ],
    })
}

impl Report {
    /// Prints it; an error if something grew.
    fn show(&self, who: &str) -> Result<()> {
        let (mut text, mut grown) = (String::new(), Vec::new());
        for Phase { what, count, seconds, looks } in &self.phases {
            let _ =
                writeln!(text, "\n{who}: {count} {what} in {seconds:.1} s\n{:>10}  {}", "done", meter::HEAD);
            for (n, look) in looks.iter().enumerate() {
                let _ = writeln!(text, "{:>10}  {look}", count * (n + 1) / life::LOOKS);
            }
            if let [first, .., last] = &looks[..] {
                grown.extend(last.growth(first, true).into_iter().map(|line| format!("{what}: {line}")));
            }
        }
        let verdict = if grown.is_empty() { "nothing grew".to_owned() } else { grown.join("\n") };
        println!("{text}{verdict}");
        if grown.is_empty() { Ok(()) } else { Err(Error::Callback { reason: format!("{who}: {verdict}") }) }
    }
}
