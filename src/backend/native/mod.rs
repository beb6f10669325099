//! The native CPU engine: threads, shared memory, TCP.
//!
//! Collectives are `plan`s that an `executor` runs over links; an `engine` a group keeps calls in
//! order and failures in one place; one `progress` thread drives what no caller drives. The README
//! beside this file describes frames, handshake and states.

mod bulk;
mod cause;
mod control;
mod diagnosis;
mod engine;
mod executor;
mod hosts;
pub(crate) mod kernels;
mod ledger;
mod limit;
mod link;
mod meet;
mod memory;
mod options;
mod p2p;
mod plan;
mod progress;
mod shm;
mod stamp;
mod tcp;
#[cfg(test)]
mod tests;
mod threads;
pub(crate) mod transport;

pub(crate) use self::meet::give_up;
pub use self::options::Options;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use self::bulk::Bulk;
use self::control::Control;
use self::engine::Engine;
use self::kernels::Reducer;
use self::ledger::Ledger;
use self::meet::Meeting;
use self::plan::Tuning;
use self::plan::hosts::Layout;
use self::transport::Transport;
use super::{BackendContext, Call, CollectiveBackend, Completion, Op, Transfer};
use crate::store::PrefixStore;
use crate::{Error, Result};

/// Makes the native backend for a group: threads of one process, processes of one host, or hosts,
/// whichever the ranks turn out to be. An outside backend can wrap what it returns.
///
/// The environment chooses as [`Options`] says.
///
/// # Errors
/// `Timeout` naming the ranks that did not come, `Rendezvous` where they differ in version or settings.
pub fn create(context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
    Options::new().create(context)
}

/// [`create`] over one transport, `threads`, `shm`, `unix` or `tcp`, whatever the environment says: a
/// factory for a backend of another name.
///
/// # Errors
/// As there; `BackendUnavailable` when the ranks are where this transport does not reach.
///
/// ```
/// use tch_distributed::{InitOptions, backend::native, register_backend, testing};
/// register_backend("over-tcp", |context| native::create_over(context, "tcp"))?;
/// testing::run_threads_on("over-tcp", InitOptions::new(), 2, |group| group.barrier().unwrap());
/// # Ok::<(), tch_distributed::Error>(())
/// ```
pub fn create_over(context: BackendContext, transport: &str) -> Result<Arc<dyn CollectiveBackend>> {
    Options::new().transport(transport).create(context)
}

/// A group in the making.
struct Plot<'a> {
    context: &'a BackendContext,
    meeting: &'a Meeting,
    options: Options,
    /// The tuning for threads and for sockets.
    tuning: (Tuning, Tuning),
    /// The group's secret.
    token: u128,
    layout: Layout,
    /// Whether all ranks are on one machine, whatever they say of hosts.
    one_machine: bool,
}

fn create_with(context: BackendContext, options: Options) -> Result<Arc<dyn CollectiveBackend>> {
    limit::raise();
    let meeting = Meeting::new(&context);
    let made = create_at(&meeting, &context, options);
    match &made {
        Ok(_) => meeting.adjourn(),
        Err(error) => meeting.give_up(error),
    }
    made
}

/// The same, at a meeting of the ranks.
fn create_at(
    meeting: &Meeting,
    context: &BackendContext,
    options: Options,
) -> Result<Arc<dyn CollectiveBackend>> {
    let tuning = options.tuning()?;
    let all = meeting.hello(&options, tuning.0.digest() ^ tuning.1.digest().rotate_left(1))?;
    let hosts: Vec<&str> = all.iter().map(|h| h.host.as_str()).collect();
    let layout = Layout::new(&hosts);
    let one_host = layout.hosts.len() <= 1;
    let one_process = one_host && all.iter().all(|h| h.process == all[0].process);
    let one_machine = all.iter().all(|h| h.machine == all[0].machine);
    let forced = options.transport.clone();
    let plot = Plot { context, meeting, options, tuning, token: all[0].token, layout, one_machine };
    match forced.as_deref() {
        Some("threads") if !one_process => {
            Err(unavailable("TCH_DISTRIBUTED_TRANSPORT=threads, but ranks are processes"))
        }
        Some("threads") => plot.threads(),
        None if one_process => plot.threads(),
        Some("shm" | "unix") if !one_host => Err(unavailable(
            "TCH_DISTRIBUTED_TRANSPORT names a transport of one host, but ranks are on several",
        )),
        Some("shm") => plot.shared(),
        Some("unix") => plot.sockets(&tcp::Listen::Local),
        Some("tcp") => plot.sockets(&plot.wide()),
        None if one_host => match plot.shared() {
            // All ranks or none: they have voted.
            Err(Error::BackendUnavailable { reason, .. }) => {
                tracing::warn!(reason, "falling back to unix sockets");
                plot.sockets(&tcp::Listen::Local)
            }
            other => other,
        },
        None if plot.layout.is_deep() => plot.hosts(),
        None => plot.sockets(&plot.wide()),
        Some(other) => Err(unavailable(&format!(
            "TCH_DISTRIBUTED_TRANSPORT={other:?}: known are threads, shm, unix and tcp"
        ))),
    }
}

fn unavailable(reason: &str) -> Error {
    Error::BackendUnavailable { backend: "native".to_owned(), reason: reason.to_owned() }
}

impl Plot<'_> {
    fn wide(&self) -> tcp::Listen {
        tcp::Listen::wide(self.options.interface.clone(), self.one_machine)
    }

    /// Ranks as threads of this process.
    fn threads(&self) -> Result<Arc<dyn CollectiveBackend>> {
        let BackendContext { rank, size, .. } = *self.context;
        let room = threads::Room::of(self.token, size);
        let seat = Arc::new(threads::Seat::new(room.clone(), rank));
        if !room.join(self.meeting.deadline().min(Instant::now() + threads::JOIN_GRACE)) {
            return Err(self.meeting.failed("ranks said hello, but did not come into the group's room"));
        }
        let transport = Arc::new(threads::Threads::new(seat.clone(), self.tuning.0));
        let ledger = seat.ledger();
        let engine = Engine::new(rank, size, transport, seat as Arc<dyn Control>, ledger);
        Ok(Arc::new(Native { engine }))
    }

    /// Ranks on one host that share memory; control and messages go through unix sockets.
    fn shared(&self) -> Result<Arc<dyn CollectiveBackend>> {
        let ranks = (0..self.context.size).collect();
        let transport = Arc::new(shm::connect(self.context, self.meeting, ranks, self.options.shm_chunk)?);
        let (_, control) = self.connect(&[tcp::Channel::Control], &tcp::Listen::Local, |_| false)?;
        let bulk = transport.bulk();
        self.engine(transport, control, Some(bulk))
    }

    /// Ranks that talk through sockets.
    fn sockets(&self, at: &tcp::Listen) -> Result<Arc<dyn CollectiveBackend>> {
        let (data, control) = self.connect(&[tcp::Channel::Data, tcp::Channel::Control], at, |_| true)?;
        self.engine(Arc::new(tcp::Sockets::new(self.context.rank, self.tuning.1, data)?), control, None)
    }

    /// Ranks on several hosts that share memory on each; through sockets where they cannot.
    fn hosts(&self) -> Result<Arc<dyn CollectiveBackend>> {
        let BackendContext { rank, .. } = *self.context;
        let (host, number) = self.layout.place(rank);
        let neighbours = self.layout.neighbours(rank);
        let local = match neighbours.len() {
            1 => Ok(None),
            size => {
                let prefix = format!("native/host/{host}");
                let store = Arc::new(PrefixStore::new(prefix, self.context.store.clone()));
                let context = BackendContext { store, rank: number, size, ..self.context.clone() };
                let meeting = Meeting::new(&context);
                let shared = shm::connect(&context, &meeting, neighbours.to_vec(), self.options.shm_chunk);
                // The ranks of the host agree, also where they have refused.
                if matches!(&shared, Ok(_) | Err(Error::BackendUnavailable { .. })) {
                    meeting.adjourn();
                }
                shared.map(Some).map_err(|error| match error {
                    Error::Timeout { op, seq, elapsed, missing } => {
                        let missing =
                            missing.into_iter().filter_map(|n| neighbours.get(n).copied()).collect();
                        Error::Timeout { op, seq, elapsed, missing }
                    }
                    other => other,
                })
            }
        };
        // The ranks of a host have voted; now all hosts or none.
        let refusal = match &local {
            Ok(_) => None,
            Err(Error::BackendUnavailable { reason, .. }) => Some(format!("rank {rank}: {reason}")),
            Err(error) => return Err(error.duplicate()),
        };
        let refusals = self.meeting.exchange("hosts", &refusal)?;
        let (Ok(local), None) = (local, refusals.into_iter().flatten().next()) else {
            tracing::warn!("ranks of a host cannot share memory: all talk through sockets");
            return self.sockets(&self.wide());
        };
        let channels = [tcp::Channel::Data, tcp::Channel::Control];
        let apart = |peer: usize| self.layout.place(peer).0 != host;
        let (data, control) = self.connect(&channels, &self.wide(), apart)?;
        let away = tcp::Sockets::new(rank, self.tuning.1, data)?;
        self.engine(Arc::new(hosts::Hosts::new(rank, self.layout.clone(), local, away)), control, None)
    }

    /// Data and control connections to the other ranks; of data only those that are wanted.
    fn connect(
        &self,
        channels: &[tcp::Channel],
        at: &tcp::Listen,
        data: impl Fn(usize) -> bool,
    ) -> Result<(Sockets, Sockets)> {
        let mut sockets = tcp::connect(self.meeting, self.token, channels, at, self.options.cut, data)?;
        let control = sockets.pop().unwrap_or_default();
        Ok((sockets.pop().unwrap_or_default(), control))
    }

    /// An engine over a transport and control connections, `control[r]` to rank r; large messages go by
    /// `bulk`, if there is such a way.
    fn engine(
        &self,
        transport: Arc<dyn Transport>,
        control: Sockets,
        bulk: Option<Arc<dyn Bulk>>,
    ) -> Result<Arc<dyn CollectiveBackend>> {
        let BackendContext { rank, size, .. } = *self.context;
        let ledger = Arc::new(Ledger::new());
        let control = tcp::SocketControl::new(rank, control, bulk, ledger.clone())?;
        Ok(Arc::new(Native { engine: Engine::new(rank, size, transport, control, ledger) }))
    }
}

/// A socket to each rank; `None` to this one.
type Sockets = Vec<Option<OwnedFd>>;

/// The backend of one rank in one group.
#[derive(Debug)]
struct Native {
    engine: Arc<Engine>,
}

impl CollectiveBackend for Native {
    fn name(&self) -> &str {
        "native"
    }

    fn supports(&self, op: &Op, kind: Kind) -> Result<(), String> {
        match op.reduce_op() {
            Some(reduce) => Reducer::new(reduce, kind, 1).map(|_| ()),
            None => Ok(()),
        }
    }

    fn allocate(&self, size: &[i64], options: (Kind, Device)) -> Result<Tensor> {
        let (kind, device) = options;
        let own = if device == Device::Cpu { self.engine.allocate(size, kind) } else { None };
        own.unwrap_or_else(|| Ok(Tensor::f_empty(size, options)?))
    }

    fn submit(&self, call: Call<'static>, done: Completion) {
        self.engine.submit(call, done);
    }

    fn run(&self, call: Call<'_>) -> Result<()> {
        self.engine.run(call)
    }

    fn transfer(&self, transfers: Vec<Transfer>) {
        self.engine.transfer(transfers);
    }

    fn failure(&self) -> Option<Arc<Error>> {
        self.engine.failure()
    }

    fn abort(&self, cause: &Arc<Error>) {
        self.engine.abort(cause);
    }

    fn shutdown(&self, timeout: Duration) -> Result<()> {
        self.engine.shutdown(timeout)
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.engine.drop_backend();
    }
}
