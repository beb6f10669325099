//! A rank that hangs in its own code is named by the records that the others' failure and a signal leave.

use std::process::Command;
use std::time::Duration;

use tch_distributed as dist;

#[test]
fn the_rank_that_hangs_in_its_own_code_is_named_by_the_merged_records() {
    let folder = std::env::temp_dir().join("tch-distributed-test-flight-record");
    if std::env::var_os("RANK").is_none() {
        let _ = std::fs::remove_dir_all(&folder);
    }
    // SAFETY: no other thread of this test binary reads or writes the environment yet.
    unsafe { std::env::set_var("TCH_DISTRIBUTED_FLIGHT_DIR", &folder) };
    dist::testing::run_processes(
        3,
        "the_rank_that_hangs_in_its_own_code_is_named_by_the_merged_records",
        || {
            let group = dist::init_process_group("native", dist::InitOptions::new()).unwrap();
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
        },
    );
    let output = Command::new(env!("CARGO_BIN_EXE_tchrun")).arg("diagnose").arg(&folder).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("rank 2 finished barrier number 0"), "{text}");
    assert!(text.contains("the hang is in the rank's own code"), "{text}");
    assert_eq!(output.status.code(), Some(1));
    std::fs::remove_dir_all(&folder).unwrap();
}
