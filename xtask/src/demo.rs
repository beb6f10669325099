//! `cargo xtask demo`: set-up, then the training example.

use anyhow::Result;

use crate::cargo::{cargo, run as execute};
use crate::setup;

pub(crate) const ABOUT: &str = "Set up, then train on the digits with several processes (--nproc N, --help)";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    setup::ensure()?;
    execute(cargo().args(["run", "--release", "--example", "train_digits", "--"]).args(arguments))
}
