//! `cargo xtask interop`: Rust ranks and PyTorch ranks in one world, and ranks started by others' launchers.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cargo::{cargo, run as execute};
use crate::crew::{Crew, free_port};
use crate::setup::{self, root};
use crate::{cache, launchers};

pub(crate) const ABOUT: &str =
    "Put Rust and PyTorch ranks into one world, and the digits example under torchrun, mpirun and Slurm's
variables (installs PyTorch, 5 GB; wants Open MPI's mpirun)";

/// PyTorch's, and of what is in its environment.
pub(crate) const VERSION: &str = "2.13.0";

/// How ranks of both languages are started.
pub(crate) struct Makings {
    pub(crate) python: PathBuf,
    /// The example `interop`.
    pub(crate) rust: PathBuf,
    pub(crate) backend: &'static str,
    /// What they have in their environment besides their place.
    pub(crate) environment: Vec<(&'static str, OsString)>,
    /// Where their words go; else what they complain of goes to ours.
    pub(crate) log: Option<File>,
}

pub(crate) fn run(_arguments: &[String]) -> Result<()> {
    setup::ensure()?;
    let python = python()?;
    execute(cargo().args(["build", "--example", "interop", "--example", "train_digits"]))?;
    let makings = Makings {
        python: python.clone(),
        rust: built("interop")?,
        backend: "gloo",
        environment: Vec::new(),
        log: None,
    };
    let mut worlds = 0;
    let mut tell = |languages: &str, how: &str, took: Result<Duration>| -> Result<()> {
        let took =
            took.with_context(|| format!("a world of {languages} (p: Python, r: Rust) over {how} failed"))?;
        println!("{languages:<5} {how:<9} as expected, {:.1} s", took.as_secs_f64());
        worlds += 1;
        Ok(())
    };
    for languages in ["pr", "rp", "prp", "rpr", "rrp", "prpr", "rppr"] {
        for method in ["tcp", "env"] {
            tell(languages, &format!("{method}://"), world(languages, method, &makings))?;
        }
    }
    for languages in ["pr", "rp"] {
        tell(languages, "torchrun", under_torchrun(languages, &makings))?;
    }
    println!("{worlds} worlds shared by Rust and PyTorch {VERSION}");
    let folder = target().join("interop");
    let bin = python.parent().context("python is in a folder")?;
    launchers::run(&built("train_digits")?, bin, &folder)
}

fn built(example: &str) -> Result<PathBuf> {
    let program = target().join("debug/examples").join(example);
    ensure!(program.is_file(), "{} was not built", program.display());
    Ok(program)
}

/// A Python with PyTorch, in an environment of its own in the cache.
pub(crate) fn python() -> Result<PathBuf> {
    let folder = cache::folder()?.join(format!("interop-torch-{VERSION}"));
    let requirement = format!("torch=={VERSION}");
    let python = folder.join("bin/python");
    let works = |python: &Path| {
        let status = Command::new(python).args(["-c", "import torch"]).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    if works(&python) {
        return Ok(python);
    }
    println!("installing {requirement} into {}", folder.display());
    let made = Command::new("python3").args(["-m", "venv"]).arg(&folder).status();
    ensure!(
        made.context("python3 does not start")?.success(),
        "python3 -m venv failed (is python3-venv there?)"
    );
    let status =
        Command::new(folder.join("bin/pip")).args(["install", "--quiet", &requirement, "numpy"]).status()?;
    ensure!(status.success() && works(&python), "pip could not install {requirement}");
    Ok(python)
}

pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Runs one rank for each letter and waits for all; tells how long that took.
pub(crate) fn world(languages: &str, method: &str, makings: &Makings) -> Result<Duration> {
    let port = free_port()?;
    let place = match method {
        "env" => "env".to_owned(),
        _ => format!("tcp://127.0.0.1:{port}"),
    };
    let mut ranks = Crew::default();
    for (rank, language) in languages.chars().enumerate() {
        let mut command = member(language, makings)?;
        command
            .args([&place, makings.backend])
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", languages.len().to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string());
        ranks.start(&mut command)?;
    }
    ranks.wait()
}

/// The same world, whose store torchrun's agent serves: each node has ranks of one language.
fn under_torchrun(languages: &str, makings: &Makings) -> Result<Duration> {
    let port = free_port()?.to_string();
    let nodes = languages.len().to_string();
    let mut agents = Crew::default();
    for (node, language) in languages.chars().enumerate() {
        let inner = member(language, makings)?;
        let mut command = Command::new(makings.python.with_file_name("torchrun"));
        command
            .args(["--nnodes", &nodes, "--node-rank", &node.to_string(), "--nproc-per-node", "1"])
            .args(["--master-addr", "127.0.0.1", "--master-port", &port, "--no-python"])
            .arg(inner.get_program())
            .args(inner.get_args())
            .args(["env", makings.backend])
            .env_remove("LD_LIBRARY_PATH")
            .env("PYTHONWARNINGS", "ignore::FutureWarning")
            .env("OMP_NUM_THREADS", "1")
            .stdout(Stdio::null());
        agents.start(&mut command)?;
    }
    agents.wait()
}

/// A rank of this language, without its place in the world.
fn member(language: char, makings: &Makings) -> Result<Command> {
    let mut command = match language {
        'p' => {
            let mut command = Command::new(&makings.python);
            // Ours is a libtorch without CUDA; PyTorch finds its own.
            command.arg(root().join("examples/interop/rank.py")).env_remove("LD_LIBRARY_PATH");
            command
        }
        _ => Command::new(&makings.rust),
    };
    // PyTorch 2.13 warns of names that older ones need.
    command.env("PYTHONWARNINGS", "ignore::FutureWarning").env("OMP_NUM_THREADS", "1").stdout(Stdio::null());
    command.envs(makings.environment.iter().map(|(name, value)| (name, value)));
    if let Some(log) = &makings.log {
        command.stdout(log.try_clone()?).stderr(log.try_clone()?);
    }
    Ok(command)
}
