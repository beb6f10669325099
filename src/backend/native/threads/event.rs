//! What a rank thread sleeps on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use crate::backend::native::progress;

/// A signal that is remembered until somebody has seen it: what is signalled while nobody sleeps makes
/// the next `park` return at once.
///
/// `signalled` and `sleeping` are written and read in opposite order on the two sides, all of it
/// sequentially consistent: either the sleeper sees the signal or the signaller sees the sleeper.
#[derive(Debug, Default)]
pub(crate) struct Event {
    signalled: AtomicBool,
    sleeping: AtomicBool,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Event {
    /// Wakes the sleeper, and the progress engine.
    pub(crate) fn notify(&self) {
        self.signalled.store(true, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) {
            drop(self.lock.lock());
            self.changed.notify_all();
        }
        progress::nudge();
    }

    /// Sleeps until a signal or until the time has come.
    pub(crate) fn park(&self, until: Instant) {
        if self.signalled.swap(false, Ordering::SeqCst) {
            return;
        }
        let mut guard = self.lock.lock();
        self.sleeping.store(true, Ordering::SeqCst);
        while !self.signalled.load(Ordering::SeqCst) {
            if self.changed.wait_until(&mut guard, until).timed_out() {
                break;
            }
        }
        self.sleeping.store(false, Ordering::SeqCst);
        self.signalled.store(false, Ordering::SeqCst);
    }
}
