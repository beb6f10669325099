//! One group's engine: numbers calls, keeps their order, drives them, and ends them all when one fails.
//!
//! # Who drives
//! A group has one turn. A blocking call on a group that is idle takes the turn and runs on its
//! caller's thread; any other call is queued, in the order of entry, and the progress engine takes the
//! turn for it. What goes over the wire is the same.

mod drive;
mod failure;
mod leave;
mod watch;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tch::{Kind, Tensor};

use self::failure::{Failure, Reprieve};
use self::watch::Inquest;
use super::cause::{Cause, lost, words_of_absence};
use super::control::{Control, Listener, Presence};
use super::diagnosis::Diagnosis;
use super::ledger::Ledger;
use super::progress;
use super::stamp;
use super::transport::{Deadline, FAR, Progress, Run, Stamp, Transport};
use crate::backend::{Call, Completion, Transfer};
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
    /// Why the call in front does not end, where one behind it is overdue; or why a message does not come.
    overdue: Mutex<Option<Diagnosis>>,
    /// Held by every diagnosis of a first finding: its verdict ends every call.
    examined: Arc<()>,
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

/// A deadline so far away that nobody waits for it.
fn far(from: Instant) -> Instant {
    from + FAR
}

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
            examined: Arc::default(),
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

    /// A finding is looked into: nobody else needs to, while this is held.
    pub(super) fn examine(&self) -> Arc<()> {
        self.examined.clone()
    }

    fn examined(&self) -> bool {
        Arc::strong_count(&self.examined) > 1
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

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine(rank {} of {})", self.rank, self.size)
    }
}
