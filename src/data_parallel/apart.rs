//! Keeps the memory of gradients apart, so that an average may be written in place.

use tch::Tensor;

use crate::Result;
use crate::autograd::{self, HookHandle};
use crate::libtorch;

/// Gives `parameter` memory of its own where the gradient on its way to it shares memory with another
/// tensor.
///
/// Autograd lets a leaf take over the gradient tensor that nobody else holds, and does not ask who is in
/// the same memory: with `&hidden + parameter.view([1, 3])` it is the gradient that flows on to `hidden`, or
/// that of another parameter. That is well as long as nobody writes to it. An exchange does, while backward
/// runs on; so does the accumulation of a second backward. A gradient that is added to an older one, or that
/// autograd copies anyway, costs nothing more here.
pub(super) fn keep_apart(parameter: &Tensor) -> Result<HookHandle> {
    // The hook holds its own tensor: its handle is always dropped, which ends the circle.
    let own = parameter.shallow_clone();
    autograd::on_grad(parameter, move |gradient| {
        if !libtorch::shares_memory(gradient)? || own.grad().defined() {
            return Ok(None);
        }
        // As the parameter lies in memory, or autograd would copy it again.
        let mut copy = own.f_detach()?.f_empty_like()?;
        copy.f_copy_(gradient)?;
        Ok(Some(copy))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use tch::nn::{self, ModuleT};
    use tch::{Device, Kind, Tensor};

    use super::keep_apart;
    use crate::autograd::{backward, on_grad};

    const F: (Kind, Device) = (Kind::Float, Device::Cpu);

    #[test]
    fn parameters_used_through_views_get_gradients_in_memory_of_their_own() {
        let leaf = || Tensor::zeros([4], F).set_requires_grad(true);
        let add = |a: &Tensor, b: &Tensor| a.view([2, 2]).view([4]) + b.view([4]);
        let factor = Tensor::arange(4, F);
        let (a, b) = (leaf(), leaf());
        let _hooks = [keep_apart(&a).unwrap(), keep_apart(&b).unwrap()];
        for total in 1..3 {
            backward(&(add(&a, &b) * &factor).sum(Kind::Float)).unwrap();
            assert_ne!(a.grad().data_ptr(), b.grad().data_ptr());
            assert_eq!((a.grad(), b.grad()), (&factor * total, &factor * total));
        }
    }

    #[test]
    fn ordinary_gradients_are_not_copied() {
        let vs = nn::VarStore::new(Device::Cpu);
        let root = vs.root();
        let net = nn::seq_t()
            .add(nn::conv2d(&root / "conv", 2, 4, 3, Default::default()))
            .add(nn::batch_norm2d(&root / "norm", 4, Default::default()))
            .add_fn(|x| x.relu().flatten(1, -1))
            .add(nn::linear(&root / "one", 16, 8, Default::default()))
            .add(nn::layer_norm(&root / "layer", vec![8], Default::default()))
            .add(nn::linear(&root / "two", 8, 3, Default::default()));
        let (seen, all) = channel();
        let tell = |index: usize| {
            let seen = seen.clone();
            move |gradient: &Tensor| {
                seen.send((index, gradient.data_ptr() as usize)).unwrap();
                Ok(None)
            }
        };
        let parameters = vs.trainable_variables();
        // One that tells what comes, ours, and one that tells what ours made of it.
        let hook =
            |(index, p): (usize, &Tensor)| [on_grad(p, tell(index)), keep_apart(p), on_grad(p, tell(index))];
        let hooks: Vec<_> = parameters.iter().enumerate().flat_map(hook).collect();
        let loss = net.forward_t(&Tensor::ones([2, 2, 4, 4], F), true).square().mean(Kind::Float);
        backward(&loss).unwrap();
        let seen: Vec<_> = all.try_iter().collect();
        assert_eq!(seen.len(), 2 * parameters.len());
        for pair in seen.chunks(2) {
            let (index, pointer) = pair[0];
            assert_eq!(pair[1], pair[0], "a copy was made of gradient {index}");
            assert_eq!(
                parameters[index].grad().data_ptr() as usize,
                pointer,
                "autograd copied gradient {index}"
            );
        }
        assert!(hooks.into_iter().all(|hook| hook.is_ok()));
    }
}
