//! Messages of a rank to itself, which these engines do not carry.

use std::collections::{HashMap, VecDeque};

use parking_lot::Mutex;
use tch::Tensor;

use crate::backend::{Completion, Receipt};
use crate::{Error, Result};

/// One side of a message that the other has not met.
struct Side {
    flat: Tensor,
    done: Completion,
}

#[derive(Default)]
struct Waiting {
    sends: VecDeque<Side>,
    recvs: VecDeque<Side>,
}

/// The messages under way, by tag.
#[derive(Default)]
pub(super) struct Own(Mutex<HashMap<u32, Waiting>>);

impl Own {
    pub(super) fn send(&self, rank: usize, tag: u32, flat: Tensor, done: Completion) {
        self.meet(rank, tag, Side { flat, done }, |w| (&mut w.sends, &mut w.recvs), true);
    }

    pub(super) fn recv(&self, rank: usize, tag: u32, flat: Tensor, done: Completion) {
        self.meet(rank, tag, Side { flat, done }, |w| (&mut w.recvs, &mut w.sends), false);
    }

    /// Whether a message with this tag waits to be received.
    pub(super) fn has_sent(&self, tag: u32) -> bool {
        self.0.lock().get(&tag).is_some_and(|w| !w.sends.is_empty())
    }

    fn meet(
        &self,
        rank: usize,
        tag: u32,
        side: Side,
        queues: impl FnOnce(&mut Waiting) -> (&mut VecDeque<Side>, &mut VecDeque<Side>),
        sends: bool,
    ) {
        let mut all = self.0.lock();
        let waiting = all.entry(tag).or_default();
        let (mine, theirs) = queues(waiting);
        let Some(other) = theirs.pop_front() else {
            mine.push_back(side);
            return;
        };
        if waiting.sends.is_empty() && waiting.recvs.is_empty() {
            all.remove(&tag);
        }
        drop(all);
        let (from, to) = if sends { (side, other) } else { (other, side) };
        match deliver(&from.flat, to.flat) {
            Ok(()) => {
                from.done.complete(Ok(Receipt::default()));
                to.done.complete(Ok(Receipt { source: Some(rank) }));
            }
            Err(error) => {
                from.done.complete(Err(error.duplicate()));
                to.done.complete(Err(error));
            }
        }
    }

    /// Gives up everything that waits, for it to be ended.
    pub(super) fn drain(&self) -> Vec<Completion> {
        let all = std::mem::take(&mut *self.0.lock());
        all.into_values().flat_map(|w| w.sends.into_iter().chain(w.recvs)).map(|side| side.done).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }
}

fn deliver(from: &Tensor, mut to: Tensor) -> Result<()> {
    if from.numel() != to.numel() {
        return Err(Error::ShapeMismatch {
            argument: "tensor",
            expected: format!("{} bytes, as sent", from.numel()),
            got: format!("{} bytes", to.numel()),
        });
    }
    Ok(to.f_copy_(from)?)
}
