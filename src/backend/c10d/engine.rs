//! One group's engine on this rank: operations started in order, their ends passed on, failures tried.
//!
//! Gloo tells of the end of an operation itself. What NCCL was given is on the device in order, and a caller that waits
//! orders its stream behind it ([`Completion::given`]); of the end itself [`lookout`](super::lookout) tells.

use std::any::Any;
use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use once_cell::sync::OnceCell;
use parking_lot::{Condvar, Mutex, MutexGuard};
use tch::{Device, Kind, Tensor};

use super::combine::{Flavor, combine};
use super::inquest::{Failure, Witness};
use super::listeners::Listeners;
use super::lookout::{Charge, Given, Lookout};
use super::messages::given_order;
use super::ops::{Refusal, Site, Started};
use super::own::Own;
use super::peers::Peers;
use super::{sentry, waiters};
use crate::backend::{Call, CollectiveBackend, Completion, Op, Receipt, Transfer, WriteBack, segment_numel};
use crate::libtorch::{C10dBackend, C10dMember, C10dWork, NcclPlan, SideStream, Told, unless_ending};
use crate::{Error, Result};

/// Gloo's receive from anybody under this tag is how its connections are closed: see [`Shared::cut`].
pub(super) const CUT_TAG: i32 = i32::MAX;

/// Held while Gloo is given an operation. libtorch has one flight recorder for all groups of a process, and a group's
/// first entry changes a map there that others read without a lock (in 2.11; 2.13 takes one).
static RECORDER: Mutex<()> = Mutex::new(());

pub(super) fn alone_at_the_recorder() -> MutexGuard<'static, ()> {
    RECORDER.lock()
}

/// How long the other ranks are asked why an operation failed, and are told of an abort.
const INQUEST: Duration = Duration::from_secs(10);

/// How long a rank that aborts waits for others that are still connecting.
const COMING: Duration = Duration::from_secs(2);

/// The same of a rank that leaves.
const SETTLING: Duration = Duration::from_secs(10);

/// libtorch's engine for one group.
pub(super) struct Engine(Arc<Shared>);

pub(super) struct Shared {
    pub(super) flavor: Flavor,
    /// Taken when the engine is dropped.
    pub(super) backend: Option<C10dBackend>,
    device: Device,
    pub(super) witness: Witness,
    /// Whether every rank is one of this crate: then what both sides do is ours to choose.
    pure: bool,
    /// Held while operations are started: their order is the same on every rank. The number of the last.
    pub(super) order: Mutex<u64>,
    pub(super) own: Arc<Own>,
    /// Gloo's messages under way.
    pub(super) listeners: Arc<Listeners>,
    pub(super) peers: Peers,
    /// Collectives under way, by number: what each is, and since when.
    at_work: Mutex<BTreeMap<u64, (String, Instant)>>,
    /// Whether somebody is asking the others what they are stuck in.
    pub(super) asking: AtomicBool,
    /// NCCL's: where copies before and after an operation go, beside the program's own stream.
    pub(super) side: Option<Mutex<SideStream>>,
    lookout: Arc<Lookout>,
    /// Set once all ranks connect, or have: see [`Shared::meet`].
    met: OnceCell<()>,
    /// Whether NCCL was aborted. Its kernels then end as if they had worked.
    pub(super) broken: AtomicBool,
    /// Whether NCCL's communicators have been freed.
    left: AtomicBool,
    pending: AtomicUsize,
    quiet: (Mutex<()>, Condvar),
    fate: Mutex<Fate>,
}

/// What became of the group.
#[derive(Default)]
struct Fate {
    cause: Option<Arc<Error>>,
    /// What failed while the cause is being looked for, or `None` where nobody looks.
    waiting: Option<Vec<Completion>>,
}

/// An operation under way. Who waits until none is learns of its end, and of its loss.
pub(super) struct Underway(pub(super) Arc<Shared>);

impl Underway {
    pub(super) fn end(self, result: Told<()>, keep: Keep, failure: Failure, done: Completion) {
        match result {
            Ok(()) => done.complete(keep().map(|source| Receipt { source })),
            Err(text) => {
                drop(keep);
                let suspect = self.0.peers.gone().or(failure.suspect);
                self.0.failed(Failure { text, suspect, ..failure }, done);
            }
        }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::AcqRel);
        let _guard = self.0.quiet.0.lock();
        self.0.quiet.1.notify_all();
    }
}

/// Keeps tensors until an operation has ended, and does what is left to do then; gives the sender of a message.
pub(super) type Keep = Box<dyn FnOnce() -> Result<Option<usize>> + Send>;

/// A collective that was started.
enum Way {
    /// The engine tells of its end; then `finish` is called.
    Told(Started),
    /// It is all on the device.
    Given(Arc<Given>, Keep),
}

impl Engine {
    pub(super) fn gloo(backend: C10dBackend, witness: Witness) -> Self {
        let pure = witness.absent().is_empty();
        Self::new(Flavor::Gloo, backend, Device::Cpu, witness, pure, None)
    }

    /// `connected`: the ranks are, and need not meet before the first operation.
    pub(super) fn nccl(
        backend: C10dBackend,
        device: usize,
        side: SideStream,
        witness: Witness,
        connected: bool,
    ) -> Self {
        let side = Some(Mutex::new(side));
        let engine = Self::new(Flavor::Nccl, backend, Device::Cuda(device), witness, false, side);
        if connected {
            engine.0.met.get_or_init(|| ());
        }
        engine
    }

    pub(super) fn is_nccl(&self) -> bool {
        self.0.flavor == Flavor::Nccl
    }

    /// The engine of some of this group's ranks, by NCCL's communicator split; every rank calls it. `None` on ranks that
    /// are not among them.
    pub(super) fn split(
        &self,
        member: &C10dMember<'_>,
        members: &[usize],
        plan: NcclPlan,
    ) -> Told<Option<C10dBackend>> {
        let backend = self.0.backend.as_ref().ok_or("the group is gone")?;
        // Nothing may be started in between: its place among the operations is the same on every rank.
        let _order = self.0.order.lock();
        backend.split(member, members, plan)
    }

    fn new(
        flavor: Flavor,
        backend: C10dBackend,
        device: Device,
        witness: Witness,
        pure: bool,
        side: Option<Mutex<SideStream>>,
    ) -> Self {
        let own = Own::new(witness.rank);
        let engine = Self(Arc::new(Shared {
            flavor,
            backend: Some(backend),
            device,
            witness,
            pure,
            order: Mutex::new(0),
            own,
            listeners: Arc::default(),
            peers: Peers::default(),
            at_work: Mutex::default(),
            asking: AtomicBool::new(false),
            side,
            met: OnceCell::new(),
            lookout: Arc::default(),
            broken: AtomicBool::new(false),
            left: AtomicBool::new(false),
            pending: AtomicUsize::new(0),
            quiet: (Mutex::new(()), Condvar::new()),
            fate: Mutex::default(),
        }));
        if engine.0.witness.size > 1 {
            sentry::watch(&engine.0);
        }
        engine
    }
}

impl CollectiveBackend for Engine {
    fn name(&self) -> &str {
        self.0.flavor.name()
    }

    fn accepts(&self, device: Device) -> bool {
        match self.0.flavor {
            Flavor::Gloo => device == Device::Cpu,
            Flavor::Nccl => matches!(device, Device::Cuda(_)),
        }
    }

    fn supports(&self, op: &Op, kind: Kind) -> Result<(), String> {
        match op.reduce_op() {
            Some(how) => combine(self.0.flavor, how, kind, self.0.witness.size, self.0.pure)
                .map(|_| ())
                .map_err(|what| format!("{} with {what}", op.name())),
            None if matches!(kind, Kind::QInt8 | Kind::QUInt8 | Kind::QInt32) => {
                Err(format!("{} of {kind:?}", op.name()))
            }
            None => Ok(()),
        }
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    /// On a device the caller's stream is ordered behind the operation, and the host goes on.
    fn run(&self, call: Call<'_>) -> Result<()> {
        let (done, ticket) = Completion::new(None);
        self.submit(call.into_owned(), done);
        ticket.settle().map(|_| ())
    }

    fn submit(&self, call: Call<'static>, mut done: Completion) {
        let shared = &self.0;
        if let Some(cause) = shared.cause() {
            return done.complete(Err(Error::Poisoned { cause }));
        }
        let Some(backend) = &shared.backend else { return };
        let site = Site {
            backend,
            flavor: shared.flavor,
            rank: shared.witness.rank,
            size: shared.witness.size,
            device: shared.device_of(&call),
            pure: shared.pure,
            ms: millis(call.timeout),
        };
        let asked = Instant::now();
        let met = shared.meet(call.timeout);
        let mut order = shared.order.lock();
        let seq = *order + 1;
        let started = met.map_err(Refusal::Told).and_then(|()| shared.start(&site, &call, &mut done));
        if !matches!(started, Err(Refusal::Error(_))) {
            *order = seq;
        }
        drop(order);
        let failure = Failure {
            op: call.op.name().to_owned(),
            seq,
            print: print(&call, site.rank),
            elapsed: Duration::ZERO,
            text: String::new(),
            suspect: None,
        };
        match started {
            Ok(Way::Told(Started { work, finish })) => {
                let keep = Box::new(move || {
                    let result = finish();
                    drop(call);
                    result.map(|()| None)
                });
                shared.watch(&work, keep, failure, done);
            }
            Ok(Way::Given(given, tensors)) => {
                // A barrier is one for the host.
                if call.op != Op::Barrier {
                    given_order(&done, Receipt::default(), &given);
                }
                let keep = Box::new(move || {
                    drop(call);
                    tensors()
                });
                let (underway, start, ms) = (shared.begin(), Instant::now(), site.ms);
                if site.size > 1 {
                    shared.at_work.lock().insert(seq, (failure.print.clone(), start));
                }
                shared.look_after(Charge { underway, given, keep, failure, start, ms, done });
            }
            Err(Refusal::Error(error)) => done.complete(Err(error)),
            Err(Refusal::Told(text)) => {
                shared.failed(Failure { text, elapsed: asked.elapsed(), ..failure }, done);
            }
        }
    }

    fn transfer(&self, transfers: Vec<Transfer>) {
        self.0.transfer(transfers);
    }

    fn failure(&self) -> Option<Arc<Error>> {
        self.0.cause()
    }

    fn abort(&self, cause: &Arc<Error>) {
        let shared = &self.0;
        {
            let mut fate = shared.fate.lock();
            if fate.cause.is_some() {
                return;
            }
            fate.cause = Some(cause.clone());
        }
        shared.own.close(cause);
        let shared = shared.clone();
        let cause = cause.clone();
        waiters::run(move || {
            let witness = shared.witness.clone();
            waiters::within(INQUEST, move || {
                witness.announce(&cause);
                // Who still connects would take this for a failure of its own.
                witness.see_others_settled(COMING);
            });
            shared.cut();
        });
    }

    fn shutdown(&self, timeout: Duration) -> Result<()> {
        let shared = &self.0;
        let deadline = Instant::now().checked_add(timeout);
        let mut guard = shared.quiet.0.lock();
        while shared.pending.load(Ordering::Acquire) > 0 {
            let late = match deadline {
                Some(deadline) => shared.quiet.1.wait_until(&mut guard, deadline).timed_out(),
                None => {
                    shared.quiet.1.wait(&mut guard);
                    false
                }
            };
            if late {
                break;
            }
        }
        drop(guard);
        let left = || deadline.map_or(timeout, |deadline| deadline.saturating_duration_since(Instant::now()));
        let (leaving, patience) = (shared.clone(), left().min(SETTLING));
        if !patience.is_zero() {
            waiters::within(patience, move || {
                leaving.witness.see_others_settled(patience);
                if leaving.cause().is_none() {
                    leaving.witness.leave();
                }
            });
        }
        if shared.leaves() && shared.pending.load(Ordering::Acquire) == 0 {
            let leaving = shared.clone();
            waiters::within(left(), move || leaving.leave());
        }
        let own = shared.own.is_empty();
        shared.own.close(&Arc::new(Error::Aborted));
        match shared.pending.load(Ordering::Acquire) {
            0 if own => Ok(()),
            _ if shared.cause().is_some() => Ok(()),
            pending => Err(Error::Timeout {
                op: format!("shutdown with {} operations under way", pending.max(1)),
                seq: *shared.order.lock(),
                elapsed: timeout,
                missing: Vec::new(),
            }),
        }
    }
}

/// What a collective is, as all ranks should have it: how much a rank has differs by rank in most.
fn print(call: &Call<'_>, rank: usize) -> String {
    match call.op {
        Op::AllReduce(_) | Op::Reduce { .. } | Op::Broadcast { .. } => {
            let numel: usize = call.inputs.iter().chain(&call.outputs).map(|s| segment_numel(s)).sum();
            let root_of_reduce = call.op.root() == Some(rank) && !matches!(call.op, Op::Broadcast { .. });
            let numel = if root_of_reduce { numel / 2 } else { numel };
            format!("{} of {numel} {:?}", call.op.alike(), call.kind)
        }
        _ => call.op.alike(),
    }
}

impl Shared {
    pub(super) fn cause(&self) -> Option<Arc<Error>> {
        self.fate.lock().cause.clone()
    }

    fn device_of(&self, call: &Call<'_>) -> Device {
        let first = call.inputs.iter().chain(&call.outputs).flatten().next();
        first.map_or(self.device, |buffer| buffer.tensor().device())
    }

    /// NCCL's ranks connect with the first operation, if not before. There libtorch waits for all of them, for good; so
    /// they meet in the store first, where one that does not come is missed in time.
    pub(super) fn meet(&self, timeout: Duration) -> Told<()> {
        let over = || self.cause().is_some() || self.witness.is_over();
        let met = || match self.flavor == Flavor::Nccl && self.witness.size > 1 {
            true => self.witness.meet(timeout, over),
            false => Ok(()),
        };
        self.met.get_or_try_init(met).map(|_| ())
    }

    /// Starts a collective. On a device, copies that go with it, the user's own outputs' too, go to a stream beside the
    /// program's: before and behind the operation, in order.
    fn start(&self, site: &Site<'_>, call: &Call<'_>, done: &mut Completion) -> Result<Way, Refusal> {
        let Some(side) = &self.side else {
            let _alone = alone_at_the_recorder();
            return site.start(call).map(Way::Told);
        };
        let write_back = done.take_write_back();
        if write_back.is_none() && site.is_alone(call) {
            let Started { work, finish } = site.start(call)?;
            return Ok(Way::Given(
                Arc::new(Given { work, mark: None }),
                Box::new(|| finish().map(|()| None)),
            ));
        }
        let behind = |started: Started, write_back: Option<WriteBack>| -> Told<C10dWork> {
            started.work.order()?;
            (started.finish)().map_err(|error| error.to_string())?;
            write_back.map_or(Ok(()), |write| write().map_err(|error| error.to_string()))?;
            Ok(started.work)
        };
        let (work, mark) = side
            .lock()
            .run(|| behind(site.start(call)?, write_back).map_err(Refusal::Told))
            .map_err(Refusal::Told)?;
        Ok(Way::Given(Arc::new(Given { work: work?, mark: Some(mark) }), Box::new(|| Ok(None))))
    }

    /// One more operation is under way.
    pub(super) fn begin(self: &Arc<Self>) -> Underway {
        self.pending.fetch_add(1, Ordering::AcqRel);
        Underway(self.clone())
    }

    pub(super) fn look_after(&self, charge: Charge) {
        let device = match self.device {
            Device::Cuda(index) => index,
            _ => 0,
        };
        self.lookout.add(device, charge);
    }

    /// Passes the end of one of Gloo's operations on.
    fn watch(self: &Arc<Self>, work: &C10dWork, keep: Keep, failure: Failure, done: Completion) {
        let (underway, seq, start) = (self.begin(), failure.seq, Instant::now());
        self.at_work.lock().insert(seq, (failure.print.clone(), start));
        let end = move |result: Told<()>| {
            underway.0.at_work.lock().remove(&seq);
            underway.end(result, keep, Failure { elapsed: start.elapsed(), ..failure }, done);
        };
        let what = match work.tell(end) {
            Ok(true) => return,
            Ok(false) => "it has no future".to_owned(),
            Err(text) => text,
        };
        // The end was dropped, and the completion with it: it says `Aborted`.
        tracing::error!("gloo cannot tell of the end of an operation: {what}");
        self.at_work.lock().remove(&seq);
    }

    /// The collective that has been under way for longer than this, if the group has not failed.
    pub(super) fn stuck(&self, quick: Duration) -> Option<(u64, String)> {
        let at_work = self.at_work.lock();
        let (seq, (print, since)) = at_work.first_key_value()?;
        let fate = self.fate.lock();
        let stuck = since.elapsed() > quick && fate.cause.is_none() && fate.waiting.is_none();
        stuck.then(|| (*seq, print.clone()))
    }

    /// An operation failed: the cause is looked for, once, and given to all that failed.
    pub(super) fn failed(self: &Arc<Self>, failure: Failure, done: Completion) {
        let mut fate = self.fate.lock();
        if let Some(cause) = fate.cause.clone() {
            drop(fate);
            return done.complete(Err(cause.duplicate()));
        }
        if let Some(waiting) = &mut fate.waiting {
            return waiting.push(done);
        }
        fate.waiting = Some(vec![done]);
        drop(fate);
        tracing::debug!(backend = self.flavor.name(), op = failure.op, "failed: {}", failure.text);
        let shared = self.clone();
        waiters::run(move || {
            let (asking, words) = (shared.clone(), failure.clone());
            let found = waiters::within(INQUEST, move || asking.witness.inquire(&words, || asking.cut()))
                .unwrap_or_else(|| {
                    shared.cut();
                    shared.witness.cut_off(&failure)
                });
            let found = Arc::new(found);
            let (cause, waiting) = {
                let mut fate = shared.fate.lock();
                let cause = fate.cause.get_or_insert(found).clone();
                (cause, fate.waiting.take().unwrap_or_default())
            };
            for done in waiting {
                done.complete(Err(cause.duplicate()));
            }
            shared.own.close(&cause);
        });
    }

    /// Whether there are communicators of NCCL to be freed in good order.
    fn leaves(&self) -> bool {
        let free = |flag: &AtomicBool| !flag.load(Ordering::Acquire);
        self.flavor == Flavor::Nccl && self.cause().is_none() && free(&self.broken) && free(&self.left)
    }

    /// Frees them, which waits for the other ranks. While the program runs: at its exit CUDA goes too.
    fn leave(&self) {
        if let Some(backend) = &self.backend
            && !self.left.swap(true, Ordering::AcqRel)
        {
            leave(backend);
        }
    }

    /// Whether a message, or an operation of a device, has been under way for longer than this; and whether a receive
    /// from any rank has.
    pub(super) fn waits_for_long(&self, quick: Duration) -> (bool, bool) {
        let (message, from_any) = self.listeners.wait_for_long(quick);
        (message || self.lookout.waits_for_long(quick), from_any)
    }

    /// A collective has ended.
    pub(super) fn done_with(&self, seq: u64) {
        self.at_work.lock().remove(&seq);
    }

    /// Ends everything that is pending. Gloo has no abort; but a wait that times out closes all its
    /// connections, so one is made.
    pub(super) fn cut(&self) {
        let Some(backend) = &self.backend else { return };
        match self.flavor {
            Flavor::Nccl => {
                self.broken.store(true, Ordering::Release);
                break_off(backend);
            }
            Flavor::Gloo if self.witness.size > 1 => {
                self.peers.end();
                let work = Tensor::f_empty([1], (Kind::Uint8, Device::Cpu))
                    .map_err(|e| e.to_string())
                    .and_then(|tensor| {
                        let _order = self.order.lock();
                        let _alone = alone_at_the_recorder();
                        backend.recv(&tensor, None, CUT_TAG)
                    });
                if let Ok(work) = work {
                    let _ = work.wait(1);
                }
                self.listeners.end();
            }
            Flavor::Gloo => {}
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.lookout.close();
        self.peers.end();
        self.own.close(&Arc::new(Error::Aborted));
        // Its destructor waits for what is pending, and this may be one of the engine's own threads. Where the process ends
        // before it has begun, it is left out.
        if let Some(backend) = self.backend.take().map(ManuallyDrop::new) {
            let witness = self.witness.clone();
            let (leaves, left) = (self.leaves(), self.left.load(Ordering::Acquire));
            let (nccl, well) = (self.flavor == Flavor::Nccl, self.cause().is_none());
            waiters::run(move || {
                witness.see_others_settled(SETTLING);
                if well {
                    witness.leave();
                }
                if leaves {
                    leave(&backend);
                } else if nccl && !left {
                    break_off(&backend);
                }
                unless_ending(move || drop(ManuallyDrop::into_inner(backend)));
            });
        }
    }
}

/// Frees NCCL's communicators. Where that fails they are aborted: else the engine's destructor would, and an exception
/// there ends the process.
fn leave(backend: &C10dBackend) {
    if let Some(Err(text)) = unless_ending(|| backend.shutdown()) {
        tracing::debug!("shutdown: {text}");
        break_off(backend);
    }
}

fn break_off(backend: &C10dBackend) {
    if let Some(Err(text)) = unless_ending(|| backend.abort()) {
        tracing::debug!("abort: {text}");
    }
}

/// c10d reads 0 and less as its default.
pub(super) fn millis(timeout: Duration) -> i64 {
    const TEN_YEARS: u128 = 10 * 365 * 24 * 3600 * 1000;
    timeout.as_millis().clamp(1, TEN_YEARS) as i64
}
