//! Runs a plan over links: a state machine that never blocks.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use smallvec::SmallVec;
use tch::Kind;

use super::kernels::{Operand, Reducer};
use super::link::{Head, Lent, Links};
use super::memory::{self, Cursor, Memory, Piece, Pieces, Scratch};
use super::plan::{self, Action, Place, Plan, Range, Shape, StepId, Tuning};
use super::stamp;
use super::transport::{Progress, Run, Stamp};
use crate::backend::{Call, Op, segment_numel};
use crate::{Error, ReduceOp, Result};

/// What the runs of a group share: its links, and scratch memory from one run to the next.
pub(crate) struct Wiring<L> {
    pub(crate) rank: usize,
    pub(crate) world: usize,
    pub(crate) tuning: Tuning,
    pub(crate) links: Mutex<L>,
    scratch: Mutex<Scratch>,
}

impl<L> Wiring<L> {
    pub(crate) fn new(rank: usize, world: usize, tuning: Tuning, links: L) -> Self {
        Self { rank, world, tuning, links: Mutex::new(links), scratch: Mutex::default() }
    }
}

/// Whether partial results of an operation on a kind are of a wider kind, to be rounded once.
pub(crate) fn is_wide(op: Op, kind: Kind) -> bool {
    let exact = matches!(op.reduce_op(), None | Some(ReduceOp::Min | ReduceOp::Max));
    !exact && matches!(kind, Kind::Half | Kind::BFloat16)
}

/// How to combine operands.
#[derive(Clone, Copy)]
struct Reducers {
    /// Partial results.
    middle: Reducer,
    /// The result.
    finish: Reducer,
}

impl Reducers {
    fn new(op: ReduceOp, kind: Kind, world: usize) -> Result<Self> {
        let reducer = |op| {
            Reducer::new(op, kind, world)
                .map_err(|what| Error::Unsupported { backend: "native".to_owned(), what })
        };
        // An average is divided once, at the end.
        let middle = if op == ReduceOp::Avg { ReduceOp::Sum } else { op };
        Ok(Self { finish: reducer(op)?, middle: reducer(middle)? })
    }
}

/// One plan in execution.
pub(crate) struct Executor<'a, L: Links> {
    wiring: Arc<Wiring<L>>,
    memory: Memory<'a>,
    plan: Plan,
    stamp: Stamp,
    reducer: Option<Reducers>,
    size: usize,
    factor: f64,
    /// For each step, how many others it still waits for.
    waits: Vec<u32>,
    /// The steps that wait for each step: `followers[first[s]..first[s + 1]]`.
    followers: Vec<u32>,
    first: Vec<u32>,
    /// Reductions and copies that may run.
    ready: VecDeque<StepId>,
    peers: Vec<Peer>,
    slots: Vec<Slot<L::Lent>>,
    scratch: Scratch,
    left: usize,
    finished: bool,
}

/// The messages to and from one peer, in order.
#[derive(Default)]
struct Peer {
    sends: Vec<StepId>,
    posted: usize,
    sent: usize,
    recvs: Vec<StepId>,
    received: usize,
    /// Bytes read of the message being received.
    read: usize,
}

struct Slot<T> {
    /// Where it is in the scratch memory.
    at: Piece,
    /// A message lent to it.
    lent: Option<T>,
    /// The factor that came with what it holds.
    factor: f64,
}

impl<'a, L: Links> Executor<'a, L> {
    pub(crate) fn new(wiring: Arc<Wiring<L>>, call: Call<'a>, stamp: Stamp) -> Result<Self> {
        let shape = Shape {
            op: call.op,
            rank: wiring.rank,
            world: wiring.world,
            size: call.kind.elt_size_in_bytes(),
            wide: is_wide(call.op, call.kind),
            inputs: call.inputs.iter().map(|s| segment_numel(s)).collect(),
            outputs: call.outputs.iter().map(|s| segment_numel(s)).collect(),
        };
        let plan = plan::plan(&shape, &wiring.tuning);
        Self::with_plan(wiring, call, stamp, plan)
    }

    /// Runs a plan that was made elsewhere, on the buffers of a call.
    pub(crate) fn with_plan(
        wiring: Arc<Wiring<L>>,
        call: Call<'a>,
        stamp: Stamp,
        plan: Plan,
    ) -> Result<Self> {
        let size = call.kind.elt_size_in_bytes();
        let reducer = match call.op.reduce_op() {
            Some(op) => Some(Reducers::new(op, call.kind, wiring.world)?),
            None => None,
        };
        let factor = match call.op.reduce_op() {
            Some(ReduceOp::PremulSum(factor)) => factor,
            _ => 1.0,
        };
        let mut scratch = std::mem::take(&mut *wiring.scratch.lock());
        let stride = |len: usize| (len * size).next_multiple_of(64);
        let mut at = scratch.reserve(plan.slots.iter().map(|&len| stride(len)).sum());
        let slots = plan
            .slots
            .iter()
            .map(|&len| {
                let slot = Slot { at: Piece { ptr: at, len: len * size }, lent: None, factor: 1.0 };
                at = at.wrapping_add(stride(len));
                slot
            })
            .collect();
        let mut run = Self {
            waits: Vec::with_capacity(plan.steps.len()),
            followers: Vec::new(),
            first: vec![0; plan.steps.len() + 1],
            ready: VecDeque::new(),
            peers: (0..wiring.world).map(|_| Peer::default()).collect(),
            left: plan.steps.len(),
            finished: false,
            memory: Memory::new(call),
            wiring,
            plan,
            stamp,
            reducer,
            size,
            factor,
            slots,
            scratch,
        };
        run.link_steps();
        run.wiring.links.lock().begin();
        Ok(run)
    }

    /// Turns "after" around, and sorts messages by peer.
    fn link_steps(&mut self) {
        for (id, step) in self.plan.steps.iter().enumerate() {
            self.waits.push(step.after.len() as u32);
            for &before in &step.after {
                self.first[before + 1] += 1;
            }
            match step.action {
                Action::Send { to, .. } => self.peers[to].sends.push(id),
                Action::Recv { from, .. } => self.peers[from].recvs.push(id),
                Action::Reduce { .. } | Action::Copy { .. } if step.after.is_empty() => {
                    self.ready.push_back(id);
                }
                Action::Reduce { .. } | Action::Copy { .. } => {}
            }
        }
        for n in 1..self.first.len() {
            self.first[n] += self.first[n - 1];
        }
        self.followers = vec![0; self.first.last().map_or(0, |&n| n as usize)];
        let mut next = self.first.clone();
        for (id, step) in self.plan.steps.iter().enumerate() {
            for &before in &step.after {
                self.followers[next[before] as usize] = id as u32;
                next[before] += 1;
            }
        }
    }

    /// A step has ended: those after it may begin.
    fn ended(&mut self, id: StepId) {
        self.left -= 1;
        for n in self.first[id]..self.first[id + 1] {
            let next = self.followers[n as usize] as usize;
            self.waits[next] -= 1;
            let local = matches!(self.plan.steps[next].action, Action::Reduce { .. } | Action::Copy { .. });
            if self.waits[next] == 0 && local {
                self.ready.push_back(next);
            }
        }
    }

    fn pieces(&self, range: Range) -> Pieces {
        let mut pieces = Pieces::new();
        match range.place {
            Place::Slot(n) => {
                let at = self.slots[n].at;
                let piece =
                    Piece { ptr: at.ptr.wrapping_add(range.start * self.size), len: range.len * self.size };
                if piece.len > 0 {
                    pieces.push(piece);
                }
            }
            _ => self.memory.resolve(range, &mut pieces),
        }
        pieces
    }

    /// Posts what may be sent to a peer and moves it on.
    fn push(&mut self, links: &mut L, to: usize) -> Result<bool> {
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
    fn pull(&mut self, links: &mut L, from: usize) -> Result<bool> {
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
    fn check_unexpected(&self, links: &mut L, from: usize) -> Result<bool> {
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

    /// Runs a reduction or a copy.
    fn compute(&mut self, id: StepId) -> Result<()> {
        match &self.plan.steps[id].action {
            &Action::Copy { from, into } => {
                // SAFETY: both ranges are this call's own, and no other step touches them now.
                unsafe { memory::copy(&self.pieces(from), &self.pieces(into)) };
            }
            Action::Reduce { into, operands } => {
                let (into, operands) = (*into, operands.clone());
                self.combine(into, &operands)?;
            }
            Action::Send { .. } | Action::Recv { .. } => unreachable!("messages are not computed"),
        }
        self.ended(id);
        Ok(())
    }

    fn combine(&mut self, into: Range, operands: &[Range]) -> Result<()> {
        let reducers = self.reducer.unwrap_or_else(|| unreachable!("only reductions have Reduce steps"));
        let reducer = if into.partial { reducers.middle } else { reducers.finish };
        let mut sources = SmallVec::<[(Pieces, f64); 8]>::new();
        let mut withdrawn = false;
        let mut held = SmallVec::<[usize; 8]>::new();
        for &operand in operands {
            // What is partial has been multiplied already.
            let factor = |factor: f64| if operand.partial { 1.0 } else { factor };
            let Place::Slot(n) = operand.place else {
                sources.push((self.pieces(operand), factor(self.factor)));
                continue;
            };
            let slot = &self.slots[n];
            match &slot.lent {
                None => sources.push((self.pieces(operand), factor(slot.factor))),
                Some(lent) => match lent.hold() {
                    Some(pieces) => {
                        held.push(n);
                        sources.push((Pieces::from_slice(pieces), factor(slot.factor)));
                    }
                    None => withdrawn = true,
                },
            }
        }
        if !withdrawn {
            let into = self.pieces(into);
            let mut to = Cursor::new(&into);
            let mut from: SmallVec<[Cursor<'_>; 8]> = sources.iter().map(|(p, _)| Cursor::new(p)).collect();
            let mut now = SmallVec::<[Operand; 8]>::new();
            loop {
                let (dst, room) = to.here();
                let n = from.iter().map(|c| c.here().1).fold(room, usize::min);
                if n == 0 {
                    break;
                }
                now.clear();
                now.extend(
                    from.iter().zip(&sources).map(|(c, &(_, factor))| Operand { data: c.here().0, factor }),
                );
                // SAFETY: `n` bytes are left in every piece, all hold whole elements of the call's
                // kind, and an operand is the destination itself or apart from it.
                unsafe { reducer.reduce(dst, &now, n / self.size) };
                to.advance(n);
                from.iter_mut().for_each(|c| c.advance(n));
            }
        }
        for n in held {
            if let Some(lent) = self.slots[n].lent.take() {
                lent.release();
            }
        }
        if withdrawn { Err(Error::Aborted) } else { Ok(()) }
    }
}

impl<L: Links> Run for Executor<'_, L> {
    fn advance(&mut self) -> Result<Progress> {
        let wiring = self.wiring.clone();
        let mut links = wiring.links.lock();
        let mut moved = false;
        for distance in 1..wiring.world {
            let peer = (wiring.rank + distance) % wiring.world;
            moved |= self.push(&mut links, peer)?;
            moved |= self.pull(&mut links, peer)?;
        }
        while let Some(id) = self.ready.pop_front() {
            self.compute(id)?;
            moved = true;
        }
        if self.left == 0 {
            self.finished = true;
            return Ok(Progress::Done);
        }
        if moved {
            return Ok(Progress::Moved);
        }
        let mut came = false;
        for peer in 0..wiring.world {
            came |= self.check_unexpected(&mut links, peer)?;
        }
        Ok(if came { Progress::Moved } else { Progress::Idle })
    }
}

impl<L: Links> Drop for Executor<'_, L> {
    fn drop(&mut self) {
        if !self.finished {
            // Lent messages that are not held need no release: their senders fail too.
            self.wiring.links.lock().withdraw();
        }
        *self.wiring.scratch.lock() = std::mem::take(&mut self.scratch);
    }
}
