//! `cargo xtask interop`: Rust ranks and PyTorch ranks in one world.

use std::env;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::cache;
use crate::cargo::{cargo, run as execute};
use crate::setup::{self, root};

pub(crate) const ABOUT: &str =
    "Put Rust and PyTorch ranks into one world, in every arrangement (installs PyTorch, 5 GB)";

const TORCH: &str = "torch==2.13.0";
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn run(_arguments: &[String]) -> Result<()> {
    setup::ensure()?;
    let python = python()?;
    execute(cargo().args(["build", "--example", "interop"]))?;
    let rust = target().join("debug/examples/interop");
    ensure!(rust.is_file(), "{} was not built", rust.display());
    let mut worlds = 0;
    for languages in ["pr", "rp", "prp", "rpr", "rrp", "prpr", "rppr"] {
        for method in ["tcp", "env"] {
            let start = Instant::now();
            world(languages, method, &python, &rust).with_context(|| {
                format!("a world of {languages} (p: Python, r: Rust) over {method}:// failed")
            })?;
            println!("{languages:<5} {method}://  as expected, {:.1} s", start.elapsed().as_secs_f64());
            worlds += 1;
        }
    }
    println!("{worlds} worlds shared by Rust and {TORCH}");
    Ok(())
}

/// A Python with PyTorch, in an environment of its own in the cache.
fn python() -> Result<PathBuf> {
    let folder = cache::folder()?.join("interop-torch-2.13.0");
    let python = folder.join("bin/python");
    let works = |python: &Path| {
        let status = Command::new(python).args(["-c", "import torch"]).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    if works(&python) {
        return Ok(python);
    }
    println!("installing {TORCH} into {}", folder.display());
    let made = Command::new("python3").args(["-m", "venv"]).arg(&folder).status();
    ensure!(
        made.context("python3 does not start")?.success(),
        "python3 -m venv failed (is python3-venv there?)"
    );
    let status =
        Command::new(folder.join("bin/pip")).args(["install", "--quiet", TORCH, "numpy"]).status()?;
    ensure!(status.success() && works(&python), "pip could not install {TORCH}");
    Ok(python)
}

fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Runs one rank for each letter and waits for all.
fn world(languages: &str, method: &str, python: &Path, rust: &Path) -> Result<()> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let place = match method {
        "env" => "env".to_owned(),
        _ => format!("tcp://127.0.0.1:{port}"),
    };
    let mut ranks = Ranks(Vec::new());
    for (rank, language) in languages.chars().enumerate() {
        let mut command = match language {
            'p' => {
                let mut command = Command::new(python);
                // Ours is a libtorch without CUDA; PyTorch finds its own.
                command.arg(root().join("examples/interop/rank.py")).env_remove("LD_LIBRARY_PATH");
                command
            }
            _ => Command::new(rust),
        };
        command
            .arg(&place)
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", languages.len().to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .env("OMP_NUM_THREADS", "1")
            .stdout(Stdio::null());
        ranks.0.push(command.spawn()?);
    }
    let start = Instant::now();
    let mut left: Vec<usize> = (0..ranks.0.len()).collect();
    while !left.is_empty() {
        let mut failed = None;
        left.retain(|&rank| match ranks.0[rank].try_wait() {
            Ok(None) => true,
            Ok(Some(status)) if status.success() => false,
            Ok(Some(status)) => {
                failed.get_or_insert(format!("rank {rank}: {status}"));
                false
            }
            Err(error) => {
                failed.get_or_insert(format!("rank {rank}: {error}"));
                false
            }
        });
        if let Some(failed) = failed {
            // What the others say of it comes a moment later.
            thread::sleep(Duration::from_secs(3));
            bail!(failed);
        }
        ensure!(start.elapsed() < LIMIT, "ranks {left:?} were not done after {LIMIT:?}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The processes of a world; none survives it.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
