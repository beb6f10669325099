//! `cargo xtask soak`: set-up, then a long life in which nothing may grow.

use anyhow::Result;

use crate::cargo::{cargo, run as execute};
use crate::setup;

pub(crate) const ABOUT: &str = "\
Make 1 000 000 small collectives and 10 000 groups, among threads and between processes;
memory, descriptors, threads, segments and keys must not grow
--collectives N, --groups N, --ranks N (2), --worlds threads,processes";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    setup::ensure()?;
    execute(cargo().args(["bench", "--bench", "soak", "--"]).args(arguments))
}
