//! `cargo xtask ci`: everything that must hold before a change is taken, each step with its time.
//!
//! `interop` is apart because it installs all of PyTorch (the index has no wheel for the CPU alone: 5 GB on disk) and
//! wants Open MPI; `gpu-bundle` because what it builds takes a GPU; `soak` and `sanitize` because they take long.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::cargo::{cargo, run as execute};
use crate::{hosts, setup, test};

pub(crate) const ABOUT: &str =
    "All checks: format, lints, documentation, tests with every example, two hosts, nccl (`interop` apart)";

type Step = (&'static str, fn() -> Result<()>);

/// What fails fast comes first; what needs libtorch comes after the set-up. The tests run every example.
const STEPS: &[Step] = &[
    ("format", format),
    ("documentation without libtorch", documentation_without_libtorch),
    ("set-up", || setup::run(&[])),
    // A shared machine may take the cores away for longer than a test can know.
    ("tests", || test::run(&["--second-look".to_owned()])),
    ("two hosts", two_hosts),
    // On a machine without a GPU too: headers and stand-ins for the libraries are provisioned.
    ("set-up for nccl", || setup::run(&["--nccl".to_owned()])),
    ("lints", lints),
    ("documentation", documentation),
    ("nccl compiles and links", nccl),
];

pub(crate) fn run(_: &[String]) -> Result<()> {
    let (begin, mut times) = (Instant::now(), Vec::new());
    let mut result = Ok(());
    for (name, step) in STEPS {
        println!("\n=== {name}");
        let start = Instant::now();
        result = step().with_context(|| format!("the step \"{name}\" failed"));
        times.push((name, start.elapsed()));
        if result.is_err() {
            break;
        }
    }
    println!("\n=== times");
    for (name, time) in times {
        println!("{:8.1} s  {name}", time.as_secs_f64());
    }
    println!("{:8.1} s  in all", begin.elapsed().as_secs_f64());
    result
}

/// It lives by deadlines too.
fn two_hosts() -> Result<()> {
    hosts::step().or_else(|error| {
        println!("\n=== FAILED, and has a second look: {error:#}");
        hosts::step()
    })
}

fn format() -> Result<()> {
    execute(cargo().args(["fmt", "--all", "--check"]))
}

/// With `nccl`, which adds a test and leaves nothing out; what it compiles, the step below links.
fn lints() -> Result<()> {
    execute(cargo().args(["clippy", "--all-targets", "--features", "nccl", "--", "-D", "warnings"]))?;
    execute(cargo().args(["clippy", "--all-targets", "--package", "xtask", "--", "-D", "warnings"]))
}

fn strict(command: &mut Command) -> &mut Command {
    command.env("RUSTDOCFLAGS", "-D warnings")
}

fn documentation_without_libtorch() -> Result<()> {
    execute(strict(&mut cargo()).args(["doc", "--no-deps", "--features", "doc-only"]))
}

fn documentation() -> Result<()> {
    execute(strict(&mut cargo()).args(["doc", "--no-deps"]))
}

fn nccl() -> Result<()> {
    let programs = ["--bin", "tchrun", "--example", "init_nccl_single", "--test", "gpu"];
    execute(cargo().args(["build", "--features", "nccl"]).args(programs))
}
