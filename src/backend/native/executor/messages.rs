//! What a run sends to its peers and receives from them, and what shows that a peer is doing something else.

use super::Executor;
use crate::backend::native::link::{Head, Lent, Links};
use crate::backend::native::memory;
use crate::backend::native::plan::{Action, Place};
use crate::backend::native::stamp;
use crate::{Error, Result};

impl<L: Links> Executor<'_, L> {
    /// Posts what may be sent to a peer and moves it on.
    pub(super) fn push(&mut self, links: &mut L, to: usize) -> Result<bool> {
        let mut moved = false;
        while let Some(&id) = self.peers[to].sends.get(self.peers[to].posted) {
            if self.waits[id] > 0 {
                break;
            }
            let Action::Send { what, .. } = self.plan.steps[id].action else { unreachable!() };
            let head = Head {
                seq: self.stamp.seq,
                fingerprint: self.stamp.fingerprint,
                index: self.peers[to].posted as u32,
                len: (what.len * self.size) as u64,
                factor: self.factor,
            };
            links.post(to, head, self.pieces(what));
            self.peers[to].posted += 1;
            moved = true;
        }
        if self.peers[to].sent < self.peers[to].posted {
            moved |= links.flush(to)?;
            let sent = links.sent(to);
            while self.peers[to].sent < sent {
                let id = self.peers[to].sends[self.peers[to].sent];
                self.peers[to].sent += 1;
                self.ended(id);
                moved = true;
            }
        }
        Ok(moved)
    }

    /// Receives what has come from a peer.
    pub(super) fn pull(&mut self, links: &mut L, from: usize) -> Result<bool> {
        let mut moved = false;
        while let Some(&id) = self.peers[from].recvs.get(self.peers[from].received) {
            if self.waits[id] > 0 {
                break;
            }
            let Action::Recv { into, lend, .. } = self.plan.steps[id].action else { unreachable!() };
            let bytes = into.len * self.size;
            let Some(head) = links.peek(from)? else { break };
            self.check(from, &head, bytes)?;
            if let Some(lent) = links.take(from) {
                match into.place {
                    Place::Slot(n) if lend => self.slots[n].lent = Some(lent),
                    _ => {
                        let pieces = lent.hold().ok_or(Error::Aborted)?;
                        // SAFETY: held until released; the destination is this call's own.
                        unsafe { memory::copy(pieces, &self.pieces(into)) };
                        lent.release();
                    }
                }
            } else {
                let n = links.read(from, &self.pieces(into), self.peers[from].read)?;
                moved |= n > 0;
                self.peers[from].read += n;
                if self.peers[from].read < bytes {
                    break;
                }
                self.peers[from].read = 0;
            }
            if let Place::Slot(n) = into.place {
                self.slots[n].factor = head.factor;
            }
            self.peers[from].received += 1;
            self.ended(id);
            moved = true;
        }
        Ok(moved)
    }

    /// Compares what came with what this rank is doing.
    fn check(&self, from: usize, head: &Head, bytes: usize) -> Result<()> {
        let ours = self.stamp;
        let differs = head.seq != ours.seq || head.fingerprint != ours.fingerprint;
        if !differs && head.len == bytes as u64 {
            return Ok(());
        }
        let (theirs, ours) = if head.seq != ours.seq {
            (
                format!("{} as number {}", stamp::words(head.fingerprint), head.seq),
                stamp::words(ours.fingerprint),
            )
        } else if differs {
            (stamp::words(head.fingerprint), stamp::words(ours.fingerprint))
        } else {
            let name = stamp::op_name(ours.fingerprint);
            let (elements, len) = (head.len / self.size.max(1) as u64, bytes / self.size.max(1));
            (
                format!("{name} with {elements} elements for rank {}", self.wiring.rank),
                format!("{name} with {len} elements from rank {from}"),
            )
        };
        Err(Error::Desync {
            op: stamp::op_name(self.stamp.fingerprint).to_owned(),
            seq: self.stamp.seq.min(head.seq),
            rank: from,
            theirs,
            ours,
        })
    }

    /// Looks for a message that this call does not expect from a peer: one of a later call may wait,
    /// anything else shows that ranks disagree. Whether one has come instead that this call can take now: links
    /// whose next header has been read do not wake who sleeps on them.
    pub(super) fn check_unexpected(&self, links: &mut L, from: usize) -> Result<bool> {
        let peer = &self.peers[from];
        if from == self.wiring.rank || peer.read > 0 {
            return Ok(false);
        }
        let next = peer.recvs.get(peer.received);
        let head = match links.peek(from) {
            // It has done its part of this call and is gone.
            Err(Error::PeerLost { .. }) if next.is_none() => return Ok(false),
            other => other?,
        };
        match head {
            Some(head) if head.seq == self.stamp.seq && head.fingerprint == self.stamp.fingerprint => {
                Ok(next.is_some_and(|&id| self.waits[id] == 0))
            }
            Some(head) if head.seq <= self.stamp.seq || next.is_some() => {
                self.check(from, &head, 0).map(|()| false)
            }
            _ => Ok(false),
        }
    }
}
