//! `cargo xtask ci`: everything that must hold before a change is taken, each step with its time.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::cargo::{cargo, run as execute};
use crate::setup::{self, root};
use crate::test;

pub(crate) const ABOUT: &str = "All checks: format, lints, documentation, tests, examples";

/// Arguments that make an example quick. Every other example runs without arguments.
const SMALL: &[(&str, &[&str])] = &[("train_digits", &["--nproc", "2", "--epochs", "1"])];

type Step = (&'static str, fn() -> Result<()>);

/// What fails fast comes first; what needs libtorch comes after the set-up.
const STEPS: &[Step] = &[
    ("format", format),
    ("documentation without libtorch", documentation_without_libtorch),
    ("set-up", || setup::run(&[])),
    ("tests", || test::run(&[])),
    ("lints", lints),
    ("documentation", documentation),
    ("examples", examples),
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

fn format() -> Result<()> {
    execute(cargo().args(["fmt", "--all", "--check"]))
}

fn lints() -> Result<()> {
    execute(cargo().args(["clippy", "--all-targets", "--", "-D", "warnings"]))?;
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

fn examples() -> Result<()> {
    let mut names: Vec<String> = fs::read_dir(root().join("examples"))
        .context("there are no examples")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned))
        .collect();
    names.sort();
    for name in names {
        println!("--- {name}");
        let small = SMALL.iter().find(|(example, _)| *example == name).map_or(&[][..], |(_, small)| *small);
        execute(cargo().args(["run", "--quiet", "--example", &name, "--"]).args(small))?;
    }
    Ok(())
}
