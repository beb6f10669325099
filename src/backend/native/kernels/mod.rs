//! Combining operands: one pass over n inputs, for every kind and op.
//!
//! [`element`] holds the loop and what it does to elements, [`select`] the table from op and kind to a
//! loop compiled for this processor, [`halves`] the way to f32 and back.

mod element;
mod halves;
mod select;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;

use tch::Kind;

use self::halves::Half;
use self::select::{Choice, Isa, MOST};
use crate::ReduceOp;

/// How many units are combined at once where a scratch block is needed: small enough for L1.
const BLOCK: usize = 512;

/// How to combine the operands of one call: chosen once, applied to any part of it.
///
/// Operands are combined in the order given (rank order), so that every rank computes the same bits.
/// Half and BFloat16 are combined in f32 and rounded once. `Avg` divides once, at the end; integers
/// are summed wrapping in their own kind (as NCCL sums them) and divided toward zero.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reducer {
    kind: Kind,
    ranks: usize,
    half: Option<Half>,
    isa: Isa,
    /// Combines.
    partial: Choice,
    /// Combines the last operands and finishes.
    finish: Choice,
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

#[allow(dead_code, reason = "what needs no factor is shorter with these")]
impl Operand {
    /// A rank's own data.
    pub(crate) fn own(data: *const u8) -> Self {
        Self { data, partial: false, factor: 1.0 }
    }

    /// A partial result.
    pub(crate) fn partial(data: *const u8) -> Self {
        Self { data, partial: true, factor: 1.0 }
    }
}

impl Reducer {
    /// The way to combine elements of `kind` of a group of `ranks`; in words what is not possible.
    pub(crate) fn new(op: ReduceOp, kind: Kind, ranks: usize) -> Result<Self, String> {
        Self::with(op, kind, ranks, Isa::detect())
    }

    fn with(op: ReduceOp, kind: Kind, ranks: usize, isa: Isa) -> Result<Self, String> {
        let half = match kind {
            Kind::Half => Some(Half::F16),
            Kind::BFloat16 => Some(Half::Bf16),
            _ => None,
        };
        let Some(finish) = select::choose(op, kind, ranks, isa) else {
            return Err(format!("{op} of {kind:?} tensors"));
        };
        let unfinished = if op == ReduceOp::Avg { ReduceOp::Sum } else { op };
        let Some(partial) = select::choose(unfinished, kind, ranks, isa) else {
            return Err(format!("{op} of {kind:?} tensors"));
        };
        Ok(Self { kind, ranks, half, isa, partial, finish })
    }

    /// The kind of the ranks' own data.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    #[allow(dead_code, reason = "for algorithms that pass partial results on")]
    /// The kind of partial results: f32 for halves, else the kind itself.
    pub(crate) fn partial_kind(&self) -> Kind {
        if self.half.is_some() { Kind::Float } else { self.kind }
    }

    /// `dst[i] = finish(o_0[i] ∘ o_1[i] ∘ …)`, of the kind of the ranks' own data.
    ///
    /// # Safety
    /// `dst` is writable and every operand readable for `numel` elements of its kind, at any
    /// alignment. An operand of the kind of `dst` may be `dst` itself; otherwise nothing overlaps
    /// `dst`.
    pub(crate) unsafe fn reduce(&self, dst: *mut u8, operands: &[Operand], numel: usize) {
        match self.half {
            // SAFETY: the caller's promise.
            None => unsafe { self.chain(dst, operands, numel, self.finish) },
            Some(half) => {
                let mut total = MaybeUninit::<[f32; BLOCK]>::uninit();
                let total: *mut f32 = total.as_mut_ptr().cast();
                for start in (0..numel).step_by(BLOCK) {
                    let n = BLOCK.min(numel - start);
                    // SAFETY: the caller's promise, for `n` elements from `start` on; `widened` writes as
                    // many to `total`.
                    unsafe {
                        self.widened(total.cast(), operands, half, start, n, self.finish);
                        half.narrow(self.isa, total, dst.add(start * 2), n);
                    }
                }
            }
        }
    }

    #[allow(dead_code, reason = "for algorithms that pass partial results on")]
    /// The same without finishing; `dst` is of the partial kind.
    ///
    /// # Safety
    /// As [`reduce`](Self::reduce).
    pub(crate) unsafe fn partial(&self, dst: *mut u8, operands: &[Operand], numel: usize) {
        match self.half {
            // SAFETY: the caller's promise.
            None => unsafe { self.chain(dst, operands, numel, self.partial) },
            Some(half) => {
                for start in (0..numel).step_by(BLOCK) {
                    let n = BLOCK.min(numel - start);
                    // SAFETY: the caller's promise, for `n` elements from `start` on.
                    unsafe { self.widened(dst.add(start * 4), operands, half, start, n, self.partial) };
                }
            }
        }
    }

    /// Combines the block from `start` on, of which some operands are halves, into f32.
    ///
    /// # Safety
    /// As [`reduce`](Self::reduce), for `n` elements from `start` on of every operand and at `dst`.
    unsafe fn widened(
        &self,
        dst: *mut u8,
        operands: &[Operand],
        half: Half,
        start: usize,
        n: usize,
        last: Choice,
    ) {
        let mut scratch = MaybeUninit::<[[f32; BLOCK]; MOST]>::uninit();
        let scratch: *mut [f32; BLOCK] = scratch.as_mut_ptr().cast();
        let mut total = MaybeUninit::<[f32; BLOCK]>::uninit();
        let total: *mut u8 = total.as_mut_ptr().cast();
        let mut begun = false;
        let mut rest = operands;
        loop {
            let mut src = [std::ptr::null(); MOST];
            let mut factors = [1.0; MOST];
            let mut filled = 0;
            if begun {
                src[0] = total;
                filled = 1;
            }
            let (now, later) = rest.split_at(rest.len().min(MOST - filled));
            for (i, operand) in now.iter().enumerate() {
                src[filled] = if operand.partial {
                    // SAFETY: the caller's promise: partials of halves are f32.
                    unsafe { operand.data.add(start * 4) }
                } else {
                    // SAFETY: the caller's promise; `i` is less than `MOST`.
                    unsafe {
                        let wide: *mut f32 = scratch.add(i).cast();
                        half.widen(self.isa, operand.data.add(start * 2), wide, n);
                        wide.cast_const().cast()
                    }
                };
                factors[filled] = operand.factor;
                filled += 1;
            }
            let (to, with) = if later.is_empty() { (dst, last) } else { (total, self.partial) };
            // SAFETY: `to` and all of `src` hold `n` floats; only whole buffers coincide.
            unsafe { (with.kernel)(to, &src[..filled], &factors[..filled], n, self.ranks as f64) };
            if later.is_empty() {
                return;
            }
            begun = true;
            rest = later;
        }
    }

    /// Combines operands of one kind.
    ///
    /// # Safety
    /// As [`reduce`](Self::reduce).
    unsafe fn chain(&self, dst: *mut u8, operands: &[Operand], numel: usize, last: Choice) {
        let ranks = self.ranks as f64;
        if operands.is_empty() {
            return;
        }
        if operands.len() <= MOST {
            let mut src = [std::ptr::null(); MOST];
            let mut factors = [1.0; MOST];
            for (n, operand) in operands.iter().enumerate() {
                src[n] = operand.data;
                factors[n] = operand.factor;
            }
            let n = operands.len();
            // SAFETY: the caller's promise.
            return unsafe { (last.kernel)(dst, &src[..n], &factors[..n], numel * last.units, ranks) };
        }
        // Many operands: a block at a time, through a scratch block, so that `dst` is written when
        // every operand has been read.
        let size = self.kind.elt_size_in_bytes();
        let mut scratch = MaybeUninit::<[u64; BLOCK]>::uninit();
        let total: *mut u8 = scratch.as_mut_ptr().cast();
        let step = size_of::<[u64; BLOCK]>() / size;
        for start in (0..numel).step_by(step) {
            let n = step.min(numel - start);
            let mut rest = operands;
            let mut begun = false;
            while !rest.is_empty() {
                let mut src = [total.cast_const(); MOST];
                let mut factors = [1.0; MOST];
                let mut filled = usize::from(begun);
                let (now, later) = rest.split_at(rest.len().min(MOST - filled));
                for operand in now {
                    // SAFETY: the caller's promise.
                    src[filled] = unsafe { operand.data.add(start * size) };
                    factors[filled] = operand.factor;
                    filled += 1;
                }
                let (to, with) = if later.is_empty() {
                    // SAFETY: the caller's promise.
                    (unsafe { dst.add(start * size) }, last)
                } else {
                    (total, self.partial)
                };
                // SAFETY: all hold `n` elements; only whole buffers coincide.
                unsafe { (with.kernel)(to, &src[..filled], &factors[..filled], n * with.units, ranks) };
                begun = true;
                rest = later;
            }
        }
    }
}
