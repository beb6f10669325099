//! PyTorch's `FileStore`, over libtorch's own.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use super::tcp::text;
use super::{Store, counter, failed};
use crate::Result;
use crate::libtorch::C10dStore;

/// A store in a file that all processes see. The file's layout is that of PyTorch's `FileStore`.
///
/// The file is made if it is not there, and it stays: whoever shares it removes it when the job is
/// over, because the next job would find its keys. A shared network file system must support locks.
///
/// ```
/// use tch_distributed::store::{FileStore, Store};
/// let path = std::env::temp_dir().join(format!("doc-file-store-{}", std::process::id()));
/// let store = FileStore::new(&path)?;
/// store.set("colour", b"blue")?;
/// assert_eq!(FileStore::new(&path)?.get("colour")?, b"blue");
/// # std::fs::remove_file(path)?;
/// # Ok::<(), tch_distributed::Error>(())
/// ```
pub struct FileStore {
    c10d: C10dStore,
    path: PathBuf,
}

impl FileStore {
    /// The store in this file.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store) at once if the file can neither be opened nor made.
    pub fn new(path: impl AsRef<Path>) -> Result<Self> {
        Self::with_workers(path.as_ref(), None)
    }

    /// The last of so many processes to close the store removes the file.
    pub(crate) fn with_workers(path: &Path, workers: Option<usize>) -> Result<Self> {
        let shown = path.display().to_string();
        let refuse = |reason: String| failed("open", &[&shown], reason);
        // libtorch would wait for a directory to appear.
        let open = OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = open.map_err(|e| refuse(e.to_string()))?;
        if !file.metadata().map_err(|e| refuse(e.to_string()))?.is_file() {
            return Err(refuse("it is not a file".to_owned()));
        }
        let utf8 = path.to_str().ok_or_else(|| refuse("its name is not valid UTF-8".to_owned()))?;
        let c10d = C10dStore::file(utf8, workers).map_err(refuse)?;
        Ok(Self { c10d, path: path.to_owned() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file, locked as libtorch locks it until the handle is dropped.
    fn locked(&self, lock: FlockOperation) -> io::Result<(File, Vec<u8>)> {
        let mut file = OpenOptions::new().read(true).append(true).open(&self.path)?;
        flock(&file, lock)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok((file, bytes))
    }
}

/// The keys of users and their values. A record of the file is a key and a value, each with its
/// length in four bytes before it; later ones win, and a key of `-` and another key deletes that one.
/// Keys of users begin with `/`; libtorch has some of its own.
fn records(mut rest: &[u8]) -> HashMap<&[u8], &[u8]> {
    let mut records = HashMap::new();
    while let Some(key) = field(&mut rest)
        && let Some(value) = field(&mut rest)
    {
        match key {
            [b'-', deleted @ ..] => drop(records.remove(deleted)),
            [b'/', ..] => drop(records.insert(key, value)),
            _ => {}
        }
    }
    records
}

fn field<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, after) = rest.split_first_chunk::<4>()?;
    let (field, after) = after.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    *rest = after;
    Some(field)
}

impl std::fmt::Debug for FileStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileStore").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Store for FileStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.c10d.set(key, value).map_err(|e| failed("set", &[key], e))
    }
    fn get(&self, key: &str) -> Result<Vec<u8>> {
        self.c10d.get(key).map_err(|e| text("get", &[key], self.timeout(), e))
    }
    fn add(&self, key: &str, amount: i64) -> Result<i64> {
        self.c10d.add(key, amount).map_err(|reason| {
            if !reason.contains("stoll") {
                return failed("add", &[key], reason);
            }
            let value = self.c10d.get(key).unwrap_or_default();
            counter(key, &value).err().unwrap_or_else(|| failed("add", &[key], reason))
        })
    }
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        self.c10d.compare_set(key, expected, desired).map_err(|e| failed("compare_set", &[key], e))
    }
    fn check(&self, keys: &[&str]) -> Result<bool> {
        self.c10d.check(keys).map_err(|e| failed("check", keys, e))
    }
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        self.c10d.wait(keys, timeout).map_err(|e| text("wait", keys, timeout, e))
    }
    fn delete(&self, key: &str) -> Result<bool> {
        self.c10d.delete(key).map_err(|e| failed("delete", &[key], e))
    }
    fn num_keys(&self) -> Result<usize> {
        let (_, bytes) = self.locked(FlockOperation::LockShared).map_err(|e| failed("num_keys", &[], e))?;
        Ok(records(&bytes).len())
    }
    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        // libtorch reads, then writes: of two at once it would lose one.
        let append = || {
            let (mut file, bytes) = self.locked(FlockOperation::LockExclusive)?;
            let key = [b"/", key.as_bytes()].concat();
            let before = records(&bytes).get(key.as_slice()).copied().unwrap_or_default();
            let mut record = Vec::new();
            for part in [&key, &[before, value].concat()] {
                let length = u32::try_from(part.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
                record.extend(length.to_le_bytes());
                record.extend(part);
            }
            file.write_all(&record)
        };
        append().map_err(|e: io::Error| failed("append", &[key], e))
    }
    fn timeout(&self) -> Duration {
        self.c10d.timeout()
    }
    fn set_timeout(&self, timeout: Duration) {
        // Sets a field: it cannot fail.
        let _ = self.c10d.set_timeout(timeout);
    }
}
