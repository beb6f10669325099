//! `cargo xtask sanitize`: the memory of the engine under tools that look at every access.
//!
//! * Plans, kernels and frames need no libtorch: their tests are built with the feature `doc-only`, without its
//!   C++. Miri interprets them; AddressSanitizer and Valgrind run them, linked with every function of libtorch left
//!   open, which none of these tests calls.
//! * The conformance suite under AddressSanitizer and ThreadSanitizer, with libtorch, which is not built for
//!   either: what it does to memory inside itself is not seen, and what ThreadSanitizer takes for a race because
//!   of that is listed in `sanitize/thread.txt`, each with its reason. ThreadSanitizer runs the tests inside the
//!   crate as well.
//!
//! Stable Rust does it: `RUSTC_BOOTSTRAP=1` admits `-Zsanitizer`. Only ThreadSanitizer and Miri take a nightly, for a
//! standard library that they see into. Each tool has a target folder of its own.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{cargo, nightly};
use crate::setup::{self, root};

pub(crate) const ABOUT: &str = "\
Run Miri, AddressSanitizer, ThreadSanitizer and Valgrind; tells how many tests each ran
--only LIST of miri, free-address, free-valgrind, address, thread; what follows `--` picks tests";

/// Tests that call nothing of libtorch.
const FREE: &[&str] = &[
    "backend::native::plan::",
    "backend::native::kernels::",
    "backend::native::tcp::wire::",
    "backend::native::cause::",
    "profile::flight::",
];

/// What ThreadSanitizer leaves out: models, which loom runs in one thread and for long; what has no threads; and the
/// backends over libtorch's own engines, whose threads are its.
const OTHER_THREADS: &[&str] = &["shm::model", "::kernels::", "::plan::", "c10d", "gloo"];

/// The one target that the sanitizers' runtimes come with everywhere we test.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where no function of libtorch is there, that is no error, and none is looked for before it is called.
/// Rustix is to ask libc for the time: by itself it would call the kernel's page for that, which Valgrind hides.
const OPEN: &str = "--cfg=rustix_use_libc -Zplt=yes -Crelro-level=partial -Clink-arg=-Wl,--unresolved-symbols=ignore-all \
                    -Clink-arg=-Wl,-z,lazy";
/// The same with AddressSanitizer, with libtorch and without, so that what they share is built once.
const ADDRESS: &str = "-Zsanitizer=address -Zplt=yes -Crelro-level=partial \
                       -Clink-arg=-Wl,--unresolved-symbols=ignore-all -Clink-arg=-Wl,-z,lazy";

struct Tool {
    name: &'static str,
    about: &'static str,
    run: fn(&[String]) -> Result<Outcome>,
}

const TOOLS: &[Tool] = &[
    Tool { name: "miri", about: "Miri on plans, kernels, frames", run: miri },
    Tool {
        name: "free-address",
        about: "AddressSanitizer on plans, kernels and frames, without libtorch",
        run: free_address,
    },
    Tool {
        name: "free-valgrind",
        about: "Valgrind on plans, kernels and frames, without libtorch",
        run: free_valgrind,
    },
    Tool { name: "address", about: "AddressSanitizer on the conformance suite", run: address },
    Tool { name: "thread", about: "ThreadSanitizer in the crate and on the conformance suite", run: thread },
];

/// How a tool's run ended.
enum Outcome {
    /// So many tests passed.
    Passed(usize),
    /// So many passed, and something was found.
    Failed(usize),
    /// It could not be run, and why.
    Absent(String),
}

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let (mut only, mut tests) = (Vec::new(), Vec::new());
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--only" => {
                only = arguments.next().context("--only needs a value")?.split(',').collect();
            }
            "--" => tests = arguments.by_ref().cloned().collect(),
            other => bail!("unknown argument {other:?}; known are --only and --"),
        }
    }
    for name in &only {
        ensure!(TOOLS.iter().any(|tool| tool.name == *name), "there is no tool {name:?}\n{ABOUT}");
    }
    setup::ensure()?;
    let mut lines = Vec::new();
    let mut failed = false;
    for tool in TOOLS.iter().filter(|tool| only.is_empty() || only.contains(&tool.name)) {
        println!("\n=== {}", tool.about);
        let begin = Instant::now();
        let outcome = match (tool.run)(&tests)? {
            Outcome::Passed(ran) => format!("{ran} tests ran, nothing found"),
            Outcome::Failed(ran) => {
                failed = true;
                format!("{ran} tests passed, FAILED")
            }
            Outcome::Absent(reason) => format!("NOT RUN: {reason}"),
        };
        lines.push(format!("{:<64} {outcome} ({:.0} s)", tool.about, begin.elapsed().as_secs_f64()));
    }
    println!("\n=== what ran");
    lines.iter().for_each(|line| println!("{line}"));
    ensure!(!failed, "a tool has found something");
    Ok(())
}

fn miri(tests: &[String]) -> Result<Outcome> {
    // This toolchain's own, or else the one of a nightly beside it.
    let there = |mut cargo: Command| {
        cargo.args(["miri", "--version"]).output().is_ok_and(|output| output.status.success())
    };
    let mut command = if there(cargo()) {
        cargo()
    } else if there(nightly()) {
        nightly()
    } else {
        let reason = "there is no Miri (`rustup component add --toolchain nightly miri rust-src`)";
        return Ok(Outcome::Absent(reason.to_owned()));
    };
    command.args(["miri", "test", "--features", "doc-only", "--lib", "--target-dir"]);
    command.arg(folder("miri"));
    // The property tests read the environment and the clock. A few cases each: Miri is slow.
    command.env("MIRIFLAGS", "-Zmiri-disable-isolation").env("PROPTEST_CASES", "2");
    count(command.arg("--").args(chosen(tests)))
}

fn free_address(tests: &[String]) -> Result<Outcome> {
    let mut command = built_for("address", ADDRESS);
    command.args(["--features", "doc-only", "--lib", "--"]).args(chosen(tests));
    count(&mut command)
}

fn free_valgrind(tests: &[String]) -> Result<Outcome> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        return Ok(Outcome::Absent("valgrind is not installed".to_owned()));
    }
    let mut command = built_for("free-valgrind", OPEN);
    command.args(["--features", "doc-only", "--lib", "--"]).args(chosen(tests));
    let runner = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";
    command.env(
        runner,
        "valgrind --quiet --error-exitcode=99 --leak-check=full --errors-for-leak-kinds=definite",
    );
    command.env("PROPTEST_CASES", "8");
    count(&mut command)
}

fn address(tests: &[String]) -> Result<Outcome> {
    let mut command = built_for("address", ADDRESS);
    command.args(["--test", "conformance", "--"]).args(tests);
    // What libtorch keeps until the end of the process is its own affair.
    command.env("ASAN_OPTIONS", "detect_leaks=0");
    count(&mut command)
}

/// Tests in the crate and of the conformance suite, with the standard library built for it too: one that is not hides
/// what orders two threads.
fn thread(tests: &[String]) -> Result<Outcome> {
    let has_library =
        |output: Output| String::from_utf8_lossy(&output.stdout).contains("rust-src (installed)");
    let components = ["component", "list", "--toolchain", "nightly"];
    if !Command::new("rustup").args(components).output().is_ok_and(has_library) {
        let reason = "there is no source of the standard library (`rustup component add --toolchain nightly rust-src`)";
        return Ok(Outcome::Absent(reason.to_owned()));
    }
    let suppressions = root().join("xtask/sanitize/thread.txt");
    let mut command = tests_for(nightly(), "thread", "-Zsanitizer=thread");
    command.args(["-Zbuild-std", "--lib", "--test", "conformance", "--no-fail-fast", "--"]);
    match tests {
        [] => command.args(OTHER_THREADS.iter().flat_map(|name| ["--skip", name])),
        tests => command.args(tests),
    };
    // A report makes its process fail at its end. Mutexes are not looked at beside what they guard: those of
    // pthreads are libtorch's, of which not every use is seen.
    let options = format!("suppressions={} report_mutex_bugs=0 detect_deadlocks=0", suppressions.display());
    command.env("TSAN_OPTIONS", options).env("PROPTEST_CASES", "8");
    count(&mut command)
}

/// Tests as they are built for a tool.
fn built_for(tool: &str, flags: &str) -> Command {
    let mut command = tests_for(cargo(), tool, flags);
    command.env("RUSTC_BOOTSTRAP", "1");
    command
}

/// The same, with a cargo of our choice.
fn tests_for(mut command: Command, tool: &str, flags: &str) -> Command {
    command.args(["test", "--target", TARGET, "--target-dir"]).arg(folder(tool));
    command.env("RUSTFLAGS", flags);
    // Everything is slower here.
    command.env("TCH_DISTRIBUTED_TEST_TIMEOUT", "900");
    command
}

fn folder(tool: &str) -> std::path::PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), Into::into);
    target.join("sanitize").join(tool)
}

fn chosen(tests: &[String]) -> Vec<String> {
    if tests.is_empty() { FREE.iter().map(|&name| name.to_owned()).collect() } else { tests.to_vec() }
}

/// Runs it, shows what it prints, and counts the tests that passed.
fn count(command: &mut Command) -> Result<Outcome> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("cargo does not start")?;
    let mut passed = 0;
    for line in BufReader::new(child.stdout.take().context("no output")?).lines() {
        let line = line?;
        println!("{line}");
        passed += passed_in(&line);
    }
    let status = child.wait()?;
    Ok(if status.success() && passed > 0 { Outcome::Passed(passed) } else { Outcome::Failed(passed) })
}

/// How many tests a line of the harness says have passed.
fn passed_in(line: &str) -> usize {
    let Some((_, rest)) = line.split_once("test result:") else { return 0 };
    let before = rest.split(" passed").next().unwrap_or_default();
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::passed_in;

    #[test]
    fn the_harness_line_says_how_many_tests_passed() {
        let line =
            "test result: ok. 27 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 1.0s";
        assert_eq!(passed_in(line), 27);
        assert_eq!(passed_in("test a::b ... ok"), 0);
    }
}
