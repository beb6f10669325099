//! `cargo xtask bench`: set-up, then collectives measured beside Gloo and beside what the machine allows.

use anyhow::Result;

use crate::cargo::{cargo, run as execute};
use crate::setup;

pub(crate) const ABOUT: &str =
    "Set up, then measure collectives beside Gloo and the floor (--quick, --json FILE, --svg FILE, --help)";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    setup::ensure()?;
    execute(cargo().args(["bench", "--bench", "collectives", "--"]).args(arguments))
}
