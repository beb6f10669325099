//! One group's engine: numbers calls, keeps their order, drives them, and ends them all when one fails.
//!
//! # Who drives
//! A group has one turn. A blocking call on a group that is idle takes the turn and runs on its
//! caller's thread; any other call is queued, in the order of entry, and the progress engine takes the
//! turn for it. What goes over the wire is the same.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tch::{Kind, Tensor};

use super::cause::{Cause, lost, words_of_absence};
use super::control::{Control, Listener, Presence};
use super::diagnosis::Diagnosis;
use super::ledger::Ledger;
use super::progress::{self, Task, Turn};
use super::stamp;
use super::transport::{Deadline, FAR, Progress, Run, Stamp, Transport, Watch};
use crate::backend::{Call, Completion, Receipt, Transfer};
use crate::{Error, Result};

/// The group has failed.
const FAILED: u8 = 1;
/// A peer is not there any more.
const ABSENT: u8 = 2;
/// This rank has shut the group down.
const CLOSED: u8 = 4;
/// A failure of a later call waits until the calls before it have ended.
const REPRIEVED: u8 = 8;

/// The state of one group on one rank.
pub(crate) struct Engine {
    pub(super) rank: usize,
    pub(super) size: usize,
    transport: Arc<dyn Transport>,
    pub(super) control: Arc<dyn Control>,
    pub(super) ledger: Arc<Ledger>,
    flags: AtomicU8,
    queue: Mutex<Queue>,
    /// What the progress engine runs.
    active: Mutex<Option<Active>>,
    failure: Mutex<Option<Failure>>,
    reprieve: Mutex<Option<Reprieve>>,
    /// Whether a call on this rank has ended with the failure, or it was this rank's wish.
    told: AtomicBool,
    /// Whether the progress engine has this group on its list.
    enlisted: AtomicBool,
    /// Point-to-point messages may be pending.
    transfers: AtomicBool,
    /// How many threads are posting messages now.
    posting: AtomicUsize,
    /// When deadlines of messages are looked at next.
    look: Mutex<Option<Instant>>,
    /// What a peer that is gone makes of the call in progress.
    inquest: Mutex<Option<Inquest>>,
    /// Why the call in front does not end, where one behind it is overdue.
    overdue: Mutex<Option<Diagnosis>>,
    /// Whether a first finding is under diagnosis: its verdict ends every call.
    examined: AtomicBool,
    /// The backend was dropped: close when nothing is pending.
    dropped: AtomicBool,
    this: Weak<Self>,
}

#[derive(Default)]
struct Queue {
    seq: u64,
    taken: bool,
    pending: VecDeque<Pending>,
}

struct Pending {
    call: Call<'static>,
    stamp: Stamp,
    entered: Instant,
    done: Completion,
}

impl Pending {
    fn deadline(&self) -> Instant {
        self.entered.checked_add(self.call.timeout).unwrap_or_else(|| far(self.entered))
    }
}

struct Active {
    run: Option<Box<dyn Run>>,
    stamp: Stamp,
    entered: Instant,
    deadline: Instant,
    done: Completion,
    diagnosis: Option<Diagnosis>,
}

/// Why a peer's absence may end the call of a number.
struct Inquest {
    seq: u64,
    since: Instant,
    diagnosis: Option<Diagnosis>,
}

struct Failure {
    cause: Cause,
    error: Arc<Error>,
}

/// A failure that leaves the call in progress alone.
struct Reprieve {
    cause: Cause,
    error: Option<Arc<Error>>,
    until: Instant,
}

/// A deadline so far away that nobody waits for it.
fn far(from: Instant) -> Instant {
    from + FAR
}

/// How long a call may go on without a peer that is gone.
const PATIENCE: Duration = Duration::from_millis(300);
/// How long calls before the one that failed may take to end.
const REPRIEVE: Duration = Duration::from_secs(1);
/// How often a blocked caller looks at what peers said.
const LOOK: Duration = Duration::from_millis(200);
/// How long a blocked caller spins, and how long it then yields, before it sleeps.
const SPINS: u32 = 64;
const YIELDS: u32 = 64;

/// Gives the turn back, whatever happens.
struct TurnGuard<'e>(&'e Engine);

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        let mut queue = self.0.queue.lock();
        queue.taken = false;
        let more = !queue.pending.is_empty();
        drop(queue);
        if more {
            self.0.enlist();
        }
    }
}

impl Engine {
    pub(crate) fn new(
        rank: usize,
        size: usize,
        transport: Arc<dyn Transport>,
        control: Arc<dyn Control>,
        ledger: Arc<Ledger>,
    ) -> Arc<Self> {
        let engine = Arc::new_cyclic(|this: &Weak<Self>| Self {
            rank,
            size,
            transport,
            control,
            ledger,
            flags: AtomicU8::new(0),
            queue: Mutex::default(),
            active: Mutex::new(None),
            failure: Mutex::new(None),
            reprieve: Mutex::new(None),
            told: AtomicBool::new(false),
            enlisted: AtomicBool::new(false),
            transfers: AtomicBool::new(false),
            posting: AtomicUsize::new(0),
            look: Mutex::new(None),
            inquest: Mutex::new(None),
            overdue: Mutex::new(None),
            examined: AtomicBool::new(false),
            dropped: AtomicBool::new(false),
            this: this.clone(),
        });
        let listener: Weak<dyn Listener> = engine.this.clone();
        engine.control.attach(listener);
        engine.changed();
        engine
    }

    fn flag(&self, flag: u8) -> bool {
        self.flags.load(Ordering::SeqCst) & flag != 0
    }

    /// Puts this group on the progress engine's list.
    fn enlist(&self) {
        if self.enlisted.swap(true, Ordering::SeqCst) {
            progress::nudge();
            return;
        }
        let Some(this) = self.this.upgrade() else { return };
        if let Err(error) = progress::enlist(this) {
            self.enlisted.store(false, Ordering::SeqCst);
            let error = Arc::new(Error::Io(error));
            self.fail(Cause::of(&error, self.rank), Some(error));
        }
    }

    /// Why nothing can be called: the failure, or that the group is closed.
    fn refusal(&self) -> Option<Error> {
        self.end_reprieve(Instant::now());
        if self.flag(FAILED) {
            self.told.store(true, Ordering::SeqCst);
            let failure = self.failure.lock();
            return failure.as_ref().map(|f| Error::Poisoned { cause: f.error.clone() });
        }
        self.flag(CLOSED).then_some(Error::Aborted)
    }

    fn number(&self, queue: &mut Queue, call: &Call<'_>) -> Stamp {
        queue.seq += 1;
        let stamp = Stamp { seq: queue.seq, fingerprint: stamp::fingerprint(call) };
        self.ledger.enter(stamp);
        stamp
    }

    /// The stamp of a call by its number.
    fn stamp_of(&self, seq: u64) -> Stamp {
        Stamp { seq, fingerprint: self.ledger.call(seq).unwrap_or(stamp::UNKNOWN) }
    }

    /// A finding is about to be looked into: nobody else needs to.
    pub(super) fn examine(&self) {
        self.examined.store(true, Ordering::SeqCst);
    }

    /// Runs a call on this thread if the group is idle; else queues it and waits.
    pub(crate) fn run(&self, call: Call<'_>) -> Result<()> {
        if self.flag(FAILED | CLOSED | REPRIEVED)
            && let Some(refusal) = self.refusal()
        {
            return Err(refusal);
        }
        let mut queue = self.queue.lock();
        if self.flag(FAILED | CLOSED) {
            drop(queue);
            return Err(self.refusal().unwrap_or(Error::Aborted));
        }
        let stamp = self.number(&mut queue, &call);
        if !queue.taken && queue.pending.is_empty() {
            queue.taken = true;
            drop(queue);
            let _turn = TurnGuard(self);
            return self.run_here(call, stamp);
        }
        let (done, ticket) = Completion::new(None);
        queue.pending.push_back(Pending { call: call.into_owned(), stamp, entered: Instant::now(), done });
        drop(queue);
        self.enlist();
        ticket.wait_until(None).unwrap_or(Err(Error::Aborted)).map(|_| ())
    }

    /// Queues a call for the progress engine.
    pub(crate) fn submit(&self, call: Call<'static>, done: Completion) {
        if self.flag(REPRIEVED)
            && let Some(refusal) = self.refusal()
        {
            return done.complete(Err(refusal));
        }
        let mut queue = self.queue.lock();
        if self.flag(FAILED | CLOSED) {
            drop(queue);
            return done.complete(Err(self.refusal().unwrap_or(Error::Aborted)));
        }
        let stamp = self.number(&mut queue, &call);
        queue.pending.push_back(Pending { call, stamp, entered: Instant::now(), done });
        drop(queue);
        self.enlist();
    }

    fn run_here(&self, call: Call<'_>, stamp: Stamp) -> Result<()> {
        let deadline = Deadline::after(call.timeout);
        let result = self.drive_here(call, stamp, &deadline);
        match result {
            Ok(()) => {
                self.ledger.complete(stamp.seq);
                Ok(())
            }
            Err(error) => {
                let mut diagnosis = Diagnosis::new(self, error, stamp, deadline.begun());
                loop {
                    if let Some(error) = diagnosis.advance(self) {
                        self.told.store(true, Ordering::SeqCst);
                        return Err(error);
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    fn drive_here(&self, call: Call<'_>, stamp: Stamp, deadline: &Deadline) -> Result<()> {
        if self.flag(ABSENT)
            && let Some(error) = self.absent(stamp.seq)
        {
            return Err(error);
        }
        let Some(call) = self.transport.run_inline(call, stamp, deadline)? else { return Ok(()) };
        let mut run = self.transport.start(call, stamp)?;
        let deadline = deadline.at();
        let mut idle = 0;
        loop {
            match run.advance()? {
                Progress::Done => return Ok(()),
                Progress::Moved => idle = 0,
                Progress::Idle => {
                    if self.flag(FAILED) {
                        return Err(Error::Aborted);
                    }
                    idle += 1;
                    if idle < SPINS {
                        std::hint::spin_loop();
                    } else if idle < SPINS + YIELDS {
                        std::thread::yield_now();
                    } else {
                        let now = Instant::now();
                        if now >= deadline {
                            return Err(timed_out(stamp, now - deadline));
                        }
                        self.transport.park(deadline.min(now + LOOK));
                    }
                }
            }
        }
    }

    /// The first finding about a peer that is not there for call `seq`, if there is one.
    pub(super) fn absent(&self, seq: u64) -> Option<Error> {
        self.control.presence().into_iter().enumerate().find_map(|(rank, presence)| match presence {
            Presence::Here => None,
            Presence::Left(calls) | Presence::Closed(calls) => {
                (calls < seq).then(|| self.not_called(rank, seq, calls))
            }
            Presence::Lost(words) => Some(lost(rank, &words)),
        })
    }

    /// See [`Transport::allocate`].
    pub(crate) fn allocate(&self, size: &[i64], kind: Kind) -> Option<Result<Tensor>> {
        self.transport.allocate(size, kind)
    }

    /// The finding that a rank has left the group before call `seq`. It is alive: not lost to others.
    pub(super) fn not_called(&self, rank: usize, seq: u64, calls: u64) -> Error {
        Error::Desync {
            op: stamp::op_name(self.stamp_of(seq).fingerprint).to_owned(),
            seq,
            rank,
            theirs: words_of_absence(calls),
            ours: self.ledger.call(seq).map_or_else(|| "nothing".to_owned(), stamp::words),
        }
    }

    /// Starts point-to-point messages.
    pub(crate) fn transfer(&self, transfers: Vec<Transfer>) {
        // Whoever shuts the group down on another thread waits for this, or is seen here.
        self.posting.fetch_add(1, Ordering::SeqCst);
        let refusal = self.refusal();
        if let Some(error) = refusal {
            self.posting.fetch_sub(1, Ordering::SeqCst);
            for transfer in transfers {
                transfer.done.complete(Err(error.duplicate()));
            }
            return;
        }
        if let Some(helper) = self.control.helper() {
            transfers.iter().for_each(|t| t.done.helped_by(helper.clone()));
        }
        let soon = transfers.iter().any(|t| t.timeout < LOOK);
        self.control.transfer(transfers);
        self.posting.fetch_sub(1, Ordering::SeqCst);
        if let Some(error) = self.failure() {
            // It came in between.
            self.control.fail_transfers(&error);
            return;
        }
        if self.control.pending() > 0 {
            let watched = self.transfers.swap(true, Ordering::SeqCst) && self.enlisted.load(Ordering::SeqCst);
            // Where messages are watched already it is soon enough to look at these with them.
            if !watched || soon || self.flag(ABSENT) {
                *self.look.lock() = None;
                self.changed();
                self.enlist();
            }
        }
    }

    /// The group has failed: the first cause ends everything that is pending.
    ///
    /// Unless it is about a later call than the one in progress: ranks leave a call one after another, and
    /// who has left it may find a failure while others are still in it. What they need for it is there.
    pub(super) fn fail(&self, cause: Cause, error: Option<Arc<Error>>) {
        let mut reprieve = self.reprieve.lock();
        match reprieve.take() {
            Some(first) if !self.spared(&cause) => {
                drop(reprieve);
                self.fail_now(first.cause, first.error);
            }
            Some(first) => *reprieve = Some(first),
            None if self.spared(&cause) && !self.flag(FAILED) => {
                *reprieve = Some(Reprieve { cause, error, until: Instant::now() + REPRIEVE });
                self.flags.fetch_or(REPRIEVED, Ordering::SeqCst);
                drop(reprieve);
                self.enlist();
            }
            None => {
                drop(reprieve);
                self.fail_now(cause, error);
            }
        }
    }

    /// Whether the call in progress has nothing to do with a failure.
    fn spared(&self, cause: &Cause) -> bool {
        let completed = self.ledger.completed();
        completed < self.ledger.entered() && completed < cause.spares()
    }

    /// Lets a failure happen that has waited long enough; when to look again.
    fn end_reprieve(&self, now: Instant) -> Option<Instant> {
        if !self.flag(REPRIEVED) {
            return None;
        }
        let mut reprieve = self.reprieve.lock();
        let first = reprieve.take()?;
        if now < first.until && self.spared(&first.cause) {
            *reprieve = Some(first);
            return Some(now + Duration::from_millis(1));
        }
        drop(reprieve);
        self.fail_now(first.cause, first.error);
        None
    }

    fn fail_now(&self, cause: Cause, error: Option<Arc<Error>>) {
        let error = error.unwrap_or_else(|| cause.shared(self.rank, None));
        {
            let mut failure = self.failure.lock();
            if failure.is_some() {
                return;
            }
            *failure = Some(Failure { cause: cause.clone(), error: error.clone() });
        }
        tracing::warn!(rank = self.rank, %error, "process group failed");
        // Peers first, whoever found out: nobody may see this rank go before it knows why.
        self.control.tell(&cause);
        self.flags.fetch_or(FAILED, Ordering::SeqCst);
        self.transport.fail();
        let pending = std::mem::take(&mut self.queue.lock().pending);
        for pending in pending {
            self.told.store(true, Ordering::SeqCst);
            let error = self.failed(Some(pending.stamp)).unwrap_or(Error::Aborted);
            pending.done.complete(Err(error));
        }
        if self.control.pending() > 0 {
            self.told.store(true, Ordering::SeqCst);
        }
        self.control.fail_transfers(&error);
        progress::nudge();
    }

    /// The failure as the call of this stamp sees it.
    pub(super) fn failed(&self, stamp: Option<Stamp>) -> Option<Error> {
        if !self.flag(FAILED) {
            return None;
        }
        let failure = self.failure.lock();
        failure.as_ref().map(|f| match &f.cause {
            Cause::Lost { .. } if matches!(*f.error, Error::PeerLost { .. }) => {
                f.cause.error(self.rank, stamp)
            }
            _ => f.error.duplicate(),
        })
    }

    pub(crate) fn failure(&self) -> Option<Arc<Error>> {
        if !self.flag(FAILED) {
            return None;
        }
        self.failure.lock().as_ref().map(|f| f.error.clone())
    }

    pub(crate) fn abort(&self, cause: &Arc<Error>) {
        self.told.store(true, Ordering::SeqCst);
        self.fail(Cause::of(cause, self.rank), Some(cause.clone()));
    }

    /// See [`CollectiveBackend::shutdown`](crate::backend::CollectiveBackend::shutdown).
    pub(crate) fn shutdown(&self, timeout: Duration) -> Result<()> {
        let entered = Instant::now();
        let deadline = entered.checked_add(timeout).unwrap_or_else(|| far(entered));
        let result = self.leave(entered, deadline);
        self.flags.fetch_or(CLOSED, Ordering::SeqCst);
        self.control.close(self.ledger.completed());
        result
    }

    fn leave(&self, entered: Instant, deadline: Instant) -> Result<()> {
        if self.flag(FAILED) && !self.told.swap(true, Ordering::SeqCst) {
            // Nobody here has heard of it yet.
            return Err(self.failed(None).unwrap_or(Error::Aborted));
        }
        if self.flag(FAILED | CLOSED) {
            return Ok(());
        }
        let mut nap = Duration::from_micros(20);
        let mut rest = |engine: &Self| {
            std::thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(2));
            Instant::now() >= deadline || engine.flag(FAILED)
        };
        // First what is pending.
        let calls = loop {
            {
                let queue = self.queue.lock();
                let quiet = || self.posting.load(Ordering::SeqCst) == 0 && self.control.pending() == 0;
                if !queue.taken && queue.pending.is_empty() && quiet() {
                    self.flags.fetch_or(CLOSED, Ordering::SeqCst);
                    // Who began to post a message before it could see that is waited for.
                    if quiet() {
                        break queue.seq;
                    }
                    self.flags.fetch_and(!CLOSED, Ordering::SeqCst);
                }
            }
            if rest(self) {
                let stamp = self.stamp_of(self.ledger.entered());
                return Err(self.conclude(timed_out(stamp, timeout_of(entered)), entered));
            }
        };
        self.control.leave(calls);
        // Then the others.
        let finding = loop {
            let presence = self.control.presence();
            let absent = presence.iter().enumerate().find_map(|(rank, p)| match p {
                Presence::Left(theirs) | Presence::Closed(theirs) if *theirs < calls => {
                    Some(self.not_called(rank, *theirs + 1, *theirs))
                }
                Presence::Left(theirs) if *theirs > calls => Some(Error::Desync {
                    op: String::new(),
                    seq: calls + 1,
                    rank,
                    theirs: format!("more ({theirs} calls before it left the group)"),
                    ours: words_of_absence(calls),
                }),
                Presence::Lost(words) => Some(lost(rank, words)),
                _ => None,
            });
            if let Some(error) = absent {
                break error;
            }
            let here = |(rank, p): (usize, &Presence)| rank != self.rank && *p == Presence::Here;
            if !presence.iter().enumerate().any(here) {
                return Ok(());
            }
            if rest(self) {
                if self.flag(FAILED) {
                    break Error::Aborted;
                }
                let missing: Vec<usize> = (0..self.size).filter(|&r| here((r, &presence[r]))).collect();
                let error = Arc::new(Error::Timeout {
                    op: "shutdown".to_owned(),
                    seq: calls,
                    elapsed: timeout_of(entered),
                    missing,
                });
                self.fail(Cause::of(&error, self.rank), Some(error.clone()));
                return Err(error.duplicate());
            }
        };
        Err(self.conclude(finding, entered))
    }

    /// What a finding during shutdown turns out to be.
    fn conclude(&self, finding: Error, entered: Instant) -> Error {
        let seq = match &finding {
            Error::Desync { seq, .. } | Error::Timeout { seq, .. } => *seq,
            _ => self.ledger.entered(),
        };
        let stamp = self.stamp_of(seq);
        let mut diagnosis = Diagnosis::new(self, finding, stamp, entered);
        loop {
            if let Some(error) = diagnosis.advance(self) {
                return error;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The backend was dropped: peers are told once what is pending has ended.
    pub(crate) fn drop_backend(&self) {
        self.dropped.store(true, Ordering::SeqCst);
        let idle = {
            let queue = self.queue.lock();
            !queue.taken && queue.pending.is_empty()
        };
        if (idle && self.control.pending() == 0) || self.flag(FAILED) {
            self.close();
        } else {
            self.enlist();
        }
    }

    fn close(&self) {
        if self.flags.fetch_or(CLOSED, Ordering::SeqCst) & CLOSED == 0 {
            self.control.close(self.ledger.completed());
        }
    }
}

fn timeout_of(entered: Instant) -> Duration {
    Instant::now().duration_since(entered)
}

/// The first finding of a deadline that has passed.
fn timed_out(stamp: Stamp, elapsed: Duration) -> Error {
    Error::Timeout {
        op: stamp::op_name(stamp.fingerprint).to_owned(),
        seq: stamp.seq,
        elapsed,
        missing: Vec::new(),
    }
}

impl Listener for Engine {
    fn failed(&self, cause: &Cause) {
        self.fail(cause.clone(), None);
    }

    fn changed(&self) {
        let presence = self.control.presence();
        if presence.iter().any(|p| *p != Presence::Here) {
            self.flags.fetch_or(ABSENT, Ordering::SeqCst);
            *self.look.lock() = None;
            // The progress engine finds out what it means for what is under way.
            if !self.flag(FAILED | CLOSED) {
                self.enlist();
            }
        }
        self.transport.interrupt();
        progress::nudge();
    }
}

/// How many steps a run may take in one turn before other groups have theirs.
const STEPS: usize = 32;

impl Task for Engine {
    fn advance(&self, _ready: bool) -> Turn {
        let mut moved = false;
        let mut until = None::<Instant>;
        let mut active = self.active.lock();
        for _ in 0..STEPS {
            if active.is_none() {
                *active = self.next_active();
            }
            let Some(current) = active.as_mut() else { break };
            match self.step(current) {
                None => moved = true,
                Some(Step::Wait(when)) => {
                    until = Some(when);
                    break;
                }
                Some(Step::Ended(result)) => {
                    moved = true;
                    if let Some(Active { done, run, stamp, .. }) = active.take() {
                        drop(run);
                        match result {
                            Ok(()) => self.ledger.complete(stamp.seq),
                            Err(_) => self.told.store(true, Ordering::SeqCst),
                        }
                        self.queue.lock().taken = false;
                        done.complete(result.map(|()| Receipt::default()));
                    }
                }
            }
        }
        let idle = active.is_none();
        drop(active);
        if moved {
            return Turn::Moved;
        }
        let now = Instant::now();
        let watched = [
            self.watch_pending(now),
            self.watch_transfers(now),
            self.watch_absent(now),
            self.end_reprieve(now),
        ];
        until = watched.into_iter().chain([until]).flatten().min();
        if idle && until.is_none() {
            self.enlisted.store(false, Ordering::SeqCst);
            // Whoever came before the flag was down relied on this turn.
            let failing = self.watch_absent(now).or(self.end_reprieve(now)).is_some();
            let queue = self.queue.lock();
            let more = failing || !queue.pending.is_empty() || self.transfers.load(Ordering::SeqCst);
            if !more || self.enlisted.swap(true, Ordering::SeqCst) {
                let close = !more && !queue.taken && self.dropped.load(Ordering::SeqCst);
                drop(queue);
                if close {
                    self.close();
                }
                return Turn::Ended;
            }
            return Turn::Moved;
        }
        Turn::Idle(until)
    }

    fn watch(&self, set: &mut Vec<Watch>) -> bool {
        self.active.lock().is_none() || self.transport.watch(set)
    }

    fn broken(&self, why: &Error) {
        self.enlisted.store(false, Ordering::SeqCst);
        self.fail(Cause::of(why, self.rank), None);
        let Some(Active { run, stamp, done, .. }) = self.active.lock().take() else { return };
        drop(run);
        done.complete(Err(self.failed(Some(stamp)).unwrap_or(Error::Aborted)));
    }
}

enum Step {
    /// Nothing moved; look again then.
    Wait(Instant),
    /// The call has ended.
    Ended(Result<()>),
}

impl Engine {
    /// Takes the turn for the first call in the queue, if it is free.
    fn next_active(&self) -> Option<Active> {
        let mut queue = self.queue.lock();
        if queue.taken || self.flag(FAILED) {
            return None;
        }
        let Pending { call, stamp, entered, done } = queue.pending.pop_front()?;
        queue.taken = true;
        drop(queue);
        let deadline = entered.checked_add(call.timeout).unwrap_or_else(|| far(entered));
        let absent = if self.flag(ABSENT) { self.absent(stamp.seq) } else { None };
        let started = match absent {
            Some(error) => Err(error),
            None => self.transport.start(call, stamp),
        };
        let (run, diagnosis) = match started {
            Ok(run) => (Some(run), None),
            Err(error) => (None, Some(Diagnosis::new(self, error, stamp, entered))),
        };
        Some(Active { run, stamp, entered, deadline, done, diagnosis })
    }

    /// Moves the active call on; `None` when something moved.
    fn step(&self, active: &mut Active) -> Option<Step> {
        let error = match (&mut active.run, &mut active.diagnosis) {
            (_, Some(diagnosis)) => {
                return Some(match diagnosis.advance(self) {
                    Some(error) => Step::Ended(Err(error)),
                    None => Step::Wait(Instant::now() + Duration::from_millis(1)),
                });
            }
            (Some(run), None) => match run.advance() {
                Ok(Progress::Done) => return Some(Step::Ended(Ok(()))),
                Ok(Progress::Moved) => return None,
                Ok(Progress::Idle) => {
                    let now = Instant::now();
                    if self.flag(FAILED) {
                        Error::Aborted
                    } else if now >= active.deadline {
                        timed_out(active.stamp, now.duration_since(active.entered))
                    } else {
                        return Some(Step::Wait(active.deadline));
                    }
                }
                Err(error) => error,
            },
            (None, None) => Error::Aborted,
        };
        // The buffers are left alone from here on.
        active.run = None;
        active.diagnosis = Some(Diagnosis::new(self, error, active.stamp, active.entered));
        None
    }

    /// Looks at the deadlines of queued calls: when to look again.
    fn watch_pending(&self, now: Instant) -> Option<Instant> {
        let soon = now + Duration::from_millis(1);
        let mut diagnosis = self.overdue.lock();
        if let Some(diagnosis) = &mut *diagnosis {
            return diagnosis.advance(self).is_none().then_some(soon);
        }
        let (first, overdue) = {
            let queue = self.queue.lock();
            let first = queue.pending.iter().map(Pending::deadline).min()?;
            let overdue = queue.pending.iter().find(|p| p.deadline() <= now);
            (first, overdue.map(|p| p.entered))
        };
        let Some(entered) = overdue else { return Some(first) };
        if !self.examined.load(Ordering::SeqCst) {
            // What it waits for is the call in front of it: who has not come to that one is missing.
            let seq = self.ledger.completed() + 1;
            let stamp = self.stamp_of(seq);
            let finding = timed_out(stamp, now.duration_since(entered));
            *diagnosis = Some(Diagnosis::new(self, finding, stamp, entered));
        }
        Some(soon)
    }

    /// Looks at what is under way, where peers are gone: whether it can still end.
    fn watch_absent(&self, now: Instant) -> Option<Instant> {
        if !self.flag(ABSENT) || self.flag(FAILED | CLOSED) {
            return None;
        }
        if let Some(stranded) = self.control.stranded() {
            let error = Diagnosis::absent_peer(self, stranded);
            self.fail(Cause::of(&error, self.rank), None);
            return None;
        }
        let mut inquest = self.inquest.lock();
        let seq = self.ledger.completed() + 1;
        if seq > self.ledger.entered() {
            *inquest = None;
            return None;
        }
        let error = self.absent(seq)?;
        let inquest = match &mut *inquest {
            Some(inquest) if inquest.seq == seq => inquest,
            other => other.insert(Inquest { seq, since: now, diagnosis: None }),
        };
        // Who ended without a word may have done all that this call needs.
        let without_a_word = matches!(&error, Error::PeerLost { rank, .. }
            if matches!(self.control.presence()[*rank], Presence::Lost(_)));
        if without_a_word && now < inquest.since + PATIENCE {
            return Some(inquest.since + PATIENCE);
        }
        let stamp = self.stamp_of(seq);
        let diagnosis =
            inquest.diagnosis.get_or_insert_with(|| Diagnosis::new(self, error, stamp, inquest.since));
        match diagnosis.advance(self) {
            Some(_) => None,
            None => Some(now + Duration::from_millis(1)),
        }
    }

    /// Looks at pending messages: whether their time is up or their peer is gone.
    fn watch_transfers(&self, now: Instant) -> Option<Instant> {
        if !self.transfers.load(Ordering::SeqCst) {
            return None;
        }
        let mut look = self.look.lock();
        if let Some(when) = *look
            && now < when
        {
            return Some(when);
        }
        self.transfers.store(false, Ordering::SeqCst);
        if self.control.pending() == 0 {
            *look = None;
            return None;
        }
        self.transfers.store(true, Ordering::SeqCst);
        let next = self.control.deadline().unwrap_or_else(|| far(now)).min(now + LOOK);
        *look = Some(next);
        drop(look);
        if let Some(overdue) = self.control.overdue(now) {
            let error = Arc::new(Error::Timeout {
                op: overdue.what,
                seq: self.ledger.entered(),
                elapsed: overdue.elapsed,
                missing: overdue.peer.into_iter().collect(),
            });
            self.fail(Cause::of(&error, self.rank), Some(error));
        }
        Some(next.max(now + Duration::from_millis(1)))
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine(rank {} of {})", self.rank, self.size)
    }
}
