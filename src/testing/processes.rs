//! Ranks as processes, from one test.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use crate::launch::supervise::{End, RankCommand, Terms, describe, supervise};
use crate::launch::{PARENT, Seat, die_with_parent, free_port, nonce, number};

/// What a rank's process exits with when its body ended. Zero would also be what a test binary exits
/// with that found no test of the name.
const DONE: i32 = 82;
/// How long a world may live, unless `TCH_DISTRIBUTED_TEST_TIMEOUT` says how many seconds.
const LIMIT: Duration = Duration::from_secs(120);

/// Tells a process that it is a rank: of which test and call.
const TEST: &str = "TCH_DISTRIBUTED_TEST";
const CALL: &str = "TCH_DISTRIBUTED_TEST_CALL";

/// How many calls each test of this process has made.
static CALLS: Mutex<Option<HashMap<String, usize>>> = Mutex::new(None);

/// Runs `body` in `n` processes, the ranks of one world: each is this test binary again, running the
/// test `test_name` alone up to this very call, where it runs `body` and ends.
///
/// `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT` and the rest are set as torchrun sets
/// them; rank 0 serves the store. `body` calls `init_process_group` itself. `test_name` is the test's
/// path as the harness prints it (`module::tests::name`, or just `name` in a test file); its last part
/// is enough where the harness runs tests in threads.
///
/// # Panics
/// When a rank fails, which ends all others at once: with that rank's number, how it ended and what
/// it printed. When they have not all ended after two minutes (`TCH_DISTRIBUTED_TEST_TIMEOUT` sets other
/// seconds). When the binary has no test of that name.
///
/// ```no_run
/// // in a test file:
/// # fn wrap() {
/// #[test]
/// fn ranks_add_up() {
///     tch_distributed::testing::run_processes(2, "ranks_add_up", || {
///         assert_eq!(std::env::var("WORLD_SIZE").unwrap(), "2");
///     });
/// }
/// # }
/// ```
#[doc(alias = "MultiProcessTestCase")]
pub fn run_processes<R>(n: usize, test_name: &str, body: impl FnOnce() -> R) {
    let test = full_name(test_name);
    let call = {
        let mut calls = CALLS.lock();
        let calls = calls.get_or_insert_default().entry(test.clone()).or_insert(0);
        *calls += 1;
        *calls
    };
    match own_call(&test) {
        // An earlier call of this test: the parent is beyond it.
        Some(own) if call < own => return,
        Some(own) if call == own => {
            if let Some(parent) = number(PARENT) {
                die_with_parent(parent);
            }
            // What the panic says is printed already.
            let ended = catch_unwind(AssertUnwindSafe(body));
            std::process::exit(if ended.is_ok() { DONE } else { 101 });
        }
        _ => {}
    }
    let seconds = std::env::var("TCH_DISTRIBUTED_TEST_TIMEOUT").ok().and_then(|text| text.parse().ok());
    let limit = seconds.map_or(LIMIT, Duration::from_secs);
    let terms = Terms {
        success: DONE,
        limit: Some(limit),
        print: false,
        keep: 2000,
        signals: false,
        interrupted: &|| None,
    };
    let report = commands(n, &test, call)
        .and_then(|ranks| supervise(ranks, &terms))
        .unwrap_or_else(|e| panic!("the ranks could not be started: {e}"));
    let what = match report.end {
        End::Success => return,
        End::Failed(failure) if failure.status.code() == Some(0) => {
            panic!("no rank came to run_processes: does this binary have a test {test:?}?")
        }
        End::Failed(failure) => format!("rank {} failed: {}", failure.rank, describe(failure.status)),
        End::Limit(ranks) => format!("ranks {ranks:?} had not ended after {limit:?}"),
        End::Interrupted(reason) => reason,
        End::Signal(signal) => format!("signal {signal}"),
    };
    let mut text = format!("{what}\n");
    for (rank, lines) in report.printed {
        lines.iter().for_each(|line| text += &format!("[rank {rank}] {line}\n"));
    }
    panic!("{text}");
}

/// Which call of this test this process is a rank of, if it is one.
fn own_call(test: &str) -> Option<usize> {
    if std::env::var(TEST).is_ok_and(|own| own == test) { number(CALL) } else { None }
}

/// The test's name as the harness knows it: it names a test's thread so.
fn full_name(test_name: &str) -> String {
    match thread::current().name() {
        Some(full) if full.ends_with(&format!("::{test_name}")) => full.to_owned(),
        _ => test_name.to_owned(),
    }
}

fn commands(n: usize, test: &str, call: usize) -> std::io::Result<Vec<RankCommand>> {
    let program = std::env::current_exe()?;
    let port = free_port()?;
    let run_id = nonce();
    let command = |rank| {
        let mut command = Command::new(&program);
        command.args([test, "--exact", "--nocapture", "--include-ignored"]);
        Seat::on_this_host(rank, n, port, &run_id, false).give(&mut command);
        command.env(TEST, test).env(CALL, call.to_string()).env(PARENT, std::process::id().to_string());
        RankCommand { rank, command, error_file: None }
    };
    Ok((0..n).map(command).collect())
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::process::Command;

    use super::run_processes;

    fn variable(name: &str) -> String {
        std::env::var(name).unwrap()
    }

    /// Runs it and gives the panic's text.
    fn failure(n: usize, name: &str, body: impl FnOnce()) -> String {
        let panic = catch_unwind(AssertUnwindSafe(|| run_processes(n, name, body))).unwrap_err();
        panic.downcast_ref::<String>().cloned().unwrap_or_default()
    }

    #[test]
    fn every_rank_runs_the_body_with_its_own_numbers() {
        let dir = std::env::temp_dir().join(format!("run-processes-{}", variable_or_id()));
        std::fs::create_dir_all(&dir).unwrap();
        run_processes(3, "every_rank_runs_the_body_with_its_own_numbers", || {
            assert_eq!(variable("WORLD_SIZE"), "3");
            assert_eq!(variable("LOCAL_RANK"), variable("RANK"));
            assert!(variable("MASTER_PORT").parse::<u16>().unwrap() > 0);
            std::fs::write(dir.join(variable("RANK")), b"").unwrap();
        });
        let ranks: Vec<bool> = (0..4).map(|r| dir.join(r.to_string()).exists()).collect();
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(ranks, [true, true, true, false]);
    }

    /// The parent's process number, in the parent and in its ranks.
    fn variable_or_id() -> String {
        std::env::var(super::PARENT).unwrap_or_else(|_| std::process::id().to_string())
    }

    #[test]
    fn a_second_call_in_one_test_runs_its_own_body() {
        run_processes(2, "a_second_call_in_one_test_runs_its_own_body", || ());
        let text = failure(2, "a_second_call_in_one_test_runs_its_own_body", || panic!("the second"));
        assert!(text.contains("the second"), "{text}");
    }

    #[test]
    fn a_rank_that_panics_is_named_with_its_words_and_ends_the_others() {
        let text = failure(3, "a_rank_that_panics_is_named_with_its_words_and_ends_the_others", || {
            if variable("RANK") == "1" {
                panic!("out of luck");
            }
            std::thread::sleep(std::time::Duration::from_secs(600));
        });
        assert!(text.starts_with("rank 1 failed: exit status 101"), "{text}");
        assert!(text.contains("[rank 1] out of luck"), "{text}");
    }

    #[test]
    fn a_rank_that_is_killed_is_named_with_the_signal() {
        let text = failure(2, "a_rank_that_is_killed_is_named_with_the_signal", || {
            if variable("RANK") == "0" {
                Command::new("kill").arg("-9").arg(std::process::id().to_string()).status().unwrap();
            }
            std::thread::sleep(std::time::Duration::from_secs(600));
        });
        assert!(text.starts_with("rank 0 failed: SIGKILL"), "{text}");
    }

    #[test]
    fn a_name_that_is_no_test_is_a_panic_that_says_so() {
        let text = failure(1, "there_is_no_such_test", || ());
        assert!(text.contains("does this binary have a test \"there_is_no_such_test\""), "{text}");
    }

    #[test]
    fn cores_are_shared_out_among_the_ranks() {
        let given = std::env::var("OMP_NUM_THREADS").is_ok();
        let cores = num_cpus::get();
        run_processes(2, "cores_are_shared_out_among_the_ranks", || {
            let expected = (cores / 2).max(1).to_string();
            assert!(given || variable("OMP_NUM_THREADS") == expected);
        });
    }
}
