//! Layer normalization of a sequence that may be split.

use std::borrow::Borrow;

use tch::nn::{self, LayerNormConfig};
use tch::{Kind, Tensor};

use crate::functional::copy_all_to_group;
use crate::model_parallel::escape::or_raise;
use crate::{ProcessGroup, Result};

/// Layer normalization whose weights are whole on every rank.
///
/// With `sequence_parallel` each rank normalizes its part of the sequence, and the weights' gradients are summed
/// over the group in one operation; without it this is tch's own layer.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn, nn::Module};
/// use tch_distributed::model_parallel::tensor::ParallelLayerNorm;
/// use tch_distributed::testing;
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let norm = ParallelLayerNorm::new(&vs.root(), 4, Default::default(), true, &group);
///     let part = Tensor::ones([3, 4], (Kind::Float, Device::Cpu));
///     norm.forward(&part).sum(Kind::Float).backward();
///     // Three positions on each of two ranks.
///     assert_eq!(Vec::<f32>::try_from(norm.bs.grad()).unwrap(), [6.0; 4]);
/// });
/// ```
#[derive(Debug)]
pub struct ParallelLayerNorm {
    /// The weight: `[width]`.
    pub ws: Tensor,
    /// The bias: `[width]`.
    pub bs: Tensor,
    eps: f64,
    sequence_parallel: bool,
    group: ProcessGroup,
}

impl ParallelLayerNorm {
    /// A layer with the initial weights of the configuration.
    pub fn new<'a>(
        path: impl Borrow<nn::Path<'a>>,
        width: i64,
        config: LayerNormConfig,
        sequence_parallel: bool,
        group: &ProcessGroup,
    ) -> Self {
        let path = path.borrow();
        let ws = path.var("weight", &[width], config.ws_init);
        let bs = path.var("bias", &[width], config.bs_init);
        Self { ws, bs, eps: config.eps, sequence_parallel, group: group.clone() }
    }

    /// The normalized values.
    ///
    /// # Errors
    /// `Torch` for an input of another width; in the backward those of the group's collectives.
    pub fn f_forward(&self, xs: &Tensor) -> Result<Tensor> {
        let (mut ws, mut bs) = (self.ws.shallow_clone(), self.bs.shallow_clone());
        if self.sequence_parallel
            && let [w, b] = copy_all_to_group(&[&ws, &bs], &self.group)?.as_slice()
        {
            (ws, bs) = (w.shallow_clone(), b.shallow_clone());
        }
        Ok(xs.f_layer_norm(ws.size(), Some(&ws), Some(&bs), self.eps, xs.kind() != Kind::Double)?)
    }
}

impl nn::Module for ParallelLayerNorm {
    fn forward(&self, xs: &Tensor) -> Tensor {
        or_raise(self.f_forward(xs))
    }
}
