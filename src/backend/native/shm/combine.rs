//! Reducing runs of private buffers with what the other ranks put into shared memory.

use std::ops::Range;

use smallvec::SmallVec;

use super::lists::{List, common_runs};
use crate::backend::native::kernels::{Operand, Reducer};

/// How much is reduced before it is copied once more: from the first-level cache.
const BLOCK: usize = 8 << 10;

/// The operands of one reduction: one for each rank, in rank order.
pub(super) struct Operands<'r> {
    pub(super) reducer: &'r Reducer,
    /// This rank, whose operand is private and may be cut.
    pub(super) rank: usize,
    /// Where each rank's operand begins; this rank's entry has no address, only its factor.
    pub(super) all: SmallVec<[Operand; 8]>,
}

impl Operands<'_> {
    /// Combines a range of this rank's buffers with the others; the result goes to `keep`, if that is
    /// given, and to `copies`, each of which may be the operand of another rank.
    ///
    /// # Safety
    /// The others' operands and `copies` hold as many bytes as the range; the buffers are alive;
    /// `keep` may be the range itself, and nothing else overlaps. Without `keep` no copy is an operand.
    pub(super) unsafe fn combine(
        &self,
        own: (&List, Range<usize>),
        keep: Option<(&List, Range<usize>)>,
        copies: &[*mut u8],
    ) {
        match (keep, copies) {
            (Some(keep), _) => {
                for (from, to, at, bytes) in common_runs(own, keep) {
                    // SAFETY: the caller's promise.
                    unsafe { self.run(from, to, copies, at, bytes) };
                }
            }
            (None, [to, copies @ ..]) => {
                for (from, at, bytes) in own.0.runs(own.1) {
                    // SAFETY: the caller's promise.
                    unsafe { self.run(from, to.add(at), copies, at, bytes) };
                }
            }
            (None, []) => {}
        }
    }

    /// # Safety
    /// As [`combine`](Self::combine), for one run that begins at `at`.
    unsafe fn run(&self, from: *mut u8, to: *mut u8, copies: &[*mut u8], at: usize, bytes: usize) {
        let element = self.reducer.kind().elt_size_in_bytes();
        let step = if copies.is_empty() { bytes.max(1) } else { BLOCK };
        let mut operands = self.all.clone();
        for start in (0..bytes).step_by(step) {
            let bytes = step.min(bytes - start);
            // SAFETY: all of it lies within the run.
            unsafe {
                for (r, (operand, base)) in operands.iter_mut().zip(&self.all).enumerate() {
                    operand.data = if r == self.rank { from.add(start) } else { base.data.add(at + start) };
                }
                self.reducer.reduce(to.add(start), &operands, bytes / element);
                for copy in copies {
                    copy.add(at + start).copy_from_nonoverlapping(to.add(start), bytes);
                }
            }
        }
    }
}
