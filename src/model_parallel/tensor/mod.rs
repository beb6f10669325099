//! Tensor parallelism: one layer's weights split over the ranks of a group, and the sequence with them.
//!
//! [`ColumnParallelLinear`] splits the outputs of a linear layer, [`RowParallelLinear`] its inputs; one after the
//! other they need one all-reduce forward and one backward (Shoeybi et al., "Megatron-LM", 2019). With
//! `sequence_parallel` the activations between such pairs are split along the sequence, and a reduce-scatter and
//! an all-gather take the all-reduce's place (Korthikanti et al., 2022).
//!
//! Every rank of the group computes the same loss; it counts once. Gradients of a shard are the shard of the
//! unsplit layer's gradients; those of what is replicated are the whole gradients, on every rank.
//!
//! A layer is a [`tch::nn::Module`]; its `forward` panics on failure, as tch's do. `f_forward` returns the error.
//!
//! # Sizes that do not divide
//!
//! A dimension that is split gives the first ranks one more
//! ([`crate::functional::shard_range`]). Attention needs heads that divide, sequence parallelism a
//! sequence that divides; they say so.
//!
//! # Initial weights
//!
//! The layer's `new` draws the *full* weight on the group's first rank, in the order in which tch's own layer draws,
//! and every rank keeps its shard: the same seed gives the weights of the unsplit layer. Other processes draw
//! too, so that their random streams stay in step.

mod attention;
mod column;
mod cross_entropy;
mod dropout;
mod embedding;
mod file;
mod initial;
mod layout;
mod linear;
mod mlp;
mod norm;
mod row;
mod split;

pub use attention::{AttentionConfig, ParallelSelfAttention};
pub use column::ColumnParallelLinear;
pub use cross_entropy::{IGNORED_TARGET, vocab_parallel_cross_entropy};
pub use dropout::ParallelDropout;
pub use embedding::VocabParallelEmbedding;
pub use initial::LinearInit;
pub use layout::{Layout, Shard};
pub use mlp::{Activation, ParallelMlp};
pub use norm::ParallelLayerNorm;
pub use row::RowParallelLinear;

use tch::Tensor;

use crate::{Error, ProcessGroup, Result};

/// How a split linear layer meets its surroundings.
///
/// ```
/// use tch_distributed::model_parallel::tensor::ParallelLinearConfig;
/// let config = ParallelLinearConfig { gather_output: true, ..Default::default() };
/// assert!(config.bias && config.input_is_parallel && !config.sequence_parallel);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParallelLinearConfig {
    /// Whether there is a bias (default: yes). A row-parallel layer adds it once, after the reduction.
    pub bias: bool,
    /// Column-parallel: put the outputs of all ranks together (default: no, each rank keeps its part).
    pub gather_output: bool,
    /// Row-parallel: the input is this rank's part already (default: yes). If not, the layer takes its part.
    pub input_is_parallel: bool,
    /// The activations outside the pair are split along the sequence, which is the last dimension but one
    /// (default: no).
    pub sequence_parallel: bool,
}

impl Default for ParallelLinearConfig {
    fn default() -> Self {
        Self { bias: true, gather_output: false, input_is_parallel: true, sequence_parallel: false }
    }
}

/// Of values that every rank has, this rank's part of the sequence (the last dimension but one): where a
/// sequence-parallel region begins. The gradients of the parts are put together again.
///
/// # Errors
/// `ShapeMismatch` where the sequence does not divide by the size of the group.
pub fn split_sequence(xs: &Tensor, group: &ProcessGroup) -> Result<Tensor> {
    let dim = sequence_dim(xs)?;
    crate::functional::check_divides(xs.size()[dim], dim, group)?;
    crate::functional::scatter_to_group(xs, dim as i64, group)
}

/// All ranks' parts of the sequence put together: where a sequence-parallel region ends and every rank goes on
/// with the same values. (Column-parallel layers do this themselves.)
///
/// # Errors
/// Those of [`ProcessGroup::all_gather`].
pub fn join_sequence(xs: &Tensor, group: &ProcessGroup) -> Result<Tensor> {
    let dim = sequence_dim(xs)?;
    let sizes = vec![xs.size()[dim]; group.size()];
    crate::functional::gather_sized(xs, dim, sizes, group)
}

/// The dimension that sequence parallelism splits: the last but one.
fn sequence_dim(xs: &Tensor) -> Result<usize> {
    xs.dim().checked_sub(2).ok_or_else(|| Error::ShapeMismatch {
        argument: "xs",
        expected: "a sequence in the last dimension but one".to_owned(),
        got: format!("{:?}", xs.size()),
    })
}

/// The last dimension must have this size.
fn check_features(xs: &Tensor, features: i64) -> Result<()> {
    match xs.size().last() {
        Some(&last) if last == features => Ok(()),
        _ => Err(Error::ShapeMismatch {
            argument: "xs",
            expected: format!("{features} in the last dimension"),
            got: format!("{:?}", xs.size()),
        }),
    }
}

/// A size must be at least one.
fn check_positive(argument: &'static str, value: i64) -> Result<()> {
    if value > 0 { Ok(()) } else { Err(Error::invalid(argument, format!("{value} is not positive"))) }
}
