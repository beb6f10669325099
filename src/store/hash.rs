//! A store for the threads of one process.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::{DEFAULT_TIMEOUT, Store, counter, failed, not_in_time};
use crate::Result;

/// A store in this process's memory: ranks that are threads share it through an
/// [`Arc`](std::sync::Arc).
///
/// ```
/// use tch_distributed::store::{HashStore, Store};
/// let store = HashStore::new();
/// store.set("colour", b"blue")?;
/// assert_eq!(store.get("colour")?, b"blue");
/// assert_eq!(store.add("visits", 2)?, 2);
/// # Ok::<(), tch_distributed::Error>(())
/// ```
#[derive(Debug)]
pub struct HashStore {
    keys: Mutex<HashMap<String, Vec<u8>>>,
    changed: Condvar,
    timeout: Mutex<Duration>,
}

impl Default for HashStore {
    fn default() -> Self {
        Self { keys: Mutex::default(), changed: Condvar::new(), timeout: Mutex::new(DEFAULT_TIMEOUT) }
    }
}

impl HashStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `ready` on the map whenever it changes, until it gives something or the time is over.
    fn until<T>(
        &self,
        timeout: Duration,
        mut ready: impl FnMut(&HashMap<String, Vec<u8>>) -> Option<T>,
    ) -> Option<T> {
        // A deadline beyond what the clock can say is none.
        let deadline = Instant::now().checked_add(timeout);
        let mut keys = self.keys.lock();
        loop {
            if let Some(found) = ready(&keys) {
                return Some(found);
            }
            match deadline {
                Some(deadline) if self.changed.wait_until(&mut keys, deadline).timed_out() => {
                    return ready(&keys);
                }
                Some(_) => {}
                None => self.changed.wait(&mut keys),
            }
        }
    }
}

impl Store for HashStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.keys.lock().insert(key.to_owned(), value.to_vec());
        self.changed.notify_all();
        Ok(())
    }

    fn get(&self, key: &str) -> Result<Vec<u8>> {
        let timeout = self.timeout();
        self.until(timeout, |keys| keys.get(key).cloned()).ok_or_else(|| not_in_time("get", &[key], timeout))
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64> {
        let mut keys = self.keys.lock();
        let before = keys.get(key).map_or(Ok(0), |value| counter(key, value))?;
        let after = before
            .checked_add(amount)
            .ok_or_else(|| failed("add", &[key], format!("{before} + {amount} is more than 64 bits hold")))?;
        keys.insert(key.to_owned(), after.to_string().into_bytes());
        self.changed.notify_all();
        Ok(after)
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        let mut keys = self.keys.lock();
        match keys.get(key) {
            Some(current) if current != expected => return Ok(current.clone()),
            None if !expected.is_empty() => return Ok(expected.to_vec()),
            _ => {}
        }
        keys.insert(key.to_owned(), desired.to_vec());
        self.changed.notify_all();
        Ok(desired.to_vec())
    }

    fn check(&self, keys: &[&str]) -> Result<bool> {
        let map = self.keys.lock();
        Ok(keys.iter().all(|&key| map.contains_key(key)))
    }

    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        self.until(timeout, |map| keys.iter().all(|&key| map.contains_key(key)).then_some(()))
            .ok_or_else(|| not_in_time("wait", keys, timeout))
    }

    fn delete(&self, key: &str) -> Result<bool> {
        Ok(self.keys.lock().remove(key).is_some())
    }

    fn num_keys(&self) -> Result<usize> {
        Ok(self.keys.lock().len())
    }

    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        self.keys.lock().entry(key.to_owned()).or_default().extend_from_slice(value);
        self.changed.notify_all();
        Ok(())
    }

    fn timeout(&self) -> Duration {
        *self.timeout.lock()
    }

    fn set_timeout(&self, timeout: Duration) {
        *self.timeout.lock() = timeout;
    }
}
