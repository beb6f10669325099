//! `cargo xtask conformance`: the whole product of the conformance suite on one backend and world.

use anyhow::{Context, Result, bail};

use crate::cargo::{cargo, run as execute};
use crate::setup;

pub(crate) const ABOUT: &str = "Run the whole conformance product, print a table of case and result:
--backend NAME (native; native-unix, native-tcp, gloo), --world N (2), --release,
--processes for ranks as processes instead of threads
--table  write what each backend can do into the README instead";

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    if arguments == ["--table"] {
        setup::ensure()?;
        let test = "backends::the_readme_says_of_every_operation_and_kind_what_the_suite_sees";
        return execute(
            cargo()
                .args(["test", "--test", "conformance", "--", "--exact", test])
                .env("TCHD_CONFORMANCE_WRITE_TABLE", "1"),
        );
    }
    let mut command = cargo();
    command.args(["test", "--test", "conformance"]);
    if arguments.iter().any(|argument| argument == "--release") {
        command.arg("--release");
    }
    command.args(["--", "--exact", "--nocapture", "whole::the_product_as_a_table"]);
    // All of it takes longer than a test may.
    command.env("TCHD_CONFORMANCE_WORLD", "2").env("TCH_DISTRIBUTED_TEST_TIMEOUT", "3600");
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().with_context(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--backend" => command.env("TCHD_CONFORMANCE_BACKEND", value()?),
            "--world" => command.env("TCHD_CONFORMANCE_WORLD", value()?),
            "--release" => continue,
            "--processes" => command.env("TCHD_CONFORMANCE_RANKS", "processes"),
            other => bail!(
                "unknown argument {other:?}; known are --backend, --world, --release, --processes and --table"
            ),
        };
    }
    setup::ensure()?;
    execute(&mut command)
}
