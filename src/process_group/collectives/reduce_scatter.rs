//! All ranks' lists combined, one result for each rank.

use tch::Tensor;

use super::super::checks::{alike, concat_or_stack, disjoint, one_per_rank, same_shape, see, see_list};
use super::super::draft::Draft;
use super::super::{ProcessGroup, ReduceOp, Work};
use crate::Result;
use crate::backend::Op;

impl ProcessGroup {
    /// Combines `inputs[r]` of all ranks, element by element, into the output of rank r.
    ///
    /// Every rank gives one input for each rank; shapes may differ by r, and the output has the shape
    /// of this rank's input to itself. All are of one kind.
    ///
    /// # Errors
    /// `InvalidArgument` when there is not one input for each rank or elements of the output share
    /// memory; `ShapeMismatch`, `KindMismatch`; `Unsupported` when the operation means nothing for the
    /// kind; failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::{ReduceOp, testing};
    /// testing::run_threads(2, |group| {
    ///     let inputs = [Tensor::from_slice(&[1i64]), Tensor::from_slice(&[10i64])];
    ///     let mut mine = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
    ///     group.reduce_scatter(&mut mine, &inputs, ReduceOp::Sum).unwrap();
    ///     assert_eq!(mine.int64_value(&[0]), if group.rank() == 0 { 2 } else { 20 });
    /// });
    /// ```
    #[track_caller]
    pub fn reduce_scatter(&self, output: &mut Tensor, inputs: &[Tensor], op: ReduceOp) -> Result<()> {
        self.reduce_scatter_draft(output, inputs, op)?.run()
    }

    /// [`reduce_scatter`](Self::reduce_scatter), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn reduce_scatter_async(&self, output: &Tensor, inputs: &[Tensor], op: ReduceOp) -> Result<Work> {
        self.reduce_scatter_draft(output, inputs, op)?.launch()
    }

    fn reduce_scatter_draft<'a>(
        &'a self,
        output: &'a Tensor,
        inputs: &'a [Tensor],
        op: ReduceOp,
    ) -> Result<Draft<'a>> {
        self.inner.usable()?;
        one_per_rank("inputs", inputs.len(), self.size())?;
        let (output, inputs) = (see(output, "output")?, see_list(inputs, "inputs")?);
        let own = &inputs[self.rank()];
        alike(&output, own)?;
        same_shape(&output, own)?;
        let mut draft = self.draft(Op::ReduceScatter(op), &output)?;
        disjoint(&[output])?;
        draft.inputs(&inputs)?;
        let buffer = draft.write(&output, false)?.whole();
        draft.output(buffer);
        Ok(draft.separate(None))
    }

    /// Combines the inputs of all ranks, element by element, and gives each rank its part: rank r gets
    /// the r-th of W equal parts of dimension 0.
    ///
    /// For an output `[n, …]` the input is `[W·n, …]` or `[W, n, …]`. All ranks give the same kind and
    /// shapes.
    ///
    /// # Errors
    /// `ShapeMismatch`, also when dimension 0 does not divide by the number of ranks; `KindMismatch`;
    /// `Unsupported` when the operation means nothing for the kind; `InvalidArgument` when elements of
    /// the output share memory; failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::{ReduceOp, testing};
    /// testing::run_threads(2, |group| {
    ///     let mut mine = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
    ///     let all = Tensor::from_slice(&[1i64, 10]);
    ///     group.reduce_scatter_tensor(&mut mine, &all, ReduceOp::Sum).unwrap();
    ///     assert_eq!(mine.int64_value(&[0]), if group.rank() == 0 { 2 } else { 20 });
    /// });
    /// ```
    #[doc(alias = "reduce_scatter_single")]
    #[doc(alias = "_reduce_scatter_base")]
    #[track_caller]
    pub fn reduce_scatter_tensor(&self, output: &mut Tensor, input: &Tensor, op: ReduceOp) -> Result<()> {
        self.reduce_scatter_tensor_draft(output, input, op)?.run()
    }

    /// [`reduce_scatter_tensor`](Self::reduce_scatter_tensor), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn reduce_scatter_tensor_async(&self, output: &Tensor, input: &Tensor, op: ReduceOp) -> Result<Work> {
        self.reduce_scatter_tensor_draft(output, input, op)?.launch()
    }

    fn reduce_scatter_tensor_draft<'a>(
        &'a self,
        output: &'a Tensor,
        input: &'a Tensor,
        op: ReduceOp,
    ) -> Result<Draft<'a>> {
        self.inner.usable()?;
        let (seen, whole) = (see(output, "output")?, see(input, "input")?);
        alike(&seen, &whole)?;
        concat_or_stack(&whole, &seen, self.size())?;
        let mut draft = self.draft(Op::ReduceScatter(op), &seen)?;
        disjoint(&[seen])?;
        let flat = draft.read(&whole)?;
        for rank in 0..self.size() {
            draft.input(flat.part(rank * seen.facts.numel, seen.facts.numel));
        }
        let buffer = draft.write(&seen, false)?.whole();
        draft.output(buffer);
        draft.shape = Some(output);
        Ok(draft.separate(None))
    }
}
