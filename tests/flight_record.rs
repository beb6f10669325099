//! The records that failures and a signal leave, merged: which rank stopped where, in words.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tch_distributed::{self as dist, ProcessGroup, ReduceOp};

/// Runs `body` on three ranks that leave their records in a folder; gives what `tchrun diagnose` says, and with which
/// status it ends.
fn diagnosed(test: &str, body: fn(ProcessGroup)) -> (String, Option<i32>) {
    let folder: PathBuf = std::env::temp_dir().join(format!("tch-distributed-test-{test}"));
    if std::env::var_os("RANK").is_none() {
        let _ = std::fs::remove_dir_all(&folder);
    }
    dist::testing::run_processes(3, test, || {
        // SAFETY: a rank runs this test alone, and nothing else of it reads the environment now.
        unsafe { std::env::set_var("TCH_DISTRIBUTED_FLIGHT_DIR", &folder) };
        let options = dist::InitOptions::new().timeout(Duration::from_secs(60));
        body(dist::init_process_group("native", options).unwrap());
    });
    let output = Command::new(env!("CARGO_BIN_EXE_tchrun")).arg("diagnose").arg(&folder).output().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.code())
}

#[test]
fn a_rank_that_hangs_in_its_own_code_is_named_after_a_timeout_and_a_signal() {
    let (text, status) =
        diagnosed("a_rank_that_hangs_in_its_own_code_is_named_after_a_timeout_and_a_signal", |group| {
            group.barrier().unwrap();
            if group.rank() == 2 {
                // Hangs in its own code; then somebody sends the signal that asks for a record.
                std::thread::sleep(Duration::from_secs(2));
                let id = std::process::id().to_string();
                assert!(Command::new("kill").args(["-USR1", &id]).status().unwrap().success());
                std::thread::sleep(Duration::from_millis(500));
            } else {
                let error = group.with_timeout(Duration::from_millis(700)).barrier().unwrap_err();
                assert!(error.to_string().contains("rank 2"), "{error}");
                // The record is written; this rank stays, so that the other is not ended before its own.
                std::thread::sleep(Duration::from_millis(2500));
            }
        });
    assert!(text.contains("rank 2 finished barrier number 0"), "{text}");
    assert!(text.contains("the hang is in the rank's own code"), "{text}");
    assert_eq!(status, Some(1));
}

#[test]
fn a_skipped_collective_is_named_after_the_desync_that_it_is() {
    let (text, status) = diagnosed("a_skipped_collective_is_named_after_the_desync_that_it_is", |group| {
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
    let (text, status) = diagnosed("a_rank_that_went_away_is_named_by_the_records_of_the_others", |group| {
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
