//! Test programs that failed run once more, and it is said that they did.

use std::io::{BufRead, BufReader};
use std::process::{ChildStderr, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cargo::{cargo, run as execute};

/// Runs cargo's tests; then, one by one, the programs of which a test failed.
///
/// # Errors
/// When one fails again, or cargo fails for another reason.
pub(crate) fn run(tests: &mut Command) -> Result<()> {
    let mut child = tests.stderr(Stdio::piped()).spawn().context("cargo does not start")?;
    let failed = child.stderr.take().map(show).transpose()?.unwrap_or_default();
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    if failed.is_empty() {
        bail!("cargo's tests failed: {status}");
    }
    println!("\n=== FAILED (above), and has a second look: {}", failed.join(", "));
    for target in &failed {
        let words = target.split_whitespace();
        execute(cargo().arg("test").args(words)).with_context(|| format!("{target} failed twice"))?;
    }
    println!("=== FAILED at first, and passed when it was run alone: {}", failed.join(", "));
    Ok(())
}

/// Shows what cargo says, and keeps which programs it says have failed.
fn show(stderr: ChildStderr) -> Result<Vec<String>> {
    let mut failed = Vec::new();
    for line in BufReader::new(stderr).lines() {
        let line = line?;
        eprintln!("{line}");
        failed.extend(failed_program(&line));
    }
    Ok(failed)
}

/// At its end cargo lists them, as the arguments that choose them: `    `--test soak``.
fn failed_program(line: &str) -> Option<String> {
    let inner = line.trim().strip_prefix('`')?.strip_suffix('`')?;
    inner.starts_with("--").then(|| inner.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_failed_are_read_from_cargos_last_words() {
        let words = "error: 2 targets failed:\n    `--lib`\n    `--test soak`\n";
        let failed: Vec<String> = words.lines().filter_map(failed_program).collect();
        assert_eq!(failed, ["--lib", "--test soak"]);
        assert_eq!(failed_program("error: test failed, to rerun pass `--lib`"), None);
        assert_eq!(failed_program("     Running `target/debug/deps/soak-0f8c`"), None);
    }
}
