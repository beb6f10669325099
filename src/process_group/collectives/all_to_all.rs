//! Something from each rank, for each rank.

use tch::Tensor;

use super::super::checks::{Seen, alike, disjoint, one_per_rank, same_shape, see, see_list, splits};
use super::super::draft::Draft;
use super::super::{ProcessGroup, Work};
use crate::backend::Op;
use crate::{Error, Result};

impl ProcessGroup {
    /// Sends `inputs[r]` to rank r, and receives from rank r into `outputs[r]`.
    ///
    /// Shapes may differ from pair to pair: `outputs[r]` has as many elements as the input that rank r
    /// gives for this rank. All are of one kind (any).
    ///
    /// # Errors
    /// `InvalidArgument` when a list holds not one tensor for each rank or outputs share memory;
    /// `ShapeMismatch` when what this rank keeps has two shapes; `KindMismatch`; failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     let me = 10 * group.rank() as i64;
    ///     let inputs = [0, 1].map(|to| Tensor::from_slice(&[me + to]));
    ///     let mut outputs = [0, 0].map(|_| Tensor::zeros([1], (Kind::Int64, Device::Cpu)));
    ///     group.all_to_all(&mut outputs, &inputs).unwrap();
    ///     assert_eq!(outputs[1].int64_value(&[0]), 10 + group.rank() as i64);
    /// });
    /// ```
    #[track_caller]
    pub fn all_to_all(&self, outputs: &mut [Tensor], inputs: &[Tensor]) -> Result<()> {
        self.all_to_all_draft(outputs, inputs)?.run()
    }

    /// [`all_to_all`](Self::all_to_all), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn all_to_all_async(&self, outputs: &[Tensor], inputs: &[Tensor]) -> Result<Work> {
        self.all_to_all_draft(outputs, inputs)?.launch()
    }

    fn all_to_all_draft<'a>(&'a self, outputs: &'a [Tensor], inputs: &'a [Tensor]) -> Result<Draft<'a>> {
        self.inner.usable()?;
        one_per_rank("outputs", outputs.len(), self.size())?;
        one_per_rank("inputs", inputs.len(), self.size())?;
        let (outputs, inputs) = (see_list(outputs, "outputs")?, see_list(inputs, "inputs")?);
        let (kept, given) = (&outputs[self.rank()], &inputs[self.rank()]);
        alike(given, kept)?;
        same_shape(kept, given)?;
        let mut draft = self.draft(Op::AllToAll, given)?;
        draft.inputs(&inputs)?;
        draft.outputs(&outputs)?;
        Ok(draft.separate(None))
    }

    /// Cuts `input` along dimension 0, sends part r to rank r, and receives from rank r into part r
    /// of `output`.
    ///
    /// Without splits the parts are equal. `input_splits[r]` rows go to rank r, `output_splits[r]` rows
    /// come from it; a split may be 0. All other dimensions, and the kind (any), agree.
    ///
    /// # Errors
    /// `ShapeMismatch` when dimension 0 does not divide by the number of ranks and no splits are
    /// given, or when the other dimensions differ; `InvalidArgument` when splits are negative, not one
    /// for each rank, or do not sum to dimension 0; `KindMismatch`; failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     let input = Tensor::from_slice(&[0i64, 1]) + 10 * group.rank() as i64;
    ///     let mut output = Tensor::zeros([2], (Kind::Int64, Device::Cpu));
    ///     group.all_to_all_single(&mut output, &input, None, None).unwrap();
    ///     let me = group.rank() as i64;
    ///     assert_eq!(Vec::<i64>::try_from(output).unwrap(), [me, 10 + me]);
    /// });
    /// ```
    #[track_caller]
    pub fn all_to_all_single(
        &self,
        output: &mut Tensor,
        input: &Tensor,
        output_splits: Option<&[i64]>,
        input_splits: Option<&[i64]>,
    ) -> Result<()> {
        self.all_to_all_single_draft(output, input, output_splits, input_splits)?.run()
    }

    /// [`all_to_all_single`](Self::all_to_all_single), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn all_to_all_single_async(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: Option<&[i64]>,
        input_splits: Option<&[i64]>,
    ) -> Result<Work> {
        self.all_to_all_single_draft(output, input, output_splits, input_splits)?.launch()
    }

    fn all_to_all_single_draft<'a>(
        &'a self,
        output: &'a Tensor,
        input: &'a Tensor,
        output_splits: Option<&[i64]>,
        input_splits: Option<&[i64]>,
    ) -> Result<Draft<'a>> {
        self.inner.usable()?;
        let (to, from) = (see(output, "output")?, see(input, "input")?);
        alike(&from, &to)?;
        let received = splits(&to, output_splits, "output_splits", self.size())?;
        let sent = splits(&from, input_splits, "input_splits", self.size())?;
        let (wide, row) = (row(&to), row(&from));
        if wide.0 != row.0 {
            return Err(Error::ShapeMismatch {
                argument: "output",
                expected: format!("{:?} after dimension 0, as input has", row.0),
                got: format!("{:?}", to.tensor.size()),
            });
        }
        let own = self.rank();
        if received[own] != sent[own] {
            return Err(Error::invalid(
                "output_splits",
                format!(
                    "rank {own} receives {} rows from itself but sends itself {}",
                    received[own], sent[own]
                ),
            ));
        }
        let mut draft = self.draft(Op::AllToAll, &from)?;
        disjoint(&[to])?;
        let (source, target) = (draft.read(&from)?, draft.write(&to, false)?);
        let (mut read, mut written) = (0, 0);
        for (&out, &received) in sent.iter().zip(&received) {
            let (n, m) = (out as usize * row.1, received as usize * row.1);
            draft.input(source.part(read, n));
            draft.output(target.part(written, m));
            read += n;
            written += m;
        }
        Ok(draft.separate(None))
    }
}

/// The dimensions after the first, and how many elements they hold.
fn row(seen: &Seen<'_>) -> (Vec<i64>, usize) {
    let shape = seen.tensor.size().split_off(1);
    // It wraps only where a factor is 0: a row has no more elements than the tensor, or that has none.
    let numel = shape.iter().fold(1i64, |numel, &n| numel.wrapping_mul(n));
    (shape, numel as usize)
}
