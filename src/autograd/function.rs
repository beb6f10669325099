//! Differentiable operations of one's own.

use tch::Tensor;

use crate::libtorch::{self, Forward, RawFunction, grad_state};
use crate::{Error, Result};

/// What the forward of a [`Function`] leaves for its backward.
#[derive(Debug)]
pub struct Context {
    saved: Vec<Tensor>,
    needs: Vec<bool>,
    materialize: bool,
}

impl Context {
    /// Keeps tensors (inputs, outputs, or others) for backward. A second call replaces the first.
    ///
    /// Saved here, and not in a field of the function, autograd notices when they are changed in place
    /// before backward, frees them when backward has run, and differentiates through them again.
    pub fn save_for_backward(&mut self, tensors: &[&Tensor]) {
        self.saved = tensors.iter().map(|t| t.shallow_clone()).collect();
    }

    /// Called in forward: backward gets zeros instead of `None` for an output that has no gradient. For a
    /// backward that communicates, which every rank must run in the same way. (In PyTorch this is so unless one
    /// says otherwise.)
    #[doc(alias = "set_materialize_grads")]
    pub fn materialize_grads(&mut self) {
        self.materialize = true;
    }

    /// The tensors that forward saved.
    pub fn saved(&self) -> &[Tensor] {
        &self.saved
    }

    /// Whether the gradient of input `index` will be used; false for an input that there is not.
    pub fn needs_input_grad(&self, index: usize) -> bool {
        self.needs.get(index).copied().unwrap_or(false)
    }
}

/// A differentiable operation: a forward and its backward.
///
/// Values that are no tensors (a group, a factor, a shape) are fields of the type. `apply` consumes it:
/// it lives in the graph and dies with it.
///
/// If `backward` is made of differentiable operations, gradients of gradients work (with
/// [`BackwardOptions::create_graph`](super::BackwardOptions::create_graph)); otherwise they stop there.
///
/// ```
/// use tch::{Kind, Tensor};
/// use tch_distributed::autograd::{self, Context, Function};
/// use tch_distributed::Result;
///
/// /// The identity, whose gradient is reversed (for domain-adversarial training).
/// struct Reverse {
///     strength: f64,
/// }
///
/// impl Function for Reverse {
///     fn forward(&mut self, _: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
///         Ok(vec![inputs[0].shallow_clone()])
///     }
///     fn backward(&mut self, _: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
///         Ok(vec![grads[0].as_ref().map(|grad| grad * -self.strength)])
///     }
/// }
///
/// let x = Tensor::from_slice(&[1.0f32, 2.0]).set_requires_grad(true);
/// let y = Reverse { strength: 0.5 }.apply(&[&x])?;
/// autograd::backward(&y[0].sum(Kind::Float))?;
/// assert_eq!(Vec::<f32>::try_from(&x.grad())?, [-0.5, -0.5]);
/// # Ok::<(), tch_distributed::Error>(())
/// ```
#[doc(alias = "torch.autograd.Function")]
pub trait Function: Send + 'static {
    /// Computes the outputs. Autograd records nothing of what happens inside.
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>>;

    /// From the gradient of each output, computes the gradient of each input. `None` stands for zero:
    /// in `grads`, an output that the loss does not depend on (zeros after
    /// [`materialize_grads`](Context::materialize_grads)); in the result, an input that gets none.
    ///
    /// A backward that it runs itself must not come to this same application of the function: libtorch holds a lock
    /// of it, and the thread would wait for itself.
    fn backward(&mut self, ctx: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>>;

    /// Runs forward and records the operation, unless grad mode is off or no input requires a gradient.
    ///
    /// # Errors
    /// What forward returns; [`Callback`](Error::Callback) if it panics. Errors of backward come from
    /// [`backward`](super::backward()).
    fn apply(self, inputs: &[&Tensor]) -> Result<Vec<Tensor>>
    where
        Self: Sized,
    {
        let states: Vec<_> = inputs.iter().map(|t| grad_state(t)).collect();
        if let Some(index) = states.iter().position(|s| !s.defined) {
            return Err(Error::invalid("inputs", format_args!("tensor {index} is undefined")));
        }
        let recording = libtorch::grad_enabled();
        let needs = states.iter().map(|s| recording && s.requires_grad).collect();
        libtorch::apply_function(Box::new(Applied { function: self, needs }), inputs)
    }
}

/// A function with what it must know of its inputs.
struct Applied<F> {
    function: F,
    needs: Vec<bool>,
}

impl<F: Function> RawFunction for Applied<F> {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Forward> {
        let mut ctx = Context { saved: Vec::new(), needs: self.needs.clone(), materialize: false };
        let outputs = self.function.forward(&mut ctx, inputs)?;
        match outputs.iter().chain(&ctx.saved).all(Tensor::defined) {
            true => Ok(Forward { outputs, saved: ctx.saved, materialize: ctx.materialize }),
            false => Err(Error::Callback {
                reason: "the forward of a Function returned or saved an undefined tensor".to_owned(),
            }),
        }
    }

    fn backward(&mut self, saved: Vec<Tensor>, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let ctx = Context { saved, needs: self.needs.clone(), materialize: false };
        let results = self.function.backward(&ctx, grads)?;
        if results.len() != self.needs.len() {
            return Err(Error::Callback {
                reason: format!(
                    "the backward of a Function returned {} gradients for {} inputs",
                    results.len(),
                    self.needs.len()
                ),
            });
        }
        Ok(results)
    }
}
