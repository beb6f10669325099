//! libtorch's key-value stores (`TCPStore`, `FileStore`, `HashStore`), and any [`Store`] of ours as
//! one of theirs. Errors are the texts of the C++ exceptions.

use std::any::Any;
use std::fmt::Display;
use std::net::{TcpStream, ToSocketAddrs};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use cxx::{CxxString, CxxVector, UniquePtr};
use parking_lot::Mutex;

use crate::store::Store;

#[allow(unreachable_pub, clippy::undocumented_unsafe_blocks)]
#[cxx::bridge(namespace = "tchd")]
pub(super) mod ffi {
    extern "Rust" {
        type RustStore;
        fn rust_store_set(store: &RustStore, key: &CxxString, value: &[u8]) -> Result<()>;
        fn rust_store_get(store: &RustStore, key: &CxxString, timeout_ms: i64) -> Result<Vec<u8>>;
        fn rust_store_add(store: &RustStore, key: &CxxString, amount: i64) -> Result<i64>;
        fn rust_store_compare_set(
            store: &RustStore,
            key: &CxxString,
            expected: &[u8],
            desired: &[u8],
        ) -> Result<Vec<u8>>;
        fn rust_store_check(store: &RustStore, keys: &CxxVector<CxxString>) -> Result<bool>;
        fn rust_store_wait(store: &RustStore, keys: &CxxVector<CxxString>, timeout_ms: i64) -> Result<()>;
        fn rust_store_delete(store: &RustStore, key: &CxxString) -> Result<bool>;
        fn rust_store_num_keys(store: &RustStore) -> Result<i64>;
        fn rust_store_append(store: &RustStore, key: &CxxString, value: &[u8]) -> Result<()>;
    }
    unsafe extern "C++" {
        include!("tch-distributed/src/libtorch/catch.h");
        include!("tch-distributed/src/libtorch/store.h");
        type StoreHandle;
        fn tcp_store(
            host: &str,
            port: u16,
            server: bool,
            workers: i64,
            wait_workers: bool,
            multi_tenant: bool,
            timeout_ms: i64,
        ) -> Result<UniquePtr<StoreHandle>>;
        fn file_store(path: &str, workers: i32) -> Result<UniquePtr<StoreHandle>>;
        fn rust_store(store: Box<RustStore>, timeout_ms: i64) -> Result<UniquePtr<StoreHandle>>;
        fn share(store: &StoreHandle) -> Result<UniquePtr<StoreHandle>>;
        fn port(self: &StoreHandle) -> Result<u16>;
        fn set(self: &StoreHandle, key: &str, value: &[u8]) -> Result<()>;
        fn get(self: &StoreHandle, key: &str) -> Result<Vec<u8>>;
        fn add(self: &StoreHandle, key: &str, amount: i64) -> Result<i64>;
        fn compare_set(self: &StoreHandle, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>>;
        fn check(self: &StoreHandle, keys: &[&str]) -> Result<bool>;
        fn wait(self: &StoreHandle, keys: &[&str], timeout_ms: i64) -> Result<()>;
        fn remove(self: &StoreHandle, key: &str) -> Result<bool>;
        fn num_keys(self: &StoreHandle) -> Result<i64>;
        fn append(self: &StoreHandle, key: &str, value: &[u8]) -> Result<()>;
        fn set_timeout(self: &StoreHandle, timeout_ms: i64) -> Result<()>;
    }
}

// SAFETY: the handle owns one reference to a c10d store and nothing tied to a thread; stores lock
// themselves (TCPStore its connection, FileStore its file, HashStore its map).
unsafe impl Send for ffi::StoreHandle {}
// SAFETY: as above; a handle itself never changes.
unsafe impl Sync for ffi::StoreHandle {}

type Text<T> = Result<T, String>;

fn text(error: cxx::Exception) -> String {
    error.what().to_owned()
}

/// c10d reads 0 as "no timeout" in places, and long ones overflow when added to a clock.
fn millis(timeout: Duration) -> i64 {
    const HUNDRED_YEARS: u128 = 100 * 365 * 24 * 3600 * 1000;
    timeout.as_millis().clamp(1, HUNDRED_YEARS) as i64
}

/// How to make a `TCPStore`.
#[derive(Clone, Debug)]
pub(crate) struct TcpStoreOptions {
    /// The server's host name or address (a server listens on every address).
    pub(crate) host: String,
    /// The server's port; a server takes a free one for 0.
    pub(crate) port: u16,
    /// Whether to be the server.
    pub(crate) server: bool,
    /// How many stores join, the server's own included; `None`: any number.
    pub(crate) num_workers: Option<usize>,
    /// Whether the server's constructor waits until `num_workers` have joined.
    pub(crate) wait_workers: bool,
    /// Whether servers of this process on the same port share one.
    pub(crate) multi_tenant: bool,
    /// How long connecting, joining and (until changed) `get` may take.
    pub(crate) timeout: Duration,
}

/// How long another connection to a server that has answered may take at least, however short the time
/// for keys to come is.
const CONNECT_MS: i64 = 5000;

/// A store of libtorch. `Send` and `Sync`: any number of threads may use one at once.
///
/// A `TCPStore` locks its connection for the whole of a waiting `get`. So each call here takes an
/// idle connection or makes one: a waiting `get` keeps nobody else from the store.
pub(crate) struct C10dStore {
    /// Holds the server, where this process is the server, and the first connection.
    first: UniquePtr<ffi::StoreHandle>,
    timeout_ms: AtomicI64,
    tcp: Option<Connections>,
}

/// How long a server that answered before may take to answer again.
const RECONNECT: Duration = Duration::from_secs(2);

/// What libtorch says when keys have not come in time. It has taken its question back then, and the server has
/// said so: the connection is as good as before.
const WAITED: &str = "wait timeout after";

/// The connections to one TCP server that are not in use.
struct Connections {
    host: String,
    port: u16,
    idle: Mutex<Vec<UniquePtr<ffi::StoreHandle>>>,
}

impl Connections {
    /// Whether somebody still listens: libtorch's client would try again and again for the store's whole
    /// timeout, and a server that answered before and is gone does not come back.
    fn knock(&self) -> Text<()> {
        let gone =
            |e: &dyn Display| format!("the store's server at {}:{} is gone: {e}", self.host, self.port);
        let addresses = (self.host.as_str(), self.port).to_socket_addrs().map_err(|e| gone(&e))?;
        let mut last = "it has no address".to_owned();
        for address in addresses {
            match TcpStream::connect_timeout(&address, RECONNECT) {
                Ok(_) => return Ok(()),
                Err(e) => last = e.to_string(),
            }
        }
        Err(gone(&last))
    }
}

impl C10dStore {
    /// A `TCPStore`, client or server.
    pub(crate) fn tcp(options: TcpStoreOptions) -> Text<Self> {
        let TcpStoreOptions { host, port, server, num_workers, wait_workers, multi_tenant, timeout } =
            options;
        let workers = num_workers.map_or(-1, |n| n as i64);
        let timeout = millis(timeout);
        let first = ffi::tcp_store(&host, port, server, workers, wait_workers, multi_tenant, timeout)
            .map_err(text)?;
        let port = first.port().map_err(text)?;
        let idle = Mutex::new(vec![ffi::share(&first).map_err(text)?]);
        Ok(Self { first, timeout_ms: AtomicI64::new(timeout), tcp: Some(Connections { host, port, idle }) })
    }

    /// A `FileStore`; `num_workers` the last of that many to close removes the file.
    pub(crate) fn file(path: &str, num_workers: Option<usize>) -> Text<Self> {
        let workers = num_workers.map_or(-1, |n| i32::try_from(n).unwrap_or(i32::MAX));
        Self::one(ffi::file_store(path, workers))
    }

    /// Any store as one that libtorch can call.
    pub(crate) fn from_rust(store: Arc<dyn Store>) -> Text<Self> {
        let timeout = millis(store.timeout());
        let this = Self::one(ffi::rust_store(Box::new(RustStore(store)), timeout))?;
        this.timeout_ms.store(timeout, Ordering::Relaxed);
        Ok(this)
    }

    fn one(store: Result<UniquePtr<ffi::StoreHandle>, cxx::Exception>) -> Text<Self> {
        Ok(Self { first: store.map_err(text)?, timeout_ms: AtomicI64::new(300_000), tcp: None })
    }

    /// The server's port, where there is one.
    pub(crate) fn port(&self) -> Option<u16> {
        self.tcp.as_ref().map(|tcp| tcp.port)
    }

    /// The server's host, where there is one.
    pub(crate) fn host(&self) -> Option<&str> {
        self.tcp.as_ref().map(|tcp| tcp.host.as_str())
    }

    /// The C++ handle, for a c10d backend.
    pub(super) fn handle(&self) -> &ffi::StoreHandle {
        &self.first
    }

    fn with<T>(&self, f: impl FnOnce(&ffi::StoreHandle) -> Result<T, cxx::Exception>) -> Text<T> {
        let Some(tcp) = &self.tcp else {
            return f(&self.first).map_err(text);
        };
        let idle = tcp.idle.lock().pop();
        let timeout = self.timeout_ms.load(Ordering::Relaxed);
        let connection = match idle {
            Some(connection) => connection,
            None => {
                tcp.knock()?;
                let patience = timeout.max(CONNECT_MS);
                ffi::tcp_store(&tcp.host, tcp.port, false, -1, false, false, patience).map_err(text)?
            }
        };
        let result = connection.set_timeout(timeout).and_then(|()| f(&connection)).map_err(text);
        // Only a connection that answered goes back: after any other error its state is unknown.
        if result.as_ref().err().is_none_or(|error| error.contains(WAITED)) {
            tcp.idle.lock().push(connection);
        }
        result
    }

    /// Sets a key.
    pub(crate) fn set(&self, key: &str, value: &[u8]) -> Text<()> {
        self.with(|s| s.set(key, value))
    }

    /// The value of a key; waits for it up to the timeout.
    pub(crate) fn get(&self, key: &str) -> Text<Vec<u8>> {
        self.with(|s| s.get(key))
    }

    /// Adds to a counter and returns the new value.
    pub(crate) fn add(&self, key: &str, amount: i64) -> Text<i64> {
        self.with(|s| s.add(key, amount))
    }

    /// Sets a key if its value is the expected one; returns the value after that.
    pub(crate) fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Text<Vec<u8>> {
        self.with(|s| s.compare_set(key, expected, desired))
    }

    /// Whether all keys are there.
    pub(crate) fn check(&self, keys: &[&str]) -> Text<bool> {
        self.with(|s| s.check(keys))
    }

    /// Waits until all keys are there.
    pub(crate) fn wait(&self, keys: &[&str], timeout: Duration) -> Text<()> {
        self.with(|s| s.wait(keys, millis(timeout)))
    }

    /// Deletes a key; false where it was absent.
    pub(crate) fn delete(&self, key: &str) -> Text<bool> {
        self.with(|s| s.remove(key))
    }

    /// How many keys there are.
    pub(crate) fn num_keys(&self) -> Text<usize> {
        self.with(|s| s.num_keys()).map(|n| usize::try_from(n).unwrap_or(0))
    }

    /// Appends to a key (empty where absent).
    pub(crate) fn append(&self, key: &str, value: &[u8]) -> Text<()> {
        self.with(|s| s.append(key, value))
    }

    /// How long `get` waits.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed) as u64)
    }

    /// Sets how long `get` waits.
    pub(crate) fn set_timeout(&self, timeout: Duration) -> Text<()> {
        let ms = millis(timeout);
        self.timeout_ms.store(ms, Ordering::Relaxed);
        match self.tcp {
            Some(_) => Ok(()), // each connection takes it over when it is used next
            None => self.first.set_timeout(ms).map_err(text),
        }
    }
}

/// A store of ours that C++ calls.
pub(super) struct RustStore(Arc<dyn Store>);

impl RustStore {
    /// A panic must not reach C++; a store's error is reported as its text.
    fn guard<T>(&self, body: impl FnOnce(&dyn Store) -> crate::Result<T>) -> Text<T> {
        match catch_unwind(AssertUnwindSafe(|| body(&*self.0))) {
            Ok(result) => result.map_err(|e| e.to_string()),
            Err(panic) => Err(format!("the store panicked: {}", panic_text(&*panic))),
        }
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    if let Some(s) = panic.downcast_ref::<&str>() {
        (*s).to_owned()
    } else if let Some(s) = panic.downcast_ref::<String>() {
        s.clone()
    } else {
        "a panic without a message".to_owned()
    }
}

fn key_text(key: &CxxString) -> String {
    key.to_string_lossy().into_owned()
}

fn rust_store_set(store: &RustStore, key: &CxxString, value: &[u8]) -> Text<()> {
    store.guard(|s| s.set(&key_text(key), value))
}

fn rust_store_get(store: &RustStore, key: &CxxString, timeout_ms: i64) -> Text<Vec<u8>> {
    store.guard(|s| {
        let key = key_text(key);
        s.wait(&[&key], Duration::from_millis(timeout_ms.max(1) as u64))?;
        s.get(&key)
    })
}

fn rust_store_add(store: &RustStore, key: &CxxString, amount: i64) -> Text<i64> {
    store.guard(|s| s.add(&key_text(key), amount))
}

fn rust_store_compare_set(
    store: &RustStore,
    key: &CxxString,
    expected: &[u8],
    desired: &[u8],
) -> Text<Vec<u8>> {
    store.guard(|s| s.compare_set(&key_text(key), expected, desired))
}

fn rust_store_check(store: &RustStore, keys: &CxxVector<CxxString>) -> Text<bool> {
    let keys: Vec<String> = keys.iter().map(key_text).collect();
    store.guard(|s| s.check(&keys.iter().map(String::as_str).collect::<Vec<_>>()))
}

fn rust_store_wait(store: &RustStore, keys: &CxxVector<CxxString>, timeout_ms: i64) -> Text<()> {
    let keys: Vec<String> = keys.iter().map(key_text).collect();
    let timeout = Duration::from_millis(timeout_ms.max(1) as u64);
    store.guard(|s| s.wait(&keys.iter().map(String::as_str).collect::<Vec<_>>(), timeout))
}

fn rust_store_delete(store: &RustStore, key: &CxxString) -> Text<bool> {
    store.guard(|s| s.delete(&key_text(key)))
}

fn rust_store_num_keys(store: &RustStore) -> Text<i64> {
    store.guard(|s| s.num_keys()).map(|n| n as i64)
}

fn rust_store_append(store: &RustStore, key: &CxxString, value: &[u8]) -> Text<()> {
    store.guard(|s| s.append(&key_text(key), value))
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    fn server() -> C10dStore {
        C10dStore::tcp(TcpStoreOptions {
            host: "127.0.0.1".into(),
            port: 0,
            server: true,
            num_workers: None,
            wait_workers: false,
            multi_tenant: false,
            timeout: Duration::from_secs(20),
        })
        .unwrap()
    }

    fn client(port: u16) -> C10dStore {
        C10dStore::tcp(TcpStoreOptions {
            host: "127.0.0.1".into(),
            port,
            server: false,
            num_workers: None,
            wait_workers: false,
            multi_tenant: false,
            timeout: Duration::from_secs(20),
        })
        .unwrap()
    }

    /// Every operation, with the results that PyTorch documents.
    fn exercise(store: &C10dStore) {
        store.set_timeout(Duration::from_secs(5)).unwrap();
        assert_eq!(store.timeout(), Duration::from_secs(5));
        store.set("a", b"one").unwrap();
        assert_eq!(store.get("a").unwrap(), b"one");
        store.set("empty", b"").unwrap();
        assert_eq!(store.get("empty").unwrap(), b"");
        assert_eq!(store.add("n", 3).unwrap(), 3);
        assert_eq!(store.add("n", -5).unwrap(), -2);
        assert_eq!(store.get("n").unwrap(), b"-2");
        assert!(store.check(&["a", "n"]).unwrap());
        assert!(!store.check(&["a", "absent"]).unwrap());
        assert_eq!(store.compare_set("a", b"other", b"two").unwrap(), b"one");
        assert_eq!(store.compare_set("a", b"one", b"two").unwrap(), b"two");
        assert_eq!(store.compare_set("new", b"", b"x").unwrap(), b"x");
        assert_eq!(store.compare_set("none", b"y", b"x").unwrap(), b"y");
        assert!(store.delete("new").unwrap());
        assert!(!store.delete("new").unwrap());
        store.wait(&["a"], Duration::from_secs(20)).unwrap();
        store.append("log", b"ab").unwrap();
        store.append("log", b"cd").unwrap();
        assert_eq!(store.get("log").unwrap(), b"abcd");
        assert!(store.num_keys().unwrap() >= 3);
        let start = Instant::now();
        let error = store.wait(&["absent"], Duration::from_millis(200)).unwrap_err();
        assert!(start.elapsed() >= Duration::from_millis(150), "{error}");
        assert!(!error.contains("frame #"), "no C++ stack in {error}");
        store.set_timeout(Duration::from_millis(200)).unwrap();
        store.get("absent").unwrap_err();
        store.set_timeout(Duration::from_secs(20)).unwrap();
        store.set("after", b"a timeout").unwrap();
        assert_eq!(store.get("after").unwrap(), b"a timeout");
    }

    #[test]
    fn a_tcp_store_does_every_operation_from_both_ends() {
        let server = server();
        exercise(&server);
        let client = client(server.port().unwrap());
        assert_eq!(client.get("after").unwrap(), b"a timeout");
        assert!(server.delete("after").unwrap());
    }

    #[test]
    fn a_file_store_does_every_operation() {
        let dir = tempfile::tempdir().unwrap();
        let store = C10dStore::file(dir.path().join("store").to_str().unwrap(), None).unwrap();
        exercise(&store);
    }

    #[test]
    fn a_waiting_get_keeps_no_other_thread_from_the_store() {
        let server = server();
        let store = client(server.port().unwrap());
        thread::scope(|scope| {
            let getters: Vec<_> = (0..4).map(|_| scope.spawn(|| store.get("late").unwrap())).collect();
            thread::sleep(Duration::from_millis(50));
            store.set("quick", b"1").unwrap();
            store.set("late", b"there").unwrap();
            for getter in getters {
                assert_eq!(getter.join().unwrap(), b"there");
            }
        });
    }

    #[test]
    fn waiting_in_vain_costs_no_connection() {
        let server = server();
        let store = client(server.port().unwrap());
        store.set("there", b"1").unwrap();
        for _ in 0..3 {
            store.wait(&["there", "absent"], Duration::from_millis(20)).unwrap_err();
            assert_eq!(store.tcp.as_ref().unwrap().idle.lock().len(), 1);
            assert_eq!(store.get("there").unwrap(), b"1", "the connection is as good as before");
        }
        assert!(!store.check(&["absent"]).unwrap());
    }

    #[test]
    fn a_server_waits_until_its_workers_have_joined() {
        let port = crate::launch::free_port().unwrap();
        let make = |server| {
            C10dStore::tcp(TcpStoreOptions {
                host: "127.0.0.1".into(),
                port,
                server,
                num_workers: Some(2),
                wait_workers: true,
                multi_tenant: false,
                timeout: Duration::from_secs(20),
            })
            .unwrap()
        };
        thread::scope(|scope| {
            let server = scope.spawn(|| make(true));
            let client = make(false);
            client.set("k", b"v").unwrap();
            assert_eq!(server.join().unwrap().get("k").unwrap(), b"v");
        });
    }

    /// A store whose `get` panics and whose `delete` fails.
    struct Faulty;

    impl Store for Faulty {
        fn set(&self, _: &str, _: &[u8]) -> crate::Result<()> {
            Ok(())
        }
        fn get(&self, _: &str) -> crate::Result<Vec<u8>> {
            panic!("no such luck")
        }
        fn add(&self, _: &str, amount: i64) -> crate::Result<i64> {
            Ok(amount)
        }
        fn compare_set(&self, _: &str, _: &[u8], desired: &[u8]) -> crate::Result<Vec<u8>> {
            Ok(desired.to_vec())
        }
        fn check(&self, _: &[&str]) -> crate::Result<bool> {
            Ok(true)
        }
        fn wait(&self, _: &[&str], _: Duration) -> crate::Result<()> {
            Ok(())
        }
        fn delete(&self, key: &str) -> crate::Result<bool> {
            Err(crate::Error::Store { op: "delete".into(), key: key.into(), reason: "read-only".into() })
        }
        fn num_keys(&self) -> crate::Result<usize> {
            Ok(0)
        }
        fn append(&self, _: &str, _: &[u8]) -> crate::Result<()> {
            Ok(())
        }
        fn timeout(&self) -> Duration {
            Duration::from_secs(1)
        }
        fn set_timeout(&self, _: Duration) {}
    }

    #[test]
    fn errors_and_panics_of_a_rust_store_come_back_through_libtorch_as_text() {
        let store = C10dStore::from_rust(Arc::new(Faulty)).unwrap();
        assert_eq!(store.add("n", 4).unwrap(), 4);
        assert!(store.get("k").unwrap_err().contains("no such luck"));
        assert!(store.delete("k").unwrap_err().contains("read-only"));
    }
}
