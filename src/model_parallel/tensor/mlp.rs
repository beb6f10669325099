//! The feed-forward part of a transformer, split by hidden features.

use std::borrow::Borrow;

use tch::{Tensor, nn};

use super::{ColumnParallelLinear, LinearInit, ParallelDropout, ParallelLinearConfig, RowParallelLinear};
use crate::model_parallel::escape::or_raise;
use crate::{ProcessGroup, Result};

/// What comes between the two linear layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// The Gaussian error linear unit.
    #[default]
    Gelu,
    /// Its approximation by tanh, as in GPT-2.
    GeluTanh,
    /// The rectified linear unit.
    Relu,
    /// A gated unit: `silu(gate) * up`, with gate and up as one fused layer (Shazeer, "GLU variants", 2020).
    SwiGlu,
}

/// Two linear layers with an activation between: column-parallel `up`, row-parallel `down`.
///
/// Its input and output are the same on every rank, or with `sequence_parallel` each rank's part of the sequence.
/// `config.bias` and `config.sequence_parallel` are looked at.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn, nn::Module};
/// use tch_distributed::model_parallel::tensor::{Activation, ParallelLinearConfig, ParallelMlp};
/// use tch_distributed::testing;
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let config = ParallelLinearConfig { bias: false, ..Default::default() };
///     let mlp = ParallelMlp::new(&vs.root(), 4, 8, Activation::SwiGlu, config, &group).unwrap();
///     assert_eq!(vs.variables()["up.weight"].size(), [8, 4]); // half of gate and of up
///     assert_eq!(mlp.forward(&Tensor::ones([5, 4], (Kind::Float, Device::Cpu))).size(), [5, 4]);
/// });
/// ```
#[derive(Debug)]
pub struct ParallelMlp {
    up: ColumnParallelLinear,
    down: RowParallelLinear,
    activation: Activation,
    dropout: Option<ParallelDropout>,
    group: ProcessGroup,
}

impl ParallelMlp {
    /// The layers `up` (`hidden` outputs; twice that for SwiGLU: first the gate, then up) and `down`.
    ///
    /// # Errors
    /// As [`ColumnParallelLinear::new`].
    pub fn new<'a>(
        path: impl Borrow<nn::Path<'a>>,
        width: i64,
        hidden: i64,
        activation: Activation,
        config: ParallelLinearConfig,
        group: &ProcessGroup,
    ) -> Result<Self> {
        Self::with_init(path, width, hidden, activation, config, [LinearInit::default(); 2], group)
    }

    /// The same with other initial weights of `up` and `down`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_init<'a>(
        path: impl Borrow<nn::Path<'a>>,
        width: i64,
        hidden: i64,
        activation: Activation,
        config: ParallelLinearConfig,
        [up, down]: [LinearInit; 2],
        group: &ProcessGroup,
    ) -> Result<Self> {
        let path = path.borrow();
        let config = ParallelLinearConfig { gather_output: false, input_is_parallel: true, ..config };
        let parts = if activation == Activation::SwiGlu { vec![hidden, hidden] } else { vec![hidden] };
        let up = ColumnParallelLinear::fused(path / "up", width, &parts, config, up, group)?;
        let down = RowParallelLinear::with_init(path / "down", hidden, width, config, down, group)?;
        Ok(Self { up, down, activation, dropout: None, group: group.clone() })
    }

    /// In training each hidden feature is zero with probability `p`, after the activation
    /// ([`f_forward_t`](Self::f_forward_t)). Each rank drops features of its own share, from a random stream of its
    /// own that `seed` begins on all ranks.
    ///
    /// # Errors
    /// `InvalidArgument` where `p` is no probability.
    pub fn with_dropout(mut self, p: f64, seed: u64) -> Result<Self> {
        self.dropout = Some(ParallelDropout::split(p, seed, self.up.ws.device(), &self.group)?);
        Ok(self)
    }

    /// The layer's outputs, without dropout.
    ///
    /// # Errors
    /// As [`ColumnParallelLinear::f_forward`] and [`RowParallelLinear::f_forward`].
    pub fn f_forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.f_forward_t(xs, false)
    }

    /// The layer's outputs, in training with the dropout it may have.
    ///
    /// # Errors
    /// As [`f_forward`](Self::f_forward).
    pub fn f_forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let up = self.up.f_forward(xs)?;
        let hidden = match self.activation {
            Activation::Gelu => up.f_gelu("none")?,
            Activation::GeluTanh => up.f_gelu("tanh")?,
            Activation::Relu => up.f_relu()?,
            Activation::SwiGlu => {
                let half = up.size().last().map_or(0, |n| n / 2);
                let (gate, up) = (up.f_narrow(-1, 0, half)?, up.f_narrow(-1, half, half)?);
                gate.f_silu()?.f_mul(&up)?
            }
        };
        match self.dropout.as_ref().filter(|_| train) {
            Some(dropout) => self.down.f_forward(&dropout.forward(&hidden, true)?),
            None => self.down.f_forward(&hidden),
        }
    }
}

impl nn::Module for ParallelMlp {
    fn forward(&self, xs: &Tensor) -> Tensor {
        or_raise(self.f_forward(xs))
    }
}
