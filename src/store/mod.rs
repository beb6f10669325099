//! The meeting place: a key-value store that all ranks reach.
//!
//! | store | who shares it | what it is |
//! |---|---|---|
//! | [`TcpStore`] | processes on any host | PyTorch's `TCPStore`, over libtorch's own: Python can join |
//! | [`FileStore`] | processes that see one file system | PyTorch's `FileStore`, over libtorch's own |
//! | [`HashStore`] | threads of one process | a map |
//! | [`PrefixStore`] | whoever shares the store below | puts `prefix/` before every key, as PyTorch does |
//!
//! A store of your own is one `impl Store`; `init_process_group` takes it with `InitOptions::store`.

#[cfg(test)]
pub(crate) mod around;
mod file;
mod hash;
mod prefix;
mod tcp;
pub(crate) mod wire;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

pub use file::FileStore;
pub use hash::HashStore;
pub use prefix::PrefixStore;
pub use tcp::TcpStore;
pub(crate) use tcp::place;

use crate::{Error, Result};

/// How long a store's `get` waits, unless told otherwise: PyTorch's five minutes.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);

/// A store operation that failed.
pub(crate) fn failed(op: &str, keys: &[&str], reason: impl std::fmt::Display) -> Error {
    Error::Store { op: op.to_owned(), key: keys.join(", "), reason: reason.to_string() }
}

/// A counter's value as it is kept.
pub(crate) fn counter(key: &str, value: &[u8]) -> Result<i64> {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).ok_or_else(|| {
        let shown: String = String::from_utf8_lossy(value).chars().take(40).collect();
        failed("add", &[key], format!("its value {shown:?} is not an integer"))
    })
}

/// What a wait that ended without its keys says.
pub(crate) fn not_in_time(op: &str, keys: &[&str], timeout: Duration) -> Error {
    failed(op, keys, format!("not set within {timeout:?}"))
}

/// A key-value store that ranks share: they find each other through it and agree on small things.
///
/// The meaning of each operation is that of PyTorch's stores.
pub trait Store: Send + Sync + 'static {
    /// Sets a key.
    fn set(&self, key: &str, value: &[u8]) -> Result<()>;
    /// The value of a key; waits for it up to [`timeout`](Self::timeout).
    fn get(&self, key: &str) -> Result<Vec<u8>>;
    /// Adds to a counter (0 where absent), atomically, and returns the new value. The value is kept
    /// as decimal text.
    fn add(&self, key: &str, amount: i64) -> Result<i64>;
    /// Sets a key to `desired` if it is `expected` (or absent, and `expected` is empty); returns the
    /// value after that: `expected` itself where the key is absent and nothing was set.
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>>;
    /// Whether all keys are there. Does not wait.
    fn check(&self, keys: &[&str]) -> Result<bool>;
    /// Waits until all keys are there.
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()>;
    /// Deletes a key; false where it was absent.
    fn delete(&self, key: &str) -> Result<bool>;
    /// How many keys there are.
    fn num_keys(&self) -> Result<usize>;
    /// Appends to a key (empty where absent).
    fn append(&self, key: &str, value: &[u8]) -> Result<()>;
    /// How long [`get`](Self::get) waits.
    fn timeout(&self) -> Duration;
    /// Sets how long [`get`](Self::get) waits.
    fn set_timeout(&self, timeout: Duration);
}

impl<S: Store + ?Sized> Store for Arc<S> {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        (**self).set(key, value)
    }
    fn get(&self, key: &str) -> Result<Vec<u8>> {
        (**self).get(key)
    }
    fn add(&self, key: &str, amount: i64) -> Result<i64> {
        (**self).add(key, amount)
    }
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        (**self).compare_set(key, expected, desired)
    }
    fn check(&self, keys: &[&str]) -> Result<bool> {
        (**self).check(keys)
    }
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        (**self).wait(keys, timeout)
    }
    fn delete(&self, key: &str) -> Result<bool> {
        (**self).delete(key)
    }
    fn num_keys(&self) -> Result<usize> {
        (**self).num_keys()
    }
    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        (**self).append(key, value)
    }
    fn timeout(&self) -> Duration {
        (**self).timeout()
    }
    fn set_timeout(&self, timeout: Duration) {
        (**self).set_timeout(timeout);
    }
}

/// Which of these keys are not there, by their places among them. Does not wait.
pub(crate) fn absent<K: AsRef<str>>(
    store: &dyn Store,
    keys: impl IntoIterator<Item = K>,
) -> Result<Vec<usize>> {
    let mut absent = Vec::new();
    for (at, key) in keys.into_iter().enumerate() {
        if !store.check(&[key.as_ref()])? {
            absent.push(at);
        }
    }
    Ok(absent)
}
