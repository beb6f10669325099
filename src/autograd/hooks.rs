//! Hooks on gradients, and callbacks at the end of backward.

use std::fmt;

use tch::Tensor;

use super::backward::alike;
use crate::libtorch::{self, Registration, grad_state};
use crate::{Error, Result};

/// A registered hook. Dropping it removes the hook.
#[must_use = "dropping the handle removes the hook: keep it, or detach() it"]
pub struct HookHandle(Option<Registration>);

impl HookHandle {
    /// Removes the hook now. A call of it that is under way on another thread runs to its end.
    pub fn remove(self) {}

    /// Leaves the hook in place for as long as the tensor lives.
    ///
    /// A detached hook that captured its own tensor keeps it alive for ever: capture something else
    /// (an index, a channel), or keep the handle.
    pub fn detach(mut self) {
        self.0 = None;
    }
}

impl Drop for HookHandle {
    fn drop(&mut self) {
        if let Some(registration) = &self.0 {
            registration.remove();
        }
    }
}

impl fmt::Debug for HookHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HookHandle").finish_non_exhaustive()
    }
}

/// Calls `f` with the leaf tensor `t` each time a backward has accumulated its gradient.
///
/// It fires once a backward, also for a parameter that is used twice, when `t.grad()` is complete;
/// not when `t` takes no part, nor in [`tch::Tensor::run_backward`] with `t` among its inputs. Several
/// hooks of one tensor run in the order in which they were registered. The hook belongs to the tensor,
/// not to this handle of it: it survives `shallow_clone` and `set_data`, and may be registered after
/// forward. It runs on the thread that calls backward, on CUDA on autograd's thread of the device. Grad
/// mode is off inside, unless backward creates a graph.
///
/// A backward inside it that comes to the same hook is refused with [`Callback`](Error::Callback); see
/// [`after_backward`].
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_distributed::autograd;
///
/// let (seen, norms) = std::sync::mpsc::channel();
/// let w = Tensor::ones([4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let _hook = autograd::on_grad_accumulated(&w, move |w| {
///     seen.send(w.grad().norm().double_value(&[])).ok();
///     Ok(())
/// })?;
/// autograd::backward(&(&w * 3.0).sum(Kind::Float))?;
/// assert_eq!(norms.recv().unwrap(), 6.0);
/// # Ok::<(), tch_distributed::Error>(())
/// ```
///
/// # Errors
/// [`InvalidArgument`](Error::InvalidArgument) if `t` is not a leaf or requires no gradient. An error
/// of `f` ends the backward and is what [`backward`](super::backward()) returns; a panic becomes
/// [`Callback`](Error::Callback).
#[doc(alias = "register_post_accumulate_grad_hook")]
pub fn on_grad_accumulated(
    t: &Tensor,
    mut f: impl FnMut(&Tensor) -> Result<()> + Send + 'static,
) -> Result<HookHandle> {
    let state = grad_state(t);
    if !state.defined || !state.requires_grad {
        return Err(requires_none(state.defined));
    }
    if !state.leaf {
        return Err(Error::invalid(
            "t",
            "the tensor is not a leaf (it was computed from others), so no gradient is accumulated in it; \
             on_grad sees the gradient that flows through it",
        ));
    }
    Ok(HookHandle(Some(libtorch::hook_accumulated(t, Box::new(move |t| f(t).map(|()| None)))?)))
}

/// Calls `f` with the gradient on its way to `t`, a leaf or the result of a computation; what `f`
/// returns takes its place (`None`: unchanged).
///
/// For a leaf it runs before the gradient is accumulated and sees this backward's share alone. Several
/// hooks run in the order in which they were registered, each with the gradient the one before it
/// returned. If `t` is changed in place later on, the hook stays with the value it had.
///
/// ```
/// use tch::{Kind, Tensor};
/// use tch_distributed::autograd;
///
/// let x = Tensor::from_slice(&[1.0f32, -5.0]).set_requires_grad(true);
/// let activation = &x * 100.0;
/// let _clip = autograd::on_grad(&activation, |grad| Ok(Some(grad.clamp(-1.0, 1.0))))?;
/// autograd::backward(&(activation * 7.0).sum(Kind::Float))?;
/// assert_eq!(Vec::<f32>::try_from(&x.grad())?, [100.0, 100.0]);
/// # Ok::<(), tch_distributed::Error>(())
/// ```
///
/// # Errors
/// [`InvalidArgument`](Error::InvalidArgument) if `t` requires no gradient. An error of `f`, or a
/// gradient of another shape, kind or device, ends the backward and is what
/// [`backward`](super::backward()) returns; a panic becomes [`Callback`](Error::Callback).
#[doc(alias = "register_hook")]
pub fn on_grad(
    t: &Tensor,
    mut f: impl FnMut(&Tensor) -> Result<Option<Tensor>> + Send + 'static,
) -> Result<HookHandle> {
    let state = grad_state(t);
    if !state.defined || !state.requires_grad {
        return Err(requires_none(state.defined));
    }
    let checked = move |grad: &Tensor| {
        let other = f(grad)?;
        if let Some(other) = &other {
            alike("the gradient that the hook returned", grad, other)?;
        }
        Ok(other)
    };
    Ok(HookHandle(Some(libtorch::hook_grad(t, Box::new(checked))?)))
}

/// Calls `f` once, when the backward that this thread is in has done everything else. Works inside
/// hooks and [`Function`](super::Function)s only.
///
/// It runs on the thread that finishes the last node: on the CPU that is the one that called backward, on CUDA as a
/// rule autograd's thread of the device. It may queue more, and may run a backward itself. If the
/// backward fails, it is dropped without having run: state that depends on it must be reset by the
/// next forward.
///
/// ```
/// use tch::{Kind, Tensor};
/// use tch_distributed::autograd;
///
/// let (log, lines) = std::sync::mpsc::channel();
/// let w = Tensor::from(1.0f32).set_requires_grad(true);
/// let _hook = autograd::on_grad_accumulated(&w, move |_| {
///     let end = log.clone();
///     autograd::after_backward(move || Ok(end.send("end").unwrap()))?;
///     log.send("hook").unwrap();
///     Ok(())
/// })?;
/// autograd::backward(&(&w * &w))?;
/// assert_eq!(lines.try_iter().collect::<Vec<_>>(), ["hook", "end"]);
/// # Ok::<(), tch_distributed::Error>(())
/// ```
///
/// # Errors
/// [`InvalidArgument`](Error::InvalidArgument) outside a backward. An error of `f` is what
/// [`backward`](super::backward()) returns.
#[doc(alias = "queue_callback")]
pub fn after_backward(f: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    if !libtorch::in_backward() {
        return Err(Error::invalid(
            "f",
            "after_backward works inside hooks only: no backward runs on this thread",
        ));
    }
    libtorch::after_backward(Box::new(f))
}

fn requires_none(defined: bool) -> Error {
    let reason = if defined { "the tensor requires no gradient" } else { "the tensor is undefined" };
    Error::invalid("t", reason)
}
