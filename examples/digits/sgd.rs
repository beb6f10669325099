//! Stochastic gradient descent with momentum, as `torch.optim.SGD` does it. tch's own optimizers do not
//! give their state away; this one can be saved, and so a resumed run goes on to the bit.

use tch::{Tensor, nn};

pub(crate) struct Sgd {
    pub(crate) lr: f64,
    momentum: f64,
    /// Name, parameter, velocity.
    pub(crate) state: Vec<(String, Tensor, Tensor)>,
}

impl Sgd {
    pub(crate) fn new(vs: &nn::VarStore, lr: f64, momentum: f64) -> Self {
        let mut state: Vec<_> = vs
            .variables()
            .into_iter()
            .filter(|(_, tensor)| tensor.requires_grad())
            .map(|(name, tensor)| {
                let velocity = tensor.zeros_like().detach();
                (name, tensor, velocity)
            })
            .collect();
        state.sort_by(|a, b| a.0.cmp(&b.0));
        Self { lr, momentum, state }
    }

    pub(crate) fn zero_grad(&mut self) {
        for (_, parameter, _) in &mut self.state {
            parameter.zero_grad();
        }
    }

    pub(crate) fn step(&mut self) {
        tch::no_grad(|| {
            for (_, parameter, velocity) in &mut self.state {
                *velocity *= self.momentum;
                *velocity += parameter.grad();
                *parameter -= &*velocity * self.lr;
            }
        });
    }
}
