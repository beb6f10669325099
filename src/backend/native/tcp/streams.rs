//! Granted messages that go around the sockets, one after the other from this rank.

use std::collections::VecDeque;
use std::sync::Arc;

use super::messages::{Deed, Messages};
use super::wire::Note;
use crate::backend::native::bulk::Bulk;

/// How many chunks go each way before other tasks have their turn.
const CHUNKS: usize = 8;

pub(super) struct Streams {
    bulk: Arc<dyn Bulk>,
    /// Whom granted messages are for, and their numbers.
    waiting: VecDeque<(usize, u64)>,
    /// The number of the message that is going out, and how many bytes have gone.
    current: Option<(u64, usize)>,
    /// What comes in: from whom, the message's number and the stream's.
    incoming: Vec<(usize, u64, u64)>,
}

impl Streams {
    pub(super) fn new(bulk: Arc<dyn Bulk>) -> Self {
        Self { bulk, waiting: VecDeque::new(), current: None, incoming: Vec::new() }
    }

    /// Whether a message of so many bytes goes this way.
    pub(super) fn carry(&self, bytes: usize) -> bool {
        self.bulk.carries(bytes)
    }

    /// A message has been granted.
    pub(super) fn send(&mut self, to: usize, id: u64) {
        self.waiting.push_back((to, id));
    }

    /// A message comes as this stream.
    pub(super) fn expect(&mut self, from: usize, id: u64, stream: u64) {
        self.incoming.push((from, id, stream));
    }

    /// Whether there is something to move.
    pub(super) fn busy(&self) -> bool {
        self.current.is_some() || !self.waiting.is_empty() || !self.incoming.is_empty()
    }

    /// Messages are given up: their buffers are not touched any more.
    pub(super) fn give_up(&mut self) {
        self.waiting.clear();
        self.current = None;
        self.incoming.clear();
    }

    /// Moves what can be moved; whether anything was.
    pub(super) fn pump(&mut self, messages: &mut Messages, deeds: &mut Vec<Deed>) -> bool {
        let mut moved = false;
        for _ in 0..CHUNKS {
            let (out, came) = (self.put(messages, deeds), self.take(messages, deeds));
            if !out && !came {
                break;
            }
            moved = true;
        }
        moved
    }

    fn put(&mut self, messages: &mut Messages, deeds: &mut Vec<Deed>) -> bool {
        if self.current.is_none() {
            let Some((to, id)) = self.waiting.pop_front() else { return false };
            deeds.push(Deed::Note(to, Note::Stream { id, stream: self.bulk.open(to) }, Vec::new()));
            self.current = Some((id, 0));
        }
        let Some((id, done)) = &mut self.current else { return false };
        let Some((posted, _)) = messages.outgoing.get(id) else {
            self.current = None;
            return true;
        };
        let left = posted.buffer.bytes() - *done;
        if left > 0 {
            // SAFETY: so much of the buffer is left; it lives until the message has ended.
            let n = unsafe { self.bulk.put(posted.buffer.data_ptr().wrapping_add(*done), left) };
            *done += n;
            return n > 0;
        }
        // Only now: who has sent may go, and what is not taken by then would be lost with it.
        if !self.bulk.taken() {
            return false;
        }
        messages.went(*id, *done, deeds);
        self.current = None;
        true
    }

    fn take(&mut self, messages: &mut Messages, deeds: &mut Vec<Deed>) -> bool {
        let mut moved = false;
        self.incoming.retain(|&(from, id, stream)| {
            let Some((posted, done)) = messages.incoming.get(&(from, id)) else { return false };
            let left = posted.buffer.bytes() - done;
            // SAFETY: so much of the buffer is left; only the message's own bytes are written to it.
            let n =
                unsafe { self.bulk.take(from, stream, posted.buffer.data_ptr().wrapping_add(*done), left) };
            if n > 0 {
                moved = true;
                messages.came(from, id, n, deeds);
            }
            n < left
        });
        moved
    }
}
