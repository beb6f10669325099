//! Links between threads: a queue of lent messages for each pair of ranks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::event::Event;
use super::room::Seat;
use crate::Result;
use crate::backend::native::link::{Head, Lent, Links};
use crate::backend::native::memory::{Piece, Pieces};

/// The sender's memory may be taken hold of.
const OFFERED: u8 = 0;
/// The receiver reads it.
const HELD: u8 = 1;
/// The receiver has read it.
const READ: u8 = 2;
/// The sender has taken it back.
const WITHDRAWN: u8 = 3;

/// A message that lies where its sender has it.
///
/// `state` goes OFFERED, HELD, READ by the receiver, or from OFFERED to WITHDRAWN by the sender. The
/// sender touches the memory again after READ or WITHDRAWN alone. Acquire and release on `state` order
/// the bytes.
#[derive(Debug)]
pub(crate) struct Message {
    head: Head,
    pieces: Pieces,
    state: AtomicU8,
    /// The sender's event.
    sender: Arc<Event>,
}

/// Messages on their way from one rank to another.
#[derive(Debug, Default)]
pub(super) struct Lane {
    count: AtomicUsize,
    messages: Mutex<VecDeque<Arc<Message>>>,
}

impl Lent for Arc<Message> {
    fn hold(&self) -> Option<&[Piece]> {
        self.state
            .compare_exchange(OFFERED, HELD, Ordering::Acquire, Ordering::Acquire)
            .is_ok()
            .then_some(&self.pieces[..])
    }

    fn release(&self) {
        self.state.store(READ, Ordering::Release);
        self.sender.notify();
    }
}

/// One rank's end of all its links.
pub(crate) struct ThreadLinks {
    seat: Arc<Seat>,
    /// To each peer: messages that have not been read, oldest first.
    posted: Vec<VecDeque<Arc<Message>>>,
    /// To each peer: how many of this run have been read.
    sent: Vec<usize>,
}

impl ThreadLinks {
    pub(super) fn new(seat: Arc<Seat>) -> Self {
        let size = seat.size();
        Self { seat, posted: (0..size).map(|_| VecDeque::new()).collect(), sent: vec![0; size] }
    }
}

impl Links for ThreadLinks {
    type Lent = Arc<Message>;

    fn begin(&mut self) {
        self.sent.fill(0);
    }

    fn post(&mut self, to: usize, head: Head, pieces: Pieces) {
        let message = Arc::new(Message {
            head,
            pieces,
            state: AtomicU8::new(OFFERED),
            sender: self.seat.event().clone(),
        });
        self.posted[to].push_back(message.clone());
        let lane = self.seat.lane_to(to);
        lane.messages.lock().push_back(message);
        lane.count.fetch_add(1, Ordering::Release);
        self.seat.event_of(to).notify();
    }

    fn flush(&mut self, _to: usize) -> Result<bool> {
        Ok(false)
    }

    fn sent(&mut self, to: usize) -> usize {
        while self.posted[to].front().is_some_and(|m| m.state.load(Ordering::Acquire) == READ) {
            self.posted[to].pop_front();
            self.sent[to] += 1;
        }
        self.sent[to]
    }

    fn peek(&mut self, from: usize) -> Result<Option<Head>> {
        let lane = self.seat.lane_from(from);
        if lane.count.load(Ordering::Acquire) == 0 {
            return Ok(None);
        }
        Ok(lane.messages.lock().front().map(|m| m.head))
    }

    fn take(&mut self, from: usize) -> Option<Arc<Message>> {
        let lane = self.seat.lane_from(from);
        let message = lane.messages.lock().pop_front();
        if message.is_some() {
            lane.count.fetch_sub(1, Ordering::Release);
        }
        message
    }

    fn read(&mut self, _from: usize, _into: &[Piece], _done: usize) -> Result<usize> {
        unreachable!("messages between threads are taken")
    }

    fn withdraw(&mut self) {
        for message in self.posted.iter_mut().flat_map(|lane| lane.drain(..)) {
            let offered =
                message.state.compare_exchange(OFFERED, WITHDRAWN, Ordering::AcqRel, Ordering::Acquire);
            if offered == Err(HELD) {
                // A peer is in the middle of reading: that takes no longer than a copy does.
                while message.state.load(Ordering::Acquire) == HELD {
                    std::thread::yield_now();
                }
            }
        }
    }
}
