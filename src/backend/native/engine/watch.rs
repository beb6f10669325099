//! What may end a call or a message from outside: deadlines, and peers that are gone.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{ABSENT, CLOSED, Engine, FAILED, LOOK, Pending, far, timed_out};
use crate::Error;
use crate::backend::native::cause::Cause;
use crate::backend::native::control::{Listener, Presence};
use crate::backend::native::diagnosis::Diagnosis;
use crate::backend::native::progress;

/// How long a call may go on without a peer that is gone.
const PATIENCE: Duration = Duration::from_millis(300);

/// Why a peer's absence may end the call of a number.
pub(super) struct Inquest {
    seq: u64,
    since: Instant,
    diagnosis: Option<Diagnosis>,
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

impl Engine {
    /// Looks at the deadlines of queued calls, and into why one is late, or a message: when to look again.
    pub(super) fn watch_pending(&self, now: Instant) -> Option<Instant> {
        let soon = now + Duration::from_millis(1);
        let mut diagnosis = self.overdue.lock();
        if diagnosis.as_ref().is_some_and(Diagnosis::is_about_a_message)
            && self.control.overdue(now).is_none()
        {
            // It has come meanwhile.
            *diagnosis = None;
        }
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
        if !self.examined() {
            // What it waits for is the call in front of it: who has not come to that one is missing.
            let seq = self.ledger.completed() + 1;
            let stamp = self.stamp_of(seq);
            let finding = timed_out(stamp, now.duration_since(entered));
            *diagnosis = Some(Diagnosis::new(self, finding, stamp, entered));
        }
        Some(soon)
    }

    /// Looks at what is under way, where peers are gone: whether it can still end.
    pub(super) fn watch_absent(&self, now: Instant) -> Option<Instant> {
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
    pub(super) fn watch_transfers(&self, now: Instant) -> Option<Instant> {
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
        if let Some(overdue) = self.control.overdue(now)
            && !self.examined()
        {
            let stamp = self.stamp_of(self.ledger.entered());
            *self.overdue.lock() = Some(Diagnosis::of_message(self, overdue, stamp, now));
        }
        Some(next.max(now + Duration::from_millis(1)))
    }
}
