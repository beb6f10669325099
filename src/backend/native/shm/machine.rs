//! One collective over shared memory, as a state machine: headers first, then small messages at once
//! or large ones in steps.

mod headers;
mod small;
mod steps;

use std::ops::Range;

use self::headers::contribution;
use self::steps::Position;
use super::lists::{List, common_runs, segment_bytes};
use super::protocol::Word;
use super::stages::Stages;
use super::{Inner, pool};
use crate::backend::native::kernels::Reducer;
use crate::backend::native::transport::{Progress, Stamp};
use crate::backend::{Call, Op};
use crate::{Error, Result};

pub(super) struct Machine<'a> {
    call: Call<'a>,
    stamp: Stamp,
    round: u64,
    reducer: Option<Reducer>,
    /// How many bytes this rank contributes.
    bytes: usize,
    phase: Phase,
    /// Boxed, so that a small call does not carry it around.
    stages: Option<Box<Stages>>,
    /// Whether this rank's data is lent to the others.
    direct: bool,
}

enum Phase {
    /// Waits for this rank's earlier calls.
    Queued,
    /// Reads headers: of ranks below the first number all have been read; the second is the most
    /// steps that one of them needs.
    Hearing(usize, usize),
    /// Moves large messages.
    Moving(Box<Position>),
    /// All is done.
    Ended,
}

// SAFETY: the buffers are touched by one thread at a time, the one that advances the machine; they are
// alive for `'a`, and libtorch's memory may be written from any thread.
unsafe impl Send for Machine<'_> {}

impl<'a> Machine<'a> {
    #[inline(always)]
    pub(super) fn new(inner: &Inner, call: Call<'a>, stamp: Stamp) -> Result<Self> {
        let reducer = match call.op.reduce_op() {
            Some(op) => Some(
                Reducer::new(op, call.kind, inner.ranks())
                    .map_err(|what| Error::Unsupported { backend: "native".to_owned(), what })?,
            ),
            None => None,
        };
        let bytes = contribution(&call, inner.rank).iter().map(|s| segment_bytes(s)).sum();
        Ok(Self { call, stamp, round: 0, reducer, bytes, phase: Phase::Queued, stages: None, direct: false })
    }

    /// Gives the call its number among the calls of this transport, from 1 on.
    pub(super) fn number(&mut self, round: u64) {
        self.round = round;
    }

    /// Whether the call has come to its end.
    pub(super) fn ended(&self) -> bool {
        matches!(self.phase, Phase::Ended)
    }

    /// The call is given up: what was lent is the caller's again, whatever those do who come late.
    pub(super) fn withdraw(&self, inner: &Inner) {
        inner.segment.withdraw(inner.rank, self.round);
        if let (true, Op::AllReduce(_)) = (self.direct, self.call.op) {
            // They would write to it. Lent was one run.
            let data = self.call.outputs.first().and_then(|s| List::new(s).one_run());
            pool::take_away(data.unwrap_or(std::ptr::null()), self.bytes);
        }
    }

    /// The ranks that have not begun this call, by their numbers in the group.
    pub(super) fn missing(&self, inner: &Inner) -> Vec<usize> {
        let begun = |r: usize| inner.segment.flag(r, self.round).read() >= self.round;
        (0..inner.ranks()).filter(|&r| r != inner.rank && !begun(r)).map(|r| inner.number(r)).collect()
    }

    pub(super) fn timed_out(&self, inner: &Inner) -> Error {
        Error::Timeout {
            op: self.call.op.name().to_owned(),
            seq: self.stamp.seq,
            elapsed: self.call.timeout,
            missing: self.missing(inner),
        }
    }

    /// Moves what can be moved.
    pub(super) fn advance(&mut self, inner: &Inner) -> Result<Progress> {
        loop {
            match &mut self.phase {
                Phase::Queued => {
                    if inner.finished() + 1 != self.round {
                        return Ok(Progress::Idle);
                    }
                    self.announce(inner);
                    self.phase = Phase::Hearing(0, 0);
                }
                Phase::Hearing(heard, most) => {
                    let (mut heard, mut most) = (*heard, *most);
                    while heard < inner.ranks() {
                        if heard != inner.rank {
                            if inner.segment.flag(heard, self.round).read() != self.round {
                                self.phase = Phase::Hearing(heard, most);
                                return Ok(Progress::Idle);
                            }
                            most = most.max(self.check(inner, heard)?);
                        } else {
                            most = most.max(self.stages.as_ref().map_or(0, |s| s.steps));
                        }
                        heard += 1;
                    }
                    if most == 0 {
                        self.finish_small(inner);
                        inner.finish(self.round);
                        self.phase = Phase::Ended;
                        return Ok(Progress::Done);
                    }
                    self.begin_steps(inner, most)?;
                }
                Phase::Moving(_) => {
                    let progress = self.step(inner)?;
                    if progress == Progress::Done {
                        inner.finish(self.round);
                        self.phase = Phase::Ended;
                    }
                    return Ok(progress);
                }
                Phase::Ended => return Ok(Progress::Done),
            }
        }
    }
}

/// Copies between buffers of this rank, which may be the same.
fn copy_local(from: &List, from_range: Range<usize>, to: &List, to_range: Range<usize>) {
    for (from, to, _, bytes) in common_runs((from, from_range), (to, to_range)) {
        if !std::ptr::eq(from, to) {
            // SAFETY: both are runs of that many bytes of live buffers.
            unsafe { to.copy_from(from, bytes) };
        }
    }
}
