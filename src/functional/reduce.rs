//! The differentiable all-reduce.

use tch::{Kind, Tensor};

use super::parts::{first, fresh, one, only};
use crate::autograd::{Context, Function};
use crate::{Error, ProcessGroup, ReduceOp, Result};

/// All ranks' tensors combined element by element; every rank gets the result.
///
/// With `g` the sum of all ranks' gradients of the result, the gradient of this rank's `x` is
/// * `Sum`: `g`; `Avg`: `g / size`; `PremulSum(f)`: `f * g`;
/// * `Product`: `g` times the product of the other ranks' `x` (exact where some are zero);
/// * `Min`, `Max`: `g` where `x` is the result, shared evenly among the ranks that have it.
///
/// ([`torch.distributed.nn.functional.all_reduce`](https://docs.pytorch.org/docs/stable/distributed.html) applies
/// the forward's operation to the gradients instead, which is no gradient for `Product`, `Min` and `Max`.)
///
/// # Errors
/// Those of [`ProcessGroup::all_reduce`]; `Unsupported` for a bit operation whose input requires a gradient.
pub fn all_reduce(t: &Tensor, op: ReduceOp, group: &ProcessGroup) -> Result<Tensor> {
    first(AllReduce { op, group: group.clone() }.apply(&[t])?)
}

struct AllReduce {
    op: ReduceOp,
    group: ProcessGroup,
}

impl AllReduce {
    fn sum(&self, t: &Tensor) -> Result<Tensor> {
        let mut sum = fresh(t)?;
        self.group.all_reduce(&mut sum, ReduceOp::Sum)?;
        Ok(sum)
    }

    /// The product of all other ranks' tensors.
    fn product_of_others(&self, x: &Tensor) -> Result<Tensor> {
        let mut all = (0..self.group.size())
            .map(|_| Ok(Tensor::f_empty(x.size(), (x.kind(), x.device()))?))
            .collect::<Result<Vec<_>>>()?;
        self.group.all_gather(&mut all, x)?;
        let mut product = x.f_ones_like()?;
        for (rank, other) in all.iter().enumerate() {
            if rank != self.group.rank() {
                product = product.f_mul(&other.f_conj()?)?;
            }
        }
        Ok(product)
    }
}

impl Function for AllReduce {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.materialize_grads();
        if ctx.needs_input_grad(0) && matches!(self.op, ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor)
        {
            return Err(Error::Unsupported {
                backend: self.group.backend_name(),
                what: format!("the gradient of all_reduce with {}", self.op),
            });
        }
        let mut y = fresh(&inputs[0])?;
        self.group.all_reduce(&mut y, self.op)?;
        match self.op {
            ReduceOp::Product => ctx.save_for_backward(&[&inputs[0]]),
            ReduceOp::Min | ReduceOp::Max => {
                // Saved as numbers of the input's kind, so that the backward can add them up.
                let mine = inputs[0].f_eq_tensor(&y)?.f_to_kind(y.kind())?;
                ctx.save_for_backward(&[&mine]);
            }
            _ => {}
        }
        Ok(vec![y])
    }

    fn backward(&mut self, ctx: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        // Itself differentiable, and so are the factors of sums: gradients of gradients are right. Not so the others.
        let linear = matches!(self.op, ReduceOp::Sum | ReduceOp::Avg | ReduceOp::PremulSum(_));
        let grad = if linear { one(grads)? } else { only(grads)? };
        let grad = all_reduce(grad, ReduceOp::Sum, &self.group)?;
        let saved = ctx.saved();
        let grad = match (self.op, saved) {
            (ReduceOp::Avg, _) => grad.f_div_scalar(self.group.size() as f64)?,
            (ReduceOp::PremulSum(factor), _) => grad.f_mul_scalar(factor)?,
            (ReduceOp::Product, [x]) => grad.f_mul(&self.product_of_others(x)?)?,
            (ReduceOp::Min | ReduceOp::Max, [mine]) => {
                // Counted in f64: a half cannot count many ranks.
                let count =
                    self.sum(&mine.f_to_kind(Kind::Double)?)?.f_clamp_min(1.0)?.f_to_kind(grad.kind())?;
                grad.f_mul(mine)?.f_div(&count)?
            }
            _ => grad,
        };
        Ok(vec![Some(grad)])
    }
}
