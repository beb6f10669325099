//! Messages of a rank to itself, which these engines do not carry.
//!
//! Both sides, the receives from any rank that the engine has, and the end of the group are under one lock: whichever
//! comes first, a side meets its other, is refused, or ends with the group.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tch::Tensor;

use crate::backend::{Completion, Receipt};
use crate::{Error, Result};

/// One side of a message that the other has not met.
struct Side {
    number: u64,
    flat: Tensor,
    done: Completion,
}

#[derive(Default)]
struct Waiting {
    sends: VecDeque<Side>,
    recvs: VecDeque<Side>,
}

#[derive(Default)]
struct State {
    /// The messages under way, by tag.
    waiting: HashMap<u32, Waiting>,
    /// How many receives from any rank the engine has, by tag: it hears nothing of this rank's own messages.
    asking: HashMap<u32, usize>,
    /// Why the group ended.
    closed: Option<Arc<Error>>,
    last: u64,
}

#[derive(Default)]
pub(super) struct Own {
    rank: usize,
    state: Mutex<State>,
    /// A side has met its other, or the group has ended.
    change: Condvar,
}

/// Where a receive from any rank goes.
pub(super) enum FromAny {
    /// To a message of this rank's own.
    Met,
    /// To the engine, and it is known of while this is there.
    Engine(Completion, Asking),
}

/// A receive from any rank that the engine has.
pub(super) struct Asking(Arc<Own>, u32);

impl Drop for Asking {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        if let Some(receives) = state.asking.get_mut(&self.1) {
            *receives -= 1;
            if *receives == 0 {
                state.asking.remove(&self.1);
            }
        }
    }
}

impl Own {
    pub(super) fn new(rank: usize) -> Arc<Self> {
        Arc::new(Self { rank, ..Self::default() })
    }

    /// Gives the number under which it waits for its other side, where it does. The completion comes back where the
    /// engine has a receive from any rank with this tag.
    pub(super) fn send(&self, tag: u32, flat: Tensor, done: Completion) -> Result<Option<u64>, Completion> {
        let state = self.state.lock();
        if state.asking.contains_key(&tag) {
            return Err(done);
        }
        Ok(self.meet(state, tag, flat, done, true))
    }

    /// Gives the number under which it waits for its other side, where it does.
    pub(super) fn recv(&self, tag: u32, flat: Tensor, done: Completion) -> Option<u64> {
        self.meet(self.state.lock(), tag, flat, done, false)
    }

    pub(super) fn recv_any(self: &Arc<Self>, tag: u32, flat: &Tensor, done: Completion) -> FromAny {
        let mut state = self.state.lock();
        if state.waiting.get(&tag).is_some_and(|w| !w.sends.is_empty()) {
            self.meet(state, tag, flat.shallow_clone(), done, false);
            return FromAny::Met;
        }
        *state.asking.entry(tag).or_insert(0) += 1;
        FromAny::Engine(done, Asking(self.clone(), tag))
    }

    fn meet(
        &self,
        mut state: MutexGuard<'_, State>,
        tag: u32,
        flat: Tensor,
        done: Completion,
        sends: bool,
    ) -> Option<u64> {
        if let Some(cause) = state.closed.clone() {
            drop(state);
            done.complete(Err(Error::Poisoned { cause }));
            return None;
        }
        state.last += 1;
        let number = state.last;
        let waiting = state.waiting.entry(tag).or_default();
        let (mine, theirs) = match sends {
            true => (&mut waiting.sends, &mut waiting.recvs),
            false => (&mut waiting.recvs, &mut waiting.sends),
        };
        let side = Side { number, flat, done };
        let Some(other) = theirs.pop_front() else {
            mine.push_back(side);
            return Some(number);
        };
        state.forget_if_empty(tag);
        drop(state);
        self.change.notify_all();
        let (from, to) = if sends { (side, other) } else { (other, side) };
        match deliver(&from.flat, to.flat) {
            Ok(()) => {
                from.done.complete(Ok(Receipt::default()));
                to.done.complete(Ok(Receipt { source: Some(self.rank) }));
            }
            Err(error) => {
                from.done.complete(Err(error.duplicate()));
                to.done.complete(Err(error));
            }
        }
        None
    }

    /// Waits until the side with this number has met its other or ended; where that takes longer, takes it out.
    pub(super) fn overdue(&self, tag: u32, number: u64, timeout: Duration) -> Option<Completion> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.state.lock();
        while state.has(tag, number) {
            let late = match deadline {
                Some(deadline) => self.change.wait_until(&mut state, deadline).timed_out(),
                None => {
                    self.change.wait(&mut state);
                    false
                }
            };
            if late {
                return state.take(tag, number);
            }
        }
        None
    }

    /// Ends what waits, and what comes from now on.
    pub(super) fn close(&self, cause: &Arc<Error>) {
        let all = {
            let mut state = self.state.lock();
            state.closed.get_or_insert_with(|| cause.clone());
            std::mem::take(&mut state.waiting)
        };
        self.change.notify_all();
        for side in all.into_values().flat_map(|w| w.sends.into_iter().chain(w.recvs)) {
            side.done.complete(Err(cause.duplicate()));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.state.lock().waiting.is_empty()
    }
}

impl State {
    fn has(&self, tag: u32, number: u64) -> bool {
        let waits = |w: &Waiting| w.sends.iter().chain(&w.recvs).any(|side| side.number == number);
        self.waiting.get(&tag).is_some_and(waits)
    }

    fn take(&mut self, tag: u32, number: u64) -> Option<Completion> {
        let waiting = self.waiting.get_mut(&tag)?;
        let side = [&mut waiting.sends, &mut waiting.recvs].into_iter().find_map(|sides| {
            let index = sides.iter().position(|side| side.number == number)?;
            sides.remove(index)
        });
        self.forget_if_empty(tag);
        side.map(|side| side.done)
    }

    fn forget_if_empty(&mut self, tag: u32) {
        if self.waiting.get(&tag).is_some_and(|w| w.sends.is_empty() && w.recvs.is_empty()) {
            self.waiting.remove(&tag);
        }
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    const TAG: u32 = 3;
    const SECONDS: Duration = Duration::from_secs(20);

    fn end() -> (Completion, Receiver<Result<Receipt>>) {
        let (tx, rx) = channel();
        (Completion::from_fn(move |result| drop(tx.send(result))), rx)
    }

    fn byte(value: u8) -> Tensor {
        Tensor::from_slice(&[value])
    }

    #[test]
    fn a_side_that_waits_too_long_is_taken_out_and_no_other_meets_it() {
        let own = Own::new(5);
        let (done, lost) = end();
        let number = own.send(TAG, byte(1), done).unwrap().expect("nobody receives yet");
        let done = own.overdue(TAG, number, Duration::ZERO).expect("nobody received");
        done.complete(Err(Error::Aborted));
        assert!(matches!(lost.recv_timeout(SECONDS).unwrap(), Err(Error::Aborted)));
        let (done, sent) = end();
        let number = own.send(TAG, byte(2), done).unwrap().expect("nobody receives yet");
        let (got, (done, received)) = (byte(0), end());
        assert!(own.recv(TAG, got.shallow_clone(), done).is_none());
        assert_eq!(received.recv_timeout(SECONDS).unwrap().unwrap().source, Some(5));
        sent.recv_timeout(SECONDS).unwrap().unwrap();
        assert_eq!(u8::try_from(got).unwrap(), 2);
        assert!(own.overdue(TAG, number, SECONDS).is_none() && own.is_empty());
    }

    #[test]
    fn a_receive_from_any_rank_takes_what_was_sent_or_has_what_comes_later_refused() {
        let own = Own::new(0);
        let ((sent, _), (any, received)) = (end(), end());
        own.send(TAG, byte(7), sent).unwrap();
        let got = byte(0);
        assert!(matches!(own.recv_any(TAG, &got, any), FromAny::Met));
        received.recv_timeout(SECONDS).unwrap().unwrap();
        assert_eq!(u8::try_from(got).unwrap(), 7);
        let FromAny::Engine(_, asking) = own.recv_any(TAG, &byte(0), end().0) else {
            panic!("nothing was sent")
        };
        assert!(own.send(TAG, byte(8), end().0).is_err());
        drop(asking);
        assert!(own.send(TAG, byte(9), end().0).is_ok());
    }

    #[test]
    fn whatever_comes_after_the_end_of_the_group_ends_at_once() {
        let own = Own::new(0);
        let (done, before) = end();
        own.send(TAG, byte(1), done).unwrap();
        own.close(&Arc::new(Error::Aborted));
        assert!(matches!(before.recv_timeout(SECONDS).unwrap(), Err(Error::Aborted)));
        let (done, after) = end();
        assert!(own.recv(TAG, byte(0), done).is_none());
        assert!(matches!(after.recv_timeout(SECONDS).unwrap(), Err(Error::Poisoned { .. })));
    }
}
