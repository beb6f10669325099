//! One rank's list of tensors, one for each rank.

use tch::Tensor;

use super::super::checks::{alike, disjoint, one_per_rank, same_shape, see, see_list};
use super::super::draft::Draft;
use super::super::{ProcessGroup, Work};
use crate::backend::Op;
use crate::{Error, Result};

impl ProcessGroup {
    /// Scatters a list of rank `src`: the output of rank r becomes `inputs[r]` of `src`.
    ///
    /// `inputs` is given on `src` and only there. Shapes may differ from rank to rank; all are of one
    /// kind (any).
    ///
    /// # Errors
    /// `InvalidArgument` when `inputs` is missing on `src`, given elsewhere, or holds not one tensor
    /// for each rank, or when elements of the output share memory; `RankOutOfRange`, `ShapeMismatch`,
    /// `KindMismatch`; failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     let lists = [Tensor::from_slice(&[10i64]), Tensor::from_slice(&[20i64])];
    ///     let mut mine = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
    ///     group.scatter(&mut mine, (group.rank() == 0).then_some(&lists[..]), 0).unwrap();
    ///     assert_eq!(mine.int64_value(&[0]), 10 * (group.rank() as i64 + 1));
    /// });
    /// ```
    #[track_caller]
    pub fn scatter(&self, output: &mut Tensor, inputs: Option<&[Tensor]>, src: usize) -> Result<()> {
        self.scatter_draft(output, inputs, src)?.run()
    }

    /// [`scatter`](Self::scatter), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn scatter_async(&self, output: &Tensor, inputs: Option<&[Tensor]>, src: usize) -> Result<Work> {
        self.scatter_draft(output, inputs, src)?.launch()
    }

    fn scatter_draft<'a>(
        &'a self,
        output: &'a Tensor,
        inputs: Option<&'a [Tensor]>,
        src: usize,
    ) -> Result<Draft<'a>> {
        self.inner.usable()?;
        self.check_rank(src)?;
        let seen = see(output, "output")?;
        let inputs = match (inputs, self.rank() == src) {
            (Some(inputs), true) => {
                one_per_rank("inputs", inputs.len(), self.size())?;
                see_list(inputs, "inputs")?
            }
            (None, false) => Default::default(),
            (None, true) => {
                return Err(Error::invalid("inputs", format!("a list is needed on the source, rank {src}")));
            }
            (Some(_), false) => {
                let rank = self.rank();
                return Err(Error::invalid(
                    "inputs",
                    format!("must be None on rank {rank}: the source is rank {src}"),
                ));
            }
        };
        if let Some(own) = inputs.get(self.rank()) {
            alike(&seen, own)?;
            same_shape(&seen, own)?;
        }
        let mut draft = self.draft(Op::Scatter { src }, &seen)?;
        disjoint(&[seen])?;
        draft.inputs(&inputs)?;
        let buffer = draft.write(&seen, false)?.whole();
        draft.output(buffer);
        Ok(draft.separate(None))
    }
}
