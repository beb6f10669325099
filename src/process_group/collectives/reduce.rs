//! All ranks' tensors combined, for one rank.

use tch::Tensor;

use super::super::checks::{disjoint, see};
use super::super::draft::Draft;
use super::super::{ProcessGroup, ReduceOp, Work};
use crate::Result;
use crate::backend::Op;

impl ProcessGroup {
    /// Combines the tensors of all ranks, element by element, into the tensor of rank `dst`. The
    /// other ranks' tensors are left as they are.
    ///
    /// All ranks give tensors of the same kind and number of elements.
    ///
    /// # Errors
    /// `RankOutOfRange` for `dst`; `Unsupported` when the operation means nothing for the kind;
    /// `InvalidArgument` when elements of the result share memory; failures of the group.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_distributed::{ReduceOp, testing};
    /// let values = testing::run_threads(3, |group| {
    ///     let mut tensor = Tensor::from_slice(&[group.rank() as i64 + 1]);
    ///     group.reduce(&mut tensor, 0, ReduceOp::Sum).unwrap();
    ///     tensor.int64_value(&[0])
    /// });
    /// assert_eq!(values, [6, 2, 3]);
    /// ```
    #[track_caller]
    pub fn reduce(&self, tensor: &mut Tensor, dst: usize, op: ReduceOp) -> Result<()> {
        self.reduce_draft(tensor, dst, op)?.run()
    }

    /// [`reduce`](Self::reduce), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn reduce_async(&self, tensor: &Tensor, dst: usize, op: ReduceOp) -> Result<Work> {
        self.reduce_draft(tensor, dst, op)?.launch()
    }

    fn reduce_draft<'a>(&'a self, tensor: &'a Tensor, dst: usize, op: ReduceOp) -> Result<Draft<'a>> {
        self.inner.usable()?;
        self.check_rank(dst)?;
        let seen = see(tensor, "tensor")?;
        let mut draft = self.draft(Op::Reduce { op, dst }, &seen)?;
        if self.rank() == dst {
            disjoint(&[seen])?;
            let both = draft.write(&seen, true)?;
            draft.input(both.part(0, seen.facts.numel));
            draft.output(both.whole());
        } else {
            let buffer = draft.read(&seen)?.whole();
            draft.input(buffer);
        }
        draft.shape = Some(tensor);
        Ok(draft)
    }
}
