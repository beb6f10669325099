//! The `tchrun` program: torchrun for programs that are no Python.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use parking_lot::Mutex;

use super::signals::die_of;
use super::supervise::{End, Failure, RankCommand, Terms, describe, supervise};
use super::{Seat, die_with_parent, nonce};
use crate::store::{PrefixStore, Store, TcpStore, wire};
use crate::{Error, Result};

/// torchrun's port where several nodes meet.
const PORT: u16 = 29500;
/// How long nodes wait for each other at the start: torchrun's.
const JOIN: Duration = Duration::from_secs(600);
/// How often nodes tell each other that they live, and how long one may be silent.
const BEAT: Duration = Duration::from_millis(500);
const SILENT: Duration = Duration::from_secs(30);
/// How long a node that ends tries to tell the others.
const TELL: Duration = Duration::from_secs(10);
/// The hidden first argument of a rank: tchrun itself, about to become the program.
const BECOME: &str = "--become-rank-of";
/// The first argument that makes it read flight records instead of running a program.
const DIAGNOSE: &str = "diagnose";

/// Runs a program as the ranks of one world.
///
/// Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and the rest as torchrun does. The first
/// rank to fail ends all others, on all nodes; its exit status is tchrun's.
///
/// `tchrun diagnose DIR` runs nothing: it reads the flight records that the ranks left in DIR (see
/// TCH_DISTRIBUTED_FLIGHT_DIR) and says which rank stopped where; its exit status is 1 where something hangs or failed.
#[derive(Debug, Parser)]
#[command(name = "tchrun", version)]
struct Options {
    /// Ranks on this node: a number, `auto` (one a GPU, else one), `gpu`, or `cpu` (one a core).
    #[arg(long, alias = "nproc_per_node", default_value = "auto")]
    nproc_per_node: String,
    /// How many nodes.
    #[arg(long, default_value_t = 1)]
    nnodes: usize,
    /// Which node this is, from 0. Node 0 serves the store.
    #[arg(long, alias = "node_rank", default_value_t = 0)]
    node_rank: usize,
    /// Node 0's address; needed with several nodes.
    #[arg(long, alias = "master_addr")]
    master_addr: Option<String>,
    /// Node 0's port: any free one on one node, 29500 on several.
    #[arg(long, alias = "master_port")]
    master_port: Option<u16>,
    /// A name for the job, to tell it from others.
    #[arg(long, alias = "rdzv-id", alias = "rdzv_id", alias = "run_id")]
    run_id: Option<String>,
    /// Everything on this node with a port of its own (as without any of the other options).
    #[arg(long)]
    standalone: bool,
    /// torchrun's flag for programs that are no Python: all are.
    #[arg(long, alias = "no_python")]
    no_python: bool,
    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<OsString>,
}

/// The whole program; its exit code.
pub fn main() -> i32 {
    let mut arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|argument| argument == BECOME) {
        return become_rank(&arguments.split_off(2));
    }
    if arguments.get(1).is_some_and(|argument| argument == DIAGNOSE) {
        return diagnose(&arguments.split_off(2));
    }
    match run(Options::parse_from(arguments)) {
        Ok(code) => code,
        Err(error) => {
            say(format_args!("tchrun: {error}"));
            1
        }
    }
}

/// A line on stderr. Whoever closed it does not want to read; `eprintln` would panic.
fn say(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Ties this process's life to the launcher's, then becomes the program: that stays through `exec`.
fn become_rank(arguments: &[OsString]) -> i32 {
    let [parent, program, rest @ ..] = arguments else { return 2 };
    if let Some(parent) = parent.to_str().and_then(|text| text.parse().ok()) {
        die_with_parent(parent);
    }
    let error = Command::new(program).args(rest).exec();
    say(format_args!("tchrun: cannot run {}: {error}", program.to_string_lossy()));
    127
}

/// Says what the flight records in a folder mean; 0 where every rank did the same.
fn diagnose(arguments: &[OsString]) -> i32 {
    let [folder] = arguments else {
        say("usage: tchrun diagnose DIR, the folder that TCH_DISTRIBUTED_FLIGHT_DIR named");
        return 2;
    };
    match crate::profile::diagnose_folder(folder.as_ref()) {
        Ok(diagnosis) => {
            let _ = write!(io::stdout(), "{diagnosis}");
            i32::from(diagnosis.hangs)
        }
        Err(error) => {
            say(format_args!("tchrun: {error}"));
            2
        }
    }
}

fn ranks_here(text: &str) -> Result<usize> {
    let gpus = || usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    let ranks = match text {
        "cpu" => num_cpus::get(),
        "gpu" => gpus(),
        "auto" => gpus().max(1),
        number => number.parse().unwrap_or(0),
    };
    if ranks == 0 {
        return Err(Error::invalid(
            "nproc-per-node",
            format!("{text:?} gives no rank, expected a number from 1, auto, gpu or cpu"),
        ));
    }
    Ok(ranks)
}

fn run(options: Options) -> Result<i32> {
    let here = ranks_here(&options.nproc_per_node)?;
    if options.node_rank >= options.nnodes {
        return Err(Error::invalid(
            "node-rank",
            format!("it is {}, expected less than nnodes, {}", options.node_rank, options.nnodes),
        ));
    }
    let nodes = Nodes::meet(&options, here)?;
    let program = std::env::current_exe()?;
    let command = |local_rank: usize| {
        let mut command = Command::new(&program);
        command.arg(BECOME).arg(std::process::id().to_string()).args(&options.program);
        let rank = nodes.first_rank + local_rank;
        let seat = Seat {
            rank,
            world_size: nodes.world_size,
            local_rank,
            local_world_size: here,
            node: options.node_rank,
            nodes: options.nnodes,
            master_addr: nodes.host.clone(),
            master_port: nodes.store.port(),
            run_id: nodes.run_id.clone(),
            agent_store: true,
        };
        seat.give(&mut command);
        RankCommand { rank, command, error_file: None }
    };
    let news = nodes.watch();
    let terms = Terms {
        success: 0,
        limit: None,
        print: true,
        keep: 20,
        signals: true,
        interrupted: &|| news.lock().clone(),
    };
    let report = supervise((0..here).map(command).collect(), &terms)?;
    match report.end {
        End::Success => nodes.leave(&news).inspect_err(|_| nodes.let_others_read()),
        End::Failed(failure) => {
            // First the others: whoever reads this node's words may be slow.
            nodes.tell(&format!("rank {} failed: {}", failure.rank, describe(failure.status)));
            say(tell(&failure, &options));
            Ok(failure.status.code().unwrap_or_else(|| 128 + failure.status.signal().unwrap_or(0)))
        }
        End::Signal(signal) => {
            nodes.tell(&format!("node {} was interrupted", options.node_rank));
            die_of(signal)
        }
        End::Interrupted(reason) => {
            nodes.let_others_read();
            Err(Error::Rendezvous { reason })
        }
        End::Limit(ranks) => Err(Error::Rendezvous { reason: format!("ranks {ranks:?} did not end") }),
    }
}

/// The report of a failure.
fn tell(failure: &Failure, options: &Options) -> String {
    let program = options.program.first().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
    let mut text = format!("tchrun: rank {} of {program} failed: {}", failure.rank, describe(failure.status));
    if options.nnodes > 1 {
        text += &format!(" (on node {})", options.node_rank);
    }
    if !failure.stderr.is_empty() {
        text += "; its last lines on stderr:";
        failure.stderr.iter().for_each(|line| text += &format!("\n    {line}"));
    }
    text
}

/// This node among the others.
struct Nodes {
    store: Arc<TcpStore>,
    keys: PrefixStore<Arc<TcpStore>>,
    host: String,
    run_id: String,
    node: usize,
    count: usize,
    first_rank: usize,
    world_size: usize,
    over: Arc<AtomicBool>,
}

impl Nodes {
    /// Meets the other nodes: how many ranks each has, and the job's name. A node of another job must leave no trace.
    ///
    /// Keys under `tchrun/`: `id` is the job's name, from node 0 before all else, `node/<n>` counts claims of a
    /// number, `ranks/<n>` is the number of ranks and of nodes, `failed` why all end, `beat/<n>` counts up while the node lives, `done/<n>`
    /// is set when its ranks have ended well.
    fn meet(options: &Options, here: usize) -> Result<Self> {
        let (node, count) = (options.node_rank, options.nnodes);
        let host = match (&options.master_addr, count) {
            (Some(host), _) => host.clone(),
            (None, 1) => "127.0.0.1".to_owned(),
            (None, _) => {
                return Err(Error::MissingArgument {
                    argument: "master-addr",
                    builder: "--master-addr",
                    variable: "--master-addr",
                });
            }
        };
        let port = options.master_port.unwrap_or(if count == 1 || options.standalone { 0 } else { PORT });
        let store = Arc::new(if node == 0 {
            if count > 1 && wire::resolve(&host, port).is_ok_and(|addresses| !wire::is_here(&addresses)) {
                say(format_args!(
                    "tchrun: node 0 serves the store, but {host} is not an address of this machine"
                ));
            }
            TcpStore::server(&host, port, JOIN)?
        } else {
            TcpStore::connect(&host, port, JOIN)?
        });
        store.set_timeout(JOIN);
        Self::join(options, here, store.clone(), host).inspect_err(|_| linger(node, count))
    }

    /// Meets them in the store.
    fn join(options: &Options, here: usize, store: Arc<TcpStore>, host: String) -> Result<Self> {
        let (node, count) = (options.node_rank, options.nnodes);
        let keys = PrefixStore::new("tchrun", store.clone());
        if node == 0 {
            let id = options.run_id.clone().unwrap_or_else(nonce);
            keys.set("id", id.as_bytes())?;
        }
        let run_id = String::from_utf8_lossy(&keys.get("id")?).into_owned();
        if let Some(own) = &options.run_id
            && *own != run_id
        {
            let reason =
                format!("another job ({run_id:?}) meets at {host}:{}, this is {own:?}", store.port());
            return Err(Error::Rendezvous { reason });
        }
        if keys.add(&format!("node/{node}"), 1)? > 1 {
            let reason = format!("two nodes claim the number {node}: give each its own --node-rank");
            return Err(refuse(&keys, reason));
        }
        keys.set(&format!("ranks/{node}"), format!("{here} {count}").as_bytes())?;
        let started = Instant::now();
        let (mut first_rank, mut world_size, mut spoke) = (0, 0, false);
        for other in 0..count {
            let key = format!("ranks/{other}");
            while !keys.check(&[&key])? {
                if keys.check(&["failed"])? {
                    let reason = String::from_utf8_lossy(&keys.get("failed")?).into_owned();
                    return Err(Error::Rendezvous { reason });
                }
                if started.elapsed() > JOIN {
                    return Err(Error::Rendezvous { reason: format!("node {other} did not come in time") });
                }
                if !spoke && started.elapsed() > Duration::from_secs(10) {
                    say(format_args!("tchrun: still waiting for node {other}"));
                    spoke = true;
                }
                thread::sleep(Duration::from_millis(20));
            }
            let (ranks, nodes) = ranks_and_nodes(&keys.get(&key)?);
            if nodes != count {
                let reason =
                    format!("node {other} was started with --nnodes {nodes}, node {node} with {count}");
                return Err(refuse(&keys, reason));
            }
            first_rank += if other < node { ranks } else { 0 };
            world_size += ranks;
        }
        let over = Arc::default();
        Ok(Self { store, keys, host, run_id, node, count, first_rank, world_size, over })
    }

    /// Listens to the other nodes; what is told there is why this one ends.
    fn watch(&self) -> Arc<Mutex<Option<String>>> {
        let news = Arc::new(Mutex::new(None));
        if self.count == 1 {
            return news;
        }
        let (keys, node, count) = (self.keys.clone(), self.node, self.count);
        let (over, told) = (self.over.clone(), news.clone());
        thread::spawn(move || {
            let mut seen = vec![(0, Instant::now()); count];
            while !over.load(Ordering::Relaxed) {
                match listen(&keys, node, &mut seen) {
                    Ok(None) => {}
                    Ok(Some(reason)) => *told.lock() = Some(reason),
                    Err(error) if node != 0 => *told.lock() = Some(format!("node 0 is gone: {error}")),
                    Err(_) => {}
                }
                thread::sleep(BEAT);
            }
        });
        news
    }

    /// Tells the other nodes to end; not for longer than [`TELL`], the way to them may be cut.
    fn tell(&self, reason: &str) {
        self.over.store(true, Ordering::Relaxed);
        if self.count == 1 {
            return;
        }
        let (keys, words) = (self.keys.clone(), format!("{reason} (node {})", self.node));
        let (done, told) = mpsc::channel();
        thread::spawn(move || done.send(keys.compare_set("failed", b"", words.as_bytes()).is_ok()));
        match told.recv_timeout(TELL) {
            Ok(true) => self.let_others_read(),
            Ok(false) => {}
            Err(_) => say(format_args!("tchrun: could not tell the other nodes within {TELL:?}")),
        }
    }

    /// Node 0's store goes with this process: not before the others have read why.
    fn let_others_read(&self) {
        linger(self.node, self.count);
    }

    /// This node's ranks have ended well. Node 0 serves the store until all others' have.
    fn leave(&self, news: &Mutex<Option<String>>) -> Result<i32> {
        if self.count > 1 {
            self.keys.set(&format!("done/{}", self.node), b"")?;
            if self.node == 0 {
                let all: Vec<String> = (0..self.count).map(|n| format!("done/{n}")).collect();
                let all: Vec<&str> = all.iter().map(String::as_str).collect();
                while !self.keys.check(&all)? {
                    if let Some(reason) = news.lock().clone() {
                        return Err(Error::Rendezvous { reason });
                    }
                    thread::sleep(Duration::from_millis(50));
                }
            } else {
                // A write is not answered; a read behind it is. Where that is not, node 0 has seen the write and gone.
                if let Err(error) = self.keys.check(&[&format!("done/{}", self.node)]) {
                    tracing::debug!("node 0 has gone: {error}");
                }
            }
        }
        self.over.store(true, Ordering::Relaxed);
        Ok(0)
    }
}

/// On node 0 of several: until the others have read what was told.
fn linger(node: usize, count: usize) {
    if node == 0 && count > 1 {
        thread::sleep(BEAT * 3);
    }
}

/// Ends the job, before it has begun, on its other nodes too. Where all of its nodes are there it runs, and whoever comes
/// to it now is none of its own: that one alone is refused.
fn refuse(keys: &PrefixStore<Arc<TcpStore>>, reason: String) -> Error {
    let told = is_complete(keys).and_then(|complete| match complete {
        true => Ok(()),
        false => keys.compare_set("failed", b"", reason.as_bytes()).map(drop),
    });
    match told {
        Ok(()) => Error::Rendezvous { reason },
        Err(error) => error,
    }
}

/// Whether the job that meets here has as many nodes as its node 0 was told.
fn is_complete(keys: &PrefixStore<Arc<TcpStore>>) -> Result<bool> {
    if !keys.check(&["ranks/0"])? {
        return Ok(false);
    }
    let (_, count) = ranks_and_nodes(&keys.get("ranks/0")?);
    let all: Vec<String> = (0..count).map(|node| format!("ranks/{node}")).collect();
    keys.check(&all.iter().map(String::as_str).collect::<Vec<_>>())
}

/// What a node says of itself: its ranks, and how many nodes it was told of.
fn ranks_and_nodes(value: &[u8]) -> (usize, usize) {
    let value = String::from_utf8_lossy(value);
    let mut numbers = value.split(' ').filter_map(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn listen(
    keys: &PrefixStore<Arc<TcpStore>>,
    node: usize,
    seen: &mut [(i64, Instant)],
) -> Result<Option<String>> {
    if keys.check(&["failed"])? {
        return Ok(Some(String::from_utf8_lossy(&keys.get("failed")?).into_owned()));
    }
    keys.add(&format!("beat/{node}"), 1)?;
    if node == 0 {
        for (other, (beat, since)) in seen.iter_mut().enumerate().skip(1) {
            let now = keys.add(&format!("beat/{other}"), 0)?;
            if now != *beat || keys.check(&[&format!("done/{other}")])? {
                (*beat, *since) = (now, Instant::now());
            } else if since.elapsed() > SILENT {
                let reason = format!("node {other} has been silent for {SILENT:?}");
                keys.compare_set("failed", b"", reason.as_bytes())?;
                return Ok(Some(reason));
            }
        }
    }
    Ok(None)
}
