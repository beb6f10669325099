//! For tests: a store around another, in which something goes otherwise.

use std::time::Duration;

use super::Store;
use crate::Result;

/// What goes otherwise.
pub(crate) trait Around: Send + Sync + 'static {
    /// The store below, once it can be reached.
    fn below(&self) -> &dyn Store;

    /// Whether what is set at this key comes to the store.
    fn lets_through(&self, _key: &str) -> bool {
        true
    }

    /// What is read where a value is at a key.
    fn read(&self, _key: &str, value: Vec<u8>) -> Vec<u8> {
        value
    }
}

/// The store.
#[derive(Default)]
pub(crate) struct Altered<A>(pub(crate) A);

impl<A: Around> Store for Altered<A> {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        if self.0.lets_through(key) { self.0.below().set(key, value) } else { Ok(()) }
    }
    fn get(&self, key: &str) -> Result<Vec<u8>> {
        Ok(self.0.read(key, self.0.below().get(key)?))
    }
    fn add(&self, key: &str, amount: i64) -> Result<i64> {
        self.0.below().add(key, amount)
    }
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        self.0.below().compare_set(key, expected, desired)
    }
    fn check(&self, keys: &[&str]) -> Result<bool> {
        self.0.below().check(keys)
    }
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        self.0.below().wait(keys, timeout)
    }
    fn delete(&self, key: &str) -> Result<bool> {
        self.0.below().delete(key)
    }
    fn num_keys(&self) -> Result<usize> {
        self.0.below().num_keys()
    }
    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        self.0.below().append(key, value)
    }
    fn timeout(&self) -> Duration {
        self.0.below().timeout()
    }
    fn set_timeout(&self, timeout: Duration) {
        self.0.below().set_timeout(timeout);
    }
}
