//! What the progress engine does in a group's turn.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{ABSENT, Active, Engine, FAILED, Pending, far, timed_out};
use crate::backend::Receipt;
use crate::backend::native::cause::Cause;
use crate::backend::native::diagnosis::Diagnosis;
use crate::backend::native::progress::{Task, Turn};
use crate::backend::native::transport::{Progress, Watch};
use crate::{Error, Result};

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
}
