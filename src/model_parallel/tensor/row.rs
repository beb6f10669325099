//! A linear layer split by inputs.

use std::borrow::Borrow;

use tch::{Tensor, nn};

use super::linear::{Parameters, Sharding, weight_size};
use super::{LinearInit, ParallelLinearConfig, check_features, sequence_dim};
use crate::functional::{copy_to_group, reduce_from_group, reduce_scatter_even, scatter_to_group};
use crate::model_parallel::escape::or_raise;
use crate::{ProcessGroup, Result};

/// A linear layer whose inputs are split: each rank holds some columns of the `[out, in]` weight, and the partial
/// results are summed. The bias is whole on every rank and added once, after the sum.
///
/// The input is this rank's part of the features (or all of them, with `input_is_parallel: false`); the output is
/// the same on every rank, or with `sequence_parallel` this rank's part of the sequence.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn, nn::Module};
/// use tch_distributed::model_parallel::tensor::{ParallelLinearConfig, RowParallelLinear};
/// use tch_distributed::testing;
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let config = ParallelLinearConfig { input_is_parallel: false, ..Default::default() };
///     let layer = RowParallelLinear::new(&vs.root(), 6, 4, config, &group).unwrap();
///     assert_eq!(layer.ws.size(), [4, 3]);
///     let xs = Tensor::ones([5, 6], (Kind::Float, Device::Cpu));
///     assert_eq!(layer.forward(&xs).size(), [5, 4]);
/// });
/// ```
#[doc(alias = "RowwiseParallel")]
#[derive(Debug)]
pub struct RowParallelLinear {
    /// This rank's columns of the weight: `[out, in share]`.
    pub ws: Tensor,
    /// The whole bias: `[out]`.
    pub bs: Option<Tensor>,
    config: ParallelLinearConfig,
    group: ProcessGroup,
    in_dim: i64,
}

impl RowParallelLinear {
    /// A layer with initial weights as [`tch::nn::linear`] would draw them from the same seed.
    ///
    /// # Errors
    /// `InvalidArgument` for a size below one; those of the group's collectives.
    pub fn new<'a>(
        path: impl Borrow<nn::Path<'a>>,
        in_dim: i64,
        out_dim: i64,
        config: ParallelLinearConfig,
        group: &ProcessGroup,
    ) -> Result<Self> {
        Self::with_init(path, in_dim, out_dim, config, LinearInit::default(), group)
    }

    /// A layer with other initial weights.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_init<'a>(
        path: impl Borrow<nn::Path<'a>>,
        in_dim: i64,
        out_dim: i64,
        config: ParallelLinearConfig,
        init: LinearInit,
        group: &ProcessGroup,
    ) -> Result<Self> {
        let sharding = Sharding::by_inputs(in_dim, group.size());
        let size = [out_dim, in_dim];
        let Parameters { ws, bs } = sharding.draw(path.borrow(), size, config.bias, init, group)?;
        Ok(Self { ws, bs, config, group: group.clone(), in_dim })
    }

    /// A layer whose shard is taken from full tensors that every rank has: `weight` `[out, in]`, `bias` `[out]`.
    /// Whether there is a bias is said by `bias`, not by the configuration.
    ///
    /// # Errors
    /// `ShapeMismatch` where weight and bias do not fit.
    pub fn from_full<'a>(
        path: impl Borrow<nn::Path<'a>>,
        weight: &Tensor,
        bias: Option<&Tensor>,
        config: ParallelLinearConfig,
        group: &ProcessGroup,
    ) -> Result<Self> {
        let (_, in_dim) = weight_size(weight)?;
        let sharding = Sharding::by_inputs(in_dim, group.size());
        let Parameters { ws, bs } = sharding.take(path.borrow(), weight, bias, group)?;
        Ok(Self { ws, bs, config, group: group.clone(), in_dim })
    }

    /// The layer's outputs.
    ///
    /// # Errors
    /// `ShapeMismatch` for an input of another width, or a sequence that does not divide; those of the group's
    /// collectives.
    pub fn f_forward(&self, xs: &Tensor) -> Result<Tensor> {
        let part = match self.config.input_is_parallel {
            true => xs.shallow_clone(),
            false => {
                check_features(xs, self.in_dim)?;
                scatter_to_group(xs, -1, &self.group)?
            }
        };
        check_features(&part, self.ws.size()[1])?;
        let partial = part.f_linear(&self.ws, None::<&Tensor>)?;
        if !self.config.sequence_parallel {
            let ys = reduce_from_group(&partial, &self.group)?;
            return self.bs.as_ref().map_or(Ok(ys.shallow_clone()), |bs| Ok(ys.f_add(bs)?));
        }
        let ys = reduce_scatter_even(&partial, sequence_dim(&partial)?, &self.group)?;
        match &self.bs {
            // Each rank adds it to its part of the sequence only, so its gradients are summed.
            Some(bs) => Ok(ys.f_add(&copy_to_group(bs, &self.group)?)?),
            None => Ok(ys),
        }
    }
}

impl nn::Module for RowParallelLinear {
    fn forward(&self, xs: &Tensor) -> Tensor {
        or_raise(self.f_forward(xs))
    }
}
