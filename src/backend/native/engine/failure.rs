//! How a group fails: the first cause, when it takes effect, and what each call sees of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Engine, FAILED, REPRIEVED};
use crate::Error;
use crate::backend::native::cause::Cause;
use crate::backend::native::progress;
use crate::backend::native::transport::Stamp;

/// How long calls before the one that failed may take to end.
const REPRIEVE: Duration = Duration::from_secs(1);

/// The first failure.
pub(super) struct Failure {
    pub(super) cause: Cause,
    pub(super) error: Arc<Error>,
}

/// A failure that leaves the call in progress alone.
pub(super) struct Reprieve {
    cause: Cause,
    error: Option<Arc<Error>>,
    until: Instant,
}

impl Engine {
    /// The group has failed: the first cause ends everything that is pending.
    ///
    /// Unless it is about a later call than the one in progress: ranks leave a call one after another, and
    /// who has left it may find a failure while others are still in it. What they need for it is there.
    pub(in crate::backend::native) fn fail(&self, cause: Cause, error: Option<Arc<Error>>) {
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
    pub(super) fn end_reprieve(&self, now: Instant) -> Option<Instant> {
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
    pub(in crate::backend::native) fn failed(&self, stamp: Option<Stamp>) -> Option<Error> {
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
}
