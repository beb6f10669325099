//! Waits that say what they wait for.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

use crate::notice::notice;

/// When a wait is spoken of first, and then each time again.
const FIRST: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_secs(30);

/// One wait, with growing pauses and a deadline.
pub(crate) struct Patience {
    started: Instant,
    timeout: Duration,
    next: Duration,
    pause: Duration,
}

impl Patience {
    pub(crate) fn new(timeout: Duration) -> Self {
        Self { started: Instant::now(), timeout, next: FIRST, pause: Duration::from_millis(1) }
    }

    pub(crate) fn left(&self) -> Duration {
        self.timeout.saturating_sub(self.started.elapsed())
    }

    /// Says now and then what is waited for.
    pub(crate) fn speak<T: Display>(&mut self, what: impl FnOnce() -> T) {
        let elapsed = self.started.elapsed();
        if elapsed >= self.next {
            self.next = elapsed + AGAIN;
            notice(format_args!("after {} s still waiting for {}", elapsed.as_secs(), what()));
        }
    }

    /// Pauses; false when the time is over.
    pub(crate) fn pause(&mut self) -> bool {
        if self.left().is_zero() {
            return false;
        }
        thread::sleep(self.pause.min(self.left()));
        self.pause = (self.pause * 3 / 2).min(Duration::from_millis(20));
        true
    }
}
