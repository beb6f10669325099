//! A fresh crate that depends on this one by path, with the lines that the README gives, builds and runs.
//!
//! It is built in this package's own target folder, with the same profile and lock file, so that it shares the
//! compiled dependencies: only the crate itself is compiled anew.

use std::env;
use std::fs;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const README: &str = include_str!("../README.md");

/// Long enough for a machine that has to compile libtorch's bindings first.
const PATIENCE: Duration = Duration::from_secs(900);

#[test]
fn a_fresh_crate_with_the_lines_of_the_readme_builds_and_runs() {
    let folder = tempfile::tempdir().unwrap();
    let fresh = folder.path();
    fs::create_dir(fresh.join("src")).unwrap();
    fs::write(fresh.join("Cargo.toml"), manifest()).unwrap();
    fs::write(fresh.join("src/main.rs"), readme_block("rust", "world_size(1)")).unwrap();
    fs::copy(root().join("Cargo.lock"), fresh.join("Cargo.lock")).unwrap();

    let setup = ["run", "--quiet", "--package", "xtask", "--", "setup", "--into"];
    finish(cargo(&root()).args(setup).arg(fresh));
    let config = fs::read_to_string(fresh.join(".cargo/config.toml")).unwrap();
    assert!(config.starts_with("[env]\n") || config.contains("/usr/lib"), "{config}");

    let output = finish(cargo(fresh).arg("run").args(profile()));
    assert!(output.contains("the sum is [3.0]"), "cargo run said: {output}");

    // Without cargo there is no library path: the build script of the README makes an rpath.
    fs::write(fresh.join("build.rs"), readme_block("rust", "rustc-link-arg")).unwrap();
    finish(cargo(fresh).arg("build").args(profile()));
    let program = target().join(if cfg!(debug_assertions) { "debug" } else { "release" }).join("fresh");
    let output = finish(Command::new(program).env_remove("LD_LIBRARY_PATH"));
    assert!(output.contains("the sum is [3.0]"), "the program said: {output}");
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().to_owned()
}

fn profile() -> &'static [&'static str] {
    if cfg!(debug_assertions) { &[] } else { &["--release"] }
}

fn manifest() -> String {
    let dependencies = readme_block("toml", "tch-distributed = {")
        .replace("../tch-distributed", &root().display().to_string());
    let ours = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let profiles = &ours[ours.find("[profile.dev]").unwrap()..];
    format!("[package]\nname = \"fresh\"\nedition = \"2024\"\n\n{dependencies}\n{profiles}")
}

/// The fenced block of the README in that language that holds `text`.
fn readme_block(language: &str, text: &str) -> String {
    let blocks = README.split("\n```").skip(1).step_by(2);
    let mut matching = blocks.filter_map(|block| {
        let (kind, code) = block.split_once('\n')?;
        (kind.split(',').next()? == language && code.contains(text)).then_some(code)
    });
    matching.next().unwrap_or_else(|| panic!("the README has no {language} block with {text:?}")).to_owned()
}

/// cargo as a user's shell would start it, not as cargo starts tests.
fn cargo(folder: &Path) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(folder).arg("--offline").env("CARGO_TARGET_DIR", target());
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let of_cargo = name.starts_with("CARGO_") && !["CARGO_HOME", "CARGO_TARGET_DIR"].contains(&&*name);
        // The fresh crate is to be told by its own configuration where libtorch is.
        let of_libtorch = name.starts_with("LIBTORCH") && folder != root();
        if of_cargo || of_libtorch || name == "LD_LIBRARY_PATH" {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// The standard output of a command that must succeed in time.
fn finish(command: &mut Command) -> String {
    let mut files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    let [stdout, stderr] = files.each_ref().map(|file| file.try_clone().unwrap());
    let mut child = command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{command:?} took more than {PATIENCE:?}");
        }
        thread::sleep(Duration::from_millis(50));
    };
    let [output, errors] = files.each_mut().map(|file| {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    });
    assert!(status.success(), "{command:?} failed: {status}\n{errors}");
    output
}
