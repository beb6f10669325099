//! Many tensors, one operation.

use smallvec::SmallVec;
use tch::Tensor;

use super::checks::{SeenList, alike, concat_or_stack, disjoint, see};
use super::draft::Draft;
use super::{ProcessGroup, ReduceOp, Work};
use crate::backend::{Op, Segments};
use crate::{Error, Result};

impl ProcessGroup {
    /// [`all_reduce`](Self::all_reduce) of many tensors as one operation, without copying them into one.
    ///
    /// Tensors may differ in shape and kind; each kind is one operation. All ranks give the same list.
    ///
    /// # Errors
    /// As `all_reduce`; `InvalidArgument` when tensors share memory with one another.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_distributed::{ReduceOp, testing};
    /// testing::run_threads(2, |group| {
    ///     let mut tensors = [Tensor::from_slice(&[1i64, 2]), Tensor::from_slice(&[0.5f32])];
    ///     group.all_reduce_coalesced(&mut tensors, ReduceOp::Sum).unwrap();
    ///     assert_eq!(tensors[0].int64_value(&[1]), 4);
    ///     assert_eq!(tensors[1].double_value(&[0]), 1.0);
    /// });
    /// ```
    #[track_caller]
    pub fn all_reduce_coalesced(&self, tensors: &mut [Tensor], op: ReduceOp) -> Result<()> {
        for draft in self.all_reduce_coalesced_drafts(tensors, op)? {
            draft.run()?;
        }
        Ok(())
    }

    /// [`all_reduce_coalesced`](Self::all_reduce_coalesced), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn all_reduce_coalesced_async(&self, tensors: &[Tensor], op: ReduceOp) -> Result<Work> {
        let mut works = Vec::new();
        for draft in self.all_reduce_coalesced_drafts(tensors, op)? {
            works.push(draft.launch()?);
        }
        Ok(Work::join(self, works))
    }

    fn all_reduce_coalesced_drafts<'a>(
        &'a self,
        tensors: &'a [Tensor],
        op: ReduceOp,
    ) -> Result<SmallVec<[Draft<'a>; 1]>> {
        self.inner.usable()?;
        let mut kinds = SmallVec::<[SeenList<'a>; 1]>::new();
        let mut all = SeenList::with_capacity(tensors.len());
        for tensor in tensors {
            let seen = see(tensor, "tensors")?;
            all.push(seen);
            match kinds.iter_mut().find(|list| list[0].facts.kind == seen.facts.kind) {
                Some(list) => {
                    alike(&list[0], &seen)?;
                    list.push(seen);
                }
                None => kinds.push(SeenList::from_elem(seen, 1)),
            }
        }
        if kinds.len() > 1 {
            disjoint(&all)?;
        }
        kinds
            .into_iter()
            .map(|list| {
                let mut draft = self.draft(Op::AllReduce(op), &list[0])?;
                draft.coalesced(&list)?;
                Ok(draft)
            })
            .collect()
    }

    /// [`all_gather_into_tensor`](Self::all_gather_into_tensor) of many pairs as one operation (for each
    /// kind).
    ///
    /// # Errors
    /// As there; `InvalidArgument` when there are not as many outputs as inputs.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     let inputs = [Tensor::from_slice(&[1i64]), Tensor::from_slice(&[2i64, 3])];
    ///     let mut outputs = [2, 4].map(|n| Tensor::zeros([n], (Kind::Int64, Device::Cpu)));
    ///     group.all_gather_into_tensor_coalesced(&mut outputs, &inputs).unwrap();
    ///     assert_eq!(Vec::<i64>::try_from(&outputs[1]).unwrap(), [2, 3, 2, 3]);
    /// });
    /// ```
    #[doc(alias = "all_gather_coalesced")]
    #[track_caller]
    pub fn all_gather_into_tensor_coalesced(&self, outputs: &mut [Tensor], inputs: &[Tensor]) -> Result<()> {
        self.all_gather_into_tensor_coalesced_async(outputs, inputs)?.wait()
    }

    /// [`all_gather_into_tensor_coalesced`](Self::all_gather_into_tensor_coalesced), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn all_gather_into_tensor_coalesced_async(
        &self,
        outputs: &[Tensor],
        inputs: &[Tensor],
    ) -> Result<Work> {
        same_number(outputs, inputs)?;
        let mut batch = self.coalescing();
        for (output, input) in outputs.iter().zip(inputs) {
            batch.all_gather_into_tensor(output, input)?;
        }
        batch.launch()
    }

    /// [`reduce_scatter_tensor`](Self::reduce_scatter_tensor) of many pairs as one operation (for each
    /// kind).
    ///
    /// # Errors
    /// As there; `InvalidArgument` when there are not as many outputs as inputs.
    #[doc(alias = "reduce_scatter_single_coalesced")]
    #[track_caller]
    pub fn reduce_scatter_tensor_coalesced(
        &self,
        outputs: &mut [Tensor],
        inputs: &[Tensor],
        op: ReduceOp,
    ) -> Result<()> {
        self.reduce_scatter_tensor_coalesced_async(outputs, inputs, op)?.wait()
    }

    /// [`reduce_scatter_tensor_coalesced`](Self::reduce_scatter_tensor_coalesced), asynchronously.
    ///
    /// # Errors
    /// As there: argument errors from the call, failures from the [`Work`].
    #[track_caller]
    pub fn reduce_scatter_tensor_coalesced_async(
        &self,
        outputs: &[Tensor],
        inputs: &[Tensor],
        op: ReduceOp,
    ) -> Result<Work> {
        same_number(outputs, inputs)?;
        let mut batch = self.coalescing();
        for (output, input) in outputs.iter().zip(inputs) {
            batch.reduce_scatter_tensor(output, input, op)?;
        }
        batch.launch()
    }

    /// Collects collectives, to start them together: those of one operation and kind become one.
    ///
    /// ```
    /// use tch::Tensor;
    /// use tch_distributed::{ReduceOp, testing};
    /// testing::run_threads(2, |group| {
    ///     let (a, b) = (Tensor::from_slice(&[1i64]), Tensor::from_slice(&[2i64]));
    ///     let mut batch = group.coalescing();
    ///     batch.all_reduce(&a, ReduceOp::Sum).unwrap();
    ///     batch.all_reduce(&b, ReduceOp::Sum).unwrap();
    ///     batch.launch().unwrap().wait().unwrap();
    ///     assert_eq!((a.int64_value(&[0]), b.int64_value(&[0])), (2, 4));
    /// });
    /// ```
    #[doc(alias = "_coalescing_manager")]
    pub fn coalescing(&self) -> Coalescing<'_> {
        Coalescing { group: self, drafts: Vec::new(), written: SeenList::new() }
    }
}

fn same_number(outputs: &[Tensor], inputs: &[Tensor]) -> Result<()> {
    if outputs.len() == inputs.len() {
        return Ok(());
    }
    Err(Error::invalid("outputs", format!("{} outputs for {} inputs", outputs.len(), inputs.len())))
}

/// Collectives that start together: see [`ProcessGroup::coalescing`]. Dropping it starts nothing.
#[must_use = "nothing starts before launch"]
pub struct Coalescing<'a> {
    group: &'a ProcessGroup,
    drafts: Vec<Draft<'a>>,
    written: SeenList<'a>,
}

impl std::fmt::Debug for Coalescing<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Coalescing({} operations)", self.drafts.len())
    }
}

impl<'a> Coalescing<'a> {
    /// Adds an [`all_reduce`](ProcessGroup::all_reduce).
    ///
    /// # Errors
    /// Its argument errors.
    pub fn all_reduce(&mut self, tensor: &'a Tensor, op: ReduceOp) -> Result<()> {
        self.group.inner.usable()?;
        let seen = see(tensor, "tensor")?;
        let mut draft = self.group.draft(Op::AllReduce(op), &seen)?;
        disjoint(&[seen])?;
        let buffer = draft.write(&seen, true)?.whole();
        draft.output(buffer);
        self.written.push(seen);
        self.add(draft);
        Ok(())
    }

    /// Adds an [`all_gather_into_tensor`](ProcessGroup::all_gather_into_tensor).
    ///
    /// # Errors
    /// Its argument errors.
    pub fn all_gather_into_tensor(&mut self, output: &'a Tensor, input: &'a Tensor) -> Result<()> {
        self.group.inner.usable()?;
        let (output, seen) = (see(output, "output")?, see(input, "input")?);
        alike(&seen, &output)?;
        concat_or_stack(&output, &seen, self.group.size())?;
        let mut draft = self.group.draft(Op::AllGather, &seen)?;
        disjoint(&[output])?;
        let buffer = draft.read(&seen)?.whole();
        draft.input(buffer);
        let flat = draft.write(&output, false)?;
        for rank in 0..self.group.size() {
            draft.output(flat.part(rank * seen.facts.numel, seen.facts.numel));
        }
        self.written.push(output);
        self.add(draft);
        Ok(())
    }

    /// Adds a [`reduce_scatter_tensor`](ProcessGroup::reduce_scatter_tensor).
    ///
    /// # Errors
    /// Its argument errors.
    pub fn reduce_scatter_tensor(
        &mut self,
        output: &'a Tensor,
        input: &'a Tensor,
        op: ReduceOp,
    ) -> Result<()> {
        self.group.inner.usable()?;
        let (seen, whole) = (see(output, "output")?, see(input, "input")?);
        alike(&seen, &whole)?;
        concat_or_stack(&whole, &seen, self.group.size())?;
        let mut draft = self.group.draft(Op::ReduceScatter(op), &seen)?;
        disjoint(&[seen])?;
        let flat = draft.read(&whole)?;
        for rank in 0..self.group.size() {
            draft.input(flat.part(rank * seen.facts.numel, seen.facts.numel));
        }
        let buffer = draft.write(&seen, false)?.whole();
        draft.output(buffer);
        self.written.push(seen);
        self.add(draft);
        Ok(())
    }

    fn add(&mut self, draft: Draft<'a>) {
        // Factors are each rank's own: whether two of this rank's are equal says nothing of the others',
        // and all ranks must make as many calls.
        let own_factor = matches!(draft.call.op.reduce_op(), Some(ReduceOp::PremulSum(_)));
        let same = |other: &&mut Draft<'a>| {
            !own_factor
                && other.call.op == draft.call.op
                && other.call.kind == draft.call.kind
                && std::ptr::addr_eq(&raw const **other.backend, &raw const **draft.backend)
        };
        match self.drafts.iter_mut().find(same) {
            Some(other) => other.merge(draft),
            None => self.drafts.push(draft),
        }
    }

    /// Starts all, in the order in which each operation and kind was first added.
    ///
    /// # Errors
    /// `InvalidArgument` when outputs share memory with one another: then nothing is started.
    #[track_caller]
    pub fn launch(self) -> Result<Work> {
        disjoint(&self.written)?;
        let mut works = Vec::with_capacity(self.drafts.len());
        for draft in self.drafts {
            // Of the whole call: an input of one pair may share memory with the output of another.
            let in_place = (draft.call.op == Op::AllGather).then(|| self.group.rank());
            works.push(draft.separate(in_place).launch()?);
        }
        Ok(Work::join(self.group, works))
    }
}

impl<'a> Draft<'a> {
    /// Makes one call of two: each segment is followed by the other's.
    fn merge(&mut self, other: Self) {
        let append = |mine: &mut Segments<'a>, theirs: Segments<'a>| {
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                mine.extend(theirs);
            }
        };
        append(&mut self.call.inputs, other.call.inputs);
        append(&mut self.call.outputs, other.call.outputs);
        self.shape = None;
        self.memory.merge(other.memory);
    }
}
