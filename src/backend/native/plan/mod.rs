//! Collectives as plans: pure functions from (operation, rank, world, lengths) to steps.
//!
//! A plan is what one rank does: messages to and from peers, reductions and copies, each after the
//! steps it names. Messages between two ranks match in the order in which the two plans list them.
//! A send may start as soon as the steps it comes after have ended and the sends to the same peer
//! before it have started; it ends when its data has been read or copied. Plans know nothing of
//! sockets or clocks: [`super::executor`] runs them over links, `simulate` in virtual time.

mod barrier;
mod broadcast;
mod doubling;
mod exchange;
mod gather;
mod halving;
pub(crate) mod hosts;
mod moves;
mod one_shot;
#[cfg(test)]
mod schedules;
#[cfg(test)]
mod simulate;
mod table;
#[cfg(test)]
mod tests;

use smallvec::SmallVec;

pub(crate) use table::{Tuning, plan};

use crate::backend::Op;

/// Whose memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// An input segment of the call.
    Input(usize),
    /// An output segment of the call.
    Output(usize),
    /// A scratch slot of the plan.
    Slot(usize),
}

/// Some elements somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) place: Place,
    pub(crate) start: usize,
    pub(crate) len: usize,
    /// Whether it holds partial results.
    pub(crate) partial: bool,
}

impl Range {
    pub(crate) fn new(place: Place, start: usize, len: usize) -> Self {
        Self { place, start, len, partial: false }
    }

    /// The part of it from `start` on.
    pub(crate) fn part(&self, start: usize, len: usize) -> Self {
        debug_assert!(start + len <= self.len);
        Self { start: self.start + start, len, ..*self }
    }

    /// The same elements, as partial results.
    fn unfinished(self) -> Self {
        Self { partial: true, ..self }
    }
}

/// What a step does.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// Sends a message.
    Send { to: usize, what: Range },
    /// Receives a message of exactly this length. What is read by one reduction and by nothing else may
    /// be lent to its slot, not copied: the sender's step then ends when the slot has been reduced.
    Recv { from: usize, into: Range, lend: bool },
    /// Combines operands, in this order, and finishes where `into` is not partial. `into` may coincide
    /// with one of them.
    Reduce { into: Range, operands: SmallVec<[Range; 4]> },
    /// Copies; the two may be the same memory.
    Copy { from: Range, into: Range },
}

/// The number of a step in its plan.
pub(crate) type StepId = usize;

/// One step.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) action: Action,
    /// The steps that have to end first; all come before it in the plan.
    pub(crate) after: SmallVec<[StepId; 4]>,
}

/// What one rank does in one collective.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// The length of each scratch slot, in elements.
    pub(crate) slots: Vec<usize>,
}

impl Plan {
    fn add(&mut self, action: Action, after: &[StepId]) -> StepId {
        debug_assert!(after.iter().all(|&a| a < self.steps.len()));
        self.steps.push(Step { action, after: SmallVec::from_slice(after) });
        self.steps.len() - 1
    }

    fn send(&mut self, to: usize, what: Range, after: &[StepId]) -> StepId {
        self.add(Action::Send { to, what }, after)
    }

    /// Receives; where that is into a slot, for one reduction to read.
    fn recv(&mut self, from: usize, into: Range, after: &[StepId]) -> StepId {
        let lend = matches!(into.place, Place::Slot(_)) && into.len > 0;
        self.add(Action::Recv { from, into, lend }, after)
    }

    /// Receives what is passed on or copied.
    fn recv_to_keep(&mut self, from: usize, into: Range, after: &[StepId]) -> StepId {
        self.add(Action::Recv { from, into, lend: false }, after)
    }

    fn reduce(&mut self, into: Range, operands: SmallVec<[Range; 4]>, after: &[StepId]) -> StepId {
        self.add(Action::Reduce { into, operands }, after)
    }

    fn copy(&mut self, from: Range, into: Range, after: &[StepId]) -> StepId {
        self.add(Action::Copy { from, into }, after)
    }

    /// A new scratch slot, as a range.
    fn slot(&mut self, len: usize) -> Range {
        self.slots.push(len);
        Range::new(Place::Slot(self.slots.len() - 1), 0, len)
    }

    /// A new scratch slot for partial results.
    fn partial_slot(&mut self, len: usize) -> Range {
        self.slot(len).unfinished()
    }
}

/// What a plan is made for: one rank's view of a call.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) op: Op,
    pub(crate) rank: usize,
    pub(crate) world: usize,
    /// Bytes of an element.
    pub(crate) size: usize,
    /// Whether partial results would be of a wider kind (f32 for sums of halves): then they do not travel.
    pub(crate) wide: bool,
    /// Elements of each input segment.
    pub(crate) inputs: SmallVec<[usize; 4]>,
    /// Elements of each output segment.
    pub(crate) outputs: SmallVec<[usize; 4]>,
}

impl Shape {
    fn input(&self, n: usize) -> Range {
        Range::new(Place::Input(n), 0, self.inputs[n])
    }

    fn output(&self, n: usize) -> Range {
        Range::new(Place::Output(n), 0, self.outputs[n])
    }

    /// The other ranks, each starting after itself, so that not all call on the same one first.
    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world) = (self.rank, self.world);
        (1..world).map(move |d| (rank + d) % world)
    }
}

/// Rank `p`'s even share of `len` elements: where it starts and how long it is.
fn share(len: usize, world: usize, p: usize) -> (usize, usize) {
    // In u128: `len * p` may not fit.
    let at = |p: usize| (len as u128 * p as u128 / world as u128) as usize;
    (at(p), at(p + 1) - at(p))
}

/// `len` elements cut into even chunks of at most `chunk`; one empty chunk where there are none.
#[derive(Clone, Copy)]
struct Cuts {
    len: usize,
    count: usize,
}

impl Cuts {
    fn new(len: usize, chunk: usize) -> Self {
        Self { len, count: len.div_ceil(chunk.max(1)).max(1) }
    }

    /// Where chunk `c` starts and how long it is.
    fn get(&self, c: usize) -> Option<(usize, usize)> {
        (c < self.count).then(|| share(self.len, self.count, c))
    }

    /// The length of the longest chunk.
    fn widest(&self) -> usize {
        self.len.div_ceil(self.count)
    }
}
