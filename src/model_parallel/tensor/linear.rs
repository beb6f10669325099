//! The parameters of a split linear layer: what column- and row-parallel ones have in common.

use tch::{Tensor, nn};

use super::initial::{Draw, draw};
use super::split::Split;
use super::{LinearInit, check_positive, layout};
use crate::{Error, ProcessGroup, Result};

/// How weight and bias are split.
#[derive(Debug)]
pub(super) struct Sharding {
    pub(super) ws: Split,
    /// None: every rank has the whole bias.
    bs: Option<Split>,
}

/// This rank's weight and bias, registered in the model.
pub(super) struct Parameters {
    pub(super) ws: Tensor,
    pub(super) bs: Option<Tensor>,
}

impl Sharding {
    /// By outputs, which may be those of several layers, one after another.
    pub(super) fn by_outputs(parts: &[i64], ranks: usize) -> Self {
        let ws = Split::new(0, parts, ranks);
        Self { bs: Some(ws.clone()), ws }
    }

    pub(super) fn by_inputs(in_dim: i64, ranks: usize) -> Self {
        Self { ws: Split::new(1, &[in_dim], ranks), bs: None }
    }

    /// Parameters as [`tch::nn::linear`] would draw them.
    pub(super) fn draw(
        &self,
        path: &nn::Path<'_>,
        [out_dim, in_dim]: [i64; 2],
        bias: bool,
        init: LinearInit,
        group: &ProcessGroup,
    ) -> Result<Parameters> {
        check_positive("in_dim", in_dim)?;
        check_positive("out_dim", self.ws.parts.iter().copied().min().unwrap_or(0).min(out_dim))?;
        let mut draws = Vec::new();
        if bias {
            draws.push(Draw { init: init.bias(in_dim), shape: vec![out_dim], split: self.bs.clone() });
        }
        draws.push(Draw { init: init.ws, shape: vec![out_dim, in_dim], split: Some(self.ws.clone()) });
        let mut drawn = draw(&draws, path.kind(), path.device(), group)?.into_iter();
        let bs = bias.then(|| drawn.next()).flatten();
        let ws = drawn.next().ok_or_else(|| Error::invalid("path", "no weight was drawn"))?;
        Ok(self.register(path, ws, bs))
    }

    /// This rank's parts of full parameters.
    pub(super) fn take(
        &self,
        path: &nn::Path<'_>,
        weight: &Tensor,
        bias: Option<&Tensor>,
        group: &ProcessGroup,
    ) -> Result<Parameters> {
        let _no_grad = tch::no_grad_guard();
        let (out_dim, _) = weight_size(weight)?;
        if let Some(bias) = bias.filter(|bias| bias.size() != [out_dim]) {
            return Err(Error::ShapeMismatch {
                argument: "bias",
                expected: format!("{:?}, the weight's outputs", [out_dim]),
                got: format!("{:?}", bias.size()),
            });
        }
        let ws = self.ws.take(&weight.f_to_device(path.device())?, group.rank())?;
        let (whole, part) = (Split::new(0, &[out_dim], 1), self.bs.as_ref().map(|bs| (bs, group.rank())));
        let (split, rank) = part.unwrap_or((&whole, 0));
        let bs = bias.map(|bs| split.take(&bs.f_to_device(path.device())?, rank)).transpose()?;
        Ok(self.register(path, ws, bs))
    }

    /// Bias before weight, as tch registers its own.
    fn register(&self, path: &nn::Path<'_>, ws: Tensor, bs: Option<Tensor>) -> Parameters {
        let bs = bs.map(|bs| match &self.bs {
            Some(split) => layout::add_shard(path, "bias", bs, split),
            None => path.add("bias", bs, true),
        });
        Parameters { bs, ws: layout::add_shard(path, "weight", ws, &self.ws) }
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
