//! Which rank numbers this process holds: two of its threads may not claim one.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};

use once_cell::sync::Lazy;
use parking_lot::Mutex;

static NEXT: AtomicU64 = AtomicU64::new(0);
/// The claims of this process that hold.
static HELD: Lazy<Mutex<HashSet<u64>>> = Lazy::new(Mutex::default);

/// One rank's claim to its number, from the moment it comes to meet the others until it leaves the world.
#[derive(Debug)]
pub(crate) struct Claim(u64);

impl Claim {
    pub(super) fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        HELD.lock().insert(number);
        Self(number)
    }

    /// What it is called within this process.
    pub(super) fn number(&self) -> u64 {
        self.0
    }

    /// Whether a claim of this process holds.
    pub(super) fn holds(number: u64) -> bool {
        HELD.lock().contains(&number)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        HELD.lock().remove(&self.0);
    }
}
