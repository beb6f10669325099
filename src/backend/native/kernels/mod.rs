//! Combining operands: one pass over n inputs, for every kind and op.

use tch::Kind;

use crate::ReduceOp;

/// How to combine the operands of one call: chosen once, applied to any part of it.
///
/// Operands are combined in the order given (rank order), so that every rank computes the same bits.
/// Half and BFloat16 are combined in f32 and rounded once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reducer {
    op: ReduceOp,
    kind: Kind,
    ranks: usize,
}

/// One operand of a reduction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    /// Its first element.
    pub(crate) data: *const u8,
    /// Whether it is a partial result of [`Reducer::partial`], of [`Reducer::partial_kind`], rather
    /// than a rank's own data.
    pub(crate) partial: bool,
    /// The factor of `PremulSum` that belongs to it (1 for partials and other ops).
    pub(crate) factor: f64,
}
