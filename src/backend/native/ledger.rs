//! What this rank has called, for others to ask: how far it is and the last calls' fingerprints.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::transport::Stamp;

/// How many calls back a rank can tell what it called.
pub(super) const DEPTH: usize = 64;

/// The record of one rank's calls. Written under the engine's queue lock by one thread at a time, read
/// by anyone at any time: an entry being overwritten reads as forgotten.
#[derive(Debug)]
pub(crate) struct Ledger {
    entered: AtomicU64,
    completed: AtomicU64,
    entries: [Entry; DEPTH],
}

#[derive(Debug, Default)]
struct Entry {
    seq: AtomicU64,
    low: AtomicU64,
    high: AtomicU64,
}

impl Ledger {
    pub(crate) fn new() -> Self {
        Self {
            entered: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            entries: std::array::from_fn(|_| Entry::default()),
        }
    }

    /// Notes that a call was entered. The first call has number 1.
    pub(crate) fn enter(&self, stamp: Stamp) {
        let entry = &self.entries[stamp.seq as usize % DEPTH];
        entry.seq.store(0, Ordering::Release);
        entry.low.store(stamp.fingerprint as u64, Ordering::Release);
        entry.high.store((stamp.fingerprint >> 64) as u64, Ordering::Release);
        entry.seq.store(stamp.seq, Ordering::Release);
        self.entered.store(stamp.seq, Ordering::Release);
    }

    /// Notes that a call has ended well.
    pub(crate) fn complete(&self, seq: u64) {
        self.completed.store(seq, Ordering::Release);
    }

    /// The number of the last call entered; 0 before the first.
    pub(crate) fn entered(&self) -> u64 {
        self.entered.load(Ordering::Acquire)
    }

    /// The number of the last call that ended well.
    pub(crate) fn completed(&self) -> u64 {
        self.completed.load(Ordering::Acquire)
    }

    /// What was called at a number, if it was and is remembered.
    pub(crate) fn call(&self, seq: u64) -> Option<u128> {
        let entry = &self.entries[seq as usize % DEPTH];
        if seq == 0 || entry.seq.load(Ordering::Acquire) != seq {
            return None;
        }
        let low = entry.low.load(Ordering::Acquire);
        let high = entry.high.load(Ordering::Acquire);
        (entry.seq.load(Ordering::Acquire) == seq).then_some(u128::from(high) << 64 | u128::from(low))
    }

    /// The answer to "what did you call at this number?".
    pub(crate) fn report(&self, seq: u64) -> Report {
        Report { completed: self.completed(), entered: self.entered(), call: self.call(seq) }
    }
}

/// How far a rank is, and what it called at the number asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The number of its last call that ended well. Looked at first: a call may be entered meanwhile.
    pub(crate) completed: u64,
    /// The number of its last call.
    pub(crate) entered: u64,
    /// Its call at the number asked for, where it got there and remembers.
    pub(crate) call: Option<u128>,
}

impl Report {
    /// The call that it is in, if it is in one.
    pub(crate) fn under_way(&self) -> Option<u64> {
        (self.completed < self.entered).then_some(self.completed + 1)
    }
}
