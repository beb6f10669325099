//! `cargo xtask test`: set-up, then every test.

use anyhow::Result;

use crate::cargo::{cargo, run as execute};
use crate::setup;

pub(crate) const ABOUT: &str = "Set up, then run every test; arguments go to `cargo test`";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    setup::ensure()?;
    // All of them, also where one fails: a run is dear.
    execute(cargo().args(["test", "--no-fail-fast"]).args(arguments))?;
    // Apart, because as one workspace the two would share features, and libtorch's bindings be compiled twice.
    if arguments.is_empty() {
        execute(cargo().args(["test", "--quiet", "--package", "xtask"]))?;
    }
    Ok(())
}
