//! What can be chosen about a group of the native engine, by options or by the environment.

use std::sync::Arc;
use std::time::Duration;

use super::plan::Tuning;
use crate::backend::{BackendContext, CollectiveBackend};
use crate::{Error, Result};

/// How the ranks of a group are connected and which algorithms they take: a builder, for a backend of
/// another name. What is not chosen is what the environment says, else what suits.
///
/// | option | variable | what |
/// |---|---|---|
/// | [`transport`](Self::transport) | `TCH_DISTRIBUTED_TRANSPORT` | `threads`, `shm`, `unix` or `tcp`; all ranks alike |
/// | [`interface`](Self::interface) | `TCH_DISTRIBUTED_SOCKET_IFNAME`, `GLOO_SOCKET_IFNAME` | which network interface this rank listens at |
/// | [`host`](Self::host) | `TCH_DISTRIBUTED_HOST` | which host this rank says it is on |
/// | [`threshold`](Self::threshold) | `TCH_DISTRIBUTED_TUNING` | sizes at which algorithms change; all ranks alike |
/// | [`shm_chunk`](Self::shm_chunk) | `TCH_DISTRIBUTED_SHM_CHUNK` | the size of a slot in shared memory (128 KiB) |
///
/// The thresholds over sockets: `direct` (8), up to how many ranks each talks to every other; `one_shot`
/// (8 KiB), up to which size everything goes to everyone; `doubling` (16 KiB), up to which size more ranks
/// than that all-reduce by recursive doubling, else by halving and doubling; `bruck` (64 KiB), up to which
/// size they gather by Bruck's algorithm, else round a ring; `tree` (64 KiB), up to which size a broadcast
/// goes down a tree; `chunk` (256 KiB), what travels as one message where a call is cut. Between threads
/// they are 64, 16 KiB, 64 KiB, 64 KiB, 256 KiB and 1 MiB. The variable holds a list such as
/// `one_shot=4096,chunk=1048576`.
///
/// ```
/// use tch_distributed::{InitOptions, backend::native, register_backend, testing};
/// register_backend("small-chunks", |context| {
///     native::Options::new().transport("tcp").threshold("chunk", 64 << 10).create(context)
/// })?;
/// testing::run_threads_on("small-chunks", InitOptions::new(), 2, |group| group.barrier().unwrap());
/// # Ok::<(), tch_distributed::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub(super) transport: Option<String>,
    pub(super) interface: Option<String>,
    pub(super) host: Option<String>,
    pub(super) shm_chunk: Option<usize>,
    /// After how long without an answer a TCP connection counts as cut.
    pub(super) cut: Option<Duration>,
    thresholds: Vec<(String, usize)>,
}

impl Options {
    /// What the environment says.
    pub fn new() -> Self {
        Self::default()
    }

    /// `threads`, `shm`, `unix` or `tcp`, whatever the environment says. All ranks choose alike.
    pub fn transport(mut self, name: impl Into<String>) -> Self {
        self.transport = Some(name.into());
        self
    }

    /// The network interface at whose address this rank listens, where ranks talk over TCP. Its IPv4
    /// address where it has one, else one of IPv6 that is not link-local.
    #[doc(alias = "GLOO_SOCKET_IFNAME")]
    pub fn interface(mut self, name: impl Into<String>) -> Self {
        self.interface = Some(name.into());
        self
    }

    /// A name for the host of this rank, in place of the one found from boot id and namespaces: ranks that
    /// say the same share memory. For containers that look like one host but are none, and for tests.
    pub fn host(mut self, name: impl Into<String>) -> Self {
        self.host = Some(name.into());
        self
    }

    /// One of the sizes at which algorithms change: see the table above. All ranks choose alike.
    pub fn threshold(mut self, name: impl Into<String>, value: usize) -> Self {
        self.thresholds.push((name.into(), value));
        self
    }

    /// How many bytes a slot of shared memory has: a power of two from 4 KiB to 4 MiB, into which other numbers are
    /// rounded. The smallest of all ranks counts, and less is taken where a process would have more than 32 MiB of
    /// slots in all its groups.
    ///
    /// ```
    /// use tch_distributed::{InitOptions, backend::native, register_backend, testing};
    /// register_backend("large-slots", |context| {
    ///     native::Options::new().transport("shm").shm_chunk(256 << 10).create(context)
    /// })?;
    /// testing::run_threads_on("large-slots", InitOptions::new(), 2, |group| group.barrier().unwrap());
    /// # Ok::<(), tch_distributed::Error>(())
    /// ```
    pub fn shm_chunk(mut self, bytes: usize) -> Self {
        self.shm_chunk = Some(bytes);
        self
    }

    /// Makes the backend of a group: a factory for
    /// [`register_backend`](crate::register_backend).
    ///
    /// # Errors
    /// Those of [`create`](super::create); `InvalidArgument` for a threshold of unknown name.
    pub fn create(self, context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
        super::create_with(context, self.or_environment())
    }

    /// These options; what is not chosen, from the environment.
    pub(super) fn or_environment(self) -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|s| !s.is_empty());
        Self {
            transport: self.transport.or_else(|| variable("TCH_DISTRIBUTED_TRANSPORT")),
            host: self.host.or_else(|| variable("TCH_DISTRIBUTED_HOST")),
            shm_chunk: self.shm_chunk.or_else(|| {
                variable("TCH_DISTRIBUTED_SHM_CHUNK").and_then(|bytes| bytes.trim().parse().ok())
            }),
            ..self
        }
    }

    /// The tuning for threads and for sockets.
    pub(super) fn tuning(&self) -> Result<(Tuning, Tuning)> {
        let (mut threads, mut sockets) = (Tuning::THREADS, Tuning::SOCKETS);
        let list = std::env::var("TCH_DISTRIBUTED_TUNING").unwrap_or_default();
        for item in list.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let number =
                item.split_once('=').and_then(|(name, value)| Some((name, value.trim().parse().ok()?)));
            let (name, value) = number.ok_or_else(|| {
                let reason = format!("expected name=number, got {item:?}");
                Error::InvalidArgument { argument: "TCH_DISTRIBUTED_TUNING", reason }
            })?;
            set(&mut threads, &mut sockets, "TCH_DISTRIBUTED_TUNING", name.trim(), value)?;
        }
        for (name, value) in &self.thresholds {
            set(&mut threads, &mut sockets, "name", name, *value)?;
        }
        Ok((threads, sockets))
    }
}

fn set(
    threads: &mut Tuning,
    sockets: &mut Tuning,
    argument: &'static str,
    name: &str,
    value: usize,
) -> Result<()> {
    let known = threads.fields().map(|(name, _)| name);
    for (known, field) in threads.fields().into_iter().chain(sockets.fields()) {
        if known == name {
            *field = value;
        }
    }
    if known.contains(&name) {
        return Ok(());
    }
    let reason = format!("there is no threshold {name:?}; known are {}", known.join(", "));
    Err(Error::InvalidArgument { argument, reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threshold_of_unknown_name_is_refused_with_those_that_there_are() {
        let (threads, sockets) = Options::new().threshold("chunk", 7).tuning().unwrap();
        assert_eq!((threads.chunk, sockets.chunk), (7, 7));
        assert_ne!(sockets.digest(), Tuning::SOCKETS.digest());
        let error = Options::new().threshold("junk", 7).tuning().unwrap_err().to_string();
        assert!(error.contains("junk") && error.contains("one_shot"), "{error}");
    }
}
