//! `cargo xtask gpu-bundle`: what takes a GPU, built here and packed for a machine that has one and need not have cargo.
//!
//! One archive holds the programs for every libtorch that this crate is tested with, the script that runs them, and
//! PyTorch's side of the comparison. A version that this repository's `Cargo.lock` does not want is built in a copy of the
//! repository whose lock file has the tch that wants it, if that was published.

use std::collections::HashSet;
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::cargo;
use crate::locate;
use crate::setup::{self, root};
use crate::wheels::{RELEASES, Release};

pub(crate) const ABOUT: &str =
    "Pack the programs that take a GPU, for a machine without cargo (target/gpu-bundle.tar.gz)
--libtorch VERSION  for this one only";

/// Tests by name, and the programs that they are in the bundle.
const TESTS: [&str; 2] = ["gpu", "conformance"];
/// The same of examples.
const EXAMPLES: [&str; 1] = ["interop"];

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let releases: Vec<&Release> = match arguments {
        [] => RELEASES.iter().collect(),
        [flag, version] if flag == "--libtorch" => {
            vec![
                Release::of_libtorch(version)
                    .with_context(|| format!("libtorch {version} is not a tested one"))?,
            ]
        }
        other => bail!("gpu-bundle does not know {other:?}; it takes\n{ABOUT}"),
    };
    let target = root().join("target");
    let bundle = target.join("gpu-bundle");
    if bundle.exists() {
        fs::remove_dir_all(&bundle)?;
    }
    fs::create_dir_all(&bundle)?;
    for file in ["tests/gpu/README.md", "tests/gpu/run.sh", "tests/gpu/beside.py", "examples/interop/rank.py"]
    {
        let from = root().join(file);
        fs::copy(&from, bundle.join(from.file_name().context("a file has a name")?))?;
    }
    for release in releases {
        let tch = if release.published { release.tch } else { "of this repository" };
        println!("=== libtorch {}, tch {tch}", release.libtorch);
        let mut build =
            vec!["build", "--release", "--features", "nccl", "--message-format", "json-render-diagnostics"];
        TESTS.iter().for_each(|test| build.extend(["--test", test]));
        EXAMPLES.iter().for_each(|example| build.extend(["--example", example]));
        let built = match locate::release(&root(), None)?.libtorch == release.libtorch {
            true => {
                setup::run(&["--nccl".to_owned()])?;
                output(cargo().args(build))?
            }
            false => {
                let copy = copy_of_repository(&target.join(format!("gpu-source-{}", release.libtorch)))?;
                // What was not published cannot be had: then the tch of this repository serves.
                for package in ["tch", "torch-sys"].iter().filter(|_| release.published) {
                    let version = format!("{}.0", release.tch);
                    output(cargo_in(&copy).args(["update", "--package", package, "--precise", &version]))?;
                }
                // Named, because the configuration of the repository around the copy names another.
                let wanted = ["xtask", "setup", "--nccl", "--libtorch", release.libtorch];
                output(cargo_in(&copy).args(wanted))?;
                let mut cargo = cargo_in(&copy);
                if !release.published {
                    cargo.env("LIBTORCH_BYPASS_VERSION_CHECK", "1");
                }
                output(cargo.args(build))?
            }
        };
        let folder = bundle.join(format!("libtorch-{}", release.libtorch));
        fs::create_dir(&folder)?;
        for program in TESTS.into_iter().chain(EXAMPLES) {
            let from = executable(&built, program)
                .with_context(|| format!("cargo does not say where it built {program}"))?;
            let to = folder.join(program);
            fs::copy(&from, &to)?;
            let status = Command::new("strip").arg(&to).status().context("strip does not start")?;
            ensure!(status.success(), "strip failed on {}", to.display());
        }
    }
    let archive = target.join("gpu-bundle.tar.gz");
    let status =
        Command::new("tar").arg("-czf").arg(&archive).arg("-C").arg(&target).arg("gpu-bundle").status();
    ensure!(status.context("tar does not start")?.success(), "tar failed");
    let megabytes = File::open(&archive)?.metadata()?.len() as f64 / 1e6;
    println!(
        "{} ({megabytes:.1} MB)\nOn the machine with a GPU: tar xzf gpu-bundle.tar.gz && gpu-bundle/run.sh",
        archive.display()
    );
    Ok(())
}

/// Everything that git would commit, in a folder that keeps its own target.
fn copy_of_repository(folder: &Path) -> Result<PathBuf> {
    let list = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .context("git does not start")?;
    ensure!(list.status.success(), "git ls-files failed");
    let list = String::from_utf8(list.stdout)?;
    let files: HashSet<&Path> =
        list.lines().map(Path::new).filter(|file| root().join(file).is_file()).collect();
    if folder.exists() {
        remove_others(folder, Path::new(""), &files)?;
    }
    for file in &files {
        let (from, to) = (root().join(file), folder.join(file));
        // What has not changed stays as it is, so that cargo does not build it again.
        if fs::read(&to).is_ok_and(|old| fs::read(&from).is_ok_and(|new| old == new)) {
            continue;
        }
        fs::create_dir_all(to.parent().context("a file is in a folder")?)?;
        fs::copy(&from, &to).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    Ok(folder.to_owned())
}

/// Removes what an earlier copy has left and the repository no longer has: a module that has moved would be there twice.
/// What cargo and the set-up make stays.
fn remove_others(copy: &Path, inside: &Path, files: &HashSet<&Path>) -> Result<()> {
    for entry in fs::read_dir(copy.join(inside))? {
        let entry = entry?;
        let path = inside.join(entry.file_name());
        if path == Path::new("target") || path == Path::new(".cargo/libtorch.toml") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            remove_others(copy, &path, files)?;
        } else if !files.contains(&*path) {
            fs::remove_file(copy.join(&path)).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// cargo in a copy, without the libtorch of this repository, which this process has in its environment.
fn cargo_in(copy: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(copy).env("CARGO_TARGET_DIR", copy.join("target"));
    for name in ["LIBTORCH", "TCH_DISTRIBUTED_NVIDIA", "CARGO_MANIFEST_DIR", "LD_LIBRARY_PATH"] {
        command.env_remove(name);
    }
    command
}

/// What it prints.
fn output(command: &mut Command) -> Result<String> {
    let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    let output = command.stderr(Stdio::inherit()).output().context("cargo does not start")?;
    ensure!(output.status.success(), "`cargo {}` failed", words.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}

/// Where cargo's messages say that the program of a test is.
fn executable(messages: &str, test: &str) -> Option<PathBuf> {
    let target = format!("\"name\":\"{test}\"");
    let line = messages.lines().find(|line| line.contains(&target) && line.contains("\"executable\":\""))?;
    let path = line.split("\"executable\":\"").nth(1)?.split('"').next()?;
    Some(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_repository_no_longer_has_goes_from_the_copy_and_what_was_built_stays() {
        let copy = tempfile::tempdir().unwrap();
        let all = ["src/a.rs", "src/b/mod.rs", "src/b.rs", "target/x/y.rs", ".cargo/libtorch.toml"];
        for file in all {
            let path = copy.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let files = HashSet::from([Path::new("src/a.rs"), Path::new("src/b/mod.rs")]);
        remove_others(copy.path(), Path::new(""), &files).unwrap();
        let left: Vec<_> = all.into_iter().filter(|file| copy.path().join(file).is_file()).collect();
        assert_eq!(left, ["src/a.rs", "src/b/mod.rs", "target/x/y.rs", ".cargo/libtorch.toml"]);
    }

    #[test]
    fn the_program_of_a_test_is_found_in_cargos_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"gpu\"},\"executable\":null}\n\
                        {\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"gpu\"},\"executable\":\"/t/gpu-1\"}\n";
        assert_eq!(executable(messages, "gpu"), Some("/t/gpu-1".into()));
        assert_eq!(executable(messages, "conformance"), None);
    }
}
