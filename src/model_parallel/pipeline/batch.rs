//! A batch cut into micro-batches, and their losses put together.

use tch::Tensor;

use super::Loss;
use crate::{Error, Result};

/// One tensor or none as a list.
pub(super) fn as_slice(t: &Option<&Tensor>) -> Vec<Tensor> {
    t.iter().map(|t| t.shallow_clone()).collect()
}

/// A loss of one output and one target, where that is what there is.
pub(super) fn one_and_one<L: Loss>(
    ys: &[Tensor],
    ts: &[Tensor],
    loss: &mut impl FnMut(&Tensor, &Tensor) -> L,
) -> Result<Tensor> {
    match (ys, ts) {
        ([y], [t]) => loss(y, t).into_loss(),
        _ => {
            let reason = format!("the last stage gives {} tensors: use step_with", ys.len());
            Err(Error::invalid("loss", reason))
        }
    }
}

/// Each tensor cut along its first dimension, as one list a micro-batch.
pub(super) fn micro_batches(
    argument: &'static str,
    tensors: &[Tensor],
    count: usize,
) -> Result<Vec<Vec<Tensor>>> {
    if tensors.is_empty() {
        let which = if argument == "inputs" { "first" } else { "last" };
        return Err(Error::invalid(argument, format!("the rank with the {which} stage must give them")));
    }
    let mut all: Vec<Vec<Tensor>> = (0..count).map(|_| Vec::new()).collect();
    for t in tensors {
        let size = t.size();
        let batch = size.first().copied().unwrap_or(0);
        if batch == 0 || batch % count as i64 != 0 {
            let reason = format!("the first dimension of {size:?} must divide by the {count} micro-batches");
            return Err(Error::invalid(argument, reason));
        }
        let each = batch / count as i64;
        for (i, micro) in all.iter_mut().enumerate() {
            micro.push(t.f_narrow(0, i as i64 * each, each)?);
        }
    }
    Ok(all)
}

/// The mean of the micro-batches' losses; none where the last stage is not.
pub(super) fn mean(losses: &[Tensor]) -> Result<Option<Tensor>> {
    match losses.is_empty() {
        true => Ok(None),
        false => {
            let losses = losses.iter().map(|l| l.f_reshape([1])).collect::<Result<Vec<_>, _>>()?;
            let all = Tensor::f_cat(&losses, 0)?;
            Ok(Some(all.f_mean(all.kind())?))
        }
    }
}

/// The outputs of all micro-batches, each put together along its first dimension; none where the last stage is not.
pub(super) fn join(outputs: &[Vec<Tensor>]) -> Result<Option<Vec<Tensor>>> {
    let Some(first) = outputs.first() else { return Ok(None) };
    if let Some(other) = outputs.iter().find(|micro| micro.len() != first.len()) {
        let reason = format!(
            "the last stage gave {} tensors for one micro-batch and {} for another",
            first.len(),
            other.len()
        );
        return Err(Error::Callback { reason });
    }
    let whole = (0..first.len()).map(|i| {
        let parts: Vec<_> = outputs.iter().map(|micro| &micro[i]).collect();
        Ok(Tensor::f_cat(&parts, 0)?)
    });
    whole.collect::<Result<Vec<_>>>().map(Some)
}
