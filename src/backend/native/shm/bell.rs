//! The bell of a rank, as one of the ranks has it.

use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::futex;

use super::door::Doors;
use super::protocol::{ASLEEP, AWAKE, Bell};

/// A word in shared memory, and the doors to knock at.
#[derive(Clone, Copy, Debug)]
pub(super) struct RankBell<'i> {
    pub(super) word: &'i AtomicU32,
    pub(super) rank: usize,
    pub(super) doors: Option<&'i Doors>,
}

impl Bell for RankBell<'_> {
    #[inline(always)]
    fn peek(&self) -> u32 {
        self.word.load(Ordering::Relaxed)
    }

    fn arm(&self, value: u32) {
        self.word.store(value, Ordering::Relaxed);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    fn reset(&self) -> u32 {
        self.word.swap(AWAKE, Ordering::AcqRel)
    }

    fn change(&self, from: u32, to: u32) -> bool {
        self.word.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn sleep(&self, nanos: u64) {
        let timeout = futex::Timespec {
            tv_sec: (nanos / 1_000_000_000) as i64,
            tv_nsec: (nanos % 1_000_000_000) as futex::Nsecs,
        };
        // Every way it can end is a reason to look again. Not `PRIVATE`: other processes wake it.
        let _ = futex::wait(self.word, futex::Flags::empty(), ASLEEP, Some(&timeout));
    }

    fn wake(&self) {
        let _ = futex::wake(self.word, futex::Flags::empty(), 1);
    }

    fn knock(&self) {
        if let Some(doors) = self.doors {
            doors.knock(self.rank);
        }
    }
}
