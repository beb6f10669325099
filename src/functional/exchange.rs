//! The differentiable all-to-all and broadcast.

use tch::Tensor;

use super::parts::{dim_index, even_sizes, exchange_parts, first, fresh, only, sizes_of_ranks};
use crate::autograd::{Context, Function};
use crate::{Error, ProcessGroup, ReduceOp, Result};

/// Part `r` along `split_dim` ([`shard_range`](super::shard_range)) goes to rank `r`; what comes in is put together
/// along `concat_dim` in rank order. The gradient goes the same way back.
///
/// Sizes along `concat_dim` may differ from rank to rank; along `split_dim` they must agree, unless it is the same
/// dimension. (DeepSpeed-Ulysses attention goes from split sequences to split heads with it.)
///
/// # Errors
/// `InvalidArgument` for a dimension that is not there; `ShapeMismatch` on every rank where ranks differ along
/// `split_dim`; those of [`ProcessGroup::all_to_all`].
#[doc(alias = "all_to_all_single_autograd")]
pub fn all_to_all(t: &Tensor, split_dim: i64, concat_dim: i64, group: &ProcessGroup) -> Result<Tensor> {
    let split_dim = dim_index(t, split_dim, "split_dim")?;
    let concat_dim = dim_index(t, concat_dim, "concat_dim")?;
    let (rank, size) = (group.rank(), group.size());
    let sizes = sizes_of_ranks(t, &[split_dim, concat_dim], group)?;
    let mine = t.size()[split_dim];
    if let Some(other) = sizes.iter().position(|s| s[0] != mine).filter(|_| split_dim != concat_dim) {
        return Err(Error::ShapeMismatch {
            argument: "t",
            expected: format!("the same size in dimension {split_dim} on every rank"),
            got: format!("{mine} on rank {rank} and {} on rank {other}", sizes[other][0]),
        });
    }
    let split = even_sizes(mine, size);
    let concat = match split_dim == concat_dim {
        true => sizes.iter().map(|s| even_sizes(s[0], size)[rank]).collect(),
        false => sizes.iter().map(|s| s[1]).collect(),
    };
    first(
        AllToAll { split: (split_dim, split), concat: (concat_dim, concat), group: group.clone() }
            .apply(&[t])?,
    )
}

/// The tensor of rank `src` on every rank; on the others `t` gives shape and kind only.
///
/// The gradient at `src` is the sum of all ranks' gradients, elsewhere zero. `t` must require gradients on every
/// rank or on none.
///
/// # Errors
/// Those of [`ProcessGroup::broadcast`].
pub fn broadcast(t: &Tensor, src: usize, group: &ProcessGroup) -> Result<Tensor> {
    first(Broadcast { src, group: group.clone() }.apply(&[t])?)
}

struct AllToAll {
    split: (usize, Vec<i64>),
    concat: (usize, Vec<i64>),
    group: ProcessGroup,
}

impl Function for AllToAll {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.materialize_grads();
        let (split, concat) = (&self.split, &self.concat);
        Ok(vec![exchange_parts(&inputs[0], (split.0, &split.1), (concat.0, &concat.1), &self.group)?])
    }

    fn backward(&mut self, _: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let (split, concat) = (&self.split, &self.concat);
        let grad = exchange_parts(only(grads)?, (concat.0, &concat.1), (split.0, &split.1), &self.group)?;
        Ok(vec![Some(grad)])
    }
}

struct Broadcast {
    src: usize,
    group: ProcessGroup,
}

impl Function for Broadcast {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.materialize_grads();
        let mut t = fresh(&inputs[0])?;
        self.group.broadcast(&mut t, self.src)?;
        Ok(vec![t])
    }

    fn backward(&mut self, _: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let mut grad = fresh(only(grads)?)?;
        self.group.reduce(&mut grad, self.src, ReduceOp::Sum)?;
        if self.group.rank() != self.src {
            grad = grad.f_zeros_like()?;
        }
        Ok(vec![Some(grad)])
    }
}
