//! A rank is killed: every group that contains it fails with its name, no other does, and those who are
//! left can begin again.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};
use tch::Tensor;
use tch_distributed::store::FileStore;
use tch_distributed::{
    Error, InitOptions, ReduceOp, Result, destroy_process_group, init_process_group, is_initialized,
};

const TEST: &str = "a_lost_rank_fails_every_group_that_contains_it_and_the_rest_begin_again";
const RANK: &str = "TCHD_LOST_PEER_RANK";
const PLACE: &str = "TCHD_LOST_PEER_PLACE";
const VICTIM: usize = 1;

/// The failure below the poison.
fn cause(error: Error) -> Error {
    match error {
        Error::Poisoned { cause } => match &*cause {
            Error::PeerLost { rank, op, .. } => Error::PeerLost { rank: *rank, op: op.clone(), source: None },
            other => panic!("{other:?}"),
        },
        other => other,
    }
}

fn lost(result: Result<()>) -> usize {
    match cause(result.expect_err("the group has lost a rank")) {
        Error::PeerLost { rank, op, .. } => {
            assert!(!op.is_empty());
            rank
        }
        other => panic!("{other:?}"),
    }
}

fn sum(group: &tch_distributed::ProcessGroup) -> Result<()> {
    group.all_reduce(&mut Tensor::from_slice(&[1.0f32]), ReduceOp::Sum)
}

/// What this process holds: descriptors, threads, and mappings of shared memory of ours.
fn holdings() -> [usize; 3] {
    let entries = |folder: &str| std::fs::read_dir(folder).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let segments = maps.lines().filter(|line| line.contains("memfd:tch-distributed")).count();
    [entries("/proc/self/fd"), entries("/proc/self/task"), segments]
}

/// One of three ranks.
fn rank(rank: usize, place: &Path) {
    let options = |file: &str, rank: usize, size: usize| {
        let store = FileStore::new(place.join(file)).unwrap();
        InitOptions::new().store(store).rank(rank).world_size(size).timeout(Duration::from_secs(60))
    };
    // What a world leaves behind that ends well is the measure.
    let world = init_process_group("native", options("before", rank, 3)).unwrap();
    sum(&world).unwrap();
    drop(world);
    destroy_process_group().unwrap();
    std::thread::sleep(Duration::from_millis(1200));
    let before = holdings();
    let world = init_process_group("native", options("first", rank, 3)).unwrap();
    let pairs = [[0, 1], [1, 2], [0, 2]].map(|ranks| world.new_group(&ranks).unwrap());
    for group in std::iter::once(&world).chain(pairs.iter().flatten()) {
        sum(group).unwrap();
    }
    world.barrier().unwrap();
    // What this rank has sent may still be on its way to another: that is in the barrier.
    let past = |rank: usize| place.join(format!("past-{rank}"));
    std::fs::write(past(rank), "").unwrap();
    if rank == VICTIM {
        while !(0..3).all(|rank| past(rank).exists()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        kill_process(getpid(), Signal::KILL).unwrap();
        std::thread::sleep(Duration::from_secs(60));
    }
    let begin = Instant::now();
    assert_eq!(lost(sum(&world)), VICTIM);
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    // The groups with the victim fail without being tried; ranks in their errors are theirs.
    match (&pairs[0], &pairs[1]) {
        (Some(with), None) => assert_eq!(lost(sum(with)), 1),
        (None, Some(with)) => assert_eq!(lost(sum(with)), 0),
        _ => panic!("rank {rank} is in one of them"),
    }
    sum(pairs[2].as_ref().unwrap()).expect("a group without the victim goes on");
    let _ = destroy_process_group();
    assert!(!is_initialized());
    // Those who are left, again.
    let again = init_process_group("native", options("second", rank / 2, 2)).unwrap();
    sum(&again).unwrap();
    drop((world, pairs, again));
    destroy_process_group().unwrap();
    let limit = Instant::now() + Duration::from_secs(10);
    while holdings().iter().zip(before).any(|(&now, before)| now > before) {
        assert!(
            Instant::now() < limit,
            "{before:?} descriptors, threads and segments became {:?}",
            holdings()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    std::fs::write(place.join(format!("done-{rank}")), "").unwrap();
}

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

#[test]
fn a_lost_rank_fails_every_group_that_contains_it_and_the_rest_begin_again() {
    if let (Ok(number), Ok(place)) = (std::env::var(RANK), std::env::var(PLACE)) {
        rank(number.parse().unwrap(), Path::new(&place));
        std::process::exit(0);
    }
    let place = tempfile::tempdir().unwrap();
    let start = |rank: usize| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env(RANK, rank.to_string())
            .env(PLACE, place.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut ranks = Ranks((0..3).map(start).collect());
    let limit = Instant::now() + Duration::from_secs(150);
    let done = |rank: usize| place.path().join(format!("done-{rank}")).exists();
    while !(done(0) && done(2)) {
        assert!(Instant::now() < limit, "the ranks that are left did not come through");
        for rank in [0, 2] {
            if let Some(status) = ranks.0[rank].try_wait().unwrap() {
                assert!(status.success() || done(rank), "rank {rank}: {status}");
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
