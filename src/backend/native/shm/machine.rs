//! One collective over shared memory, as a state machine: headers first, then small messages at once
//! or large ones in steps.

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::Inner;
use super::combine::Operands;
use super::direct::{self, Direct};
use super::lists::{List, common_runs, segment_bytes};
use super::protocol::{STEP_BITS, Word, mark, steps_of, tell};
use super::segment::{DEPTH, Header, SMALL};
use super::stages::{Fill, Stages, Stream};
use crate::backend::native::kernels::{Operand, PAST_CACHE, Reducer};
use crate::backend::native::stamp::words;
use crate::backend::native::transport::{Progress, Stamp};
use crate::backend::{Call, Op, Segment};
use crate::{Error, ReduceOp, Result};

const FILLED: usize = 0;
const REDUCED: usize = 1;
const GATHERED: usize = 2;

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
    /// Whether this rank's data is read in place.
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

/// How far a call that moves in steps is.
struct Position {
    steps: usize,
    done: [usize; 3],
    /// How many sources of the current step have been gathered.
    sources: usize,
    /// The last known progress of every rank, by stage.
    seen: [SmallVec<[usize; 8]>; 3],
    factors: SmallVec<[f64; 8]>,
    /// Whose data is read in place.
    direct: Direct,
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

    /// The call is given up.
    pub(super) fn withdraw(&self, inner: &Inner) {
        inner.segment.withdraw(inner.rank, self.round);
    }

    /// The ranks that have not begun this call.
    pub(super) fn missing(&self, inner: &Inner) -> Vec<usize> {
        let begun = |r: usize| inner.segment.flag(r, self.round).read() >= self.round;
        (0..inner.ranks()).filter(|&r| r != inner.rank && !begun(r)).collect()
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

    /// Writes this rank's header, and its payload where that is small.
    fn announce(&mut self, inner: &Inner) {
        let (rank, ranks) = (inner.rank, inner.ranks());
        let segment = &inner.segment;
        let payload = segment.payload(rank, self.round);
        let sources = contribution(&self.call, rank);
        // Where everybody reads all payloads, many ranks make it dearer than a share for each.
        let limit = if self.reducer.is_some() { SMALL.min((64 << 10) / ranks) } else { SMALL };
        let mut steps = 0;
        if self.bytes <= limit {
            let mut at = 0;
            for buffer in sources.iter().flatten().filter(|b| b.bytes() > 0) {
                // SAFETY: the payload of this rank and this parity: nobody has read it since the round
                // before last, which all ranks have finished; `bytes` fit.
                unsafe { payload.add(at).copy_from_nonoverlapping(buffer.data_ptr(), buffer.bytes()) };
                at += buffer.bytes();
            }
        } else {
            let stages = Stages::new(&self.call, rank, ranks, segment.layout.chunk);
            steps = stages.steps;
            self.stages = Some(Box::new(stages));
            let lent = if lends(self.call.op, self.bytes, ranks) { sources } else { &[] };
            self.direct = direct::announce(segment, rank, self.round, lent);
        }
        if by_rank(self.call.op) {
            let sizes = segment.sizes(rank, self.round);
            for (r, source) in sources.iter().enumerate() {
                // SAFETY: this rank's table, as above; there are `ranks` sources.
                unsafe { sizes.add(r).write(segment_bytes(source) as u64) };
            }
        }
        let factor = match self.call.op.reduce_op() {
            Some(ReduceOp::PremulSum(factor)) => factor,
            _ => 1.0,
        };
        let header = segment.header(rank, self.round);
        let fingerprint = self.stamp.fingerprint;
        // SAFETY: this rank's header, as above.
        unsafe {
            (*header).seq = self.stamp.seq;
            (*header).fingerprint = [fingerprint as u64, (fingerprint >> 64) as u64];
            (*header).extent = mark(self.bytes as u64, steps as u64);
            (*header).factor = factor;
        }
        tell(segment.flag(rank, self.round), self.round, inner.other_bells());
    }

    fn header<'s>(&self, inner: &'s Inner, rank: usize) -> &'s Header {
        // SAFETY: written before the flag that was read, and not again before this rank goes on.
        unsafe { &*inner.segment.header(rank, self.round) }
    }

    /// The bytes that `rank` said it has for `reader`, and where they begin in its payload.
    fn size_for(&self, inner: &Inner, rank: usize, reader: usize) -> (usize, usize) {
        let sizes = inner.segment.sizes(rank, self.round);
        // SAFETY: as in `header`; there are as many as ranks.
        let size = |r| unsafe { sizes.add(r).read() as usize };
        ((0..reader).map(size).fold(0, usize::saturating_add), size(reader))
    }

    /// Compares another rank's header with this call; returns how many steps that rank needs.
    fn check(&self, inner: &Inner, rank: usize) -> Result<usize> {
        let header = self.header(inner, rank);
        let theirs = u128::from(header.fingerprint[1]) << 64 | u128::from(header.fingerprint[0]);
        let disagree = |theirs: String, ours: String| Error::Desync {
            op: self.call.op.name().to_owned(),
            seq: self.stamp.seq,
            rank,
            theirs,
            ours,
        };
        if theirs != self.stamp.fingerprint || header.seq != self.stamp.seq {
            let tell = |print, seq| match header.seq == self.stamp.seq {
                true => words(print),
                false => format!("{} as number {seq}", words(print)),
            };
            return Err(disagree(tell(theirs, header.seq), tell(self.stamp.fingerprint, self.stamp.seq)));
        }
        // What one has for another and the other expects.
        let bytes = (header.extent >> STEP_BITS) as usize;
        let steps = (header.extent & ((1 << STEP_BITS) - 1)) as usize;
        let (at, len) = match self.call.op {
            Op::Scatter { src } if src != rank => (0, 0),
            op if by_rank(op) => self.size_for(inner, rank, inner.rank),
            _ => (0, 0),
        };
        // It lies within what the peer has, and where that is not cut into steps behind its header.
        let end = at.saturating_add(len);
        if len > 0 && (end > bytes || (steps == 0 && end > SMALL)) {
            let words = "what it wrote into the shared memory makes no sense";
            let source = Some(std::io::Error::new(std::io::ErrorKind::InvalidData, words));
            return Err(Error::PeerLost { rank, op: String::new(), source });
        }
        let outputs = &self.call.outputs;
        let (theirs, ours) = match self.call.op {
            Op::AllGather => (bytes, segment_bytes(&outputs[rank])),
            Op::Gather { dst } if dst == inner.rank => (bytes, segment_bytes(&outputs[rank])),
            Op::Scatter { src } if src == rank => {
                (self.size_for(inner, rank, inner.rank).1, segment_bytes(&outputs[0]))
            }
            Op::AllToAll => (self.size_for(inner, rank, inner.rank).1, segment_bytes(&outputs[rank])),
            Op::ReduceScatter(_) => {
                let input = segment_bytes(&self.call.inputs[inner.rank]);
                (self.size_for(inner, rank, inner.rank).1, input)
            }
            Op::AllReduce(_) | Op::Reduce { .. } => (bytes, self.bytes),
            _ => (0, 0),
        };
        if theirs != ours {
            let name = self.call.op.name();
            let to = inner.rank;
            return Err(disagree(
                format!("{name} with {theirs} bytes for rank {to}"),
                format!("{name} with {ours} bytes expected from rank {rank}"),
            ));
        }
        Ok(steps)
    }

    fn factor(&self, inner: &Inner, rank: usize) -> f64 {
        match self.call.op.reduce_op() {
            Some(ReduceOp::PremulSum(own)) if rank == inner.rank => own,
            Some(ReduceOp::PremulSum(_)) => self.header(inner, rank).factor,
            _ => 1.0,
        }
    }

    /// Ends a call whose payloads all came with their headers.
    fn finish_small(&self, inner: &Inner) {
        let (rank, ranks, segment) = (inner.rank, inner.ranks(), &inner.segment);
        let payload = |r: usize, at: usize| {
            // SAFETY: within the payload, as the checks of sizes have found.
            unsafe { segment.payload(r, self.round).add(at).cast_const() }
        };
        let whole = |list: &List| 0..list.bytes();
        // SAFETY: for all copies below: payloads hold what their headers said, which `check` found to
        // be what the output expects; they stay until this rank's next call.
        let place = |output: &Segment<'_>, from: usize, at: usize| unsafe {
            let list = List::new(output);
            list.write(whole(&list), payload(from, at), false);
        };
        // The buffers are this rank's own; they may coincide, where a tensor is its own output.
        let local = |input: &Segment<'_>, output: &Segment<'_>| {
            let (input, output) = (List::new(input), List::new(output));
            copy_local(&input, whole(&input), &output, whole(&output));
        };
        let combine = |input: &Segment<'_>, output: &Segment<'_>, at: &dyn Fn(usize) -> usize| {
            let Some(reducer) = &self.reducer else { return };
            let operand = |r| Operand { data: payload(r, at(r)), factor: self.factor(inner, r) };
            let operands = Operands { reducer, rank, all: (0..ranks).map(operand).collect() };
            let (input, output) = (List::new(input), List::new(output));
            // SAFETY: as above; a buffer is its own output or does not overlap it.
            unsafe { operands.combine((&input, whole(&input)), Some((&output, whole(&output))), None) };
        };
        let Call { op, inputs, outputs, .. } = &self.call;
        match *op {
            Op::AllReduce(_) => combine(&outputs[0], &outputs[0], &|_| 0),
            Op::Reduce { dst, .. } if dst == rank => combine(&inputs[0], &outputs[0], &|_| 0),
            Op::ReduceScatter(_) => {
                combine(&inputs[rank], &outputs[0], &|r| match r == rank {
                    true => 0,
                    false => self.size_for(inner, r, rank).0,
                });
            }
            Op::Broadcast { src } if src != rank => place(&outputs[0], src, 0),
            Op::Scatter { src } if src != rank => place(&outputs[0], src, self.size_for(inner, src, rank).0),
            Op::Scatter { .. } => local(&inputs[rank], &outputs[0]),
            Op::AllGather => {
                local(&inputs[0], &outputs[rank]);
                (0..ranks).filter(|&r| r != rank).for_each(|r| place(&outputs[r], r, 0));
            }
            Op::Gather { dst } if dst == rank => {
                local(&inputs[0], &outputs[rank]);
                (0..ranks).filter(|&r| r != rank).for_each(|r| place(&outputs[r], r, 0));
            }
            Op::AllToAll => {
                local(&inputs[rank], &outputs[rank]);
                for r in (0..ranks).filter(|&r| r != rank) {
                    place(&outputs[r], r, self.size_for(inner, r, rank).0);
                }
            }
            Op::Reduce { .. } | Op::Broadcast { .. } | Op::Gather { .. } | Op::Barrier => {}
        }
    }

    /// Where the data of the others can be read in place, and whether this rank's is.
    fn locate(&self, inner: &Inner) -> Result<Direct> {
        let mut direct = Direct::new(inner.ranks(), self.direct);
        for r in (0..inner.ranks()).filter(|&r| r != inner.rank) {
            let bytes = self.header(inner, r).extent;
            if bytes & ((1 << STEP_BITS) - 1) == 0 {
                // It came with the header.
                continue;
            }
            let (segment, bytes) = match by_rank(self.call.op) {
                true => (inner.rank, self.size_for(inner, r, inner.rank).1),
                false => (0, (bytes >> STEP_BITS) as usize),
            };
            direct.look_up(inner, r, self.round, segment, bytes)?;
        }
        Ok(direct)
    }

    fn begin_steps(&mut self, inner: &Inner, steps: usize) -> Result<()> {
        let (rank, ranks, chunk) = (inner.rank, inner.ranks(), inner.segment.layout.chunk);
        let stages = self.stages.take();
        let stages = stages.unwrap_or_else(|| Box::new(Stages::new(&self.call, rank, ranks, chunk)));
        if let Some((from, to)) = &stages.local {
            copy_local(
                &stages.lists[from.list],
                from.range.clone(),
                &stages.lists[to.list],
                to.range.clone(),
            );
        }
        let direct = self.locate(inner)?;
        let unless = |there: bool| if there { 0 } else { steps };
        let done = [
            unless(!matches!(stages.fill, Fill::None) && !self.direct),
            unless(stages.reduce.is_some()),
            unless(!stages.gather.is_empty()),
        ];
        self.stages = Some(stages);
        self.phase = Phase::Moving(Box::new(Position {
            steps,
            done,
            sources: 0,
            seen: std::array::from_fn(|_| smallvec![0; ranks]),
            factors: (0..ranks).map(|r| self.factor(inner, r)).collect(),
            direct,
        }));
        Ok(())
    }

    /// Does one thing that can be done: what frees slots first.
    fn step(&mut self, inner: &Inner) -> Result<Progress> {
        let Phase::Moving(position) = &mut self.phase else { return Ok(Progress::Done) };
        let Some(stages) = &self.stages else { return Ok(Progress::Done) };
        let mut view = View { inner, round: self.round, stages, position };
        let moved = view.gather() || view.reduce(self.reducer.as_ref()) || view.fill();
        if view.position.done.iter().all(|&d| d == view.position.steps) && view.let_go() {
            // What was read in place was what its owner lent, unless it had given up by now.
            return match view.position.direct.sources().any(|r| inner.segment.withdrawn(r, self.round)) {
                true => Err(Error::Aborted),
                false => Ok(Progress::Done),
            };
        }
        Ok(if moved { Progress::Moved } else { Progress::Idle })
    }
}

/// A call in steps, for the length of one of them.
struct View<'m> {
    inner: &'m Inner,
    round: u64,
    stages: &'m Stages,
    position: &'m mut Position,
}

impl View<'_> {
    /// Whether a rank has done a stage of `steps` steps.
    fn reached(&mut self, rank: usize, stage: usize, steps: usize) -> bool {
        if stage == FILLED && self.position.direct.of(rank).is_some() {
            // There is nothing to fill.
            return true;
        }
        let seen = &mut self.position.seen[stage][rank];
        if *seen < steps {
            *seen = steps_of(self.inner.segment.progress(rank, stage).read(), self.round) as usize;
        }
        *seen >= steps
    }

    /// Whether what is gathered lies where the data is lent.
    fn in_place(&self) -> bool {
        self.stages.in_place.is_some_and(|short| self.position.steps > short)
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.inner.rank;
        (0..self.inner.ranks()).filter(move |&r| r != rank)
    }

    fn advance(&mut self, stage: usize) {
        self.position.done[stage] += 1;
        let word = self.inner.segment.progress(self.inner.rank, stage);
        tell(word, mark(self.round, self.position.done[stage] as u64), self.inner.other_bells());
    }

    /// Whether those who read a slot have read what was there [`DEPTH`] steps ago.
    fn free(&mut self, step: usize, stage: usize) -> bool {
        let readers = self.stages.readers;
        step < DEPTH
            || self.others().all(|r| {
                (stage == GATHERED && !readers.contain(r)) || self.reached(r, stage, step + 1 - DEPTH)
            })
    }

    /// Whether the others have read all that they read of this rank's tensors in place.
    fn let_go(&mut self) -> bool {
        let (steps, readers) = (self.position.steps, self.stages.readers);
        let reduces = self.stages.reduce.is_some();
        // Of a reduction they gather results, which are in place if those are kept there.
        let gathered = !reduces || (self.in_place() && !self.stages.gather.is_empty());
        !self.position.direct.own
            || self.others().all(|r| {
                (!reduces || self.reached(r, REDUCED, steps))
                    && (!gathered || !readers.contain(r) || self.reached(r, GATHERED, steps))
            })
    }

    fn fill(&mut self) -> bool {
        let step = self.position.done[FILLED];
        let stage = if self.stages.reduce.is_some() { REDUCED } else { GATHERED };
        if step == self.position.steps || !self.free(step, stage) {
            return false;
        }
        let (segment, rank) = (&self.inner.segment, self.inner.rank);
        let fill = |stream: &Stream, slot| {
            let list = &self.stages.lists[stream.list];
            // SAFETY: a slot of this rank that has been read, and a chunk fits in it.
            unsafe { list.read(stream.chunk(step, segment.layout.chunk), slot) };
        };
        match &self.stages.fill {
            Fill::None => {}
            Fill::All(stream) => fill(stream, segment.chunk_for_all(rank, step)),
            Fill::Each(streams) => {
                for r in self.others() {
                    fill(&streams[r], segment.chunk_for(rank, r, step));
                }
            }
        }
        self.advance(FILLED);
        true
    }

    fn reduce(&mut self, reducer: Option<&Reducer>) -> bool {
        let step = self.position.done[REDUCED];
        let (Some(reduce), Some(reducer)) = (&self.stages.reduce, reducer) else { return false };
        // Others find the result where it is kept.
        let in_place = self.position.direct.own && self.in_place();
        if step == self.position.steps
            || !self.others().all(|r| self.reached(r, FILLED, step + 1))
            || (reduce.share && !in_place && !self.free(step, GATHERED))
        {
            return false;
        }
        let (segment, rank) = (&self.inner.segment, self.inner.rank);
        let part = |s: &Stream| s.chunk(step, segment.layout.chunk);
        let start = part(&reduce.own).start;
        let place = |r| match self.position.direct.of(r) {
            // SAFETY: `Direct` has compared the size of what is there with what the header said.
            Some(base) => unsafe { base.add(start) },
            None => segment.chunk_for(r, rank, step).cast_const(),
        };
        let factors = self.position.factors.iter().enumerate();
        let all = factors.map(|(r, &factor)| Operand { data: place(r), factor });
        let operands = Operands { reducer, rank, all: all.collect() };
        let lists = &self.stages.lists;
        let keep = reduce.keep.as_ref().map(|k| (&lists[k.list], part(k)));
        let share = (reduce.share && !in_place).then(|| segment.chunk_for_all(rank, step));
        // SAFETY: every rank has filled its slot for this step and waits for this rank before it fills
        // it again, or has lent its tensor until this rank is done; the slot for all has been read;
        // `keep` is `own` or does not overlap it.
        unsafe { operands.combine((&lists[reduce.own.list], part(&reduce.own)), keep, share) };
        self.advance(REDUCED);
        true
    }

    fn gather(&mut self) -> bool {
        let step = self.position.done[GATHERED];
        if step == self.position.steps {
            return false;
        }
        let (segment, rank, ranks) = (&self.inner.segment, self.inner.rank, self.inner.ranks());
        // Results of reductions and what is the same for all lie in the slots for all.
        let reduced = self.stages.reduce.is_some();
        let each = self.stages.comes_apart;
        let mut moved = false;
        while self.position.sources + 1 < ranks {
            let source = (rank + 1 + self.position.sources) % ranks;
            if let Some(stream) = &self.stages.gather[source] {
                if !self.reached(source, if reduced { REDUCED } else { FILLED }, step + 1) {
                    return moved;
                }
                let chunk = stream.chunk(step, segment.layout.chunk);
                let from = match self.position.direct.of(source).filter(|_| self.in_place()) {
                    // SAFETY: `Direct` has compared the size of what is there with what the header said.
                    Some(base) => unsafe { base.add(chunk.start) },
                    None if each => segment.chunk_for(source, rank, step).cast_const(),
                    None => segment.chunk_for_all(source, step).cast_const(),
                };
                let list = &self.stages.lists[stream.list];
                // SAFETY: the slot was filled for this step and is not filled again before this rank
                // says that it has gathered, and a chunk fits; or the tensor is lent until then.
                unsafe { list.write(chunk, from, self.stages.past_cache) };
                moved = true;
            }
            self.position.sources += 1;
        }
        self.position.sources = 0;
        self.advance(GATHERED);
        true
    }
}

/// What a rank contributes: the segments that go into its payload.
fn contribution<'c, 'a>(call: &'c Call<'a>, rank: usize) -> &'c [Segment<'a>] {
    match call.op {
        Op::AllReduce(_) => &call.outputs,
        Op::Broadcast { src } if src == rank => &call.outputs,
        Op::Broadcast { .. } => &[],
        _ => &call.inputs,
    }
}

/// Whether it is worth while that others read a tensor in place. Where only one rank reads, and from memory, not from
/// a cache, two cores do better: one fills slots, the other empties them.
fn lends(op: Op, bytes: usize, ranks: usize) -> bool {
    let one_reads = match op {
        Op::Gather { .. } => true,
        Op::Broadcast { .. } | Op::Scatter { .. } => ranks == 2,
        _ => false,
    };
    !one_reads || bytes < PAST_CACHE / 2
}

/// Whether a rank contributes something else for each rank.
fn by_rank(op: Op) -> bool {
    matches!(op, Op::Scatter { .. } | Op::ReduceScatter(_) | Op::AllToAll)
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
