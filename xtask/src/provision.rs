//! Puts a libtorch together in the cache folder, from wheels.
//!
//! A folder of the cache is made beside its place and renamed into it when it is whole, so that what is in its place
//! is always whole. Only the holder of the [`Lock`] makes anything.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{self, Lock, Workplace};
use crate::pip::Pip;
use crate::unpack::{sha256, unpack};
use crate::wheels::{Bundle, Release, Wheel};

/// A libtorch for the CPU: the folder of `lib` and `include`, found or made.
pub(crate) fn libtorch(release: &'static Release) -> Result<PathBuf> {
    Ok(provide(&release.cpu())?.join("torch"))
}

/// The headers of CUDA and NCCL (`cu13/include`, `nccl/include`), found or made. Beside that folder lies
/// `torch/lib` with the CUDA part of libtorch to link with.
pub(crate) fn nvidia(release: &'static Release) -> Result<PathBuf> {
    Ok(provide(&release.nccl())?.join("nvidia"))
}

/// The same, where an earlier set-up has made it.
pub(crate) fn nvidia_if_there(release: &'static Release) -> Result<Option<PathBuf>> {
    let (cache, bundle) = (cache::folder()?, release.nccl());
    Ok(is_whole(&cache, &bundle).then(|| cache.join(bundle.folder).join("nvidia")))
}

fn provide(bundle: &Bundle) -> Result<PathBuf> {
    let cache = cache::folder()?;
    if !is_whole(&cache, bundle) {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            bail!("libtorch can be fetched for Linux on x86-64 only; elsewhere set LIBTORCH to your own");
        }
        let lock = Lock::take(&cache)?;
        // Another set-up may have made it while we waited for the lock.
        if !is_whole(&cache, bundle) {
            make(&cache, &lock, bundle).with_context(|| format!("{} could not be set up", bundle.folder))?;
        }
        lock.clear()?;
    }
    Ok(cache.join(&bundle.folder))
}

fn is_whole(cache: &Path, bundle: &Bundle) -> bool {
    cache.join(&bundle.folder).join(bundle.proof).is_file()
}

fn make(cache: &Path, lock: &Lock, bundle: &Bundle) -> Result<()> {
    let workplace = lock.workplace()?;
    let mut wanted = Vec::new();
    for (wheel, _) in &bundle.parts {
        if !is_here(lock, wheel)? {
            wanted.push(*wheel);
        }
    }
    // pip holds a wheel twice for a moment.
    let largest = wanted.iter().map(|wheel| wheel.bytes).max().unwrap_or(0);
    let download: u64 = wanted.iter().map(|wheel| wheel.bytes).sum();
    lock.need_room(download + largest.max(bundle.unpacked) + 100_000_000)?;
    if !wanted.is_empty() {
        let pip = Pip::find()?;
        eprintln!("fetching {} into {} ({} MB, once)", bundle.folder, cache.display(), download / 1_000_000);
        for wheel in wanted {
            fetch(&pip, lock, &workplace, wheel)?;
        }
    }

    let new = workplace.folder("new")?;
    for (wheel, keep) in &bundle.parts {
        unpack(&lock.wheels().join(wheel.file), &new, *keep)?;
    }
    if !new.join(bundle.proof).exists() {
        link_empty_libtorch(&new.join("torch/lib"))?;
    }

    let place = cache.join(&bundle.folder);
    if place.exists() {
        // Not whole, or we would not be here.
        fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
    }
    fs::rename(&new, &place).with_context(|| format!("cannot make {}", place.display()))
}

/// Whether an interrupted set-up left this wheel, whole.
fn is_here(lock: &Lock, wheel: &Wheel) -> Result<bool> {
    let path = lock.wheels().join(wheel.file);
    Ok(path.is_file() && sha256(&path)? == wheel.sha256)
}

fn fetch(pip: &Pip, lock: &Lock, workplace: &Workplace, wheel: &Wheel) -> Result<()> {
    let folder = workplace.folder(wheel.file.trim_end_matches(".whl"))?;
    pip.download(wheel, &folder)?;
    let path = folder.join(wheel.file);
    if !path.is_file() {
        let names: Vec<_> = fs::read_dir(&folder)?.flatten().map(|entry| entry.file_name()).collect();
        bail!("pip downloaded {names:?} in place of {}", wheel.file);
    }
    let digest = sha256(&path)?;
    if digest != wheel.sha256 {
        bail!(
            "the checksum of {} is {digest}, not {}: a broken or changed download, which was thrown away",
            wheel.file,
            wheel.sha256
        );
    }
    fs::rename(&path, lock.wheels().join(wheel.file)).context("cannot keep the downloaded wheel")
}

/// The wheel's `libtorch.so` is an empty library that loads the CUDA part. Ours loads the CPU part.
fn link_empty_libtorch(lib: &Path) -> Result<()> {
    let compiler = env::var_os("CC").filter(|cc| !cc.is_empty()).unwrap_or_else(|| "cc".into());
    let output = Command::new(&compiler)
        .args(["-shared", "-x", "c", "/dev/null", "-x", "none", "-o"])
        .arg(lib.join("libtorch.so"))
        .arg("-L")
        .arg(lib)
        .args(["-Wl,-soname,libtorch.so", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,-rpath,$ORIGIN"])
        .output();
    let name = compiler.to_string_lossy();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            bail!("{name} cannot link libtorch.so: {}", String::from_utf8_lossy(&output.stderr).trim())
        }
        Err(error) => bail!(
            "the C compiler {name} does not start: {error}\n\
             tch and tch-distributed need a C and C++ compiler (tested: gcc 12); CC and CXX name another than cc, c++."
        ),
    }
}
