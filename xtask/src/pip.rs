//! Downloads of wheels through the user's own pip, which knows the user's index, proxy and certificates.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::wheels::Wheel;

/// The tags of the wheels in our table, so that any Python with pip will do.
const TAGS: &[&str] = &[
    "--python-version=3.12",
    "--implementation=cp",
    "--abi=cp312",
    "--abi=none",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_25_x86_64",
    "--platform=manylinux_2_18_x86_64",
    "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux2014_x86_64",
];

/// What else there is where Python or the network is not.
const ELSE: &str = "Python is needed for this one download only. Without it, set LIBTORCH to a libtorch of your \
                    own, or build with the feature download-libtorch.";

pub(crate) struct Pip {
    python: OsString,
}

impl Pip {
    /// Makes sure that there is a Python 3.9 or newer with pip.
    pub(crate) fn find() -> Result<Self> {
        let python = OsString::from("python3");
        let version = Command::new(&python)
            .args(["-c", "import sys; print(sys.version_info >= (3, 9), sys.version.split()[0])"])
            .output();
        let version = match version {
            Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
            Ok(output) => {
                bail!("python3 does not start: {}\n{ELSE}", String::from_utf8_lossy(&output.stderr).trim())
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                bail!("python3 is not on the PATH; it is needed to download libtorch.\n{ELSE}")
            }
            Err(error) => bail!("python3 does not start: {error}\n{ELSE}"),
        };
        if let Some(old) = version.trim().strip_prefix("False ") {
            bail!("python3 is version {old}; 3.9 or newer is needed to download libtorch.\n{ELSE}");
        }
        let pip = Command::new(&python).args(["-m", "pip", "--version"]).output()?;
        if !pip.status.success() {
            bail!(
                "python3 has no pip, which is needed to download libtorch. Install it (`python3 -m ensurepip`, or \
                 your system's package python3-pip).\n{ELSE}"
            );
        }
        Ok(Self { python })
    }

    /// Leaves the wheel in `folder`, which must be empty and on the disk of its final place.
    pub(crate) fn download(&self, wheel: &Wheel, folder: &Path) -> Result<()> {
        let (temporary, errors) = (folder.join("tmp"), folder.join("errors"));
        fs::create_dir(&temporary)?;
        let mut pip = Command::new(&self.python)
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"])
            .args(["--no-input", "--disable-pip-version-check", "--progress-bar=off"])
            .args(TAGS)
            .arg("--dest")
            .arg(folder)
            .arg(wheel.requirement)
            .env("TMPDIR", &temporary)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&errors)?)
            .spawn()
            .context("python3 does not start")?;

        let bar = progress(wheel.requirement, wheel.bytes);
        let status = loop {
            if let Some(status) = pip.try_wait()? {
                break status;
            }
            // pip writes into its temporary folder and copies at the end, so the sum may pass the total.
            bar.set_position(bytes_under(folder).min(wheel.bytes));
            thread::sleep(Duration::from_millis(100));
        };
        bar.finish_and_clear();
        if !status.success() {
            let said = fs::read_to_string(&errors).unwrap_or_default();
            // The rest repeats itself.
            let said: Vec<_> = said.trim().lines().rev().take(3).collect();
            let said: String = said.iter().rev().map(|line| format!("  {line}\n")).collect();
            return Err(anyhow!(
                "pip could not download {}: is the network there? pip says:\n{said}{ELSE}",
                wheel.requirement,
            ));
        }
        Ok(())
    }
}

/// A bar on a terminal; elsewhere one line.
pub(crate) fn progress(what: &str, bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    if bar.is_hidden() {
        eprintln!("{what}: {:.1} MB", bytes as f64 / 1e6);
    }
    let style =
        ProgressStyle::with_template("{msg:32} [{bar:30}] {bytes:>10} of {total_bytes} {bytes_per_sec:>12}");
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what.to_owned());
    bar
}

fn bytes_under(folder: &Path) -> u64 {
    // Files come and go while pip works: what cannot be read counts nothing.
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes_under(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}
