//! A run's reductions and copies.

use smallvec::SmallVec;
use tch::Kind;

use super::Executor;
use crate::backend::native::kernels::{Operand, Reducer};
use crate::backend::native::link::{Lent, Links};
use crate::backend::native::memory::{self, Cursor, Pieces};
use crate::backend::native::plan::{Action, Place, Range, StepId};
use crate::{Error, ReduceOp, Result};

/// How to combine operands.
#[derive(Clone, Copy)]
pub(super) struct Reducers {
    /// Partial results.
    middle: Reducer,
    /// The result.
    finish: Reducer,
}

impl Reducers {
    pub(super) fn new(op: ReduceOp, kind: Kind, world: usize) -> Result<Self> {
        let reducer = |op| {
            Reducer::new(op, kind, world)
                .map_err(|what| Error::Unsupported { backend: "native".to_owned(), what })
        };
        // An average is divided once, at the end.
        let middle = if op == ReduceOp::Avg { ReduceOp::Sum } else { op };
        Ok(Self { finish: reducer(op)?, middle: reducer(middle)? })
    }
}

impl<L: Links> Executor<'_, L> {
    /// Runs a reduction or a copy.
    pub(super) fn compute(&mut self, id: StepId) -> Result<()> {
        match &self.plan.steps[id].action {
            &Action::Copy { from, into } => {
                // SAFETY: both ranges are this call's own, and no other step touches them now.
                unsafe { memory::copy(&self.pieces(from), &self.pieces(into)) };
            }
            Action::Reduce { into, operands } => {
                let (into, operands) = (*into, operands.clone());
                self.combine(into, &operands)?;
            }
            Action::Send { .. } | Action::Recv { .. } => unreachable!("messages are not computed"),
        }
        self.ended(id);
        Ok(())
    }

    fn combine(&mut self, into: Range, operands: &[Range]) -> Result<()> {
        let reducers = self.reducer.unwrap_or_else(|| unreachable!("only reductions have Reduce steps"));
        let reducer = if into.partial { reducers.middle } else { reducers.finish };
        let mut sources = SmallVec::<[(Pieces, f64); 8]>::new();
        let mut withdrawn = false;
        let mut held = SmallVec::<[usize; 8]>::new();
        for &operand in operands {
            // What is partial has been multiplied already.
            let factor = |factor: f64| if operand.partial { 1.0 } else { factor };
            let Place::Slot(n) = operand.place else {
                sources.push((self.pieces(operand), factor(self.factor)));
                continue;
            };
            let slot = &self.slots[n];
            match &slot.lent {
                None => sources.push((self.pieces(operand), factor(slot.factor))),
                Some(lent) => match lent.hold() {
                    Some(pieces) => {
                        held.push(n);
                        sources.push((Pieces::from_slice(pieces), factor(slot.factor)));
                    }
                    None => withdrawn = true,
                },
            }
        }
        if !withdrawn {
            let into = self.pieces(into);
            let mut to = Cursor::new(&into);
            let mut from: SmallVec<[Cursor<'_>; 8]> = sources.iter().map(|(p, _)| Cursor::new(p)).collect();
            let mut now = SmallVec::<[Operand; 8]>::new();
            loop {
                let (dst, room) = to.here();
                let n = from.iter().map(|c| c.here().1).fold(room, usize::min);
                if n == 0 {
                    break;
                }
                now.clear();
                now.extend(
                    from.iter().zip(&sources).map(|(c, &(_, factor))| Operand { data: c.here().0, factor }),
                );
                // SAFETY: `n` bytes are left in every piece, all hold whole elements of the call's
                // kind, and an operand is the destination itself or apart from it.
                unsafe { reducer.reduce(dst, &now, n / self.size) };
                to.advance(n);
                from.iter_mut().for_each(|c| c.advance(n));
            }
        }
        for n in held {
            if let Some(lent) = self.slots[n].lent.take() {
                lent.release();
            }
        }
        if withdrawn { Err(Error::Aborted) } else { Ok(()) }
    }
}
