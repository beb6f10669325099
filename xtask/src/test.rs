//! `cargo xtask test`: set-up, then every test.

use anyhow::Result;

use crate::cargo::{cargo, run as execute};
use crate::{second_look, setup};

pub(crate) const ABOUT: &str = "\
Set up, then run every test; arguments go to `cargo test`
--second-look runs test programs that failed once more, alone, and says which they are";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    setup::ensure()?;
    // All of them, also where one fails: a run is dear.
    let mut every = cargo();
    every.args(["test", "--no-fail-fast"]);
    let twice = arguments == ["--second-look"];
    if twice {
        second_look::run(&mut every)?;
    } else {
        execute(every.args(arguments))?;
    }
    // Apart, because as one workspace the two would share features, and libtorch's bindings be compiled twice.
    if twice || arguments.is_empty() {
        execute(cargo().args(["test", "--quiet", "--package", "xtask"]))?;
    }
    Ok(())
}
