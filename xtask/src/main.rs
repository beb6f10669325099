//! Development tasks of tch-distributed: `cargo xtask <command>`.
//!
//! Every command does its own set-up. A new command is a file here and a line in [`COMMANDS`].

mod bench;
mod cache;
mod cargo;
mod ci;
mod conformance;
mod crew;
mod demo;
mod gpu_bundle;
mod gpu_simulated;
mod hosts;
mod interop;
mod launchers;
mod locate;
mod model_parallel;
mod pip;
mod provision;
mod record;
mod sanitize;
mod second_look;
mod setup;
mod soak;
mod test;
mod unpack;
mod wheels;

use std::env;
use std::process::ExitCode;

use anyhow::Result;

struct Command {
    name: &'static str,
    about: &'static str,
    run: fn(&[String]) -> Result<()>,
}

const COMMANDS: &[Command] = &[
    Command { name: "setup", about: setup::ABOUT, run: setup::run },
    Command { name: "demo", about: demo::ABOUT, run: demo::run },
    Command { name: "test", about: test::ABOUT, run: test::run },
    Command { name: "conformance", about: conformance::ABOUT, run: conformance::run },
    Command { name: "model-parallel", about: model_parallel::ABOUT, run: model_parallel::run },
    Command { name: "hosts", about: hosts::ABOUT, run: hosts::run },
    Command { name: "bench", about: bench::ABOUT, run: bench::run },
    Command { name: "interop", about: interop::ABOUT, run: interop::run },
    Command { name: "soak", about: soak::ABOUT, run: soak::run },
    Command { name: "sanitize", about: sanitize::ABOUT, run: sanitize::run },
    Command { name: "gpu-bundle", about: gpu_bundle::ABOUT, run: gpu_bundle::run },
    Command { name: "gpu-simulated", about: gpu_simulated::ABOUT, run: gpu_simulated::run },
    Command { name: "ci", about: ci::ABOUT, run: ci::run },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let Some(name) = arguments.first() else {
        print!("{}", usage());
        return ExitCode::SUCCESS;
    };
    if ["help", "--help", "-h"].contains(&name.as_str()) {
        print!("{}", usage());
        return ExitCode::SUCCESS;
    }
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        eprintln!("error: there is no command {name:?}\n\n{}", usage());
        return ExitCode::from(2);
    };
    match (command.run)(&arguments[1..]) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> String {
    let mut text = String::from("usage: cargo xtask <command> [arguments]\n\n");
    for command in COMMANDS {
        let mut lines = command.about.lines();
        text += &format!("  {:<15}{}\n", command.name, lines.next().unwrap_or_default());
        for line in lines {
            text += &format!("                 {line}\n");
        }
    }
    text
}
