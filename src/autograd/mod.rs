//! What tch lacks of autograd: gradient hooks, callbacks at the end of backward, a gradient setter,
//! and custom differentiable operations. Useful alone, without any process group.
//!
//! Errors are typed all the way: what a hook or a [`Function`] returns as an
//! [`Error`](crate::Error) is what [`backward`] returns. tch's own `f_backward` runs the same hooks,
//! and gives such an error as text; tch's `backward` panics on any error.
//!
//! ```
//! use tch::{Device, Kind, Tensor};
//! use tch_distributed::autograd;
//!
//! let x = Tensor::from(3.0f64).set_requires_grad(true);
//! let hook = autograd::on_grad(&x, |grad| Ok(Some(grad * 10)))?;
//! autograd::backward(&(&x * &x))?;
//! assert_eq!(x.grad().double_value(&[]), 60.0); // 2 x = 6, times 10
//! hook.remove();
//! # Ok::<(), tch_distributed::Error>(())
//! ```

mod backward;
mod function;
mod hooks;
#[cfg(test)]
mod tests;

pub use backward::{BackwardOptions, backward, backward_with, backward_with_grad, set_grad};
pub use function::{Context, Function};
pub use hooks::{HookHandle, after_backward, on_grad, on_grad_accumulated};
