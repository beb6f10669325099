//! Every rank's tensor, for one rank.

use tch::Tensor;

use super::super::checks::{alike, one_per_rank, same_shape, see, see_list};
use super::super::draft::Draft;
use super::super::{ProcessGroup, Work};
use crate::backend::Op;
use crate::{Error, Result};

impl ProcessGroup {
    /// Gathers the tensor of every rank on rank `dst`: there `outputs[r]` becomes the input of rank r.
    ///
    /// `outputs` is given on `dst` and only there. Shapes may differ from rank to rank; all are of one
    /// kind (any).
    ///
    /// # Errors
    /// `InvalidArgument` when `outputs` is missing on `dst`, given elsewhere, holds not one tensor for
    /// each rank, or tensors that share memory; `RankOutOfRange`, `ShapeMismatch`, `KindMismatch`;
    /// failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     let mine = Tensor::from_slice(&[group.rank() as i64]);
    ///     let mut all = [0, 0].map(|_| Tensor::zeros([1], (Kind::Int64, Device::Cpu)));
    ///     let outputs = (group.rank() == 0).then_some(&mut all[..]);
    ///     group.gather(outputs, &mine, 0).unwrap();
    ///     assert_eq!(all[1].int64_value(&[0]), if group.rank() == 0 { 1 } else { 0 });
    /// });
    /// ```
    #[track_caller]
    pub fn gather(&self, outputs: Option<&mut [Tensor]>, input: &Tensor, dst: usize) -> Result<()> {
        self.gather_draft(outputs.map(|o| &*o), input, dst)?.run()
    }

    /// [`gather`](Self::gather), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn gather_async(&self, outputs: Option<&[Tensor]>, input: &Tensor, dst: usize) -> Result<Work> {
        self.gather_draft(outputs, input, dst)?.launch()
    }

    fn gather_draft<'a>(
        &'a self,
        outputs: Option<&'a [Tensor]>,
        input: &'a Tensor,
        dst: usize,
    ) -> Result<Draft<'a>> {
        self.inner.usable()?;
        self.check_rank(dst)?;
        let seen = see(input, "input")?;
        let outputs = match (outputs, self.rank() == dst) {
            (Some(outputs), true) => {
                one_per_rank("outputs", outputs.len(), self.size())?;
                see_list(outputs, "outputs")?
            }
            (None, false) => Default::default(),
            (None, true) => {
                return Err(Error::invalid(
                    "outputs",
                    format!("a list is needed on the destination, rank {dst}"),
                ));
            }
            (Some(_), false) => {
                let rank = self.rank();
                return Err(Error::invalid(
                    "outputs",
                    format!("must be None on rank {rank}: the destination is rank {dst}"),
                ));
            }
        };
        if let Some(own) = outputs.get(self.rank()) {
            alike(&seen, own)?;
            same_shape(own, &seen)?;
        }
        let mut draft = self.draft(Op::Gather { dst }, &seen)?;
        let buffer = draft.read(&seen)?.whole();
        draft.input(buffer);
        draft.outputs(&outputs)?;
        Ok(draft.separate(Some(self.rank())))
    }
}
