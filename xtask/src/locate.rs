//! Where libtorch is: the user's own, else one in the system, else one that we provide.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::provision;
use crate::record;
use crate::wheels::{RELEASES, Release};

pub(crate) enum Libtorch {
    /// `LIBTORCH` names it.
    Users(PathBuf),
    /// `LIBTORCH_USE_PYTORCH`: the one that Python imports.
    Python,
    /// In `/usr/lib`, where tch looks by itself.
    System,
    Provisioned(PathBuf),
}

/// Finds it or fetches it. `version` is what the user asked for in so many words.
pub(crate) fn find(root: &Path, version: Option<&str>) -> Result<Libtorch> {
    if version.is_none() {
        if let Some(theirs) = users_own(root)? {
            return Ok(theirs);
        }
        if Path::new("/usr/lib/libtorch.so").exists() {
            return Ok(Libtorch::System);
        }
    }
    Ok(Libtorch::Provisioned(provision::libtorch(release(root, version)?)?))
}

/// The tested release of that version, or else the one that the tch in `Cargo.lock` wants.
pub(crate) fn release(root: &Path, version: Option<&str>) -> Result<&'static Release> {
    let Some(version) = version else { return wanted_by_tch(root) };
    Release::of_libtorch(version).with_context(|| {
        let known: Vec<_> = RELEASES.iter().map(|release| release.libtorch).collect();
        format!("libtorch {version} cannot be provided; known: {}", known.join(", "))
    })
}

/// `cargo xtask` itself runs with what an earlier set-up recorded, so what is in the environment is the user's only
/// where the record does not say the same, or says what the user chose then.
fn users_own(root: &Path) -> Result<Option<Libtorch>> {
    if env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
        return Ok(Some(Libtorch::Python));
    }
    let Some(named) = env::var_os("LIBTORCH").filter(|value| !value.is_empty()).map(PathBuf::from) else {
        return Ok(None);
    };
    if record::read(root).as_deref() == Some(&*named) && (record::is_provided(root) || !named.is_dir()) {
        return Ok(None);
    }
    // torch-sys takes the libraries and headers from elsewhere where these two say so.
    let apart = env::var_os("LIBTORCH_LIB").is_some() || env::var_os("LIBTORCH_INCLUDE").is_some();
    if !apart && !named.join("lib").is_dir() {
        bail!(
            "LIBTORCH is {}, but there is no folder lib in it; unset LIBTORCH or correct it",
            named.display()
        );
    }
    Ok(Some(Libtorch::Users(named)))
}

fn wanted_by_tch(root: &Path) -> Result<&'static Release> {
    let lock = fs::read_to_string(root.join("Cargo.lock")).context("cannot read Cargo.lock")?;
    let version = resolved_tch(&lock).context("there is no tch in Cargo.lock")?;
    Release::for_tch(version).with_context(|| format!("which libtorch tch {version} wants is not known"))
}

fn resolved_tch(lock: &str) -> Option<&str> {
    let after = lock.split("name = \"tch\"\nversion = \"").nth(1)?;
    after.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_file_says_which_tch_it_is() {
        let lock = "[[package]]\nname = \"tch\"\nversion = \"0.26.0\"\n\n[[package]]\nname = \"torch-sys\"\n";
        assert_eq!(resolved_tch(lock), Some("0.26.0"));
        assert_eq!(resolved_tch("[[package]]\nname = \"torch-sys\"\n"), None);
    }
}
