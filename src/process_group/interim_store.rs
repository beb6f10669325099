//! A store of this process and a store with a prefix, until `store` has them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::store::Store;
use crate::{Error, Result};

pub(crate) struct HashStore {
    map: Mutex<HashMap<String, Vec<u8>>>,
    changed: Condvar,
    timeout: Mutex<Duration>,
}

impl HashStore {
    pub(crate) fn new() -> Self {
        Self { map: Mutex::default(), changed: Condvar::new(), timeout: Mutex::new(Duration::from_secs(300)) }
    }

    fn change<T>(&self, f: impl FnOnce(&mut HashMap<String, Vec<u8>>) -> T) -> T {
        let value = f(&mut self.map.lock());
        self.changed.notify_all();
        value
    }
}

impl Store for HashStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.change(|map| map.insert(key.to_owned(), value.to_vec()));
        Ok(())
    }
    fn get(&self, key: &str) -> Result<Vec<u8>> {
        self.wait(&[key], self.timeout())?;
        Ok(self.map.lock().get(key).cloned().unwrap_or_default())
    }
    fn add(&self, key: &str, amount: i64) -> Result<i64> {
        Ok(self.change(|map| {
            let old =
                map.get(key).and_then(|v| std::str::from_utf8(v).ok()?.parse::<i64>().ok()).unwrap_or(0);
            map.insert(key.to_owned(), (old + amount).to_string().into_bytes());
            old + amount
        }))
    }
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        Ok(self.change(|map| match map.get_mut(key) {
            Some(value) if value == expected => {
                *value = desired.to_vec();
                desired.to_vec()
            }
            Some(value) => value.clone(),
            None if expected.is_empty() => {
                map.insert(key.to_owned(), desired.to_vec());
                desired.to_vec()
            }
            None => expected.to_vec(),
        }))
    }
    fn check(&self, keys: &[&str]) -> Result<bool> {
        let map = self.map.lock();
        Ok(keys.iter().all(|k| map.contains_key(*k)))
    }
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut map = self.map.lock();
        while !keys.iter().all(|k| map.contains_key(*k)) {
            if self.changed.wait_until(&mut map, deadline).timed_out() {
                return Err(Error::Store {
                    op: "wait".into(),
                    key: keys.join(", "),
                    reason: format!("timed out after {timeout:?}"),
                });
            }
        }
        Ok(())
    }
    fn delete(&self, key: &str) -> Result<bool> {
        Ok(self.change(|map| map.remove(key).is_some()))
    }
    fn num_keys(&self) -> Result<usize> {
        Ok(self.map.lock().len())
    }
    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        self.change(|map| map.entry(key.to_owned()).or_default().extend_from_slice(value));
        Ok(())
    }
    fn timeout(&self) -> Duration {
        *self.timeout.lock()
    }
    fn set_timeout(&self, timeout: Duration) {
        *self.timeout.lock() = timeout;
    }
}

pub(crate) struct PrefixStore {
    prefix: String,
    store: Arc<dyn Store>,
}

impl PrefixStore {
    pub(crate) fn new(prefix: &str, store: impl Store) -> Self {
        Self { prefix: prefix.to_owned(), store: Arc::new(store) }
    }
    fn key(&self, key: &str) -> String {
        format!("{}/{key}", self.prefix)
    }
    fn keys<T>(&self, keys: &[&str], f: impl FnOnce(&[&str]) -> T) -> T {
        let keys: Vec<String> = keys.iter().map(|k| self.key(k)).collect();
        f(&keys.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

impl Store for PrefixStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.store.set(&self.key(key), value)
    }
    fn get(&self, key: &str) -> Result<Vec<u8>> {
        self.store.get(&self.key(key))
    }
    fn add(&self, key: &str, amount: i64) -> Result<i64> {
        self.store.add(&self.key(key), amount)
    }
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        self.store.compare_set(&self.key(key), expected, desired)
    }
    fn check(&self, keys: &[&str]) -> Result<bool> {
        self.keys(keys, |keys| self.store.check(keys))
    }
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        self.keys(keys, |keys| self.store.wait(keys, timeout))
    }
    fn delete(&self, key: &str) -> Result<bool> {
        self.store.delete(&self.key(key))
    }
    fn num_keys(&self) -> Result<usize> {
        self.store.num_keys()
    }
    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        self.store.append(&self.key(key), value)
    }
    fn timeout(&self) -> Duration {
        self.store.timeout()
    }
    fn set_timeout(&self, timeout: Duration) {
        self.store.set_timeout(timeout);
    }
}
