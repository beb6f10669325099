//! The records that failures and a signal leave, merged: which rank stopped where, in words.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tch_distributed::{self as dist, ProcessGroup, ReduceOp};

/// Runs `body` on three ranks that leave their records in a folder; gives what `tchrun diagnose` says, and with which
/// status it ends.
fn diagnosed(test: &str, body: fn(&Path)) -> (String, Option<i32>) {
    // One folder for this process and the ranks that it starts.
    let is_rank = std::env::var_os("RANK").is_some();
    let run = if is_rank { std::os::unix::process::parent_id() } else { std::process::id() };
    let folder = std::env::temp_dir().join(format!("tch-distributed-test-{test}-{run}"));
    if !is_rank && folder.exists() {
        // Of a run with this number that was cut off.
        std::fs::remove_dir_all(&folder).unwrap();
    }
    dist::testing::run_processes(3, test, || {
        // SAFETY: a rank runs this test alone, and nothing else of it reads the environment now.
        unsafe { std::env::set_var("TCH_DISTRIBUTED_FLIGHT_DIR", &folder) };
        body(&folder);
    });
    let output = Command::new(env!("CARGO_BIN_EXE_tchrun")).arg("diagnose").arg(&folder).output().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.code())
}

/// The world, with patience for a slow machine.
fn world() -> ProcessGroup {
    let options = dist::InitOptions::new().timeout(Duration::from_secs(60));
    dist::init_process_group("native", options).unwrap()
}

/// Waits until it is so, at most a minute.
fn until(what: &str, so: impl Fn() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(60), "a minute went by before {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn record(folder: &Path, rank: usize) -> PathBuf {
    folder.join(format!("flight-rank-{rank}.json"))
}

/// Somebody sends this rank the signal that asks for its record.
fn is_asked(folder: &Path, rank: usize) {
    let id = std::process::id().to_string();
    until("the record that the signal asks for was there", || {
        assert!(Command::new("kill").args(["-USR1", &id]).status().unwrap().success());
        std::thread::sleep(Duration::from_millis(50));
        std::fs::read_to_string(record(folder, rank)).is_ok_and(|text| text.contains("SIGUSR1"))
    });
}

#[test]
fn a_rank_that_hangs_in_its_own_code_is_named_after_a_timeout_and_a_signal() {
    let (text, status) =
        diagnosed("a_rank_that_hangs_in_its_own_code_is_named_after_a_timeout_and_a_signal", |folder| {
            let group = world();
            group.barrier().unwrap();
            if group.rank() == 2 {
                // Hangs in its own code until the others have given up.
                until("the others had left their records", || (0..2).all(|r| record(folder, r).exists()));
                is_asked(folder, 2);
            } else {
                let error = group.with_timeout(Duration::from_secs(4)).barrier().unwrap_err();
                assert!(error.to_string().contains("rank 2"), "{error}");
            }
        });
    assert!(text.contains("rank 2 finished barrier number 0"), "{text}");
    assert!(text.contains("the hang is in the rank's own code"), "{text}");
    assert!(!text.contains("in the communication"), "{text}");
    assert_eq!(status, Some(1));
}

#[test]
fn a_rank_that_does_not_send_what_another_waits_for_is_named() {
    let (text, status) = diagnosed("a_rank_that_does_not_send_what_another_waits_for_is_named", |folder| {
        let group = world();
        group.barrier().unwrap();
        if group.rank() == 1 {
            let mut t = Tensor::ones([4], (Kind::Float, Device::Cpu));
            group.with_timeout(Duration::from_secs(4)).recv(&mut t, 2, 9).unwrap_err();
        } else {
            // Rank 2 hangs in its own code; rank 0 has nothing to do.
            until("the one that waits had left its record", || record(folder, 1).exists());
            is_asked(folder, group.rank());
        }
    });
    let first = text.lines().next().unwrap();
    assert!(first.contains("rank 1 failed in recv number 0 from rank 2 with tag 9"), "{text}");
    assert!(first.contains("the hang is in the own code of rank 2"), "{text}");
    assert_eq!(status, Some(1));
}

#[test]
fn a_hang_in_communication_is_told_apart_from_one_in_a_rank_s_own_code() {
    let (text, status) =
        diagnosed("a_hang_in_communication_is_told_apart_from_one_in_a_rank_s_own_code", |folder| {
            dist::register_backend("deaf", deaf::create).unwrap();
            let group = dist::init_process_group("deaf", dist::InitOptions::new()).unwrap();
            group.barrier().unwrap();
            let rank = group.rank();
            // Every rank calls, and none gets out of it.
            std::thread::spawn(move || group.all_reduce(&mut Tensor::from(1_i64), ReduceOp::Sum));
            until("the call was made", deaf::has_been_called);
            is_asked(folder, rank);
            until("every record was there", || (0..3).all(|r| record(folder, r).exists()));
        });
    assert!(text.contains("every rank has called all_reduce number 1"), "{text}");
    assert!(text.contains("the hang is in the communication"), "{text}");
    assert!(!text.contains("own code"), "{text}");
    assert_eq!(status, Some(1));
}

/// The native backend, except that nothing is ever heard of an `all_reduce` again.
mod deaf {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use tch_distributed::backend::{
        BackendContext, Call, CollectiveBackend, Completion, Op, Transfer, native,
    };
    use tch_distributed::{Error, Result};

    static CALLED: AtomicBool = AtomicBool::new(false);

    pub(super) fn has_been_called() -> bool {
        CALLED.load(Ordering::SeqCst)
    }

    struct Deaf(Arc<dyn CollectiveBackend>);

    pub(super) fn create(context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
        Ok(Arc::new(Deaf(native::create(context)?)))
    }

    impl CollectiveBackend for Deaf {
        fn name(&self) -> &str {
            "deaf"
        }

        fn submit(&self, call: Call<'static>, done: Completion) {
            if matches!(call.op, Op::AllReduce(_)) {
                CALLED.store(true, Ordering::SeqCst);
                return std::mem::forget((call, done));
            }
            self.0.submit(call, done);
        }

        fn transfer(&self, transfers: Vec<Transfer>) {
            self.0.transfer(transfers);
        }

        fn failure(&self) -> Option<Arc<Error>> {
            self.0.failure()
        }

        fn abort(&self, cause: &Arc<Error>) {
            self.0.abort(cause);
        }

        fn shutdown(&self, timeout: Duration) -> Result<()> {
            self.0.shutdown(timeout)
        }
    }
}

#[test]
fn a_skipped_collective_is_named_after_the_desync_that_it_is() {
    let (text, status) = diagnosed("a_skipped_collective_is_named_after_the_desync_that_it_is", |_| {
        let group = world();
        group.barrier().unwrap();
        let mut t = Tensor::ones([4], (Kind::Float, Device::Cpu));
        // Rank 1 leaves the all_reduce out and is one call ahead of the others.
        if group.rank() == 1 {
            group.broadcast(&mut t, 0).unwrap_err();
        } else {
            let ended = group.all_reduce(&mut t, ReduceOp::Sum).and_then(|()| group.broadcast(&mut t, 0));
            ended.unwrap_err();
        }
    });
    assert!(text.contains("disagree at collective number 1"), "{text}");
    assert!(text.contains("rank 1 called broadcast"), "{text}");
    assert!(text.contains("each of ranks 0, 2 called all_reduce"), "{text}");
    assert_eq!(status, Some(1));
}

#[test]
fn a_rank_that_went_away_is_named_by_the_records_of_the_others() {
    let (text, status) = diagnosed("a_rank_that_went_away_is_named_by_the_records_of_the_others", |_| {
        let group = world();
        group.barrier().unwrap();
        // Rank 0 ends here, as if it were killed: without a word.
        if group.rank() != 0 {
            let error = group.barrier().unwrap_err();
            assert!(matches!(error, dist::Error::PeerLost { rank: 0, .. }), "{error}");
        }
    });
    assert!(text.contains("rank 0 left no record"), "{text}");
    assert_eq!(status, Some(1));
}
