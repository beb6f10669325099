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
pub(crate) mod kernels;
mod ledger;
mod link;
mod meet;
mod memory;
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
use self::transport::Transport;
use super::{BackendContext, Call, CollectiveBackend, Completion, Op, Transfer};
use crate::{Error, Result};

/// Makes the native backend for a group: threads of one process, processes of one host, or hosts,
/// whichever the ranks turn out to be. An outside backend can wrap what it returns.
///
/// `TCH_DISTRIBUTED_TRANSPORT` = `threads`, `shm`, `unix` or `tcp` forces one; all ranks have to agree.
///
/// # Errors
/// `Timeout` naming the ranks that did not come, `Rendezvous` where they differ in version or settings.
pub fn create(context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
    let forced = std::env::var("TCH_DISTRIBUTED_TRANSPORT").ok().filter(|s| !s.is_empty());
    create_with(context, forced)
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
    create_with(context, Some(transport.to_owned()))
}

/// The same, with the transport forced, or not.
fn create_with(context: BackendContext, forced: Option<String>) -> Result<Arc<dyn CollectiveBackend>> {
    let meeting = Meeting::new(&context);
    let made = create_at(&meeting, &context, forced);
    if let Err(error) = &made {
        meeting.give_up(error);
    }
    made
}

/// The same, at a meeting of the ranks.
fn create_at(
    meeting: &Meeting,
    context: &BackendContext,
    forced: Option<String>,
) -> Result<Arc<dyn CollectiveBackend>> {
    let all = meeting.hello(forced.clone(), Tuning::THREADS.digest() ^ Tuning::SOCKETS.digest())?;
    let one_process = all.iter().all(|h| h.process == all[0].process);
    let one_host = all.iter().all(|h| h.host == all[0].host);
    let token = all[0].token;
    match forced.as_deref() {
        Some("threads") if !one_process => {
            Err(unavailable("TCH_DISTRIBUTED_TRANSPORT=threads, but ranks are processes"))
        }
        Some("threads") => threads(context, meeting, token),
        None if one_process => threads(context, meeting, token),
        Some("shm" | "unix") if !one_host => Err(unavailable(
            "TCH_DISTRIBUTED_TRANSPORT names a transport of one host, but ranks are on several",
        )),
        Some("shm") => shared(context, meeting, token),
        Some("unix") => sockets(context, meeting, token, true, true),
        Some("tcp") => sockets(context, meeting, token, false, one_host),
        None if one_host => match shared(context, meeting, token) {
            // All ranks or none: they have voted.
            Err(Error::BackendUnavailable { reason, .. }) => {
                tracing::warn!(reason, "falling back to unix sockets");
                sockets(context, meeting, token, true, true)
            }
            other => other,
        },
        None => sockets(context, meeting, token, false, false),
        Some(other) => Err(unavailable(&format!(
            "TCH_DISTRIBUTED_TRANSPORT={other:?}: known are threads, shm, unix and tcp"
        ))),
    }
}

fn unavailable(reason: &str) -> Error {
    Error::BackendUnavailable { backend: "native".to_owned(), reason: reason.to_owned() }
}

/// Ranks as threads of this process.
fn threads(context: &BackendContext, meeting: &Meeting, token: u128) -> Result<Arc<dyn CollectiveBackend>> {
    let room = threads::Room::of(token, context.size);
    let seat = Arc::new(threads::Seat::new(room.clone(), context.rank));
    if !room.join(meeting.deadline().min(Instant::now() + threads::JOIN_GRACE)) {
        return Err(meeting.failed("ranks said hello, but did not come into the group's room"));
    }
    let transport = Arc::new(threads::Threads::new(seat.clone()));
    let ledger = seat.ledger();
    let engine = Engine::new(context.rank, context.size, transport, seat as Arc<dyn Control>, ledger);
    Ok(Arc::new(Native { engine }))
}

/// Ranks on one host that share memory; control and messages go through unix sockets.
fn shared(context: &BackendContext, meeting: &Meeting, token: u128) -> Result<Arc<dyn CollectiveBackend>> {
    let (rank, world) = (context.rank, context.size);
    let transport = Arc::new(shm::connect(context, meeting)?);
    let control = [tcp::Channel::Control];
    let mut sockets = tcp::connect(meeting, rank, world, token, &control, true, true)?;
    let bulk = transport.bulk();
    engine(rank, transport, sockets.pop().unwrap_or_default(), Some(bulk))
}

/// Ranks that talk through sockets.
fn sockets(
    context: &BackendContext,
    meeting: &Meeting,
    token: u128,
    local: bool,
    one_host: bool,
) -> Result<Arc<dyn CollectiveBackend>> {
    let (rank, world) = (context.rank, context.size);
    let channels = [tcp::Channel::Data, tcp::Channel::Control];
    let mut sockets = tcp::connect(meeting, rank, world, token, &channels, local, one_host)?;
    let control = sockets.pop().unwrap_or_default();
    let data = sockets.pop().unwrap_or_default();
    engine(rank, Arc::new(tcp::Sockets::new(rank, data)?), control, None)
}

/// An engine over a transport and control connections, `control[r]` to rank r; large messages go by `bulk`, if
/// there is such a way.
fn engine(
    rank: usize,
    transport: Arc<dyn Transport>,
    control: Vec<Option<OwnedFd>>,
    bulk: Option<Arc<dyn Bulk>>,
) -> Result<Arc<dyn CollectiveBackend>> {
    let world = control.len();
    let ledger = Arc::new(Ledger::new());
    let control = tcp::SocketControl::new(rank, control, bulk, ledger.clone())?;
    Ok(Arc::new(Native { engine: Engine::new(rank, world, transport, control, ledger) }))
}

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
