//! All ranks' tensors combined, for all ranks.

use tch::Tensor;

use super::super::checks::{disjoint, see};
use super::super::draft::Draft;
use super::super::{ProcessGroup, ReduceOp, Work};
use crate::Result;
use crate::backend::Op;

impl ProcessGroup {
    /// Combines the tensors of all ranks, element by element, in place: every rank gets the result.
    ///
    /// All ranks give tensors of the same kind and number of elements. On the native backend the
    /// result is the same bits on every rank and from run to run.
    ///
    /// # Errors
    /// `Unsupported` when the operation means nothing for the kind; `InvalidArgument` when elements of
    /// the tensor share memory; failures of the group.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_distributed::{ReduceOp, testing};
    /// testing::run_threads(3, |group| {
    ///     let mut tensor = Tensor::from_slice(&[group.rank() as f64, 1.0]);
    ///     group.all_reduce(&mut tensor, ReduceOp::Avg).unwrap();
    ///     assert_eq!(Vec::<f64>::try_from(tensor).unwrap(), [1.0, 1.0]);
    /// });
    /// ```
    #[track_caller]
    pub fn all_reduce(&self, tensor: &mut Tensor, op: ReduceOp) -> Result<()> {
        self.all_reduce_draft(tensor, op)?.run()
    }

    /// [`all_reduce`](Self::all_reduce), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn all_reduce_async(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work> {
        self.all_reduce_draft(tensor, op)?.launch()
    }

    #[inline(always)]
    fn all_reduce_draft<'a>(&'a self, tensor: &'a Tensor, op: ReduceOp) -> Result<Draft<'a>> {
        self.inner.usable()?;
        let seen = see(tensor, "tensor")?;
        let mut draft = self.draft(Op::AllReduce(op), &seen)?;
        disjoint(&[seen])?;
        let buffer = draft.write(&seen, true)?.whole();
        draft.output(buffer);
        draft.shape = Some(tensor);
        Ok(draft)
    }
}
