//! PyTorch's `TCPStore`, over libtorch's own.

use std::fmt;
use std::time::Duration;

use super::wire::{self, Wire};
use super::{DEFAULT_TIMEOUT, Store, counter, failed, not_in_time};
use crate::Result;
use crate::libtorch::{C10dStore, TcpStoreOptions};

/// A store that one process serves over TCP. The wire and the keys are those of PyTorch's `TCPStore`.
///
/// Any number of threads may use one at once: a `get` that waits keeps nobody else waiting.
/// The server lives as long as the store that serves it. PyTorch's server takes keys of up to 8191 bytes and values of up
/// to 8 MiB; what is longer is refused here.
///
/// ```
/// use std::time::Duration;
/// use tch_distributed::store::{Store, TcpStore};
/// let server = TcpStore::serve("127.0.0.1", 0)?; // 0: any free port
/// let client = TcpStore::connect("127.0.0.1", server.port(), Duration::from_secs(10))?;
/// client.set("colour", b"blue")?;
/// assert_eq!(server.get("colour")?, b"blue");
/// # Ok::<(), tch_distributed::Error>(())
/// ```
#[doc(alias = "TCPStore")]
pub struct TcpStore {
    c10d: C10dStore,
    host: String,
    port: u16,
    serves: bool,
}

impl TcpStore {
    /// Serves a store on a port of this machine; 0 takes a free one.
    ///
    /// `host` is the name or address under which others reach this machine. As in PyTorch the
    /// server listens on all of the machine's addresses.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store) if the port is in use, the host does not resolve, or is
    /// another machine.
    pub fn serve(host: impl AsRef<str>, port: u16) -> Result<Self> {
        let host = host.as_ref();
        let at = place(host, port);
        let addresses = wire::resolve(host, port).map_err(|reason| failed("serve", &[&at], reason))?;
        if !wire::is_here(&addresses) {
            return Err(failed("serve", &[&at], format!("{host} is not an address of this machine")));
        }
        Self::server(host, port, DEFAULT_TIMEOUT)
    }

    /// A server, whatever others call this machine.
    pub(crate) fn server(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        let made = C10dStore::tcp(TcpStoreOptions {
            // The name that others use may lead here by a way round, or not yet.
            host: "127.0.0.1".to_owned(),
            port,
            server: true,
            num_workers: None,
            wait_workers: false,
            multi_tenant: false,
            timeout,
        });
        let c10d = made.map_err(|reason| {
            let reason = if reason.contains("EADDRINUSE") {
                format!("port {port} is in use by another program, or by another job on this machine")
            } else {
                reason
            };
            failed("serve", &[&place(host, port)], reason)
        })?;
        let port = c10d.port().unwrap_or(port);
        Ok(Self { c10d, host: host.to_owned(), port, serves: true })
    }

    /// Connects to a served store; waits up to `timeout` for the server to come up.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store): at once if the host does not resolve or if what listens
    /// there is not a store, after `timeout` if nothing does.
    pub fn connect(host: impl AsRef<str>, port: u16, timeout: Duration) -> Result<Self> {
        let host = host.as_ref();
        Wire::knock(host, port, timeout, |_| ())
            .map_err(|reason| failed("connect", &[&place(host, port)], reason))?;
        let store = Self::client(host, port, timeout)?;
        store.set_timeout(DEFAULT_TIMEOUT);
        Ok(store)
    }

    /// A client of a server that is known to answer.
    pub(crate) fn client(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        let c10d = C10dStore::tcp(TcpStoreOptions {
            host: wire::bare(host).to_owned(),
            port,
            server: false,
            num_workers: None,
            wait_workers: false,
            multi_tenant: false,
            timeout,
        })
        .map_err(|reason| failed("connect", &[&place(host, port)], reason))?;
        Ok(Self { c10d, host: host.to_owned(), port, serves: false })
    }

    /// The server's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The name or address of the server's machine, as it was given.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// A connection for the store's own keys.
    pub(crate) fn wire(&self) -> std::io::Result<Wire> {
        let host = self.c10d.host().unwrap_or(&self.host);
        Wire::knock(host, self.port, Duration::from_secs(5), |_| ())
            .map_err(|reason| std::io::Error::other(reason.to_string()))
    }
}

/// A host and port as they are written.
pub(crate) fn place(host: &str, port: u16) -> String {
    if wire::bare(host).contains(':') {
        format!("[{}]:{port}", wire::bare(host))
    } else {
        format!("{host}:{port}")
    }
}

impl fmt::Debug for TcpStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpStore")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("serves", &self.serves)
            .finish_non_exhaustive()
    }
}

/// What libtorch said, or that the time was over.
pub(super) fn text(op: &str, keys: &[&str], timeout: Duration, reason: String) -> crate::Error {
    let lower = reason.to_lowercase();
    if lower.contains("wait timeout") || lower.contains("timeout waiting for key") {
        return not_in_time(op, keys, timeout);
    }
    failed(op, keys, reason)
}

/// The longest key and value that PyTorch's server takes: its `MAX_STRING_LEN` and `MAX_PAYLOAD_LEN`.
const LONGEST_KEY: usize = 8 << 10;
const LONGEST_VALUE: usize = 8 << 20;

/// Whether the server will take them. It answers what is longer by hanging up: a write, which it never answers, would be
/// lost without a word, and the next call on that connection would fail.
fn fits(op: &str, keys: &[&str], values: &[&[u8]]) -> Result<()> {
    // libtorch puts a `/` before each.
    if let Some(key) = keys.iter().find(|key| key.len() >= LONGEST_KEY) {
        let begin: String = key.chars().take(40).collect();
        let most = LONGEST_KEY - 1;
        let reason = format!("the key has {} bytes; PyTorch's server takes {most} at most", key.len());
        return Err(failed(op, &[&format!("{begin}…")], reason));
    }
    if let Some(value) = values.iter().find(|value| value.len() > LONGEST_VALUE) {
        let (bytes, most) = (value.len(), LONGEST_VALUE);
        let reason = format!("the value has {bytes} bytes; PyTorch's server takes {most} at most");
        return Err(failed(op, keys, reason));
    }
    Ok(())
}

impl Store for TcpStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        fits("set", &[key], &[value])?;
        self.c10d.set(key, value).map_err(|e| failed("set", &[key], e))
    }
    fn get(&self, key: &str) -> Result<Vec<u8>> {
        fits("get", &[key], &[])?;
        self.c10d.get(key).map_err(|e| text("get", &[key], self.timeout(), e))
    }
    fn add(&self, key: &str, amount: i64) -> Result<i64> {
        fits("add", &[key], &[])?;
        self.c10d.add(key, amount).map_err(|reason| {
            // A server answers a value that is no number by hanging up. Say why.
            match self.c10d.check(&[key]).and_then(|there| there.then(|| self.c10d.get(key)).transpose()) {
                Ok(Some(value)) => {
                    counter(key, &value).err().unwrap_or_else(|| failed("add", &[key], reason))
                }
                _ => failed("add", &[key], reason),
            }
        })
    }
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        fits("compare_set", &[key], &[expected, desired])?;
        self.c10d.compare_set(key, expected, desired).map_err(|e| failed("compare_set", &[key], e))
    }
    fn check(&self, keys: &[&str]) -> Result<bool> {
        fits("check", keys, &[])?;
        self.c10d.check(keys).map_err(|e| failed("check", keys, e))
    }
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        fits("wait", keys, &[])?;
        self.c10d.wait(keys, timeout).map_err(|e| text("wait", keys, timeout, e))
    }
    fn delete(&self, key: &str) -> Result<bool> {
        fits("delete", &[key], &[])?;
        self.c10d.delete(key).map_err(|e| failed("delete", &[key], e))
    }
    fn num_keys(&self) -> Result<usize> {
        let all = self.c10d.num_keys().map_err(|e| failed("num_keys", &[], e))?;
        // The server counts its own key too.
        let own =
            self.wire().and_then(|mut wire| wire.has_workers()).map_err(|e| failed("num_keys", &[], e))?;
        Ok(all - usize::from(own && all > 0))
    }
    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        fits("append", &[key], &[value])?;
        self.c10d.append(key, value).map_err(|e| failed("append", &[key], e))
    }
    fn timeout(&self) -> Duration {
        self.c10d.timeout()
    }
    fn set_timeout(&self, timeout: Duration) {
        // A TCPStore takes it over with the next call, which cannot fail.
        let _ = self.c10d.set_timeout(timeout);
    }
}
