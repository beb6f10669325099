//! Ranks as processes: the same numbers, and failures that everybody hears of.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use tch::{Device, Kind, nn};
use tch_distributed as dist;

use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::equivalence::{as_rank, compare};
use crate::support::{Net, batch};

#[test]
fn one_to_four_processes_train_as_one_process_does_in_f32_and_f64() {
    for ranks in 1..=4 {
        let name = "processes::one_to_four_processes_train_as_one_process_does_in_f32_and_f64";
        dist::testing::run_processes(ranks, name, || {
            let group = dist::init_process_group("native", dist::InitOptions::new()).unwrap();
            for kind in [Kind::Float, Kind::Double] {
                let trace = as_rank(&group, kind, DdpOptions::new().bucket_cap_mb(0.0005)).unwrap();
                let traces = group.gather_object(&trace, 0).unwrap();
                if let Some(traces) = traces {
                    compare(&traces, kind, &format!("{ranks} processes, {kind:?}"));
                }
            }
            dist::destroy_process_group().unwrap();
        });
    }
}

/// Says that this process is a rank of a world whose ranks are to fail.
const FAILING_WORLD: &str = "DDP_TEST_FAILING_WORLD";
const PATIENCE: &str = "DDP_TEST_PATIENCE";
const SIZE: usize = 4;

/// A rank's life: trains without end; says `training` after some steps, and at its end how it ended.
fn be_a_rank() -> ! {
    let seconds = std::env::var(PATIENCE).unwrap().parse().unwrap();
    let options = dist::InitOptions::new().timeout(Duration::from_secs(seconds));
    let life = || -> dist::Result<()> {
        let group = dist::init_process_group("native", options)?;
        let vs = nn::VarStore::new(Device::Cpu);
        let ddp = DistributedDataParallel::new(Net::new(&vs), &vs, &group, DdpOptions::new())?;
        for step in 0.. {
            let (input, target) = batch(step % 100, 8, Kind::Float);
            ddp.backward(&(ddp.forward(&input)? - target).square().mean(Kind::Float))?;
            if step == 20 {
                println!("training");
            }
        }
        Ok(())
    };
    println!("ended: {:?}", life().unwrap_err());
    std::process::exit(0);
}

/// A rank's process and what it prints, line by line.
struct Rank {
    process: Child,
    lines: mpsc::Receiver<String>,
}

/// Ranks of one world, ended when this is dropped.
struct World(Vec<Rank>);

impl World {
    /// Starts `ranks`; each is this test again.
    fn start(test: &str, ranks: std::ops::Range<usize>, patience: u64) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let start = |rank: usize| {
            let mut process = Command::new(std::env::current_exe().unwrap())
                .args([test, "--exact", "--nocapture", "--test-threads=1"])
                .env(FAILING_WORLD, "1")
                .env(PATIENCE, patience.to_string())
                .env("RANK", rank.to_string())
                .env("LOCAL_RANK", rank.to_string())
                .env("WORLD_SIZE", SIZE.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", port.to_string())
                .env("OMP_NUM_THREADS", "1")
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let stdout = BufReader::new(process.stdout.take().unwrap());
            let (send, lines) = mpsc::channel();
            std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|l| send.send(l)));
            Rank { process, lines }
        };
        Self(ranks.map(start).collect())
    }

    /// The next line of a rank that has `word` in it, if it comes before the deadline.
    fn line_with(&self, rank: usize, word: &str, deadline: Instant) -> String {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.0[rank].lines.recv_timeout(left) {
                Ok(line) if line.contains(word) => return line,
                Ok(_) => {}
                Err(_) => panic!("rank {rank} had not said {word:?} at the deadline, or ended before"),
            }
        }
    }

    /// Waits for a rank's process to be gone.
    fn gone(&mut self, rank: usize, deadline: Instant) {
        while self.0[rank].process.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "rank {rank} was still there at the deadline");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for rank in &mut self.0 {
            let _ = rank.process.kill();
            let _ = rank.process.wait();
        }
    }
}

fn seconds_from_now(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

#[test]
fn killing_any_rank_in_training_ends_all_others_within_two_seconds_with_its_number() {
    if std::env::var_os(FAILING_WORLD).is_some() {
        be_a_rank();
    }
    let test = "processes::killing_any_rank_in_training_ends_all_others_within_two_seconds_with_its_number";
    for victim in 0..SIZE {
        // A machine that is busy with other things may hold up one of these worlds, not all three.
        let quick = (0..3).any(|_| told_after_killing(victim, test) < Duration::from_secs(2));
        assert!(quick, "three times the others took longer to hear of the end of rank {victim}");
    }
}

/// Kills a rank in training: how long it took until all others had said whom they lost.
fn told_after_killing(victim: usize, test: &str) -> Duration {
    let mut world = World::start(test, 0..SIZE, 60);
    (0..SIZE).for_each(|rank| drop(world.line_with(rank, "training", seconds_from_now(60))));
    world.0[victim].process.kill().unwrap();
    let killed = Instant::now();
    let (told, gone) = (seconds_from_now(30), seconds_from_now(60));
    let others = || (0..SIZE).filter(move |&rank| rank != victim);
    for rank in others() {
        let said = world.line_with(rank, "ended", told);
        assert!(said.contains(&format!("PeerLost {{ rank: {victim},")), "rank {rank} said {said:?}");
    }
    let took = killed.elapsed();
    // Taking libtorch down takes the time that a busy machine gives it.
    others().for_each(|rank| world.gone(rank, gone));
    took
}

#[test]
fn a_rank_that_never_comes_is_named() {
    if std::env::var_os(FAILING_WORLD).is_some() {
        be_a_rank();
    }
    // Time enough for a busy machine to start the others: they are not to be named.
    let world = World::start("processes::a_rank_that_never_comes_is_named", 0..SIZE - 1, 20);
    let deadline = seconds_from_now(120);
    for rank in 0..SIZE - 1 {
        let said = world.line_with(rank, "ended", deadline);
        assert!(said.contains("rank 3") || said.contains("missing: [3]"), "rank {rank} said {said:?}");
    }
}

#[test]
fn a_rank_that_stops_stepping_is_a_timeout_that_names_it() {
    let options = dist::InitOptions::new().timeout(Duration::from_secs(60));
    let given_up = AtomicUsize::new(0);
    dist::testing::run_threads_on("native", options, 3, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let hurried = group.with_timeout(Duration::from_secs(3));
        let ddp = DistributedDataParallel::new(Net::new(&vs), &vs, &hurried, DdpOptions::new()).unwrap();
        let step = || {
            let (input, target) = batch(0, 8, Kind::Float);
            ddp.backward(&(ddp.forward(&input)? - target).square().mean(Kind::Float))
        };
        step().unwrap();
        if group.rank() == 1 {
            // Does something else, until the others have given up.
            let until = Instant::now() + Duration::from_secs(60);
            while given_up.load(Ordering::SeqCst) < 2 {
                assert!(Instant::now() < until, "the others do not give up");
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(step().is_err());
            return;
        }
        let error = step().unwrap_err();
        given_up.fetch_add(1, Ordering::SeqCst);
        match error {
            dist::Error::Timeout { missing, .. } => assert_eq!(missing, [1]),
            dist::Error::Poisoned { cause } => assert!(matches!(*cause, dist::Error::Timeout { .. })),
            other => panic!("{other}"),
        }
    });
}
