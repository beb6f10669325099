//! The meeting place: a key-value store that all ranks reach.

use std::sync::Arc;
use std::time::Duration;

use crate::Result;

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
