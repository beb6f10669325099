//! One group's engine on this rank: operations started in order, their ends passed on, failures tried.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tch::{Device, Kind, Tensor};

use super::combine::{Flavor, combine};
use super::flat::bytes;
use super::inquest::{Failure, Witness};
use super::ops::{Refusal, Site, Started};
use super::own::Own;
use super::waiters;
use crate::backend::{Call, CollectiveBackend, Completion, Direction, Op, Receipt, Transfer, segment_numel};
use crate::libtorch::{C10dBackend, C10dWork, Told};
use crate::{Error, Result};

/// Gloo's receive from anybody under this tag is how its connections are closed: see [`Shared::cut`].
const CUT_TAG: i32 = i32::MAX;

/// How long a rank that leaves waits for others that are still connecting.
const SETTLING: Duration = Duration::from_secs(10);

/// libtorch's engine for one group.
pub(super) struct Engine(Arc<Shared>);

struct Shared {
    flavor: Flavor,
    /// Taken when the engine is dropped.
    backend: Option<C10dBackend>,
    device: Device,
    witness: Witness,
    /// Held while operations are started: their order is the same on every rank. The number of the last.
    order: Mutex<u64>,
    own: Own,
    /// Whether NCCL was aborted. Its kernels then end as if they had worked.
    broken: AtomicBool,
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

impl Engine {
    pub(super) fn new(flavor: Flavor, backend: C10dBackend, device: Device, witness: Witness) -> Self {
        Self(Arc::new(Shared {
            flavor,
            backend: Some(backend),
            device,
            witness,
            order: Mutex::new(0),
            own: Own::default(),
            broken: AtomicBool::new(false),
            pending: AtomicUsize::new(0),
            quiet: (Mutex::new(()), Condvar::new()),
            fate: Mutex::default(),
        }))
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
            Some(how) => combine(self.0.flavor, how, kind, self.0.witness.size)
                .map(|_| ())
                .map_err(|what| format!("{} with {what}", op.name())),
            None if matches!(kind, Kind::QInt8 | Kind::QUInt8 | Kind::QInt32) => {
                Err(format!("{} of {kind:?}", op.name()))
            }
            None => Ok(()),
        }
    }

    fn submit(&self, call: Call<'static>, done: Completion) {
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
            ms: millis(call.timeout),
        };
        let mut order = shared.order.lock();
        let seq = *order + 1;
        let started = site.start(&call);
        if !matches!(started, Err(Refusal::Error(_))) {
            *order = seq;
        }
        drop(order);
        let numel: usize = call.inputs.iter().chain(&call.outputs).map(|s| segment_numel(s)).sum();
        let failure = Failure {
            op: call.op.name().to_owned(),
            seq,
            print: match call.op {
                // How much a rank has differs by rank in these.
                Op::AllReduce(_) | Op::Reduce { .. } | Op::Broadcast { .. } => {
                    let numel =
                        if call.op.root() == Some(site.rank) && !matches!(call.op, Op::Broadcast { .. }) {
                            numel / 2
                        } else {
                            numel
                        };
                    format!("{} of {numel} {:?}", call.op, call.kind)
                }
                _ => call.op.to_string(),
            },
            elapsed: Duration::ZERO,
            text: String::new(),
        };
        match started {
            Ok(Started { work, finish }) => {
                let keep = Box::new(move || {
                    let result = finish();
                    drop(call);
                    result.map(|()| None)
                });
                shared.watch(work, keep, failure, site.ms, done);
            }
            Err(Refusal::Error(error)) => done.complete(Err(error)),
            Err(Refusal::Told(text)) => shared.failed(Failure { text, ..failure }, done),
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
        shared.end_own(cause);
        let shared = shared.clone();
        let cause = cause.clone();
        waiters::run(move || {
            shared.witness.announce(&cause);
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
        shared.witness.see_others_settled(timeout.min(SETTLING));
        let own = shared.own.is_empty();
        shared.end_own(&Arc::new(Error::Aborted));
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

type KeepUntilEnd = Box<dyn FnOnce() -> Result<Option<usize>> + Send>;

impl Shared {
    fn cause(&self) -> Option<Arc<Error>> {
        self.fate.lock().cause.clone()
    }

    fn device_of(&self, call: &Call<'_>) -> Device {
        let first = call.inputs.iter().chain(&call.outputs).flatten().next();
        first.map_or(self.device, |buffer| buffer.tensor().device())
    }

    /// Passes the end of an operation on.
    fn watch(
        self: &Arc<Self>,
        work: C10dWork,
        keep: KeepUntilEnd,
        failure: Failure,
        ms: i64,
        done: Completion,
    ) {
        self.pending.fetch_add(1, Ordering::AcqRel);
        let shared = self.clone();
        let start = Instant::now();
        let end = move |result: Told<()>| {
            shared.ended(result, keep, Failure { elapsed: start.elapsed(), ..failure }, done);
        };
        match self.flavor {
            Flavor::Gloo => match work.tell(end) {
                Ok(true) => {}
                // The end was dropped, and the completion with it: it says `Aborted`.
                Ok(false) => tracing::error!("gloo gave an operation without a future"),
                Err(text) => tracing::error!("gloo gave an operation without an end: {text}"),
            },
            Flavor::Nccl => {
                let shared = self.clone();
                waiters::run(move || end(shared.poll(&work, ms)));
            }
        }
    }

    /// Waits for an operation of a device; breaks it off when it takes too long.
    fn poll(&self, work: &C10dWork, ms: i64) -> Told<()> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(20);
        loop {
            if let Some(result) = work.poll() {
                return match self.broken.load(Ordering::Acquire) {
                    true => result.and_then(|()| Err("the group was aborted".to_owned())),
                    false => result,
                };
            }
            if start.elapsed().as_millis() as i64 > ms {
                self.cut();
                return Err("the operation timed out".to_owned());
            }
            if self.cause().is_some() {
                return Err("the group was aborted".to_owned());
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
        }
    }

    fn ended(self: &Arc<Self>, result: Told<()>, keep: KeepUntilEnd, failure: Failure, done: Completion) {
        match result {
            Ok(()) => done.complete(keep().map(|source| Receipt { source })),
            Err(text) => {
                drop(keep);
                self.failed(Failure { text, ..failure }, done);
            }
        }
        self.pending.fetch_sub(1, Ordering::AcqRel);
        let _guard = self.quiet.0.lock();
        self.quiet.1.notify_all();
    }

    /// An operation failed: the cause is looked for, once, and given to all that failed.
    fn failed(self: &Arc<Self>, failure: Failure, done: Completion) {
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
            let found = Arc::new(shared.witness.inquire(&failure, || shared.cut()));
            let (cause, waiting) = {
                let mut fate = shared.fate.lock();
                let cause = fate.cause.get_or_insert(found).clone();
                (cause, fate.waiting.take().unwrap_or_default())
            };
            for done in waiting {
                done.complete(Err(cause.duplicate()));
            }
            shared.end_own(&cause);
        });
    }

    fn end_own(&self, cause: &Arc<Error>) {
        for done in self.own.drain() {
            done.complete(Err(cause.duplicate()));
        }
    }

    /// Ends everything that is pending. Gloo has no abort; but a wait that times out closes all its
    /// connections, so one is made.
    fn cut(&self) {
        let Some(backend) = &self.backend else { return };
        match self.flavor {
            Flavor::Nccl => {
                self.broken.store(true, Ordering::Release);
                if let Err(text) = backend.abort() {
                    tracing::debug!("abort: {text}");
                }
            }
            Flavor::Gloo if self.witness.size > 1 => {
                let work = Tensor::f_empty([1], (Kind::Uint8, Device::Cpu))
                    .map_err(|e| e.to_string())
                    .and_then(|tensor| {
                        let _order = self.order.lock();
                        backend.recv(&tensor, None, CUT_TAG)
                    });
                if let Ok(work) = work {
                    let _ = work.wait(1);
                }
            }
            Flavor::Gloo => {}
        }
    }

    fn transfer(self: &Arc<Self>, transfers: Vec<Transfer>) {
        let mut far = Vec::new();
        for transfer in transfers {
            if let Some(cause) = self.cause() {
                transfer.done.complete(Err(Error::Poisoned { cause }));
                continue;
            }
            let rank = self.witness.rank;
            let flat = match bytes(&transfer.buffer.tensor()) {
                Ok(flat) => flat,
                Err(error) => {
                    transfer.done.complete(Err(error));
                    continue;
                }
            };
            match transfer.direction {
                Direction::Send { dst } if dst == rank => {
                    self.own.send(rank, transfer.tag, flat, transfer.done)
                }
                Direction::Recv { src: Some(src) } if src == rank => {
                    self.own.recv(rank, transfer.tag, flat, transfer.done);
                }
                Direction::Recv { src: None } if self.own.has_sent(transfer.tag) => {
                    self.own.recv(rank, transfer.tag, flat, transfer.done);
                }
                _ => far.push((transfer, flat)),
            }
        }
        match self.flavor {
            Flavor::Gloo => far.into_iter().for_each(|(transfer, flat)| self.message(transfer, flat)),
            Flavor::Nccl => self.messages_at_once(far),
        }
    }

    /// One message through Gloo, which can only be waited for.
    fn message(self: &Arc<Self>, transfer: Transfer, flat: Tensor) {
        let Some(backend) = &self.backend else { return };
        let Ok(tag) = i32::try_from(transfer.tag)
            .map_err(|_| ())
            .and_then(|t| if t == CUT_TAG { Err(()) } else { Ok(t) })
        else {
            return transfer.done.complete(Err(Error::invalid(
                "tag",
                format_args!("{} was given; gloo takes tags below {CUT_TAG}", transfer.tag),
            )));
        };
        let (op, work) = {
            let _order = self.order.lock();
            match transfer.direction {
                Direction::Send { dst } => (format!("send to rank {dst}"), backend.send(&flat, dst, tag)),
                Direction::Recv { src: Some(src) } => {
                    (format!("recv from rank {src}"), backend.recv(&flat, Some(src), tag))
                }
                Direction::Recv { src: None } => {
                    ("recv from any rank".to_owned(), backend.recv(&flat, None, tag))
                }
            }
        };
        let failure = Failure {
            op: format!("{op} (tag {tag})"),
            seq: *self.order.lock(),
            print: String::new(),
            elapsed: Duration::ZERO,
            text: String::new(),
        };
        let (direction, ms, done) = (transfer.direction, millis(transfer.timeout), transfer.done);
        let buffer = transfer.buffer;
        let work = match work {
            Ok(work) => work,
            Err(text) => return self.failed(Failure { text, ..failure }, done),
        };
        self.pending.fetch_add(1, Ordering::AcqRel);
        let shared = self.clone();
        let start = Instant::now();
        waiters::run(move || {
            let result = work.wait(ms);
            let keep = Box::new(move || {
                drop(buffer);
                Ok(match direction {
                    Direction::Recv { src } => src.or_else(|| work.source()),
                    Direction::Send { .. } => None,
                })
            });
            shared.ended(result, keep, Failure { elapsed: start.elapsed(), ..failure }, done);
        });
    }

    /// Messages through NCCL: one operation, in the order in which both sides give them. NCCL knows no tags.
    fn messages_at_once(self: &Arc<Self>, messages: Vec<(Transfer, Tensor)>) {
        let Some(backend) = &self.backend else { return };
        if messages.is_empty() {
            return;
        }
        let ms = messages.iter().map(|(t, _)| millis(t.timeout)).max().unwrap_or(1);
        let start = || -> Told<C10dWork> {
            backend.start_group()?;
            let mut outcome = Ok(());
            for (transfer, flat) in &messages {
                let one = match transfer.direction {
                    Direction::Send { dst } => backend.send(flat, dst, 0),
                    Direction::Recv { src: Some(src) } => backend.recv(flat, Some(src), 0),
                    Direction::Recv { src: None } => {
                        Err("nccl cannot receive from any rank: name one".to_owned())
                    }
                };
                outcome = outcome.and(one.map(|_| ()));
            }
            let work = backend.end_group();
            outcome.and(work)
        };
        let (seq, started) = {
            let order = self.order.lock();
            (*order, start())
        };
        let (mut dones, mut keep): (Vec<_>, Vec<_>) = (Vec::new(), Vec::new());
        for (transfer, flat) in messages {
            let source = match transfer.direction {
                Direction::Recv { src } => src,
                Direction::Send { .. } => None,
            };
            dones.push((transfer.done, source));
            keep.push((transfer.buffer, flat));
        }
        let all = Completion::from_fn(move |result| {
            for (done, source) in dones {
                done.complete(match &result {
                    Ok(_) => Ok(Receipt { source }),
                    Err(error) => Err(error.duplicate()),
                });
            }
        });
        let failure = Failure {
            op: "batch of messages".to_owned(),
            seq,
            print: String::new(),
            elapsed: Duration::ZERO,
            text: String::new(),
        };
        match started {
            Ok(work) => {
                let keep = Box::new(move || {
                    drop(keep);
                    Ok(None)
                });
                self.watch(work, keep, failure, ms, all);
            }
            Err(text) => self.failed(Failure { text, ..failure }, all),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Its destructor waits for what is pending, and this may be one of the engine's own threads.
        if let Some(backend) = self.backend.take() {
            let witness = self.witness.clone();
            let leaves = self.flavor == Flavor::Nccl && !self.broken.load(Ordering::Acquire);
            waiters::run(move || {
                witness.see_others_settled(SETTLING);
                if leaves && let Err(text) = backend.shutdown() {
                    tracing::debug!("shutdown: {text}");
                }
                drop(backend);
            });
        }
    }
}

/// c10d reads 0 and less as its default.
pub(super) fn millis(timeout: Duration) -> i64 {
    const TEN_YEARS: u128 = 10 * 365 * 24 * 3600 * 1000;
    timeout.as_millis().clamp(1, TEN_YEARS) as i64
}
