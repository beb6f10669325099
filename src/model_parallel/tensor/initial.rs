//! Initial weights: drawn in full once, so that a split layer begins as the unsplit one would.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use once_cell::sync::Lazy;
use tch::nn::{self, Init};
use tch::{Device, Kind, Tensor};

use super::split::Split;
use crate::{ProcessGroup, Result};

/// How a split linear layer's weight and bias begin. The default is that of [`tch::nn::linear`].
#[derive(Clone, Copy, Debug)]
pub struct LinearInit {
    /// The weight.
    pub ws: Init,
    /// The bias; `None`: uniform up to one over the root of the inputs.
    pub bs: Option<Init>,
}

impl Default for LinearInit {
    fn default() -> Self {
        Self { ws: nn::init::DEFAULT_KAIMING_UNIFORM, bs: None }
    }
}

impl LinearInit {
    pub(super) fn bias(&self, in_dim: i64) -> Init {
        let bound = 1.0 / (in_dim as f64).sqrt();
        self.bs.unwrap_or(Init::Uniform { lo: -bound, up: bound })
    }
}

/// One tensor to begin with.
pub(super) struct Draw {
    pub(super) init: Init,
    pub(super) shape: Vec<i64>,
    pub(super) split: Option<Split>,
}

/// Tells processes apart: ranks that are threads share libtorch's random stream, so only one of them may draw.
static PROCESS: Lazy<i64> = Lazy::new(|| RandomState::new().hash_one(std::process::id()) as i64);

/// Draws the tensors one after another, whole, and gives this rank its shards.
pub(super) fn draw(draws: &[Draw], kind: Kind, device: Device, group: &ProcessGroup) -> Result<Vec<Tensor>> {
    let _no_grad = tch::no_grad_guard();
    let random = draws.iter().any(|d| !matches!(d.init, Init::Const(_)));
    // No rank draws before all are here: a thread that still seeds would seed for all.
    let draws_here = !random || group.size() == 1 || {
        let mine = Tensor::f_from_slice(&[*PROCESS])?.f_to_device(device)?;
        let mut all = Tensor::f_empty([group.size() as i64], (Kind::Int64, device))?;
        group.all_gather_into_tensor(&mut all, &mine)?;
        group.rank() == 0 || all.f_int64_value(&[0])? != *PROCESS
    };
    let full = draws
        .iter()
        .map(|d| match draws_here || matches!(d.init, Init::Const(_)) {
            true => nn::f_init(d.init, &d.shape, device, kind),
            false => Tensor::f_empty(&d.shape, (kind, device)),
        })
        .collect::<Result<Vec<_>, _>>()?;
    full.into_iter()
        .zip(draws)
        .map(|(mut full, d)| {
            if !matches!(d.init, Init::Const(_)) && group.size() > 1 {
                group.broadcast(&mut full, 0)?;
            }
            d.split.as_ref().map_or(Ok(full.shallow_clone()), |split| split.take(&full, group.rank()))
        })
        .collect()
}
