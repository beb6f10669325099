//! A linear layer split by outputs.

use std::borrow::Borrow;

use tch::{Tensor, nn};

use super::linear::{Parameters, Sharding, weight_size};
use super::{LinearInit, ParallelLinearConfig, check_features, sequence_dim};
use crate::functional::{all_gather_even, copy_to_group, gather_sized};
use crate::model_parallel::escape::or_raise;
use crate::{ProcessGroup, Result};

/// A linear layer whose outputs are split: each rank holds some rows of the `[out, in]` weight and of the bias.
///
/// The input is the same on every rank (or, with `sequence_parallel`, each rank's part of the sequence); the output
/// is this rank's part of the features, or all of them with `gather_output`.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn, nn::Module};
/// use tch_distributed::model_parallel::tensor::{ColumnParallelLinear, ParallelLinearConfig};
/// use tch_distributed::testing;
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let config = ParallelLinearConfig::default();
///     let layer = ColumnParallelLinear::new(&vs.root(), 4, 6, config, &group).unwrap();
///     assert_eq!(layer.ws.size(), [3, 4]);
///     let xs = Tensor::ones([5, 4], (Kind::Float, Device::Cpu));
///     assert_eq!(layer.forward(&xs).size(), [5, 3]);
/// });
/// ```
#[doc(alias = "ColwiseParallel")]
#[derive(Debug)]
pub struct ColumnParallelLinear {
    /// This rank's rows of the weight: `[out share, in]`.
    pub ws: Tensor,
    /// This rank's part of the bias: `[out share]`.
    pub bs: Option<Tensor>,
    sharding: Sharding,
    config: ParallelLinearConfig,
    group: ProcessGroup,
}

impl ColumnParallelLinear {
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
        Self::fused(path, in_dim, &[out_dim], config, LinearInit::default(), group)
    }

    /// Several layers in one, such as query, key and value: `parts` are their outputs. Each part is split by itself,
    /// so a rank holds its share of every part, one after another.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn fused<'a>(
        path: impl Borrow<nn::Path<'a>>,
        in_dim: i64,
        parts: &[i64],
        config: ParallelLinearConfig,
        init: LinearInit,
        group: &ProcessGroup,
    ) -> Result<Self> {
        let sharding = Sharding::by_outputs(parts, group.size());
        let size = [sharding.ws.full(), in_dim];
        let parameters = sharding.draw(path.borrow(), size, config.bias, init, group)?;
        Ok(Self::of(parameters, sharding, config, group))
    }

    /// A layer whose shards are taken from full tensors that every rank has: `weight` `[out, in]`, `bias` `[out]`.
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
        let (out_dim, _) = weight_size(weight)?;
        let sharding = Sharding::by_outputs(&[out_dim], group.size());
        let parameters = sharding.take(path.borrow(), weight, bias, group)?;
        Ok(Self::of(parameters, sharding, config, group))
    }

    fn of(
        Parameters { ws, bs }: Parameters,
        sharding: Sharding,
        config: ParallelLinearConfig,
        group: &ProcessGroup,
    ) -> Self {
        Self { ws, bs, sharding, config, group: group.clone() }
    }

    /// The layer's outputs.
    ///
    /// # Errors
    /// `ShapeMismatch` for an input of another width; those of the group's collectives.
    pub fn f_forward(&self, xs: &Tensor) -> Result<Tensor> {
        check_features(xs, self.ws.size()[1])?;
        let xs = match self.config.sequence_parallel {
            true => all_gather_even(xs, sequence_dim(xs)?, &self.group)?,
            false => copy_to_group(xs, &self.group)?,
        };
        let ys = xs.f_linear(&self.ws, self.bs.as_ref())?;
        if !self.config.gather_output {
            return Ok(ys);
        }
        let last = ys.dim() - 1;
        let all = gather_sized(&ys, last, self.sharding.ws.lens(), &self.group)?;
        self.sharding.ws.join(&all, last)
    }
}

impl nn::Module for ColumnParallelLinear {
    fn forward(&self, xs: &Tensor) -> Tensor {
        or_raise(self.f_forward(xs))
    }
}
