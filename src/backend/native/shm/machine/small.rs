//! Small calls: all payloads came with their headers.

use smallvec::SmallVec;

use super::{Machine, copy_local};
use crate::backend::native::kernels::Operand;
use crate::backend::native::shm::Inner;
use crate::backend::native::shm::combine::Operands;
use crate::backend::native::shm::lists::List;
use crate::backend::{Call, Op, Segment};

impl Machine<'_> {
    /// Ends a call whose payloads all came with their headers.
    pub(super) fn finish_small(&self, inner: &Inner) {
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
            // Where this rank's operand begins; a list says it for each of its runs.
            let own = input.first().map_or(std::ptr::null(), |b| b.data_ptr().cast_const());
            let data = |r| if r == rank { own } else { payload(r, at(r)) };
            let operand = |r| Operand { data: data(r), factor: self.factor(inner, r) };
            let all: SmallVec<[Operand; 8]> = (0..ranks).map(operand).collect();
            // One tensor, as nearly always: a list of it would cost more than the rest.
            if let ([from], [to]) = (&input[..], &output[..])
                && from.bytes() == to.bytes()
            {
                // SAFETY: as above; a buffer is its own output or does not overlap it.
                return unsafe { reducer.reduce(to.data_ptr(), &all, to.numel()) };
            }
            let operands = Operands { reducer, rank, all };
            let (input, output) = (List::new(input), List::new(output));
            // SAFETY: as above; a buffer is its own output or does not overlap it.
            unsafe { operands.combine((&input, whole(&input)), Some((&output, whole(&output))), &[]) };
        };
        let Call { op, inputs, outputs, .. } = &self.call;
        match *op {
            Op::AllReduce(_) => combine(&outputs[0], &outputs[0], &|_| 0),
            Op::Reduce { dst, .. } if dst == rank => combine(&inputs[0], &outputs[0], &|_| 0),
            Op::ReduceScatter(_) => {
                combine(&inputs[rank], &outputs[0], &|r| self.size_for(inner, r, rank).0);
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
}
