//! `cargo xtask model-parallel`: the whole product of mesh shapes and schedules.

use anyhow::{Result, bail};

use crate::cargo::{cargo, run as execute};
use crate::setup;

pub(crate) const ABOUT: &str =
    "Train a GPT on every mesh of 1, 2, 4 and 8 ranks with every schedule and compare with
one rank: 90 cases, some four minutes on two cores (the tests take as many as have every pair)";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    if let Some(unknown) = arguments.first() {
        bail!("unknown argument {unknown:?}: there are none");
    }
    setup::ensure()?;
    let mut command = cargo();
    command.args([
        "test",
        "--test",
        "model_parallel_gpt",
        "--",
        "--nocapture",
        "--test-threads",
        "1",
        "_equal_one_rank_",
    ]);
    execute(command.env("TCHD_MODEL_PARALLEL_WHOLE", "1"))
}
