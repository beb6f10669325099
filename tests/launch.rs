//! Launchers, from outside: `launch::local` in a program of its own, and `tchrun` around any program.
//!
//! A test of `local` runs this test binary again, on itself alone, with `PLAY` set: that process plays
//! the user's program.

use std::io::Read;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tch_distributed as dist;
use tch_distributed::store::{Store, TcpStore};

const PLAY: &str = "LAUNCH_TEST_PLAYS";
const LIMIT: Duration = Duration::from_secs(60);

/// A program that finds every signal as it is by default: a script's background job, as this test may be one, is
/// to ignore interrupts, and so would be what it starts.
fn undisturbed(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = clean(Command::new("env"));
    command.arg("--default-signal").arg(program);
    command
}

fn tchrun(arguments: &[&str]) -> Command {
    let mut command = undisturbed(env!("CARGO_BIN_EXE_tchrun"));
    command.args(arguments);
    command
}

fn clean(mut command: Command) -> Command {
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// This binary, playing the program that `test` is when it plays.
fn program(test: &str) -> Command {
    let mut command = undisturbed(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(PLAY, "1");
    command
}

fn plays() -> bool {
    std::env::var_os(PLAY).is_some()
}

/// Runs to the end, within the limit.
fn finish(mut command: Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait(child)
}

fn wait(mut child: Child) -> Output {
    let mut pipes = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let out = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipes.0.read_to_end(&mut bytes).map(|_| bytes)
    });
    let err = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipes.1.read_to_end(&mut bytes).map(|_| bytes)
    });
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("it did not end in {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    Output { status, stdout: out.join().unwrap().unwrap(), stderr: err.join().unwrap().unwrap() }
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until no process has this word among its arguments.
fn gone(word: &str) {
    let started = Instant::now();
    loop {
        let alive: Vec<String> = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
            .map(|line| String::from_utf8_lossy(&line).into_owned())
            .filter(|line| line.contains(word))
            .collect();
        if alive.is_empty() {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "still there: {alive:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// Reads the child's stdout until a line holds the word.
fn until(child: &mut Child, word: &str) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while !text.contains(word) {
        assert_eq!(child.stdout.as_mut().unwrap().read(&mut byte).unwrap(), 1, "it ended: {text}");
        text.push(byte[0] as char);
    }
    text
}

/// A body that says something, on a line of its own: on one core the test's name stands in front of what it prints.
fn says(text: &str) -> Result<(), ()> {
    println!("\n{text}");
    Ok(())
}

fn unique(word: &str) -> String {
    format!("{word}-{}", std::process::id())
}

#[test]
fn local_runs_the_body_once_a_rank_and_the_ranks_reach_each_other() {
    let name = "local_runs_the_body_once_a_rank_and_the_ranks_reach_each_other";
    if plays() {
        dist::launch::local(3, || -> dist::Result<()> {
            let number = |name: &str| std::env::var(name).unwrap().parse::<u16>().unwrap();
            let store =
                TcpStore::connect(std::env::var("MASTER_ADDR").unwrap(), number("MASTER_PORT"), LIMIT)?;
            store.add("sum", number("RANK").into())?;
            store.set(&format!("rank {}", number("RANK")), b"")?;
            store.wait(&["rank 0", "rank 1", "rank 2"], LIMIT)?;
            println!("\nsum {} local {}", store.add("sum", 0)?, number("LOCAL_RANK"));
            Ok(())
        })
        .unwrap();
        println!("all done");
        return;
    }
    let output = finish(program(name));
    let text = out(&output);
    assert!(output.status.success(), "{text}{}", err(&output));
    for rank in 0..3 {
        assert!(text.contains(&format!("[rank {rank}] sum 3 local {rank}\n")), "{text}");
    }
    assert_eq!(text.matches("all done").count(), 1, "{text}");
}

#[test]
fn the_first_error_of_a_rank_is_what_local_returns_and_the_others_end() {
    let name = "the_first_error_of_a_rank_is_what_local_returns_and_the_others_end";
    if plays() {
        let result = dist::launch::local(3, || {
            if std::env::var("RANK").unwrap() == "1" {
                return Err("no such file: data.bin");
            }
            std::thread::sleep(Duration::from_secs(600));
            Ok(())
        });
        println!("result: {}", result.unwrap_err());
        return;
    }
    let output = finish(program(name));
    let text = out(&output);
    assert!(text.contains("result: rank 1 failed: \"no such file: data.bin\""), "{text}{}", err(&output));
}

#[test]
fn a_rank_that_is_killed_is_what_local_returns() {
    let name = "a_rank_that_is_killed_is_what_local_returns";
    if plays() {
        let result = dist::launch::local(2, || {
            if std::env::var("RANK").unwrap() == "1" {
                let me = std::process::id().to_string();
                Command::new("kill").args(["-9", &me]).status().unwrap();
            }
            std::thread::sleep(Duration::from_secs(600));
            Ok::<(), ()>(())
        });
        println!("result: {}", result.unwrap_err());
        return;
    }
    let text = out(&finish(program(name)));
    assert!(text.contains("result: rank 1 failed: SIGKILL"), "{text}");
}

#[test]
fn two_calls_of_local_each_run_their_own_body() {
    let name = "two_calls_of_local_each_run_their_own_body";
    if plays() {
        dist::launch::local(2, || says("first")).unwrap();
        dist::launch::local(1, || says("second")).unwrap();
        return;
    }
    let text = out(&finish(program(name)));
    assert_eq!((text.matches("] first").count(), text.matches("] second").count()), (2, 1), "{text}");
}

#[test]
fn a_call_that_only_the_first_process_makes_does_not_take_the_place_of_another() {
    let name = "a_call_that_only_the_first_process_makes_does_not_take_the_place_of_another";
    if plays() {
        // As a program that prepares its data where they are not there yet: the ranks of the second call find them.
        let data = std::env::var("DATA").unwrap();
        if !std::path::Path::new(&data).exists() {
            dist::launch::local(1, || std::fs::write(&data, "")).unwrap();
        }
        dist::launch::local(2, || says("trained")).unwrap();
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = program(name);
    command.env("DATA", folder.path().join("data"));
    let text = out(&finish(command));
    assert_eq!(text.matches("] trained").count(), 2, "{text}");
}

#[test]
fn ranks_that_end_without_coming_to_the_call_are_an_error() {
    let name = "ranks_that_end_without_coming_to_the_call_are_an_error";
    if plays() {
        if std::env::var_os("RANK").is_none() {
            println!("result: {}", dist::launch::local(2, || says("trained")).unwrap_err());
        }
        return;
    }
    let text = out(&finish(program(name)));
    assert!(text.contains("result: rank 0 failed: its program ended well, but without coming"), "{text}");
}

#[test]
fn a_program_that_a_rank_starts_may_start_ranks_of_its_own() {
    let name = "a_program_that_a_rank_starts_may_start_ranks_of_its_own";
    if plays() {
        const INNER: &str = "LAUNCH_TEST_IS_INNER";
        if std::env::var_os(INNER).is_some() {
            dist::launch::local(2, || says("inner")).unwrap();
            return;
        }
        dist::launch::local(1, || {
            let output = finish({
                let mut command = Command::new(std::env::current_exe().unwrap());
                command.args(std::env::args_os().skip(1)).env(INNER, "1");
                command
            });
            print!("{}", out(&output));
            assert!(output.status.success(), "{}", err(&output));
            Ok::<(), ()>(())
        })
        .unwrap();
        return;
    }
    let text = out(&finish(program(name)));
    assert_eq!(text.matches("] inner").count(), 2, "{text}");
}

#[test]
fn under_a_launcher_local_just_runs_the_body() {
    let name = "under_a_launcher_local_just_runs_the_body";
    if plays() {
        dist::launch::local(7, || says(&format!("body in {}", std::process::id()))).unwrap();
        println!("main in {}", std::process::id());
        return;
    }
    for (rank, size) in [
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ] {
        let mut command = program(name);
        command.env(rank, "0").env(size, "1");
        let text = out(&finish(command));
        let number =
            |word: &str| text.split(word).nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
        assert_eq!(number("body in "), number("main in "), "{text}");
    }
}

#[test]
fn an_interrupted_local_ends_all_its_ranks_and_itself() {
    let name = "an_interrupted_local_ends_all_its_ranks_and_itself";
    if plays() {
        let _ = dist::launch::local(2, || {
            let word = std::env::var("WORD").unwrap();
            let mut below = Command::new("sh").args(["-c", "sleep 600; true", &word]).spawn().unwrap();
            println!("ready");
            below.wait().unwrap();
            Ok::<(), ()>(())
        });
        return;
    }
    for how in ["-INT", "-TERM"] {
        let word = unique(&format!("interrupted{how}"));
        let mut command = program(name);
        command.env("WORD", &word).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        until(&mut child, "ready\n");
        until(&mut child, "ready\n");
        signal(&child, how);
        let output = wait(child);
        assert!(!output.status.success(), "{}", out(&output));
        gone(&word);
    }
}

#[test]
fn a_tchrun_that_is_to_ignore_hang_ups_goes_on() {
    let word = unique("nohup");
    let mut command = clean(Command::new("nohup"));
    command.arg(env!("CARGO_BIN_EXE_tchrun"));
    command.args(["--nproc-per-node", "1", "sh", "-c", &format!("echo begun; sleep 1; echo {word}")]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    until(&mut child, "begun");
    signal(&child, "-HUP");
    let output = wait(child);
    assert!(output.status.success() && out(&output).contains(&word), "{}{}", out(&output), err(&output));
}

#[test]
fn tchrun_gives_each_rank_torchruns_variables_and_prefixes_its_lines() {
    let script = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $GROUP_RANK $TORCHELASTIC_RESTART_COUNT; \
                  echo oops >&2";
    for flag in ["--nproc-per-node", "--nproc_per_node"] {
        let output = finish(tchrun(&[flag, "3", "sh", "-c", script]));
        assert!(output.status.success(), "{}", err(&output));
        for rank in 0..3 {
            assert!(
                out(&output).contains(&format!("[rank {rank}] {rank} {rank} 3 3 0 0\n")),
                "{}",
                out(&output)
            );
            assert!(err(&output).contains(&format!("[rank {rank}] oops\n")), "{}", err(&output));
        }
    }
}

#[test]
fn tchrun_ends_with_the_code_of_the_rank_that_failed_first_and_says_which() {
    let script = "if [ $RANK = 1 ]; then echo bad luck >&2; exit 7; fi; sleep 600";
    let output = finish(tchrun(&["--nproc-per-node", "3", "sh", "-c", script, &unique("first-code")]));
    assert_eq!(output.status.code(), Some(7));
    let text = err(&output);
    assert!(text.contains("rank 1 of sh failed: exit status 7"), "{text}");
    assert!(text.contains("    bad luck"), "{text}");
    gone(&unique("first-code"));
}

#[test]
fn tchrun_names_the_signal_that_killed_a_rank() {
    let script = "if [ $RANK = 2 ]; then kill -9 $$; fi; sleep 600";
    let output = finish(tchrun(&["--nproc-per-node", "3", "sh", "-c", script, &unique("nine")]));
    assert_eq!(output.status.code(), Some(128 + 9));
    assert!(err(&output).contains("rank 2 of sh failed: SIGKILL"), "{}", err(&output));
    gone(&unique("nine"));
}

#[test]
fn an_interrupted_or_killed_tchrun_leaves_no_process() {
    for how in ["-INT", "-TERM", "-KILL"] {
        let word = unique(&format!("left{how}"));
        let script = "echo ready; sleep 600 & wait";
        let mut command = tchrun(&["--nproc-per-node", "2", "sh", "-c", script, &word]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        until(&mut child, "ready\n");
        until(&mut child, "ready\n");
        signal(&child, how);
        let _ = child.wait().unwrap();
        gone(&word);
    }
}

#[test]
fn a_program_that_is_not_there_is_said() {
    let output = finish(tchrun(&["--nproc-per-node", "2", "./no-such-program"]));
    assert_eq!(output.status.code(), Some(127));
    assert!(err(&output).contains("cannot run ./no-such-program"), "{}", err(&output));
}

#[test]
fn what_is_wrong_with_tchruns_arguments_is_said() {
    for (arguments, words) in [
        (vec!["--nproc-per-node", "none", "true"], "nproc-per-node"),
        (vec!["--nnodes", "2", "--node-rank", "2", "true"], "node-rank"),
        (vec!["--nnodes", "2", "--node-rank", "0", "true"], "--master-addr"),
        (
            vec!["--nnodes", "2", "--node-rank", "1", "--master-addr", "no-such.invalid", "true"],
            "does not resolve",
        ),
    ] {
        let output = finish(tchrun(&arguments));
        assert!(!output.status.success());
        assert!(err(&output).contains(words), "{arguments:?}: {}", err(&output));
    }
}

fn free_port() -> String {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    free.local_addr().unwrap().port().to_string()
}

/// One node of several on this machine.
fn node(number: usize, count: usize, port: &str, more: &[&str], script: &str) -> Child {
    let (number, count) = (number.to_string(), count.to_string());
    let mut command = tchrun(&["--nnodes", &count, "--node-rank", &number, "--master-addr", "127.0.0.1"]);
    command.args(["--master-port", port]).args(more).args(["sh", "-c", script]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Nodes on this machine with so many ranks; each node's output.
fn nodes<const N: usize>(script: [&str; N], ranks: [&str; N]) -> [Output; N] {
    let port = free_port();
    // Node 0 last.
    let mut all: Vec<Child> =
        (0..N).rev().map(|n| node(n, N, &port, &["--nproc-per-node", ranks[n]], script[n])).collect();
    all.reverse();
    let mut all = all.into_iter();
    [(); N].map(|()| wait(all.next().unwrap()))
}

#[test]
fn ranks_of_several_nodes_are_numbered_through() {
    let script = "echo $RANK $LOCAL_RANK $WORLD_SIZE $GROUP_RANK $MASTER_PORT";
    let [first, second] = nodes([script; 2], ["1", "2"]);
    assert!(first.status.success() && second.status.success(), "{}{}", err(&first), err(&second));
    assert!(out(&first).contains("[rank 0] 0 0 3 0 "), "{}", out(&first));
    assert!(out(&second).contains("[rank 1] 1 0 3 1 ") && out(&second).contains("[rank 2] 2 1 3 1 "));
}

#[test]
fn a_rank_that_fails_on_one_node_ends_the_ranks_of_the_others() {
    let [first, second] = nodes(["sleep 600", "exit 5"], ["1", "1"]);
    assert_eq!(second.status.code(), Some(5));
    assert!(!first.status.success());
    assert!(err(&first).contains("rank 1 failed: exit status 5"), "{}", err(&first));
}

#[test]
fn ranks_share_the_cores_unless_told_otherwise() {
    let cores = num_cpus::get();
    let mine = |ranks: usize| format!("] {}\n", (cores / ranks).max(1));
    let output = finish(tchrun(&["--nproc-per-node", "2", "sh", "-c", "echo $OMP_NUM_THREADS"]));
    assert_eq!(out(&output).matches(&mine(2)).count(), 2, "{}", out(&output));
    let mut told = tchrun(&["--nproc-per-node", "2", "sh", "-c", "echo $OMP_NUM_THREADS"]);
    told.env("OMP_NUM_THREADS", "13");
    assert_eq!(out(&finish(told)).matches("] 13\n").count(), 2);
}

#[test]
fn every_node_of_three_is_told_which_rank_failed_on_another() {
    let [first, second, third] = nodes(["sleep 600", "exit 5", "sleep 600"], ["1"; 3]);
    assert_eq!(second.status.code(), Some(5));
    for other in [first, third] {
        assert!(!other.status.success());
        assert!(err(&other).contains("rank 1 failed: exit status 5"), "{}", err(&other));
    }
}

#[test]
fn a_node_of_another_job_at_the_same_address_ends_alone() {
    let (port, folder) = (free_port(), tempfile::tempdir().unwrap());
    let over = folder.path().join("over").display().to_string();
    let script = format!("echo begun; while [ ! -e {over} ]; do sleep 0.1; done; echo finished");
    let start =
        |number: usize, id: &str| node(number, 2, &port, &["--nproc-per-node", "1", "--run-id", id], &script);
    let mut first = start(0, "a");
    // The stranger is there before node 1 of this job, and once more while the job runs.
    let early = wait(start(1, "b"));
    let mut second = start(1, "a");
    until(&mut first, "begun");
    until(&mut second, "begun");
    let late = wait(start(1, "b"));
    let unnamed = wait(node(1, 2, &port, &["--nproc-per-node", "1"], "echo never"));
    // The job's nodes ask every half second what was told.
    std::thread::sleep(Duration::from_secs(2));
    std::fs::write(&over, "").unwrap();
    for job in [wait(first), wait(second)] {
        assert!(job.status.success() && out(&job).contains("finished"), "{}{}", out(&job), err(&job));
    }
    for stranger in [early, late] {
        assert!(!stranger.status.success());
        assert!(err(&stranger).contains("another job (\"a\") meets at"), "{}", err(&stranger));
    }
    assert!(err(&unnamed).contains("two nodes claim the number 1"), "{}", err(&unnamed));
}

#[test]
fn all_that_ranks_printed_comes_through_a_slow_reader() {
    let tchrun = env!("CARGO_BIN_EXE_tchrun");
    let mut command = undisturbed("sh");
    // More than one pipe holds with the prefixes, and less than two: the rank ends before anything is read.
    command.args(["-c", &format!("{tchrun} --nproc-per-node 1 seq 12000 | (sleep 3; wc -l)")]);
    let output = finish(command);
    assert_eq!(out(&output).trim(), "12000", "{}", err(&output));
}

#[test]
fn a_process_that_a_rank_left_behind_does_not_hold_tchrun() {
    let script = "sleep 600 & echo $!";
    let output = finish(tchrun(&["--nproc-per-node", "1", "sh", "-c", script]));
    assert!(output.status.success(), "{}", err(&output));
    let left = out(&output).trim().strip_prefix("[rank 0] ").unwrap().to_owned();
    assert!(Command::new("kill").arg(&left).status().unwrap().success());
}

#[test]
fn a_tchrun_whose_stderr_nobody_reads_still_ends_with_the_code_of_the_rank() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = tchrun(&["--nproc-per-node", "1", "sh", "-c", "echo bad luck >&2; exit 7"]);
    let child = command.stdout(Stdio::null()).stderr(writer).spawn().unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(7));
}

#[test]
fn how_nccl_is_to_handle_errors_stands_where_the_user_has_set_it() {
    let seen = |set: Option<&str>| {
        let script = "echo $TORCH_NCCL_ASYNC_ERROR_HANDLING";
        let mut command = tchrun(&["--nproc-per-node", "1", "sh", "-c", script]);
        command.env_remove("TORCH_NCCL_ASYNC_ERROR_HANDLING");
        command.envs(set.map(|value| ("TORCH_NCCL_ASYNC_ERROR_HANDLING", value)));
        out(&finish(command))
    };
    assert_eq!([seen(None), seen(Some("3"))], ["[rank 0] 1\n", "[rank 0] 3\n"]);
}
