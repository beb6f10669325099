//! Point-to-point between threads: who comes second copies.

use std::time::{Duration, Instant};

use super::room::Seat;
use crate::Error;
use crate::backend::native::cause::Cause;
use crate::backend::native::control::{Overdue, Stranded};
use crate::backend::native::p2p::{self, Pattern};
use crate::backend::{Buffer, Completion, Direction, Receipt, Transfer};

/// A message that waits for its other side.
pub(super) struct Letter {
    /// Who posted it.
    owner: usize,
    /// Whom it is from or to; `None` for a receive from any rank.
    peer: Option<usize>,
    pattern: Pattern,
    buffer: Buffer<'static>,
    posted: Instant,
    timeout: Duration,
    pub(super) done: Completion,
}

impl Letter {
    fn deadline(&self) -> Option<Instant> {
        self.posted.checked_add(self.timeout)
    }
}

/// What waits at one receiver: sends to it that it has not asked for, and receives that it has posted.
#[derive(Default)]
pub(super) struct Mailbox {
    sends: Vec<Letter>,
    recvs: Vec<Letter>,
    /// Sender and receiver of each message that is being copied.
    delivering: Vec<(usize, usize)>,
}

impl Mailbox {
    fn letters(&self, owner: usize) -> impl Iterator<Item = &Letter> {
        self.sends.iter().chain(&self.recvs).filter(move |l| l.owner == owner)
    }

    pub(super) fn deadline(&self, owner: usize) -> Option<Instant> {
        self.letters(owner).filter_map(Letter::deadline).min()
    }

    pub(super) fn overdue(&self, owner: usize, now: Instant) -> Option<Overdue> {
        let find = |list: &[Letter], send: bool| {
            let late = |l: &&Letter| l.owner == owner && l.deadline().is_some_and(|d| d <= now);
            list.iter().find(late).map(|l| Overdue {
                what: l.pattern.words(send, l.peer),
                elapsed: now.duration_since(l.posted),
                peer: l.peer,
            })
        };
        find(&self.sends, true).or_else(|| find(&self.recvs, false))
    }

    /// A letter that waits for a peer that is gone; `nobody`: whom to name where any would do.
    pub(super) fn stranded(
        &self,
        owner: usize,
        gone: impl Fn(usize) -> bool,
        nobody: Option<usize>,
    ) -> Option<Stranded> {
        let find = |list: &[Letter], send: bool| {
            list.iter().filter(|l| l.owner == owner).find_map(|l| {
                let absent = l.peer.map_or(nobody, |peer| gone(peer).then_some(peer))?;
                Some(Stranded { what: l.pattern.words(send, l.peer), peer: absent })
            })
        };
        find(&self.sends, true).or_else(|| find(&self.recvs, false))
    }

    pub(super) fn pending(&self, owner: usize) -> usize {
        // One that is being copied counts for both.
        let sides = self.delivering.iter().flat_map(|&(from, to)| [from, to]);
        self.letters(owner).count() + sides.filter(|&side| side == owner).count()
    }

    pub(super) fn remove(&mut self, owner: usize) -> Vec<Letter> {
        let mut removed = Vec::new();
        for list in [&mut self.sends, &mut self.recvs] {
            let (out, keep): (Vec<_>, Vec<_>) = list.drain(..).partition(|l| l.owner == owner);
            removed.extend(out);
            *list = keep;
        }
        removed
    }
}

impl Seat {
    /// Matches a message with the first that fits it, or leaves it in the receiver's mailbox.
    pub(super) fn post(&self, to: usize, transfer: Transfer) {
        let pattern = Pattern::of(&transfer);
        let (peer, sending) = match transfer.direction {
            Direction::Send { dst } => (Some(dst), true),
            Direction::Recv { src } => (src, false),
        };
        let letter = Letter {
            owner: self.rank,
            peer,
            pattern,
            buffer: transfer.buffer,
            posted: Instant::now(),
            timeout: transfer.timeout,
            done: transfer.done,
        };
        let mut mailbox = self.room.mail[to].lock();
        let tag = pattern.tag;
        let found = if sending {
            let fits = |r: &Letter| r.pattern.tag == tag && r.peer.is_none_or(|p| p == self.rank);
            mailbox.recvs.iter().position(fits).map(|n| mailbox.recvs.remove(n))
        } else {
            let fits = |s: &Letter| s.pattern.tag == tag && peer.is_none_or(|p| p == s.owner);
            mailbox.sends.iter().position(fits).map(|n| mailbox.sends.remove(n))
        };
        match found {
            None if sending => mailbox.sends.push(letter),
            None => mailbox.recvs.push(letter),
            Some(other) => {
                let (send, recv) = if sending { (letter, other) } else { (other, letter) };
                let sides = (send.owner, recv.owner);
                mailbox.delivering.push(sides);
                drop(mailbox);
                self.deliver(send, recv);
                let delivering = &mut self.room.mail[to].lock().delivering;
                if let Some(n) = delivering.iter().position(|d| *d == sides) {
                    delivering.swap_remove(n);
                }
            }
        }
    }

    fn deliver(&self, send: Letter, recv: Letter) {
        if (send.pattern.kind, send.pattern.numel) == (recv.pattern.kind, recv.pattern.numel) {
            p2p::copy(&send.buffer, &recv.buffer);
            send.done.complete(Ok(Receipt::default()));
            recv.done.complete(Ok(Receipt { source: Some(send.owner) }));
            return;
        }
        let cause = Cause::Disagree {
            op: "recv".to_owned(),
            seq: 0,
            by: (recv.owner, recv.pattern.words(false, Some(send.owner))),
            with: (send.owner, send.pattern.words(true, Some(recv.owner))),
        };
        let error = |rank: usize| -> Error { cause.error(rank, None) };
        if let Some(listener) = self.room.places[self.rank].listener() {
            listener.failed(&cause);
        }
        recv.done.complete(Err(error(recv.owner)));
        send.done.complete(Err(error(send.owner)));
    }
}
