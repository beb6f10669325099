//! Giving rank 0's tensors to every rank.

use tch::Tensor;

use crate::Result;
use crate::process_group::ProcessGroup;

/// Broadcasts whole tensors, each by itself: for the parameters, once.
pub(super) fn broadcast_each(tensors: &[&Tensor], group: &ProcessGroup) -> Result<()> {
    // `data` shares the memory and not the history: autograd does not take this for a change that a
    // running graph must not see.
    let started: Result<Vec<_>> = tensors.iter().map(|t| group.broadcast_async(&t.data(), 0)).collect();
    started?.iter().try_for_each(|work| work.wait())
}

/// Broadcasts small tensors together, one message a kind: for the buffers, in every step.
pub(super) fn broadcast_together(tensors: &[Tensor], group: &ProcessGroup) -> Result<()> {
    let mut left: Vec<&Tensor> = tensors.iter().collect();
    while let Some(first) = left.first() {
        let (kind, device) = (first.kind(), first.device());
        let (same, others): (Vec<&Tensor>, Vec<&Tensor>) =
            left.iter().partition(|t| t.kind() == kind && t.device() == device);
        tch::no_grad(|| -> Result<()> {
            let pieces = same.iter().map(|t| t.data().f_reshape(-1)).collect::<Result<Vec<_>, _>>()?;
            let mut flat = Tensor::f_cat(&pieces, 0)?;
            group.broadcast(&mut flat, 0)?;
            if group.rank() != 0 {
                let mut start = 0;
                for tensor in &same {
                    let numel = tensor.numel() as i64;
                    let piece = flat.f_narrow(0, start, numel)?.f_view(tensor.size().as_slice())?;
                    tensor.data().f_copy_(&piece)?;
                    start += numel;
                }
            }
            Ok(())
        })?;
        left = others;
    }
    Ok(())
}
