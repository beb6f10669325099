//! How a rank leaves a group: what is pending ends, the others are told, and waited for.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{CLOSED, Engine, FAILED, far, timed_out, timeout_of};
use crate::backend::native::cause::{Cause, lost, words_of_absence};
use crate::backend::native::control::Presence;
use crate::backend::native::diagnosis::Diagnosis;
use crate::{Error, Result};

impl Engine {
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
                // Ranks of a group that has failed go as well; they have told why before they did.
                if self.flag(FAILED) {
                    break Error::Aborted;
                }
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

    pub(super) fn close(&self) {
        if self.flags.fetch_or(CLOSED, Ordering::SeqCst) & CLOSED == 0 {
            self.control.close(self.ledger.completed());
        }
    }
}
