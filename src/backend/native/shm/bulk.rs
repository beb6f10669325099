//! Large messages from one rank to another, through slots of the sender.
//!
//! A rank has [`MAIL_DEPTH`] slots for the stream that it sends. It counts the chunks that it has put, the receiver
//! those that it has taken, both as `stream << 22 | chunks`: words that only grow, like those of collectives. A slot
//! is written again when the receiver has taken what was in it, and a stream begins when the one before it
//! has been taken to its end.

use std::sync::Arc;

use parking_lot::Mutex;

use super::Inner;
use super::protocol::{STEP_BITS, Word, mark, steps_of};
use super::segment::MAIL_DEPTH;
use crate::backend::native::bulk::Bulk;
use crate::backend::native::kernels::{PAST_CACHE, copy_past_cache};

/// A shorter message goes through the socket as fast.
const SHORTEST: usize = 16 << 10;

pub(super) struct Mail {
    inner: Arc<Inner>,
    /// What this rank sends.
    sending: Mutex<Sending>,
    /// The last stream of each other rank.
    taking: Mutex<Vec<Taking>>,
}

/// A stream from another rank.
#[derive(Clone, Copy, Default)]
struct Taking {
    stream: u64,
    chunks: u64,
    /// Whether it is more than caches hold.
    past_cache: bool,
}

/// The last stream of this rank.
#[derive(Default)]
struct Sending {
    stream: u64,
    to: usize,
    chunks: u64,
}

impl Mail {
    pub(super) fn new(inner: Arc<Inner>) -> Self {
        let taking = Mutex::new(vec![Taking::default(); inner.ranks()]);
        Self { inner, sending: Mutex::default(), taking }
    }

    /// How many chunks of a stream its receiver has taken.
    fn taken_of(&self, sending: &Sending) -> u64 {
        steps_of(self.inner.segment.taken(sending.to, self.inner.rank).read(), sending.stream)
    }
}

impl Bulk for Mail {
    fn carries(&self, bytes: usize) -> bool {
        // As many chunks as the count has room for: it begins at 0.
        let most = self.inner.segment.layout.chunk * ((1 << STEP_BITS) - 1);
        (SHORTEST..=most).contains(&bytes)
    }

    fn open(&self, to: usize) -> u64 {
        let mut sending = self.sending.lock();
        *sending = Sending { stream: sending.stream + 1, to, chunks: 0 };
        sending.stream
    }

    fn taken(&self) -> bool {
        let sending = self.sending.lock();
        self.taken_of(&sending) == sending.chunks
    }

    unsafe fn put(&self, data: *const u8, len: usize) -> usize {
        let mut sending = self.sending.lock();
        let segment = &self.inner.segment;
        if sending.chunks >= self.taken_of(&sending) + MAIL_DEPTH as u64 {
            return 0;
        }
        let bytes = len.min(segment.layout.chunk);
        let slot = segment.mail(self.inner.rank, sending.chunks);
        // SAFETY: the caller's promise; what was in the slot has been taken, and a chunk fits.
        unsafe { slot.copy_from_nonoverlapping(data, bytes) };
        sending.chunks += 1;
        segment.put(self.inner.rank).publish(mark(sending.stream, sending.chunks));
        bytes
    }

    unsafe fn take(&self, from: usize, stream: u64, data: *mut u8, len: usize) -> usize {
        let mut taking = self.taking.lock();
        let taking = &mut taking[from];
        let segment = &self.inner.segment;
        if taking.stream != stream {
            *taking = Taking { stream, chunks: 0, past_cache: len >= PAST_CACHE };
        }
        if steps_of(segment.put(from).read(), stream) <= taking.chunks {
            return 0;
        }
        let bytes = len.min(segment.layout.chunk);
        let slot = segment.mail(from, taking.chunks);
        // SAFETY: the caller's promise; the slot was filled before the word that was read, and not again until the
        // word below says that it was taken.
        unsafe {
            match taking.past_cache {
                true => copy_past_cache(slot, data, bytes),
                false => data.copy_from_nonoverlapping(slot, bytes),
            }
        }
        taking.chunks += 1;
        segment.taken(self.inner.rank, from).publish(mark(stream, taking.chunks));
        bytes
    }
}
