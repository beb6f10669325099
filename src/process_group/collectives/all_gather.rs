//! Every rank's tensor, for all ranks.

use tch::{Kind, Tensor};

use super::super::checks::{alike, concat_or_stack, disjoint, one_per_rank, same_shape, see, see_list};
use super::super::draft::Draft;
use super::super::{ProcessGroup, Work};
use crate::backend::Op;
use crate::{Error, Result};

/// torch allows no more dimensions.
const MAX_DIMS: usize = 64;

impl ProcessGroup {
    /// Gathers the tensor of every rank: `outputs[r]` becomes the input of rank r.
    ///
    /// Shapes may differ from rank to rank; `outputs[r]` has the shape of rank r's input. All are of
    /// one kind (any). Where shapes are not known beforehand:
    /// [`all_gather_uneven`](Self::all_gather_uneven).
    ///
    /// # Errors
    /// `InvalidArgument` when there is not one output for each rank or outputs share memory;
    /// `ShapeMismatch` when this rank's output has not the shape of its input; `KindMismatch`;
    /// failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     let mine = Tensor::full([group.rank() as i64 + 1], 5, (Kind::Int64, Device::Cpu));
    ///     let mut all = [1, 2].map(|n| Tensor::zeros([n], (Kind::Int64, Device::Cpu)));
    ///     group.all_gather(&mut all, &mine).unwrap();
    ///     assert_eq!(Vec::<i64>::try_from(&all[1]).unwrap(), [5, 5]);
    /// });
    /// ```
    #[track_caller]
    pub fn all_gather(&self, outputs: &mut [Tensor], input: &Tensor) -> Result<()> {
        self.all_gather_draft(outputs, input)?.run()
    }

    /// [`all_gather`](Self::all_gather), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn all_gather_async(&self, outputs: &[Tensor], input: &Tensor) -> Result<Work> {
        self.all_gather_draft(outputs, input)?.launch()
    }

    fn all_gather_draft<'a>(&'a self, outputs: &'a [Tensor], input: &'a Tensor) -> Result<Draft<'a>> {
        self.inner.usable()?;
        one_per_rank("outputs", outputs.len(), self.size())?;
        let (seen, outputs) = (see(input, "input")?, see_list(outputs, "outputs")?);
        let own = &outputs[self.rank()];
        alike(&seen, own)?;
        same_shape(own, &seen)?;
        let mut draft = self.draft(Op::AllGather, &seen)?;
        let buffer = draft.read(&seen)?.whole();
        draft.input(buffer);
        draft.outputs(&outputs)?;
        Ok(draft.separate(Some(self.rank())))
    }

    /// Gathers the tensor of every rank into one: concatenated along dimension 0 (`[W·n, …]` for inputs
    /// `[n, …]`) or stacked (`[W, n, …]`), as the shape of `output` says.
    ///
    /// All ranks give inputs of the same kind (any) and shape. The input may be this rank's part of
    /// the output itself.
    ///
    /// # Errors
    /// `ShapeMismatch`, `KindMismatch`; `InvalidArgument` when elements of the output share memory;
    /// failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     let mine = Tensor::from_slice(&[group.rank() as i64; 2]);
    ///     let mut all = Tensor::zeros([4], (Kind::Int64, Device::Cpu));
    ///     group.all_gather_into_tensor(&mut all, &mine).unwrap();
    ///     assert_eq!(Vec::<i64>::try_from(all).unwrap(), [0, 0, 1, 1]);
    /// });
    /// ```
    #[doc(alias = "all_gather_single")]
    #[doc(alias = "_all_gather_base")]
    #[track_caller]
    pub fn all_gather_into_tensor(&self, output: &mut Tensor, input: &Tensor) -> Result<()> {
        self.all_gather_into_tensor_draft(output, input)?.run()
    }

    /// [`all_gather_into_tensor`](Self::all_gather_into_tensor), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn all_gather_into_tensor_async(&self, output: &Tensor, input: &Tensor) -> Result<Work> {
        self.all_gather_into_tensor_draft(output, input)?.launch()
    }

    fn all_gather_into_tensor_draft<'a>(
        &'a self,
        output: &'a Tensor,
        input: &'a Tensor,
    ) -> Result<Draft<'a>> {
        self.inner.usable()?;
        let (output, seen) = (see(output, "output")?, see(input, "input")?);
        alike(&seen, &output)?;
        concat_or_stack(&output, &seen, self.size())?;
        let mut draft = self.draft(Op::AllGather, &seen)?;
        disjoint(&[output])?;
        let buffer = draft.read(&seen)?.whole();
        draft.input(buffer);
        let flat = draft.write(&output, false)?;
        for rank in 0..self.size() {
            draft.output(flat.part(rank * seen.facts.numel, seen.facts.numel));
        }
        draft.shape = Some(input);
        Ok(draft.separate(Some(self.rank())))
    }

    /// Gathers the tensor of every rank; shapes may differ and are found out first. All are of one
    /// kind (any), and have at most 64 dimensions.
    ///
    /// # Errors
    /// `KindMismatch`, on every rank alike, when kinds differ; failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(3, |group| {
    ///     let mine = Tensor::ones([group.rank() as i64, 2], (Kind::Float, Device::Cpu));
    ///     let all = group.all_gather_uneven(&mine).unwrap();
    ///     assert_eq!(all.iter().map(|t| t.size()[0]).collect::<Vec<_>>(), [0, 1, 2]);
    /// });
    /// ```
    #[track_caller]
    pub fn all_gather_uneven(&self, input: &Tensor) -> Result<Vec<Tensor>> {
        self.inner.usable()?;
        let seen = see(input, "input")?;
        let shape = input.size();
        if shape.len() > MAX_DIMS {
            return Err(Error::invalid("input", format!("{} dimensions, at most {MAX_DIMS}", shape.len())));
        }
        // One message of fixed size from each: kind, number of dimensions, dimensions.
        let mut mine = vec![0i64; MAX_DIMS + 2];
        mine[0] = seen.facts.kind as i64;
        mine[1] = shape.len() as i64;
        mine[2..2 + shape.len()].copy_from_slice(&shape);
        let on = |t: Tensor| t.f_to_device(seen.facts.device);
        let mut all =
            on(Tensor::f_zeros([(self.size() * mine.len()) as i64], (Kind::Int64, tch::Device::Cpu))?)?;
        self.all_gather_into_tensor(&mut all, &on(Tensor::from_slice(&mine))?)?;
        let all = Vec::<i64>::try_from(all)?;
        let mut outputs = Vec::with_capacity(self.size());
        for (rank, theirs) in all.chunks(mine.len()).enumerate() {
            if theirs[0] != mine[0] {
                return Err(Error::KindMismatch {
                    argument: "input",
                    expected: format!(
                        "one kind on all ranks ({:?} on rank {})",
                        seen.facts.kind,
                        self.rank()
                    ),
                    got: format!("another on rank {rank}"),
                });
            }
            let dims = usize::try_from(theirs[1]).ok().and_then(|n| theirs.get(2..2 + n));
            let dims = dims.filter(|d| d.iter().all(|&n| n >= 0)).ok_or_else(|| Error::Object {
                reason: format!("the shape that rank {rank} sent is damaged"),
            })?;
            outputs.push(Tensor::f_empty(dims, (seen.facts.kind, seen.facts.device))?);
        }
        self.all_gather(&mut outputs, input)?;
        Ok(outputs)
    }
}
