//! The cache folder, which survives `cargo clean`, and the lock that lets one set-up at a time write to it.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock, statvfs};

/// `TCH_DISTRIBUTED_CACHE`, else `$XDG_CACHE_HOME/tch-distributed`, else `~/.cache/tch-distributed`.
pub(crate) fn folder() -> Result<PathBuf> {
    let given = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = if let Some(folder) = given("TCH_DISTRIBUTED_CACHE") {
        folder
    } else if let Some(caches) = given("XDG_CACHE_HOME") {
        caches.join("tch-distributed")
    } else if let Some(home) = given("HOME") {
        home.join(".cache/tch-distributed")
    } else {
        bail!("no place for downloads: set TCH_DISTRIBUTED_CACHE to a folder (HOME is not set)");
    };
    std::path::absolute(&folder).with_context(|| format!("the cache folder {}", folder.display()))
}

/// The right to write to the cache folder. The system gives it back when this process ends, however it ends.
pub(crate) struct Lock {
    folder: PathBuf,
    _file: File,
}

impl Lock {
    /// Waits while another set-up is at work.
    pub(crate) fn take(folder: &Path) -> Result<Self> {
        let explain = || {
            format!(
                "cannot write to the cache folder {}; TCH_DISTRIBUTED_CACHE names another",
                folder.display()
            )
        };
        fs::create_dir_all(folder).with_context(explain)?;
        let file = File::create(folder.join("lock")).with_context(explain)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!("another set-up is at work in {}; waiting for it", folder.display());
            flock(&file, FlockOperation::LockExclusive).with_context(explain)?;
        }
        Ok(Self { folder: folder.to_owned(), _file: file })
    }

    /// Verified wheels that a set-up still needs. They outlive an interrupted one.
    pub(crate) fn wheels(&self) -> PathBuf {
        self.folder.join("partial/wheels")
    }

    /// A new empty folder for half-made things. What an interrupted set-up left is removed first.
    pub(crate) fn workplace(&self) -> Result<Workplace> {
        let partial = self.folder.join("partial");
        fs::create_dir_all(self.wheels()).with_context(|| format!("cannot make {}", partial.display()))?;
        for entry in fs::read_dir(&partial)? {
            let path = entry?.path();
            if path != self.wheels() {
                fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        // The number keeps an orphaned pip of an earlier set-up out of our files.
        let folder = partial.join(format!("work-{}", std::process::id()));
        fs::create_dir(&folder)?;
        Ok(Workplace { folder })
    }

    /// Removes what no later set-up needs.
    pub(crate) fn clear(&self) -> Result<()> {
        let partial = self.folder.join("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
        }
        Ok(())
    }

    /// Fails where the disk has less room than `bytes`.
    pub(crate) fn need_room(&self, bytes: u64) -> Result<()> {
        let disk = statvfs(&self.folder)?;
        let free = disk.f_bavail * disk.f_frsize;
        if free < bytes {
            bail!(
                "the disk of {} has {} MB free, {} MB are needed while libtorch is set up.\n\
                 Make room, or name a folder on another disk with TCH_DISTRIBUTED_CACHE.",
                self.folder.display(),
                free / 1_000_000,
                bytes / 1_000_000,
            );
        }
        Ok(())
    }
}

/// A folder that goes when this value does.
pub(crate) struct Workplace {
    folder: PathBuf,
}

impl Workplace {
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        // Best effort: what stays is removed by the next set-up.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn only_one_set_up_at_a_time_has_the_lock() {
        let cache = tempfile::tempdir().unwrap();
        let busy = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _lock = Lock::take(cache.path()).unwrap();
                        assert!(!busy.swap(true, Ordering::SeqCst), "two have the lock");
                        thread::yield_now();
                        busy.store(false, Ordering::SeqCst);
                    }
                });
            }
        });
    }

    #[test]
    fn what_an_interrupted_set_up_left_is_removed_and_its_whole_wheels_are_kept() {
        let cache = tempfile::tempdir().unwrap();
        let lock = Lock::take(cache.path()).unwrap();
        let left = cache.path().join("partial/work-1/new/torch");
        fs::create_dir_all(&left).unwrap();
        fs::create_dir_all(lock.wheels()).unwrap();
        fs::write(lock.wheels().join("a.whl"), "a").unwrap();

        let workplace = lock.workplace().unwrap();
        assert!(!left.exists() && lock.wheels().join("a.whl").is_file());
        let folder = workplace.folder("new").unwrap();
        drop(workplace);
        assert!(!folder.exists());
        lock.clear().unwrap();
        assert!(!lock.wheels().exists());
    }

    #[test]
    fn a_full_disk_is_found_before_the_download_and_says_what_to_do() {
        let cache = tempfile::tempdir().unwrap();
        let lock = Lock::take(cache.path()).unwrap();
        lock.need_room(1).unwrap();
        let error = lock.need_room(u64::MAX).unwrap_err().to_string();
        assert!(error.contains("MB free") && error.contains("TCH_DISTRIBUTED_CACHE"), "{error}");
    }
}
