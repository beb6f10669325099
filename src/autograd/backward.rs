//! Running a backward with typed errors, and setting gradients.

use tch::Tensor;

use crate::libtorch::{self, grad_state};
use crate::{Error, Result};

/// Computes the gradients of all leaves that `loss` depends on, and adds them up in the leaves.
///
/// `loss` has one element. What a hook or a [`Function`](super::Function) failed with is returned as
/// it was, with its type; gradients may then be partly accumulated, and later backwards work.
///
/// The graph is freed; for a second pass through it, and for gradients of gradients, see
/// [`backward_with`].
///
/// ```
/// use tch::Tensor;
/// use tch_distributed::autograd::backward;
///
/// let w = Tensor::from_slice(&[1.0f32, 2.0]).set_requires_grad(true);
/// backward(&w.square().sum(tch::Kind::Float))?;
/// assert_eq!(Vec::<f32>::try_from(&w.grad())?, [2.0, 4.0]);
/// # Ok::<(), tch_distributed::Error>(())
/// ```
///
/// # Errors
/// [`InvalidArgument`](Error::InvalidArgument) if `loss` has more elements than one or does not
/// depend on anything that requires a gradient, [`Callback`](Error::Callback) if a callback panicked,
/// [`Torch`](Error::Torch) for libtorch's own, and whatever callbacks return.
#[doc(alias = "torch.Tensor.backward")]
pub fn backward(loss: &Tensor) -> Result<()> {
    differentiable("loss", loss)?;
    if loss.numel() != 1 {
        return Err(Error::invalid(
            "loss",
            format_args!(
                "it has shape {:?}; one element is expected (or use backward_with_grad)",
                loss.size()
            ),
        ));
    }
    libtorch::backward(&[loss], &[], false, false)
}

/// [`backward`] from several tensors at once, each with the gradient that it gets.
///
/// ```
/// use tch::Tensor;
/// use tch_distributed::autograd::backward_with_grad;
///
/// let w = Tensor::from_slice(&[1.0f32, 2.0]).set_requires_grad(true);
/// let (y, z) = (&w * 3.0, &w * 4.0);
/// let one = Tensor::from_slice(&[1.0f32, 1.0]);
/// backward_with_grad(&[&y, &z], &[&one, &(&one * 10.0)])?;
/// assert_eq!(Vec::<f32>::try_from(&w.grad())?, [43.0, 43.0]);
/// # Ok::<(), tch_distributed::Error>(())
/// ```
///
/// # Errors
/// As [`backward`]; [`ShapeMismatch`](Error::ShapeMismatch), [`KindMismatch`](Error::KindMismatch) or
/// [`DeviceMismatch`](Error::DeviceMismatch) if a gradient is unlike its tensor.
#[doc(alias = "torch.autograd.backward")]
pub fn backward_with_grad(tensors: &[&Tensor], grads: &[&Tensor]) -> Result<()> {
    backward_with(tensors, grads, BackwardOptions::new())
}

/// What a backward leaves behind.
#[derive(Clone, Copy, Debug, Default)]
#[must_use]
pub struct BackwardOptions {
    retain_graph: bool,
    create_graph: bool,
}

impl BackwardOptions {
    /// The graph is freed and gradients have none.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps the graph for another backward through it.
    pub fn retain_graph(mut self, retain: bool) -> Self {
        self.retain_graph = retain;
        self
    }

    /// Records the backward itself, so that gradients can be differentiated; keeps the graph too.
    pub fn create_graph(mut self, create: bool) -> Self {
        self.create_graph = create;
        self
    }
}

/// [`backward_with_grad`] that may keep the graph, or record its own.
///
/// ```
/// use tch::Tensor;
/// use tch_distributed::autograd::{BackwardOptions, backward, backward_with};
///
/// let w = Tensor::from(3.0f64).set_requires_grad(true);
/// let (y, one) = (w.square(), Tensor::from(1.0f64));
/// backward_with(&[&y], &[&one], BackwardOptions::new().retain_graph(true))?;
/// backward(&y)?;
/// assert_eq!(w.grad().double_value(&[]), 12.0);
/// # Ok::<(), tch_distributed::Error>(())
/// ```
///
/// # Errors
/// As [`backward_with_grad`].
#[doc(alias = "torch.autograd.backward")]
pub fn backward_with(tensors: &[&Tensor], grads: &[&Tensor], options: BackwardOptions) -> Result<()> {
    if tensors.len() != grads.len() {
        return Err(Error::invalid(
            "grads",
            format_args!("{} gradients were given for {} tensors", grads.len(), tensors.len()),
        ));
    }
    for (tensor, grad) in tensors.iter().zip(grads) {
        differentiable("tensors", tensor)?;
        alike("grads", tensor, grad)?;
    }
    if tensors.is_empty() {
        return Ok(());
    }
    let BackwardOptions { retain_graph, create_graph } = options;
    libtorch::backward(tensors, grads, retain_graph || create_graph, create_graph)
}

/// Sets the gradient of a tensor (`None`: no gradient, as after `zero_grad`).
///
/// The gradient is shared, not copied: later backwards accumulate into it in place. That is how
/// gradients are made views of one flat buffer.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_distributed::autograd::{backward, set_grad};
///
/// let mut w = Tensor::zeros([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let flat = Tensor::zeros([10], (Kind::Float, Device::Cpu));
/// set_grad(&mut w, Some(&flat.narrow(0, 4, 2)))?;
/// backward(&w.sum(Kind::Float))?;
/// assert_eq!(Vec::<f32>::try_from(&flat)?, [0., 0., 0., 0., 1., 1., 0., 0., 0., 0.]);
/// set_grad(&mut w, None)?;
/// assert!(!w.grad().defined());
/// # Ok::<(), tch_distributed::Error>(())
/// ```
///
/// # Errors
/// [`ShapeMismatch`](Error::ShapeMismatch), [`KindMismatch`](Error::KindMismatch) or
/// [`DeviceMismatch`](Error::DeviceMismatch) if the gradient is unlike the tensor;
/// [`InvalidArgument`](Error::InvalidArgument) if the tensor is undefined or its own gradient.
#[doc(alias = "torch.Tensor.grad")]
pub fn set_grad(t: &mut Tensor, grad: Option<&Tensor>) -> Result<()> {
    if !t.defined() {
        return Err(Error::invalid("t", "the tensor is undefined"));
    }
    let grad = grad.filter(|g| g.defined());
    if let Some(grad) = grad {
        alike("grad", t, grad)?;
        if libtorch::same(t, grad) {
            return Err(Error::invalid("grad", "a tensor cannot be its own gradient"));
        }
    }
    libtorch::set_grad(t, grad)
}

fn differentiable(argument: &'static str, tensor: &Tensor) -> Result<()> {
    let state = grad_state(tensor);
    if !state.defined {
        return Err(Error::invalid(argument, "the tensor is undefined"));
    }
    if !state.requires_grad {
        return Err(Error::invalid(
            argument,
            "the tensor depends on nothing that requires a gradient (or was computed under no_grad)",
        ));
    }
    Ok(())
}

/// A gradient has the shape, kind and device of its tensor.
pub(super) fn alike(argument: &'static str, tensor: &Tensor, grad: &Tensor) -> Result<()> {
    if !grad.defined() {
        return Err(Error::invalid(argument, "the gradient is undefined"));
    }
    let (expected, got) = (tensor.size(), grad.size());
    if expected != got {
        return Err(Error::ShapeMismatch {
            argument,
            expected: format!("{expected:?}"),
            got: format!("{got:?}"),
        });
    }
    let kind = |t: &Tensor| t.f_kind().map_or_else(|e| e.to_string(), |kind| format!("{kind:?}"));
    let (expected, got) = (kind(tensor), kind(grad));
    if expected != got {
        return Err(Error::KindMismatch { argument, expected, got });
    }
    // A sparse gradient (of an embedding, say) has no facts: autograd itself checks its device.
    if let (Ok(tensor), Ok(grad)) = (libtorch::facts(tensor), libtorch::facts(grad))
        && tensor.device != grad.device
    {
        let (expected, got) = (format!("{:?}", tensor.device), format!("{:?}", grad.device));
        return Err(Error::DeviceMismatch { argument, expected, got });
    }
    Ok(())
}
