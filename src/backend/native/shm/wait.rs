//! Waiting for other ranks: spin, then give way, then sleep.

use std::time::Instant;

use super::Inner;
use super::protocol::{arm, doze};
use crate::{Error, Result};

/// How often to look again at once, with a core for each rank: about 50 µs.
const SPINS: u32 = 2000;
/// The same with more ranks than cores: somebody else needs this one.
const SPINS_CROWDED: u32 = 20;
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
        Self { spins: if inner.crowded { SPINS_CROWDED } else { SPINS }, tries: 0 }
    }

    /// Something moved.
    #[inline(always)]
    pub(super) fn moved(&mut self) {
        self.tries = 0;
    }

    /// Nothing moved.
    #[inline(always)]
    pub(super) fn idle(&mut self, inner: &Inner, deadline: Instant) -> Result<Next> {
        self.tries += 1;
        if self.tries < self.spins && self.tries % SAMPLE != 0 {
            std::hint::spin_loop();
            return Ok(Next::Look);
        }
        self.idle_for_long(inner, deadline)
    }

    #[cold]
    fn idle_for_long(&mut self, inner: &Inner, deadline: Instant) -> Result<Next> {
        if inner.failed() {
            return Err(Error::Aborted);
        }
        if self.tries >= self.spins + YIELDS {
            arm(inner.segment.bell(inner.rank));
            return Ok(Next::LookThenSleep);
        }
        if self.tries >= self.spins {
            std::thread::yield_now();
        }
        if self.tries % SAMPLE == 0 && Instant::now() >= deadline {
            return Ok(Next::Late);
        }
        Ok(Next::Look)
    }

    /// Sleeps until a bell rings, or for as long as `until` is away.
    pub(super) fn sleep(inner: &Inner, until: Instant) -> Next {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Next::Late;
        }
        doze(inner.segment.bell(inner.rank), u64::try_from(left.as_nanos()).unwrap_or(u64::MAX));
        Next::Look
    }
}
