//! Sending to another rank so that the gradient comes back.

use tch::{Device, Kind, Tensor};

use super::parts::{defined, first, fresh, only, refuse_create_graph};
use crate::autograd::{Context, Function};
use crate::{ProcessGroup, Result};

/// Sends `t` to rank `dst` and gives a **zero** (a scalar) that must be added to this rank's loss: when its backward
/// comes by, it waits for the gradient that [`recv`] on the other rank sends back.
///
/// That gradient comes whether or not `t` requires one (it is dropped if not): the other rank cannot know. So the
/// zero requires a gradient wherever gradients are on and `t` is of a kind that can have one. Where no gradient
/// shall come back, use [`ProcessGroup::send`] and [`ProcessGroup::recv`], or turn gradients off on both ranks.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_distributed::{functional, testing};
///
/// testing::run_threads(2, |group| {
///     let x = Tensor::full([2], 3.0, (Kind::Float, Device::Cpu)).set_requires_grad(true);
///     if group.rank() == 0 {
///         let sent = functional::send(&x, 1, 7, &group).unwrap();
///         sent.backward();
///         assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [6.0, 6.0]); // of the other rank's loss
///     } else {
///         let y = functional::recv(&x, 0, 7, &group).unwrap();
///         y.square().sum(Kind::Float).backward();
///     }
/// });
/// ```
///
/// # Errors
/// Those of [`ProcessGroup::send`].
pub fn send(t: &Tensor, dst: usize, tag: u32, group: &ProcessGroup) -> Result<Tensor> {
    defined(t, "t")?;
    first(Send { dst, tag, group: group.clone(), sent: None }.apply(&[t, &anchor(t)?])?)
}

/// Receives from rank `src` a tensor of the shape, kind and device of `like`. Its gradient is sent back, if
/// gradients are on, so it must go into this rank's loss; the sender uses [`send`] with the same tag, and its zero
/// in its own loss: what the one sends back, the other must wait for.
///
/// # Errors
/// Those of [`ProcessGroup::recv`].
pub fn recv(like: &Tensor, src: usize, tag: u32, group: &ProcessGroup) -> Result<Tensor> {
    defined(like, "like")?;
    let like = like.f_detach()?;
    let anchor = anchor(&like)?;
    first(Recv { src, tag, group: group.clone(), like }.apply(&[&anchor])?)
}

/// Autograd comes only to a function whose input requires a gradient: this one does if `like` can, on both ranks.
fn anchor(like: &Tensor) -> Result<Tensor> {
    let anchor = Tensor::f_zeros([0_i64; 1], (like.kind(), like.device()))?;
    let differentiable = like.f_is_floating_point()? || like.f_is_complex()?;
    Ok(anchor.f_set_requires_grad(differentiable)?)
}

struct Send {
    dst: usize,
    tag: u32,
    group: ProcessGroup,
    sent: Option<(Vec<i64>, Kind, Device)>,
}

impl Function for Send {
    fn forward(&mut self, _: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let t = &inputs[0];
        self.group.send(t, self.dst, self.tag)?;
        self.sent = Some((t.size(), t.kind(), t.device()));
        Ok(vec![Tensor::f_zeros([0_i64; 0], (t.kind(), t.device()))?])
    }

    fn backward(&mut self, ctx: &Context, _: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        refuse_create_graph("send")?;
        let Some((size, kind, device)) = &self.sent else { return Ok(vec![None, None]) };
        let mut grad = Tensor::f_empty(size, (*kind, *device))?;
        self.group.recv(&mut grad, self.dst, self.tag)?;
        Ok(vec![ctx.needs_input_grad(0).then_some(grad), None])
    }
}

struct Recv {
    src: usize,
    tag: u32,
    group: ProcessGroup,
    like: Tensor,
}

impl Function for Recv {
    fn forward(&mut self, ctx: &mut Context, _: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.materialize_grads();
        let mut t = Tensor::f_empty(self.like.size(), (self.like.kind(), self.like.device()))?;
        self.group.recv(&mut t, self.src, self.tag)?;
        Ok(vec![t])
    }

    fn backward(&mut self, _: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        self.group.send(&fresh(only(grads)?)?, self.src, self.tag)?;
        Ok(vec![None])
    }
}
