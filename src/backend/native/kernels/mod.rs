//! Combining operands: one pass over n inputs, for every kind and op.
//!
//! [`element`] holds the loop and what it does to elements, [`halves`] the way of 16-bit floats to f32 and
//! back, [`select`] the table from op and kind to a loop compiled for this processor, [`mod@copy`] the way around the
//! caches for what they cannot hold.

mod copy;
mod element;
mod halves;
mod select;
#[cfg(test)]
mod tests;

use tch::Kind;

pub(crate) use self::copy::{PAST_CACHE, copy_past_cache};
use self::select::{Choice, Isa};
use crate::ReduceOp;

/// How to combine the operands of one call: chosen once, applied to any part of it.
///
/// Operands are combined in the order given (rank order), so that every rank computes the same bits.
/// Half and BFloat16 are combined in f32 and rounded once. `Avg` divides once, at the end; integers
/// are summed wrapping in their own kind (as NCCL sums them) and divided toward zero. Bools are bytes of 0
/// and 1, as libtorch keeps them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reducer {
    kind: Kind,
    ranks: usize,
    choice: Choice,
}

/// One operand of a reduction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    /// Its first element.
    pub(crate) data: *const u8,
    /// The factor of `PremulSum` that belongs to it (1 for other ops).
    pub(crate) factor: f64,
}

impl Reducer {
    /// The way to combine elements of `kind` of a group of `ranks`; in words what is not possible.
    pub(crate) fn new(op: ReduceOp, kind: Kind, ranks: usize) -> Result<Self, String> {
        Self::with(op, kind, ranks, Isa::detect())
    }

    fn with(op: ReduceOp, kind: Kind, ranks: usize, isa: Isa) -> Result<Self, String> {
        match select::choose(op, kind, ranks, isa) {
            Some(choice) => Ok(Self { kind, ranks, choice }),
            None => Err(format!("{op} of {kind:?} tensors")),
        }
    }

    /// The kind of the operands and the result.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// `dst[i] = finish(o_0[i] ∘ o_1[i] ∘ …)`.
    ///
    /// # Safety
    /// `dst` is writable and every operand readable for `numel` elements, at any alignment. An operand is
    /// `dst` itself or does not overlap it.
    pub(crate) unsafe fn reduce(&self, dst: *mut u8, operands: &[Operand], numel: usize) {
        // SAFETY: the caller's promise; the loop is for this processor.
        unsafe { (self.choice.kernel)(dst, operands, numel * self.choice.units, self.ranks as f64) };
    }
}
