//! One rank's tensor, for all ranks.

use tch::Tensor;

use super::super::checks::{disjoint, see};
use super::super::draft::Draft;
use super::super::{ProcessGroup, Work};
use crate::Result;
use crate::backend::Op;

impl ProcessGroup {
    /// Copies the tensor of rank `src` into the tensor of every other rank, in place.
    ///
    /// All ranks give tensors of the same kind (any) and number of elements.
    ///
    /// # Errors
    /// `RankOutOfRange` for `src`; `InvalidArgument` when elements of the tensor share memory on a rank
    /// that receives; failures of the group.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     let mut tensor = Tensor::from_slice(&[group.rank() as i64 + 7]);
    ///     group.broadcast(&mut tensor, 1).unwrap();
    ///     assert_eq!(tensor.int64_value(&[0]), 8);
    /// });
    /// ```
    #[track_caller]
    pub fn broadcast(&self, tensor: &mut Tensor, src: usize) -> Result<()> {
        self.broadcast_draft(tensor, src)?.run()
    }

    /// [`broadcast`](Self::broadcast), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn broadcast_async(&self, tensor: &Tensor, src: usize) -> Result<Work> {
        self.broadcast_draft(tensor, src)?.launch()
    }

    fn broadcast_draft<'a>(&'a self, tensor: &'a Tensor, src: usize) -> Result<Draft<'a>> {
        self.inner.usable()?;
        self.check_rank(src)?;
        let seen = see(tensor, "tensor")?;
        let mut draft = self.draft(Op::Broadcast { src }, &seen)?;
        let buffer = if self.rank() == src {
            draft.read(&seen)?.whole()
        } else {
            disjoint(&[seen])?;
            draft.write(&seen, false)?.whole()
        };
        draft.output(buffer);
        draft.shape = Some(tensor);
        Ok(draft)
    }
}
