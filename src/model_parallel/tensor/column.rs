//! A linear layer split by outputs.

use std::borrow::Borrow;

use tch::{Tensor, nn};

use super::initial::{Draw, draw};
use super::split::Split;
use super::{LinearInit, ParallelLinearConfig, check_features, check_positive, layout, sequence_dim};
use crate::functional::{all_gather_even, copy_to_group, gather_sized};
use crate::model_parallel::escape::or_raise;
use crate::{Error, ProcessGroup, Result};

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
    split: Split,
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
        let path = path.borrow();
        check_positive("in_dim", in_dim)?;
        check_positive("out_dim", parts.iter().copied().min().unwrap_or(0))?;
        let split = Split::new(0, parts, group.size());
        let out_dim = split.full();
        let mut draws = Vec::new();
        if config.bias {
            draws.push(Draw { init: init.bias(in_dim), shape: vec![out_dim], split: Some(split.clone()) });
        }
        draws.push(Draw { init: init.ws, shape: vec![out_dim, in_dim], split: Some(split.clone()) });
        let mut drawn = draw(&draws, path.kind(), path.device(), group)?.into_iter();
        let bs = config.bias.then(|| drawn.next()).flatten();
        let ws = drawn.next().ok_or_else(|| Error::invalid("path", "no weight was drawn"))?;
        Ok(Self::register(path, ws, bs, split, config, group))
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
        let _no_grad = tch::no_grad_guard();
        let path = path.borrow();
        let (out_dim, _) = weight_size(weight)?;
        let split = Split::new(0, &[out_dim], group.size());
        let take = |t: &Tensor| split.take(&t.f_to_device(path.device())?, group.rank());
        let ws = take(weight)?;
        let bs = bias.map(take).transpose()?;
        Ok(Self::register(path, ws, bs, split, config, group))
    }

    fn register(
        path: &nn::Path<'_>,
        ws: Tensor,
        bs: Option<Tensor>,
        split: Split,
        config: ParallelLinearConfig,
        group: &ProcessGroup,
    ) -> Self {
        // Bias before weight, as tch registers its own.
        let bs = bs.map(|bs| layout::add_shard(path, "bias", bs, &split));
        let ws = layout::add_shard(path, "weight", ws, &split);
        Self { ws, bs, split, config, group: group.clone() }
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
        let all = gather_sized(&ys, last, self.split.lens(), &self.group)?;
        self.split.join(&all, last)
    }
}

impl nn::Module for ColumnParallelLinear {
    fn forward(&self, xs: &Tensor) -> Tensor {
        or_raise(self.f_forward(xs))
    }
}

/// A linear weight's outputs and inputs.
pub(super) fn weight_size(weight: &Tensor) -> Result<(i64, i64)> {
    weight.size2().map_err(|_| Error::ShapeMismatch {
        argument: "weight",
        expected: "two dimensions, outputs and inputs".to_owned(),
        got: format!("{:?}", weight.size()),
    })
}
