//! Cross-entropy of logits that are split by vocabulary and never put together.

use tch::{Kind, Tensor};

use super::embedding::check_ids;
use crate::autograd::{Context, Function};
use crate::{Error, ProcessGroup, ReduceOp, Result};

/// A target that counts nothing: its loss and its gradient are zero, as in `torch.nn.functional.cross_entropy`.
pub const IGNORED_TARGET: i64 = -100;

/// The loss of every token, from this rank's share of its logits.
///
/// `logits` is `[.., vocabulary share]`, where the shares are those of
/// [`VocabParallelEmbedding`](super::VocabParallelEmbedding); `targets` `[..]` are global token numbers, the same on
/// every rank. The result `[..]` is the same on every rank and counts once: its backward does not communicate.
/// Half precision is computed in f32, which is the kind of the result. A backward with `create_graph` is refused.
///
/// Only three numbers a token travel: the maximum, the sum of exponentials and the target's logit (Megatron-LM).
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_distributed::model_parallel::tensor::vocab_parallel_cross_entropy;
/// use tch_distributed::testing;
///
/// testing::run_threads(2, |group| {
///     let logits = Tensor::zeros([3, 4], (Kind::Float, Device::Cpu)); // of a vocabulary of 8
///     let losses = vocab_parallel_cross_entropy(&logits, &Tensor::from_slice(&[0_i64, 7, 3]), &group).unwrap();
///     assert!((f64::try_from(losses.mean(Kind::Float)).unwrap() - 8_f64.ln()).abs() < 1e-6);
/// });
/// ```
///
/// # Errors
/// `ShapeMismatch` where targets do not fit the logits; `KindMismatch` for targets that are no integers;
/// `InvalidArgument` for a target outside the vocabulary; those of the group's collectives.
#[doc(alias = "loss_parallel")]
pub fn vocab_parallel_cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    group: &ProcessGroup,
) -> Result<Tensor> {
    let shape = logits.size();
    let Some((&share, tokens)) = shape.split_last().filter(|(_, tokens)| **tokens == targets.size()) else {
        return Err(Error::ShapeMismatch {
            argument: "targets",
            expected: format!("the logits' {shape:?} without the last dimension"),
            got: format!("{:?}", targets.size()),
        });
    };
    if !matches!(targets.kind(), Kind::Int64 | Kind::Int | Kind::Int16 | Kind::Int8 | Kind::Uint8) {
        return Err(Error::KindMismatch {
            argument: "targets",
            expected: "integers".to_owned(),
            got: format!("{:?}", targets.kind()),
        });
    }
    let targets = targets.f_to_kind(Kind::Int64)?.f_reshape([-1])?;
    let rows = logits.f_reshape([targets.numel() as i64, share])?;
    let function = CrossEntropy { targets, kind: logits.kind(), group: group.clone() };
    let losses = function.apply(&[&rows])?;
    let losses = losses.first().ok_or_else(|| Error::invalid("logits", "gave no loss"))?;
    Ok(losses.f_reshape(tokens)?)
}

struct CrossEntropy {
    targets: Tensor,
    /// The kind of the logits, and so of their gradient.
    kind: Kind,
    group: ProcessGroup,
}

impl CrossEntropy {
    /// The largest logit of every token over all ranks, and the number of columns on each rank, which travels in the
    /// same operation: a slot for each rank, of which the others leave the least number.
    fn maxima(&self, logits: &Tensor) -> Result<(Tensor, Vec<i64>)> {
        let (rank, size) = (self.group.rank() as i64, self.group.size() as i64);
        let (tokens, columns) = logits.size2()?;
        let mut slots = Tensor::f_full([size], f64::NEG_INFINITY, (logits.kind(), logits.device()))?;
        let _ = slots.f_narrow(0, rank, 1)?.f_fill_(columns as f64)?;
        // A rank may have no columns at all: more ranks than tokens in the vocabulary.
        let own = match columns {
            0 => logits.f_new_full([tokens], f64::NEG_INFINITY, (logits.kind(), logits.device()))?,
            _ => logits.f_amax([-1_i64], false)?,
        };
        slots = Tensor::f_cat(&[own, slots], 0)?;
        self.group.all_reduce(&mut slots, ReduceOp::Max)?;
        let columns = Vec::<f64>::try_from(slots.f_narrow(0, tokens, size)?.f_to_kind(Kind::Double)?)?;
        Ok((slots.f_narrow(0, 0, tokens)?, columns.into_iter().map(|c| c as i64).collect()))
    }
}

impl Function for CrossEntropy {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let logits = match inputs[0].kind() {
            Kind::Half | Kind::BFloat16 => inputs[0].f_to_kind(Kind::Float)?,
            _ => inputs[0].shallow_clone(),
        };
        let (maxima, columns) = self.maxima(&logits)?;
        let ignored = self.targets.f_eq(IGNORED_TARGET)?;
        let targets = self.targets.f_masked_fill(&ignored, 0)?;
        check_ids(&targets, columns.iter().sum(), "targets")?;

        let rank = self.group.rank();
        let local = targets.f_sub_scalar(columns[..rank].iter().sum::<i64>())?;
        let elsewhere = local.f_lt(0)?.f_logical_or(&local.f_ge(columns[rank])?)?.f_logical_or(&ignored)?;
        let local = local.f_masked_fill(&elsewhere, 0)?.f_unsqueeze(-1)?;

        // What does not count is filled with zeros, not multiplied by them: it may be infinite, as the logits of
        // columns that only pad the vocabulary are.
        let shifted = logits.f_sub(&maxima.f_unsqueeze(-1)?)?;
        let target = match columns[rank] {
            0 => maxima.f_zeros_like()?,
            _ => shifted.f_gather(-1, &local, false)?.f_squeeze_dim(-1)?.f_masked_fill(&elsewhere, 0)?,
        };
        let exponentials = shifted.f_exp()?;
        let mut sums = Tensor::f_stack(&[exponentials.f_sum_dim_intlist(-1, false, None)?, target], 0)?;
        self.group.all_reduce(&mut sums, ReduceOp::Sum)?;
        let (total, target) = (sums.f_get(0)?, sums.f_get(1)?);
        let losses = total.f_log()?.f_sub(&target)?.f_masked_fill(&ignored, 0)?;

        let softmax = exponentials.f_div(&total.f_unsqueeze(-1)?)?;
        ctx.save_for_backward(&[&softmax, &local, &elsewhere, &ignored]);
        Ok(vec![losses])
    }

    fn backward(&mut self, ctx: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        crate::functional::refuse_create_graph("vocab_parallel_cross_entropy")?;
        let saved = ctx.saved();
        let (Some(Some(grad)), [softmax, local, elsewhere, ignored]) = (grads.first(), saved) else {
            return Ok(vec![None]);
        };
        let mut logits = softmax.f_mul(&grad.f_unsqueeze(-1)?)?;
        if logits.size().last() != Some(&0) {
            let at_target = grad.f_neg()?.f_masked_fill(elsewhere, 0)?.f_unsqueeze(-1)?;
            logits = logits.f_scatter_add(-1, local, &at_target)?;
        }
        let logits = logits.f_masked_fill(&ignored.f_unsqueeze(-1)?, 0)?;
        Ok(vec![Some(logits.f_to_kind(self.kind)?)])
    }
}
