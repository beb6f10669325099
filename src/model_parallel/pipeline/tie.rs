//! Weights that several stages share, such as an embedding and the head.

use std::cell::RefCell;
use std::sync::Arc;

use tch::Tensor;

use crate::autograd::set_grad;
use crate::{Error, ProcessGroup, ReduceOp, Result};

/// One weight with a copy on each of some ranks.
pub(super) struct Tie {
    group: ProcessGroup,
    /// Its ranks in the pipeline.
    ranks: Vec<usize>,
    tensor: Tensor,
    /// The gradient of earlier steps, which is summed already.
    before: RefCell<Option<Tensor>>,
}

impl Tie {
    /// Every rank of the pipeline calls it; on the ranks outside it gives `None`.
    pub(super) fn new(
        tensor: Option<&Tensor>,
        ranks: &[usize],
        group: &ProcessGroup,
    ) -> Result<Option<Self>> {
        // All ranks see the same list, and so agree whether to go on.
        let mine = tensor.map(|t| (t.size(), format!("{:?}", t.kind())));
        let all: Vec<Option<(Vec<i64>, String)>> = group.all_gather_object(&mine)?;
        let first = ranks.first().and_then(|&r| all[r].as_ref());
        for &rank in ranks {
            if all[rank].is_none() || all[rank].as_ref() != first {
                let reason = match &all[rank] {
                    None => format!("rank {rank} has a stage that shares it, but gives none"),
                    Some(look) => {
                        format!("it is {look:?} on rank {rank}, but {first:?} on rank {}", ranks[0])
                    }
                };
                return Err(Error::invalid("tensor", reason));
            }
        }
        let subgroup = if ranks.len() > 1 { group.new_group(ranks)? } else { None };
        let (Some(group), Some(tensor)) = (subgroup, tensor) else { return Ok(None) };
        let mut tensor = tensor.shallow_clone();
        tch::no_grad(|| group.broadcast(&mut tensor, 0))?;
        Ok(Some(Self { group, ranks: ranks.to_vec(), tensor, before: RefCell::default() }))
    }

    /// Before a step: puts the gradient of earlier steps aside, so that it is not summed twice. A copy of it: where
    /// gradients live in buckets, the step writes into the same memory.
    pub(super) fn begin(&self) -> Result<()> {
        let grad = self.tensor.grad();
        self.before.replace(if grad.defined() { Some(grad.f_detach_copy()?) } else { None });
        self.set(None)
    }

    /// After it: the sum of all copies' gradients. Where no copy has one, as of a frozen weight, none gets one.
    pub(super) fn end(&self) -> Result<()> {
        self.sum().map_err(|error| self.in_pipeline(error))
    }

    fn sum(&self) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let grad = self.tensor.grad();
        let mut used =
            Tensor::f_from_slice(&[u8::from(grad.defined())])?.f_to_device(self.tensor.device())?;
        self.group.all_reduce(&mut used, ReduceOp::Max)?;
        if used.f_int64_value(&[0])? == 0 {
            return self.undo();
        }
        let mut grad = if grad.defined() { grad } else { self.tensor.f_detach()?.f_zeros_like()? };
        self.group.all_reduce(&mut grad, ReduceOp::Sum)?;
        if let Some(before) = self.before.take() {
            let _ = grad.f_add_(&before)?;
        }
        self.set(Some(&grad))
    }

    fn set(&self, grad: Option<&Tensor>) -> Result<()> {
        set_grad(&mut self.tensor.shallow_clone(), grad)
    }

    /// The pipeline failed on this rank: nobody shall wait for it here. `words` tell the others of it.
    pub(super) fn give_up(&self, words: &str) {
        self.group.abort_after(words);
    }

    /// The rank that was lost, as the pipeline counts.
    fn in_pipeline(&self, error: Error) -> Error {
        match error {
            Error::PeerLost { rank, op, source } => {
                Error::PeerLost { rank: self.ranks.get(rank).copied().unwrap_or(rank), op, source }
            }
            Error::Poisoned { cause } if matches!(*cause, Error::PeerLost { .. }) => {
                Error::Poisoned { cause: Arc::new(self.in_pipeline(cause.duplicate())) }
            }
            other => other,
        }
    }

    /// What was there before is there again: the step failed, or gave this weight nothing.
    pub(super) fn undo(&self) -> Result<()> {
        let before = self.before.take();
        self.set(before.as_ref())
    }
}
