//! Running cargo for the repository.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::record;
use crate::setup::root;

/// cargo in the repository, with libtorch as the record says.
pub(crate) fn cargo() -> Command {
    in_the_repository(Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into())))
}

/// The same of a nightly beside this toolchain.
pub(crate) fn nightly() -> Command {
    let mut rustup = Command::new("rustup");
    rustup.args(["run", "nightly", "cargo"]);
    in_the_repository(rustup)
}

fn in_the_repository(mut cargo: Command) -> Command {
    let root = root();
    cargo.current_dir(&root);
    // cargo gave us the record's values. It gives them to our children again, and they are not to look like the user's
    // own, or torch-sys would be compiled anew.
    let ours = record::read(&root);
    if ours.is_some() && ours == env::var_os("LIBTORCH").map(PathBuf::from) {
        cargo.env_remove("LIBTORCH");
    }
    cargo
}

/// Runs it to its end; a failure is an error that names the command.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
    let line = format!("{} {}", "cargo", words.join(" "));
    let status = command.status().with_context(|| format!("`{line}` does not start"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}");
    }
    Ok(())
}
