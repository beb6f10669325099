//! `cargo xtask conformance`: the whole product of the conformance suite on one backend and world.

use anyhow::{Context, Result, bail};

use crate::cargo::{cargo, run as execute};
use crate::setup;

pub(crate) const ABOUT: &str = "Run the whole conformance product, print a table of case and result:
--backend NAME (native), --world N (2), --processes for ranks as processes instead of threads";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let mut command = cargo();
    command.args(["test", "--test", "conformance", "--", "--exact", "--nocapture"]);
    command.arg("whole::the_product_as_a_table");
    command.env("TCHD_CONFORMANCE_WORLD", "2");
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--backend" => command.env("TCHD_CONFORMANCE_BACKEND", value()?),
            "--world" => command.env("TCHD_CONFORMANCE_WORLD", value()?),
            "--processes" => command.env("TCHD_CONFORMANCE_RANKS", "processes"),
            other => bail!("unknown argument {other:?}; known are --backend, --world and --processes"),
        };
    }
    setup::ensure()?;
    execute(&mut command)
}
