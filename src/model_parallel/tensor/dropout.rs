//! Dropout whose random streams are the user's.

use tch::Tensor;

use crate::random::Generator;
use crate::{Error, ProcessGroup, Result};

/// Dropout from a generator of its own.
///
/// Where every rank has the same values, all must drop the same: [`replicated`](Self::replicated). Where each has its own
/// part (of the sequence, or of the features between a column- and a row-parallel layer), each must drop
/// independently: [`split`](Self::split). (Megatron-LM's two random states.)
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_distributed::model_parallel::tensor::ParallelDropout;
/// use tch_distributed::testing;
///
/// let masks = testing::run_threads(2, |group| {
///     let ones = Tensor::ones([64], (Kind::Float, Device::Cpu));
///     let drop = |d: &ParallelDropout| Vec::<f32>::try_from(d.forward(&ones, true).unwrap()).unwrap();
///     let same = drop(&ParallelDropout::replicated(0.5, 7, Device::Cpu).unwrap());
///     (same, drop(&ParallelDropout::split(0.5, 7, Device::Cpu, &group).unwrap()))
/// });
/// assert_eq!(masks[0].0, masks[1].0);
/// assert_ne!(masks[0].1, masks[1].1);
/// ```
pub struct ParallelDropout {
    p: f64,
    generator: Generator,
}

impl ParallelDropout {
    /// Every rank drops the same elements; all ranks give the same seed.
    ///
    /// # Errors
    /// `InvalidArgument` where `p` is no probability; those of [`Generator::on`].
    pub fn replicated(p: f64, seed: u64, device: tch::Device) -> Result<Self> {
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::invalid("p", format!("{p} was given; a probability is expected")));
        }
        Ok(Self { p, generator: Generator::on(device, seed)? })
    }

    /// Each rank of the group drops elements of its own part, from a stream of its own.
    ///
    /// # Errors
    /// As [`replicated`](Self::replicated).
    pub fn split(p: f64, seed: u64, device: tch::Device, group: &ProcessGroup) -> Result<Self> {
        // Far from the seeds that neighbouring layers are likely to have.
        let seed = seed.wrapping_add((group.rank() as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self::replicated(p, seed, device)
    }

    /// Drops elements in training, else gives them as they are.
    ///
    /// # Errors
    /// Those of [`Generator::dropout`].
    pub fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        self.generator.dropout(xs, self.p, train)
    }

    /// The generator: its state belongs into a checkpoint. (A stage that is
    /// [computed again](crate::model_parallel::pipeline::Stage::recompute) draws the same by itself.)
    pub fn generator(&self) -> &Generator {
        &self.generator
    }
}

impl std::fmt::Debug for ParallelDropout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ParallelDropout").field("p", &self.p).finish_non_exhaustive()
    }
}
