//! The progress engine: one thread of the process that drives whatever no caller drives.
//!
//! It runs asynchronous collectives, watches control channels and deadlines, and sleeps on their
//! descriptors when nothing moves.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use once_cell::sync::OnceCell;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::transport::Watch;
use crate::Error;
use crate::backend::contained;

/// Something to drive. Never blocks.
pub(crate) trait Task: Send + Sync {
    /// Moves what can be moved. `ready`: one of its descriptors may be ready.
    fn advance(&self, ready: bool) -> Turn;

    /// Adds the descriptors to sleep on; false where the task has to be looked at again soon.
    fn watch(&self, set: &mut Vec<Watch>) -> bool;

    /// It panicked in its turn and gets no more: ends what it had under way.
    fn broken(&self, why: &Error);
}

/// What a task did in its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Something moved.
    Moved,
    /// Nothing moved; look again when a descriptor is ready, on a nudge, or at this time.
    Idle(Option<Instant>),
    /// It needs no more turns (until it is enlisted again).
    Ended,
}

struct Progress {
    /// Tasks that have come since the last pass.
    arrivals: Mutex<Vec<Arc<dyn Task>>>,
    wake: OwnedFd,
}

/// Whether the thread is about to sleep, or sleeps, on its descriptors.
static ASLEEP: AtomicBool = AtomicBool::new(false);
static PROGRESS: OnceCell<&'static Progress> = OnceCell::new();

/// How long the thread looks around before it sleeps, where a collective is under way.
const SPIN: Duration = Duration::from_micros(30);
/// How often a busy thread tries descriptors that it does not sleep on.
const LOOK: Duration = Duration::from_micros(50);
/// How long it naps where there is nothing to sleep on.
const NAP: Duration = Duration::from_micros(100);
/// How long it sleeps at most.
const LONG: Duration = Duration::from_secs(10);

/// Starts the thread if it has not been started.
pub(crate) fn start() -> io::Result<()> {
    PROGRESS
        .get_or_try_init(|| {
            let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            let progress: &'static Progress =
                Box::leak(Box::new(Progress { arrivals: Mutex::default(), wake }));
            std::thread::Builder::new().name("dist-progress".to_owned()).spawn(|| progress.run())?;
            Ok(progress)
        })
        .map(|_| ())
}

/// Hands the thread a task.
pub(crate) fn enlist(task: Arc<dyn Task>) -> io::Result<()> {
    start()?;
    if let Some(progress) = PROGRESS.get() {
        progress.arrivals.lock().push(task);
        nudge();
    }
    Ok(())
}

/// Makes the thread look around, if it sleeps.
pub(crate) fn nudge() {
    // While nobody knows how to wake the thread, it stays asleep: who started it wakes it as soon as that is known.
    if let Some(progress) = PROGRESS.get()
        && ASLEEP.load(Ordering::SeqCst)
        && ASLEEP.swap(false, Ordering::SeqCst)
    {
        // The counter cannot overflow: one nudge a sleep. A failure would mean a late wake-up.
        let _ = rustix::io::write(&progress.wake, &1u64.to_ne_bytes());
    }
}

impl Progress {
    fn run(&self) {
        let mut tasks: Vec<Arc<dyn Task>> = Vec::new();
        let mut idle_since: Option<Instant> = None;
        // Tasks whose descriptors are ready, after a sleep.
        let mut ready: Vec<bool> = Vec::new();
        let mut looked = Instant::now();
        loop {
            // While there is no time to sleep, every descriptor is looked at now and then.
            let look = looked.elapsed() > LOOK;
            if look {
                looked = Instant::now();
            }
            let (moved, until) = self.pass(&mut tasks, &ready, look);
            ready.clear();
            if moved {
                idle_since = None;
                continue;
            }
            let now = Instant::now();
            let since = *idle_since.get_or_insert(now);
            if until.is_some() && now.duration_since(since) < SPIN {
                std::thread::yield_now();
                continue;
            }
            // Whoever signals from here on sees the flag; what was signalled before, this pass sees.
            ASLEEP.store(true, Ordering::SeqCst);
            let (moved, until) = self.pass(&mut tasks, &ready, false);
            if !moved {
                self.sleep(&tasks, until, &mut ready);
                looked = Instant::now();
            }
            ASLEEP.store(false, Ordering::SeqCst);
            idle_since = None;
        }
    }

    /// Gives every task a turn: whether something moved, and the earliest time to look again.
    /// `ready`: whose descriptors are ready, where that is known; `look`: whether to try them all.
    fn pass(&self, tasks: &mut Vec<Arc<dyn Task>>, ready: &[bool], look: bool) -> (bool, Option<Instant>) {
        let known = tasks.len();
        tasks.append(&mut self.arrivals.lock());
        let (mut moved, mut until) = (false, None::<Instant>);
        let mut at = 0;
        tasks.retain(|task| {
            let ready = look || at >= known || ready.get(at).copied().unwrap_or(false);
            at += 1;
            // One task's fault must not end the thread: it drives all groups of the process.
            match contained(|| task.advance(ready)) {
                Ok(Turn::Moved) => moved = true,
                Ok(Turn::Idle(when)) => until = [until, when].into_iter().flatten().min(),
                Ok(Turn::Ended) => return false,
                Err(why) => {
                    tracing::error!(%why, "a task of the progress engine panicked");
                    if let Err(error) = contained(|| task.broken(&why)) {
                        tracing::error!(%error, "it could not be ended");
                    }
                    return false;
                }
            }
            true
        });
        (moved, until)
    }

    /// Sleeps on every task's descriptors.
    fn sleep(&self, tasks: &[Arc<dyn Task>], until: Option<Instant>, ready: &mut Vec<bool>) {
        let mut set: Vec<Watch> = Vec::new();
        let mut owner: Vec<usize> = Vec::new();
        let mut longest = LONG;
        for (n, task) in tasks.iter().enumerate() {
            if !task.watch(&mut set) {
                longest = NAP;
            }
            owner.resize(set.len(), n);
        }
        let mut fds: Vec<PollFd<'_>> =
            set.iter().map(|watch| PollFd::from_borrowed_fd(watch.fd.as_fd(), watch.flags())).collect();
        fds.push(PollFd::new(&self.wake, PollFlags::IN));
        let until = until.map_or(longest, |t| t.saturating_duration_since(Instant::now()).min(longest));
        let timeout = Timespec { tv_sec: until.as_secs() as _, tv_nsec: until.subsec_nanos().into() };
        if poll(&mut fds, Some(&timeout)).is_err() {
            // Interrupted, or out of memory for the moment: look around and come again.
            std::thread::yield_now();
            return;
        }
        ready.resize(tasks.len(), false);
        for (fd, &owner) in fds.iter().zip(&owner) {
            ready[owner] |= !fd.revents().is_empty();
        }
        let mut counter = [0; 8];
        // Nothing to read where nobody nudged.
        let _ = rustix::io::read(&self.wake, &mut counter);
    }
}
