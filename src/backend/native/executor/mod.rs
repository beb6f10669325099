//! Runs a plan over links: a state machine that never blocks. Which step may run is decided here; [`messages`] moves
//! data between ranks, and [`compute`] reduces and copies.

mod compute;
mod messages;

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tch::Kind;

use self::compute::Reducers;
use super::link::Links;
use super::memory::{Memory, Piece, Pieces, Scratch};
use super::plan::{self, Action, Place, Plan, Range, Shape, StepId, Tuning};
use super::transport::{Progress, Run, Stamp};
use crate::backend::{Call, Op, segment_numel};
use crate::{ReduceOp, Result};

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
