//! `cargo xtask setup`: finds or provides libtorch and tells cargo.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::locate::{self, Libtorch};
use crate::{provision, record};

pub(crate) const ABOUT: &str = "\
Find libtorch, or fetch it once, and tell cargo where it is
--libtorch VERSION  one of the tested versions, in place of what is found
--nccl              the headers of CUDA and NCCL too, for the feature nccl
--into FOLDER       tell cargo in another crate's folder too
--print-config      only print the lines for another crate's .cargo/config.toml";

/// The repository.
pub(crate) fn root() -> PathBuf {
    let xtask =
        env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    xtask.parent().map(Path::to_path_buf).unwrap_or_default()
}

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let (mut version, mut nccl, mut into, mut print) = (None, false, Vec::new(), false);
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().with_context(|| format!("{argument} wants a value"));
        match argument.as_str() {
            "--libtorch" => version = Some(value()?.as_str()),
            "--into" => into.push(PathBuf::from(value()?)),
            "--nccl" => nccl = true,
            "--print-config" => print = true,
            _ => bail!("setup does not know the argument {argument:?}; it takes\n{ABOUT}"),
        }
    }
    let libtorch = locate::find(&root(), version)?;
    if nccl {
        provision::nvidia(locate::release(&root(), version)?)?;
    }
    let lines = lines(&libtorch, version)?;
    if print {
        print!("{lines}");
        return Ok(());
    }
    record::write(&root(), &lines)?;
    match &libtorch {
        Libtorch::Users(folder) => println!("libtorch: {} (LIBTORCH)", folder.display()),
        Libtorch::Python => println!("libtorch: that of Python's torch (LIBTORCH_USE_PYTORCH)"),
        Libtorch::System => println!("libtorch: /usr/lib"),
        Libtorch::Provisioned(folder) => println!("libtorch: {}", folder.display()),
    }
    into.iter().try_for_each(|folder| tell(folder, &lines))
}

/// What every other command does first: [`run`] without arguments, in silence where all is there.
pub(crate) fn ensure() -> Result<()> {
    let libtorch = locate::find(&root(), None)?;
    record::write(&root(), &lines(&libtorch, None)?)
}

fn lines(libtorch: &Libtorch, version: Option<&str>) -> Result<String> {
    // Headers of CUDA that an earlier set-up fetched stay told of. Not knowing the release is no error here.
    let nvidia = match locate::release(&root(), version) {
        Ok(release) => provision::nvidia_if_there(release)?,
        Err(_) => None,
    };
    Ok(record::text(libtorch, nvidia.as_deref()))
}

/// Writes `.cargo/config.toml` in a crate that depends on this one.
fn tell(folder: &Path, lines: &str) -> Result<()> {
    if !folder.join("Cargo.toml").is_file() {
        bail!("{} is no crate: there is no Cargo.toml in it", folder.display());
    }
    let path = folder.join(".cargo/config.toml");
    match fs::read_to_string(&path) {
        Ok(old) if old == lines => return Ok(()),
        Ok(old) if !record::is_ours(&old) => {
            bail!("{} is there already; add these lines to it:\n{lines}", path.display())
        }
        _ => {}
    }
    fs::create_dir_all(folder.join(".cargo"))
        .and_then(|()| fs::write(&path, lines))
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("wrote {}", path.display());
    Ok(())
}
