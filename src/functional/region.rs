//! The four functions between replicated values and a tensor-parallel region. The loss is the same on every rank
//! of the group, and counts once.

use tch::Tensor;

use super::parts::{
    dim_index, even_sizes, first, fresh, gather_parts, one, only, own_part, shard_range, sizes_of_ranks,
};
use crate::autograd::{Context, Function};
use crate::{ProcessGroup, ReduceOp, Result, libtorch};

/// The same value; its gradient is the sum of all ranks' gradients.
///
/// For a replicated value that each rank uses in its own way (Megatron-LM's *f*).
///
/// The result is a view of `t`, not a copy. Where the operation is recorded, autograd refuses to change it in place.
pub fn copy_to_group(t: &Tensor, group: &ProcessGroup) -> Result<Tensor> {
    first(copy_all_to_group(&[t], group)?)
}

/// The same for several tensors, whose gradients are summed in one operation.
pub(crate) fn copy_all_to_group(tensors: &[&Tensor], group: &ProcessGroup) -> Result<Vec<Tensor>> {
    Copy { group: group.clone() }.apply(tensors)
}

/// The sum of all ranks' values; its gradient goes to every rank unchanged.
///
/// For partial results whose sum every rank then uses in the same way (Megatron-LM's *g*).
pub fn reduce_from_group(t: &Tensor, group: &ProcessGroup) -> Result<Tensor> {
    first(Reduce { group: group.clone() }.apply(&[t])?)
}

/// Of a replicated value, this rank's part along `dim` ([`shard_range`](super::shard_range)); the gradients of all
/// parts are put together.
///
/// # Errors
/// `InvalidArgument` for a `dim` that is not there.
pub fn scatter_to_group(t: &Tensor, dim: i64, group: &ProcessGroup) -> Result<Tensor> {
    let dim = dim_index(t, dim, "dim")?;
    first(Scatter { dim, group: group.clone(), len: t.size()[dim] }.apply(&[t])?)
}

/// All ranks' parts put together along `dim`; of its gradient each rank takes its own part.
///
/// # Errors
/// `InvalidArgument` for a `dim` that is not there, and those of [`ProcessGroup::all_gather`].
pub fn gather_from_group(t: &Tensor, dim: i64, group: &ProcessGroup) -> Result<Tensor> {
    let dim = dim_index(t, dim, "dim")?;
    let sizes = sizes_of_ranks(t, &[dim], group)?.concat();
    gather_sized(t, dim, sizes, group)
}

/// The same where the sizes are known.
pub(crate) fn gather_sized(t: &Tensor, dim: usize, sizes: Vec<i64>, group: &ProcessGroup) -> Result<Tensor> {
    first(Gather { dim, sizes, group: group.clone() }.apply(&[t])?)
}

struct Copy {
    group: ProcessGroup,
}

impl Function for Copy {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.materialize_grads();
        // The inputs themselves: autograd makes views of them, and knows them as such.
        Ok(inputs.iter().map(Tensor::shallow_clone).collect())
    }

    fn backward(&mut self, ctx: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        if libtorch::grad_enabled() {
            // One by one, so that autograd follows.
            let sum = |(i, g): (usize, &Option<Tensor>)| {
                let sum = g.as_ref().map(|g| reduce_from_group(g, &self.group)).transpose()?;
                Ok(sum.filter(|_| ctx.needs_input_grad(i)))
            };
            return grads.iter().enumerate().map(sum).collect();
        }
        let mut sums = grads.iter().flatten().map(fresh).collect::<Result<Vec<_>>>()?;
        match sums.as_mut_slice() {
            [one] => self.group.all_reduce(one, ReduceOp::Sum)?,
            many => self.group.all_reduce_coalesced(many, ReduceOp::Sum)?,
        }
        let needed = |(i, sum)| ctx.needs_input_grad(i).then_some(sum);
        Ok(sums.into_iter().enumerate().map(needed).collect())
    }
}

struct Reduce {
    group: ProcessGroup,
}

impl Function for Reduce {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.materialize_grads();
        let mut sum = fresh(&inputs[0])?;
        self.group.all_reduce(&mut sum, ReduceOp::Sum)?;
        Ok(vec![sum])
    }

    fn backward(&mut self, _: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(one(grads)?.shallow_clone())])
    }
}

struct Scatter {
    dim: usize,
    len: i64,
    group: ProcessGroup,
}

impl Function for Scatter {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.materialize_grads();
        let part = shard_range(self.len, self.group.rank(), self.group.size());
        Ok(vec![own_part(&inputs[0], self.dim, part)?])
    }

    fn backward(&mut self, _: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let sizes = even_sizes(self.len, self.group.size());
        Ok(vec![Some(gather_parts(only(grads)?, self.dim, &sizes, &self.group)?)])
    }
}

struct Gather {
    dim: usize,
    sizes: Vec<i64>,
    group: ProcessGroup,
}

impl Function for Gather {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.materialize_grads();
        Ok(vec![gather_parts(&inputs[0], self.dim, &self.sizes, &self.group)?])
    }

    fn backward(&mut self, _: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let rank = self.group.rank();
        let start: i64 = self.sizes[..rank].iter().sum();
        Ok(vec![Some(own_part(only(grads)?, self.dim, start..start + self.sizes[rank])?)])
    }
}
