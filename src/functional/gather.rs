//! The differentiable all-gather and reduce-scatter: each is the other's backward.

use tch::Tensor;

use super::parts::{dim_index, even_sizes, first, gather_parts, only, reduce_parts, sizes_of_ranks};
use crate::autograd::{Context, Function};
use crate::{Error, ProcessGroup, ReduceOp, Result};

/// All ranks' tensors put together along `dim`, in rank order; their sizes along it may differ.
///
/// The gradient of a rank's tensor is the sum over all ranks of their gradients of its part: a reduce-scatter.
///
/// # Errors
/// `InvalidArgument` for a `dim` that is not there, and those of [`ProcessGroup::all_gather`].
#[doc(alias = "all_gather_tensor_autograd")]
pub fn all_gather(t: &Tensor, dim: i64, group: &ProcessGroup) -> Result<Tensor> {
    let dim = dim_index(t, dim, "dim")?;
    let sizes = sizes_of_ranks(t, &[dim], group)?.concat();
    first(AllGather { dim, sizes, group: group.clone() }.apply(&[t])?)
}

/// The same where all ranks are known to have the same size: no sizes are exchanged.
pub(crate) fn all_gather_even(t: &Tensor, dim: usize, group: &ProcessGroup) -> Result<Tensor> {
    let sizes = vec![t.size()[dim]; group.size()];
    first(AllGather { dim, sizes, group: group.clone() }.apply(&[t])?)
}

/// All ranks' tensors combined, and of the result this rank's part along `dim`
/// ([`shard_range`](super::shard_range)).
///
/// The gradient of every rank's tensor is the gradients of all parts put together: an all-gather; divided by the
/// number of ranks for `Avg`, times this rank's factor for `PremulSum`.
///
/// # Errors
/// `InvalidArgument` for a `dim` that is not there; `Unsupported` for another operation than `Sum`, `Avg` and
/// `PremulSum` if the input requires a gradient; those of [`ProcessGroup::reduce_scatter`].
#[doc(alias = "reduce_scatter_tensor_autograd")]
pub fn reduce_scatter(t: &Tensor, dim: i64, op: ReduceOp, group: &ProcessGroup) -> Result<Tensor> {
    let dim = dim_index(t, dim, "dim")?;
    let sizes = even_sizes(t.size()[dim], group.size());
    first(ReduceScatter { dim, sizes, op, group: group.clone() }.apply(&[t])?)
}

/// The sum's part, of a dimension that must divide.
pub(crate) fn reduce_scatter_even(t: &Tensor, dim: usize, group: &ProcessGroup) -> Result<Tensor> {
    check_divides(t.size()[dim], dim, group)?;
    reduce_scatter(t, dim as i64, ReduceOp::Sum, group)
}

/// Where parts must be of one size, because their receiver does not know another.
pub(crate) fn check_divides(len: i64, dim: usize, group: &ProcessGroup) -> Result<()> {
    match len % group.size() as i64 {
        0 => Ok(()),
        _ => Err(Error::ShapeMismatch {
            argument: "xs",
            expected: format!("a multiple of the {} ranks in dimension {dim}", group.size()),
            got: len.to_string(),
        }),
    }
}

struct AllGather {
    dim: usize,
    sizes: Vec<i64>,
    group: ProcessGroup,
}

impl Function for AllGather {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.materialize_grads();
        Ok(vec![gather_parts(&inputs[0], self.dim, &self.sizes, &self.group)?])
    }

    fn backward(&mut self, _: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let part = reduce_parts(only(grads)?, self.dim, &self.sizes, ReduceOp::Sum, &self.group)?;
        Ok(vec![Some(part)])
    }
}

struct ReduceScatter {
    dim: usize,
    sizes: Vec<i64>,
    op: ReduceOp,
    group: ProcessGroup,
}

impl Function for ReduceScatter {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.materialize_grads();
        let linear = matches!(self.op, ReduceOp::Sum | ReduceOp::Avg | ReduceOp::PremulSum(_));
        if ctx.needs_input_grad(0) && !linear {
            return Err(Error::Unsupported {
                backend: self.group.backend_name(),
                what: format!("the gradient of reduce_scatter with {}", self.op),
            });
        }
        Ok(vec![reduce_parts(&inputs[0], self.dim, &self.sizes, self.op, &self.group)?])
    }

    fn backward(&mut self, _: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let whole = gather_parts(only(grads)?, self.dim, &self.sizes, &self.group)?;
        let whole = match self.op {
            ReduceOp::Avg => whole.f_div_scalar(self.group.size() as f64)?,
            ReduceOp::PremulSum(factor) => whole.f_mul_scalar(factor)?,
            _ => whole,
        };
        Ok(vec![Some(whole)])
    }
}
