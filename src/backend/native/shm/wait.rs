//! Waiting for other ranks: spin, then give way, then sleep.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Inner;
use super::protocol::{arm, doze};
use crate::backend::native::transport::Deadline;
use crate::{Error, Result};

/// How often to look again at once, at most, with a core for each rank: about 50 µs.
const SPINS: u32 = 2000;
/// The least, and what is right with more ranks than cores: somebody else needs this one.
const SPINS_LEAST: u32 = 20;
/// How often to look again after giving way to whoever is ready to run.
const YIELDS: u32 = 200;
/// How often to look at the clock and for failures while not asleep.
const SAMPLE: u32 = 64;

/// What to do when nothing moves.
#[derive(Debug)]
pub(super) struct Wait {
    spins: u32,
    tries: u32,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Look again.
    Look,
    /// Look again: if there is still nothing, call `sleep`.
    LookThenSleep,
    /// The deadline has passed.
    Late,
}

impl Wait {
    pub(super) fn new(inner: &Inner) -> Self {
        Self { spins: inner.spins.load(Ordering::Relaxed), tries: 0 }
    }

    /// What a new group begins with.
    pub(super) fn first_spins(ranks: usize) -> u32 {
        if ranks > num_cpus::get() { SPINS_LEAST } else { SPINS }
    }

    /// Something moved. Spinning that was of use is worth more of it the next time, and the reverse: two
    /// ranks may find themselves on one core of a busy machine, where each would wait for the other to
    /// stop spinning.
    #[inline(always)]
    pub(super) fn moved(&mut self, inner: &Inner) {
        if self.tries > 0 {
            let spins = match self.tries < self.spins {
                true if inner.crowded => self.spins,
                true => (self.spins * 2).min(SPINS),
                false => (self.spins / 4).max(SPINS_LEAST),
            };
            if spins != self.spins {
                inner.spins.store(spins, Ordering::Relaxed);
                self.spins = spins;
            }
            self.tries = 0;
        }
    }

    /// Nothing moved.
    #[inline(always)]
    pub(super) fn idle(&mut self, inner: &Inner, deadline: &Deadline) -> Result<Next> {
        self.tries += 1;
        if self.tries < self.spins && !self.tries.is_multiple_of(SAMPLE) {
            std::hint::spin_loop();
            return Ok(Next::Look);
        }
        self.idle_for_long(inner, deadline)
    }

    #[cold]
    fn idle_for_long(&mut self, inner: &Inner, deadline: &Deadline) -> Result<Next> {
        if inner.failed() {
            return Err(Error::Aborted);
        }
        if self.tries >= self.spins + YIELDS {
            arm(&inner.bell());
            return Ok(Next::LookThenSleep);
        }
        if self.tries >= self.spins {
            std::thread::yield_now();
        }
        if self.tries.is_multiple_of(SAMPLE) && Instant::now() >= deadline.at() {
            return Ok(Next::Late);
        }
        Ok(Next::Look)
    }

    /// Sleeps until a bell rings, or for as long as `until` is away. The bell is armed, and what is
    /// waited for was looked at since.
    pub(super) fn sleep(inner: &Inner, until: Instant) -> Result<Next> {
        // The failure is something that is waited for too.
        if inner.failed() {
            return Err(Error::Aborted);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Next::Late);
        }
        doze(&inner.bell(), u64::try_from(left.as_nanos()).unwrap_or(u64::MAX));
        Ok(Next::Look)
    }
}
