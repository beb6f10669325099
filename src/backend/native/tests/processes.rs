//! Ranks as processes: one is killed or stopped, and the others learn.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitIdOptions, getpid, kill_process};
use tch::{Device, Kind, Tensor};

use super::{LONG, Rank, none, options, segments};
use crate::backend::{BackendContext, Call, Direction, Op};
use crate::store::FileStore;
use crate::{Error, ReduceOp};

/// The number of the victim among four.
const VICTIM: usize = 2;
const WORLD: usize = 4;
/// How long the others may take to learn (the promise is 2 s; tests share their cores).
const SOON: Duration = Duration::from_secs(5);

/// Set in a rank's process: its number, and where ranks meet and report.
const RANK: &str = "TCH_DISTRIBUTED_NATIVE_TEST_RANK";
const PLACE: &str = "TCH_DISTRIBUTED_NATIVE_TEST_PLACE";

/// Ends the ranks with the test, however it ends.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn report(place: &Path, rank: usize) -> PathBuf {
    place.join(format!("report-{rank}"))
}

/// Starts this test again as four processes that run `body` (what it returns is a rank's report); kills
/// or stops the victim when all have begun, and gives the reports of the others.
fn with_victim(test: &str, transport: &str, signal: Signal, body: fn(&Rank) -> String) -> Vec<String> {
    if let (Ok(rank), Ok(place)) = (std::env::var(RANK), std::env::var(PLACE)) {
        let (rank, place): (usize, PathBuf) = (rank.parse().unwrap(), place.into());
        let context = BackendContext {
            store: Arc::new(FileStore::new(place.join("store")).unwrap()),
            rank,
            size: WORLD,
            ranks: (0..WORLD).collect(),
            timeout: LONG,
            group_name: "victims".to_owned(),
        };
        let backend = options(transport, rank).create(context).unwrap();
        let rank = Rank { backend, rank, world: WORLD };
        for _ in 0..20 {
            rank.all_reduce(&Tensor::ones([100], (Kind::Float, Device::Cpu)), ReduceOp::Sum).unwrap();
        }
        let mut lent = lent(&rank);
        rank.all_reduce(&lent, ReduceOp::Sum).unwrap();
        assert_eq!(lent.mean(Kind::Double).double_value(&[]), WORLD as f64);
        let _ = lent.fill_(1.0);
        // What this rank has sent may still be on its way to another: that is in the call.
        let past = |rank: usize| place.join(format!("past-{rank}"));
        std::fs::write(past(rank.rank), "").unwrap();
        if rank.rank == VICTIM {
            while !(0..WORLD).all(|rank| past(rank).exists()) {
                std::thread::sleep(Duration::from_millis(1));
            }
            kill_process(getpid(), signal).unwrap();
            // A signal may take a moment to reach every thread.
            std::thread::sleep(LONG);
        }
        std::fs::write(report(&place, rank.rank), body(&rank)).unwrap();
        std::process::exit(0);
    }
    let place = tempfile::tempdir().unwrap();
    let name = format!("backend::native::tests::processes::{test}");
    let start = |rank: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture", "--test-threads=1"])
            .env(RANK, rank.to_string())
            .env(PLACE, place.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut ranks = Ranks((0..WORLD).map(start).collect());
    let victim = Pid::from_child(&ranks.0[VICTIM]);
    let limit = Instant::now() + LONG;
    // Until the victim is dead or stopped.
    let id = || rustix::process::WaitId::Pid(victim);
    let options =
        WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    while rustix::process::waitid(id(), options).unwrap().is_none() {
        assert!(Instant::now() < limit, "the ranks should have come up");
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = Instant::now();
    let mut reports = Vec::new();
    for rank in (0..WORLD).filter(|&r| r != VICTIM) {
        let status = loop {
            if let Some(status) = ranks.0[rank].try_wait().unwrap() {
                break status;
            }
            assert!(ended.elapsed() < SOON, "rank {rank} should have learned of the end of rank {VICTIM}");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(status.success(), "rank {rank}: {status}");
        reports.push(std::fs::read_to_string(report(place.path(), rank)).unwrap());
    }
    reports
}

/// All-reduces until it fails: in what.
fn until_failure(rank: &Rank) -> String {
    let tensor = Tensor::ones([10_000], (Kind::Float, Device::Cpu));
    loop {
        match rank.all_reduce(&tensor, ReduceOp::Avg) {
            Ok(()) => {}
            Err(Error::Poisoned { cause }) => return cause.to_string(),
            Err(error) => return error.to_string(),
        }
    }
}

/// A large tensor of ones in memory of the engine's choice: over shared memory the others read it in place.
fn lent(rank: &Rank) -> Tensor {
    let mut tensor = rank.backend.allocate(&[100_000], (Kind::Float, Device::Cpu)).unwrap();
    tensor.fill_(1.0)
}

/// All-reduces such a tensor until it fails: in what.
fn in_place_until_failure(rank: &Rank) -> String {
    let tensor = lent(rank);
    loop {
        match rank.all_reduce(&tensor, ReduceOp::Avg) {
            Ok(()) => assert_eq!(tensor.max().double_value(&[]), 1.0),
            Err(Error::Poisoned { cause }) => return cause.to_string(),
            Err(error) => return error.to_string(),
        }
    }
}

/// Waits for a collective that the progress engine drives.
fn in_async_work(rank: &Rank) -> String {
    let tensor = Tensor::ones([300_000], (Kind::Float, Device::Cpu));
    let call = Rank::call(Op::AllReduce(ReduceOp::Sum), Kind::Float, none(), segments(&[tensor]));
    match rank.submit(call).wait().unwrap_err() {
        Error::Poisoned { cause } => cause.to_string(),
        error => error.to_string(),
    }
}

/// Waits with a timeout of one second.
fn with_timeout(rank: &Rank) -> String {
    let call = Call {
        op: Op::Barrier,
        kind: Kind::Float,
        inputs: none(),
        outputs: none(),
        timeout: Duration::from_secs(1),
    };
    match rank.backend.run(call).unwrap_err() {
        Error::Poisoned { cause } => cause.to_string(),
        error => error.to_string(),
    }
}

/// Waits for a message from whoever sends one.
fn in_a_receive_from_any(rank: &Rank) -> String {
    let into = Tensor::zeros([5], (Kind::Float, Device::Cpu));
    match rank.transfer(Direction::Recv { src: None }, 0, &into).wait().unwrap_err() {
        Error::Poisoned { cause } => cause.to_string(),
        error => error.to_string(),
    }
}

fn killed(test: &str, transport: &str, body: fn(&Rank) -> String) {
    for report in with_victim(test, transport, Signal::KILL, body) {
        assert!(report.starts_with("rank 2 was lost"), "{report}");
    }
}

#[test]
fn a_killed_rank_is_named_by_those_that_wait_in_shared_memory() {
    killed("a_killed_rank_is_named_by_those_that_wait_in_shared_memory", "shm", until_failure);
}

#[test]
fn a_killed_rank_is_named_by_those_that_read_its_tensors_in_place() {
    let test = "a_killed_rank_is_named_by_those_that_read_its_tensors_in_place";
    killed(test, "shm", in_place_until_failure);
}

#[test]
fn a_killed_rank_is_named_by_those_that_wait_at_sockets() {
    killed("a_killed_rank_is_named_by_those_that_wait_at_sockets", "tcp", until_failure);
}

#[test]
fn a_killed_rank_is_named_by_those_on_its_host_and_on_another() {
    killed("a_killed_rank_is_named_by_those_on_its_host_and_on_another", "hosts", until_failure);
}

#[test]
fn a_killed_rank_ends_asynchronous_work_of_several_hosts() {
    killed("a_killed_rank_ends_asynchronous_work_of_several_hosts", "hosts", in_async_work);
}

#[test]
fn a_killed_rank_ends_asynchronous_work_in_shared_memory() {
    killed("a_killed_rank_ends_asynchronous_work_in_shared_memory", "shm", in_async_work);
}

#[test]
fn a_killed_rank_ends_asynchronous_work_at_sockets() {
    killed("a_killed_rank_ends_asynchronous_work_at_sockets", "tcp", in_async_work);
}

#[test]
fn a_killed_rank_ends_a_receive_from_any_rank() {
    killed("a_killed_rank_ends_a_receive_from_any_rank", "shm", in_a_receive_from_any);
}

#[test]
fn a_stopped_rank_is_missing_at_the_timeout() {
    for report in with_victim("a_stopped_rank_is_missing_at_the_timeout", "tcp", Signal::STOP, with_timeout) {
        assert!(report.contains("timed out") && report.contains("rank 2 did not arrive"), "{report}");
    }
}

#[test]
fn groups_open_beyond_the_number_of_descriptors_that_is_allowed_at_first() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    if std::env::var(RANK).is_err() {
        // A process of its own: the limit is that of a whole process.
        let name = "backend::native::tests::processes::groups_open_beyond_the_number_of_descriptors_that_is_allowed_at_first";
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(RANK, "0");
        let output = child.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    assert!(maximum.is_none_or(|m| m > open + 200), "this test needs some descriptors");
    setrlimit(Resource::Nofile, Rlimit { current: Some(open + 20), maximum }).unwrap();
    // Three ranks have six sockets and more each.
    let groups: Vec<_> =
        (0..4).map(|_| super::ranks_with(3, |rank| options("tcp", rank), |rank| rank)).collect();
    assert!(std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 > open + 20);
    for group in groups {
        let ends: Vec<_> =
            group.into_iter().map(|rank| std::thread::spawn(move || rank.shutdown().unwrap())).collect();
        ends.into_iter().for_each(|end| end.join().unwrap());
    }
}
