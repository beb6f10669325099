//! A part of another store.

use std::time::Duration;

use super::Store;
use crate::Result;

/// The keys of another store that begin with `prefix/`.
///
/// The key is joined as PyTorch joins it, so that `PrefixStore::new("0/", …)` gives `0//key`.
/// [`num_keys`](Store::num_keys) and the timeout are those of the store below.
///
/// ```
/// use std::sync::Arc;
/// use tch_distributed::store::{HashStore, PrefixStore, Store};
/// let below = Arc::new(HashStore::new());
/// let store = PrefixStore::new("job", below.clone());
/// store.set("a", b"1")?;
/// assert_eq!(below.get("job/a")?, b"1");
/// # Ok::<(), tch_distributed::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PrefixStore<S> {
    prefix: String,
    below: S,
}

impl<S: Store> PrefixStore<S> {
    /// The part of `store` whose keys begin with `prefix` and a slash.
    pub fn new(prefix: impl Into<String>, store: S) -> Self {
        Self { prefix: prefix.into(), below: store }
    }

    /// The store below.
    #[doc(alias = "underlying_store")]
    pub fn below(&self) -> &S {
        &self.below
    }

    fn key(&self, key: &str) -> String {
        format!("{}/{key}", self.prefix)
    }

    fn with_keys<T>(&self, keys: &[&str], f: impl FnOnce(&[&str]) -> T) -> T {
        let keys: Vec<String> = keys.iter().map(|key| self.key(key)).collect();
        f(&keys.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

impl<S: Store> Store for PrefixStore<S> {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.below.set(&self.key(key), value)
    }
    fn get(&self, key: &str) -> Result<Vec<u8>> {
        self.below.get(&self.key(key))
    }
    fn add(&self, key: &str, amount: i64) -> Result<i64> {
        self.below.add(&self.key(key), amount)
    }
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        self.below.compare_set(&self.key(key), expected, desired)
    }
    fn check(&self, keys: &[&str]) -> Result<bool> {
        self.with_keys(keys, |keys| self.below.check(keys))
    }
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        self.with_keys(keys, |keys| self.below.wait(keys, timeout))
    }
    fn delete(&self, key: &str) -> Result<bool> {
        self.below.delete(&self.key(key))
    }
    fn num_keys(&self) -> Result<usize> {
        self.below.num_keys()
    }
    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        self.below.append(&self.key(key), value)
    }
    fn timeout(&self) -> Duration {
        self.below.timeout()
    }
    fn set_timeout(&self, timeout: Duration) {
        self.below.set_timeout(timeout);
    }
}
