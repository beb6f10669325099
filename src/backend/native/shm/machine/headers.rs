//! Headers: what a rank says of a call before anything moves, and what it makes of what the others say.

use super::Machine;
use crate::backend::native::kernels::PAST_CACHE;
use crate::backend::native::shm::lists::segment_bytes;
use crate::backend::native::shm::protocol::{STEP_BITS, mark, tell};
use crate::backend::native::shm::segment::{Header, SMALL};
use crate::backend::native::shm::stages::Stages;
use crate::backend::native::shm::{Inner, direct};
use crate::backend::native::stamp::words;
use crate::backend::{Call, Op, Segment};
use crate::{Error, ReduceOp, Result};

impl Machine<'_> {
    /// Writes this rank's header, and its payload where that is small.
    pub(super) fn announce(&mut self, inner: &Inner) {
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
            let written = matches!(self.call.op, Op::AllReduce(_));
            self.direct = direct::announce(segment, rank, self.round, lent, written);
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

    pub(super) fn header<'s>(&self, inner: &'s Inner, rank: usize) -> &'s Header {
        // SAFETY: written before the flag that was read, and not again before this rank goes on.
        unsafe { &*inner.segment.header(rank, self.round) }
    }

    /// The bytes that `rank` said it has for `reader`, and where they begin in its payload.
    pub(super) fn size_for(&self, inner: &Inner, rank: usize, reader: usize) -> (usize, usize) {
        let sizes = inner.segment.sizes(rank, self.round);
        // SAFETY: as in `header`; there are as many as ranks.
        let size = |r| unsafe { sizes.add(r).read() as usize };
        ((0..reader).map(size).fold(0, usize::saturating_add), size(reader))
    }

    /// Compares another rank's header with this call; returns how many steps that rank needs.
    pub(super) fn check(&self, inner: &Inner, rank: usize) -> Result<usize> {
        let header = self.header(inner, rank);
        let theirs = u128::from(header.fingerprint[1]) << 64 | u128::from(header.fingerprint[0]);
        let disagree = |theirs: String, ours: String| Error::Desync {
            op: self.call.op.name().to_owned(),
            seq: self.stamp.seq,
            rank: inner.number(rank),
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
            return Err(Error::PeerLost { rank: inner.number(rank), op: String::new(), source });
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
            let (from, to) = (inner.number(rank), inner.number(inner.rank));
            return Err(disagree(
                format!("{name} with {theirs} bytes for rank {to}"),
                format!("{name} with {ours} bytes expected from rank {from}"),
            ));
        }
        Ok(steps)
    }

    pub(super) fn factor(&self, inner: &Inner, rank: usize) -> f64 {
        match self.call.op.reduce_op() {
            Some(ReduceOp::PremulSum(own)) if rank == inner.rank => own,
            Some(ReduceOp::PremulSum(_)) => self.header(inner, rank).factor,
            _ => 1.0,
        }
    }
}

/// What a rank contributes: the segments that go into its payload.
pub(super) fn contribution<'c, 'a>(call: &'c Call<'a>, rank: usize) -> &'c [Segment<'a>] {
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
pub(super) fn by_rank(op: Op) -> bool {
    matches!(op, Op::Scatter { .. } | Op::ReduceScatter(_) | Op::AllToAll)
}
