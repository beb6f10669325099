//! `cargo xtask gpu-simulated`: what takes a GPU, run without one, on the simulated devices of `tests/gpu/simulated`. The
//! libtorch is PyTorch's with CUDA; the CUDA runtime, NCCL and the kernels under it are ours, on the host. PyTorch itself
//! runs on them too: in worlds of its ranks and ours.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::interop::Makings;
use crate::setup::root;
use crate::wheels::Release;
use crate::{cache, gpu_bundle, interop};

pub(crate) const ABOUT: &str =
    "Run what takes a GPU on a simulated one: NCCL's engine, CUDA tensors, DDP, worlds shared with PyTorch (installs it, 5 GB)
PARTS               only those whose names begin so: checks-2, suite, world";

/// What is run, and what it has in its environment besides.
struct Part {
    name: &'static str,
    what: What,
    environment: Environment,
}

type Environment = &'static [(&'static str, &'static str)];

enum What {
    /// A program of the bundle, with arguments.
    Program(&'static str, &'static [&'static str]),
    /// One rank of Rust or PyTorch for each letter, over `tcp://` and then over `env://`.
    World(&'static str),
}

/// Ranks have a device each and may have memory of no other, or share one whose streams are late by chance.
const OWN_DEVICES: Environment = &[("SIMULATED_CUDA_DEVICES", "3"), ("SIMULATED_CUDA_BOUND", "1")];
const LATE_STREAMS: Environment = &[("SIMULATED_CUDA_DELAY", "200")];

const TABLE: &[&str] = &["--exact", "whole::the_product_as_a_table"];

const PARTS: &[Part] = &[
    checks("checks-1", &["checks", "1"], &[]),
    checks("checks-2", &["checks", "2"], OWN_DEVICES),
    checks("checks-3", &["checks", "3"], OWN_DEVICES),
    checks("checks-4", &["checks", "4"], LATE_STREAMS),
    suite(
        "cases-1",
        &[("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("TCHD_CONFORMANCE_RANKS", "launched")],
    ),
    suite("suite-1", &[("TCHD_CONFORMANCE_WORLD", "1"), ("TCHD_CONFORMANCE_RANKS", "processes")]),
    suite("suite-2", &[("TCHD_CONFORMANCE_WORLD", "2"), ("TCHD_CONFORMANCE_RANKS", "processes")]),
    suite("suite-4", &[("TCHD_CONFORMANCE_WORLD", "4"), ("TCHD_CONFORMANCE_RANKS", "processes")]),
    world("world-pr", "pr", OWN_DEVICES),
    world("world-rp", "rp", LATE_STREAMS),
    world("world-prp", "prp", OWN_DEVICES),
    world("world-rppr", "rppr", LATE_STREAMS),
];

const fn checks(name: &'static str, arguments: &'static [&'static str], environment: Environment) -> Part {
    Part { name, what: What::Program("gpu", arguments), environment }
}

const fn suite(name: &'static str, environment: Environment) -> Part {
    Part { name, what: What::Program("conformance", TABLE), environment }
}

const fn world(name: &'static str, languages: &'static str, environment: Environment) -> Part {
    Part { name, what: What::World(languages), environment }
}

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let wanted: Vec<&Part> = PARTS
        .iter()
        .filter(|part| arguments.is_empty() || arguments.iter().any(|start| part.name.starts_with(start)))
        .collect();
    ensure!(!wanted.is_empty(), "no part has a name that begins with {arguments:?}");
    let torch = torch()?;
    let version = interop::VERSION;
    gpu_bundle::run(&["--libtorch".to_owned(), version.to_owned()])?;
    let target = interop::target();
    let programs = target.join("gpu-bundle").join(format!("libtorch-{version}"));
    let folder = target.join("gpu-simulated");
    let preload = build(&torch, &folder, version)?;
    let devices = [("LD_PRELOAD", preload), ("LD_LIBRARY_PATH", path_list(&[&folder, &torch.join("lib")])?)];
    let mut failed = Vec::new();
    for part in wanted {
        let (start, log) = (Instant::now(), folder.join(format!("{}.log", part.name)));
        let mut result = part.run(&programs, &folder, &devices, File::create(&log)?);
        if part.name == "suite-2" && result.is_ok() {
            result = as_recorded(&part.seen(&folder));
        }
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        println!("{:<10} {word:<7} {:>4} s   {}", part.name, start.elapsed().as_secs(), log.display());
        if let Err(error) = result {
            println!("    {error:#}");
            failed.push(part.name);
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("{} failed", failed.join(", ")),
    }
}

impl Part {
    /// Where the suite says which kinds it has seen done.
    fn seen(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}-kinds.txt", self.name))
    }

    fn run(
        &self,
        programs: &Path,
        folder: &Path,
        devices: &[(&'static str, OsString)],
        log: File,
    ) -> Result<()> {
        let own = self.environment.iter().map(|(name, value)| (*name, OsString::from(value)));
        let environment = devices.iter().cloned().chain(own);
        match self.what {
            What::Program(program, arguments) => {
                let status = Command::new(programs.join(program))
                    .args(arguments)
                    .envs(environment)
                    .env("TCHD_CONFORMANCE_BACKEND", "nccl-staged")
                    .env("TCH_DISTRIBUTED_TEST_TIMEOUT", "600")
                    .env("GPU_TRACES", folder)
                    .env("TCHD_CONFORMANCE_RECORD", self.seen(folder))
                    .stdin(Stdio::null())
                    .stdout(log.try_clone()?)
                    .stderr(log)
                    .status()
                    .with_context(|| format!("{program} does not start"))?;
                ensure!(status.success(), "{program}: {status}");
            }
            What::World(languages) => {
                let makings = Makings {
                    python: interop::python()?,
                    rust: programs.join("interop"),
                    backend: "nccl",
                    environment: environment.collect(),
                    log: Some(log),
                };
                for method in ["tcp", "env"] {
                    interop::world(languages, method, &makings)
                        .with_context(|| format!("over {method}://"))?;
                }
            }
        }
        Ok(())
    }
}

/// What NCCL does is in the documentation as a test has it in a file.
fn as_recorded(seen: &Path) -> Result<()> {
    let kept = root().join("tests/fixtures/nccl_kinds.txt");
    let same = fs::read(seen)? == fs::read(&kept)?;
    ensure!(same, "NCCL does other kinds than {} says: {} is what was seen", kept.display(), seen.display());
    Ok(())
}

/// Where a PyTorch with CUDA is.
fn torch() -> Result<PathBuf> {
    let python = interop::python()?;
    let code = "import os, torch; print(os.path.dirname(torch.__file__))";
    let output = Command::new(python).args(["-c", code]).env_remove("LD_LIBRARY_PATH").output()?;
    ensure!(output.status.success(), "PyTorch does not say where it is");
    let torch = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    ensure!(torch.join("lib/libtorch_cuda.so").is_file(), "{} has no CUDA part", torch.display());
    Ok(torch)
}

/// Compiles the simulated runtime, NCCL and operators; what is to be loaded before everything else.
fn build(torch: &Path, folder: &Path, version: &str) -> Result<OsString> {
    let sources = root().join("tests/gpu/simulated");
    let release = Release::of_libtorch(version).context("not a tested libtorch")?;
    let nvidia = cache::folder()?.join(release.nccl().folder).join("nvidia");
    let toolkit = fs::read_dir(&nvidia)?
        .filter_map(|entry| Some(entry.ok()?.path().join("include")))
        .find(|include| include.join("cuda_runtime_api.h").is_file())
        .with_context(|| format!("no CUDA headers in {}", nvidia.display()))?;
    let runtime = needed(&torch.join("lib/libtorch_cuda.so"), "libcudart.so.")?;
    fs::create_dir_all(folder)?;
    let compile = |files: &[&str], library: &str, more: &[&str]| -> Result<PathBuf> {
        let output = folder.join(library);
        let mut command = Command::new("c++");
        command.args(["-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", "-isystem"]);
        command.arg(torch.join("include")).arg("-isystem").arg(&toolkit);
        command.arg("-isystem").arg(nvidia.join("nccl/include"));
        command.args(files.iter().map(|file| sources.join(file)));
        command.arg(format!("-Wl,-soname,{library}")).arg("-o").arg(&output);
        command.arg("-L").arg(torch.join("lib")).arg("-L").arg(folder).args(more);
        ensure!(command.status().context("c++ does not start")?.success(), "{library} does not compile");
        Ok(output)
    };
    let parts = [
        compile(&["runtime.cpp", "absent.cpp"], &runtime, &["-Wl,--default-symver"])?,
        compile(&["nccl.cpp"], "libnccl.so.2", &[])?,
        compile(
            &["operators.cpp"],
            "libsimulated_operators.so",
            &[
                "-Wl,--no-as-needed",
                "-ltorch_cuda",
                "-ltorch_cpu",
                "-lc10_cuda",
                "-lc10",
                &format!("-l:{runtime}"),
            ],
        )?,
    ];
    // libtorch opens the driver by its name.
    let driver = folder.join("libcuda.so.1");
    if !driver.exists() {
        std::os::unix::fs::symlink(&runtime, driver)?;
    }
    path_list(&parts.each_ref().map(PathBuf::as_path))
}

/// The name of a library that another one is linked with.
fn needed(library: &Path, start: &str) -> Result<String> {
    let output = Command::new("readelf").arg("-d").arg(library).output().context("readelf does not start")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let name = text.split(['[', ']']).find(|word| word.starts_with(start));
    Ok(name.with_context(|| format!("{} is linked with no {start}", library.display()))?.to_owned())
}

fn path_list(paths: &[&Path]) -> Result<OsString> {
    Ok(std::env::join_paths(paths)?)
}
