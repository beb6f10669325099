//! Parts of a dimension, and the collectives on them that autograd does not see.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::{Error, ProcessGroup, ReduceOp, Result, libtorch};

/// The part of a dimension of `len` elements that belongs to `rank` of `size` ranks: as even as can be, the first
/// `len % size` ranks have one more.
///
/// ```
/// use tch_distributed::functional::shard_range;
/// let parts: Vec<_> = (0..3).map(|rank| shard_range(7, rank, 3)).collect();
/// assert_eq!(parts, [0..3, 3..5, 5..7]);
/// ```
pub fn shard_range(len: i64, rank: usize, size: usize) -> Range<i64> {
    let (rank, size) = (rank as i64, (size as i64).max(1));
    let (each, more) = (len / size, len % size);
    let start = rank * each + rank.min(more);
    start..start + each + i64::from(rank < more)
}

/// The lengths of all ranks' parts.
pub(crate) fn even_sizes(len: i64, size: usize) -> Vec<i64> {
    (0..size).map(|r| shard_range(len, r, size)).map(|p| p.end - p.start).collect()
}

/// The dimension counted from the front.
pub(crate) fn dim_index(t: &Tensor, dim: i64, argument: &'static str) -> Result<usize> {
    defined(t, "t")?;
    let dims = t.dim() as i64;
    if (-dims..dims).contains(&dim) {
        return Ok(dim.rem_euclid(dims) as usize);
    }
    Err(Error::invalid(argument, format!("dimension {dim} of a tensor of {dims} dimensions")))
}

/// tch panics where it is asked for the kind or the device of an undefined tensor.
pub(super) fn defined(t: &Tensor, argument: &'static str) -> Result<()> {
    match t.defined() {
        true => Ok(()),
        false => Err(Error::invalid(argument, "the tensor is undefined")),
    }
}

/// A contiguous tensor of its own with the same elements.
pub(super) fn fresh(t: &Tensor) -> Result<Tensor> {
    let mut copy = Tensor::f_empty(t.size(), (t.kind(), t.device()))?;
    copy.f_copy_(t)?;
    Ok(copy)
}

/// One rank's part of `t` along `dim`, as a tensor of its own.
pub(crate) fn own_part(t: &Tensor, dim: usize, part: Range<i64>) -> Result<Tensor> {
    fresh(&t.f_narrow(dim as i64, part.start, part.end - part.start)?)
}

/// Views of parts that follow one another along `dim`.
fn views(t: &Tensor, dim: usize, sizes: &[i64]) -> Result<Vec<Tensor>> {
    let mut start = 0;
    sizes
        .iter()
        .map(|&len| {
            start += len;
            Ok(t.f_narrow(dim as i64, start - len, len)?)
        })
        .collect()
}

/// The length of every rank's `t` along each of `dims`, one row a rank: one small all-gather.
pub(crate) fn sizes_of_ranks(t: &Tensor, dims: &[usize], group: &ProcessGroup) -> Result<Vec<Vec<i64>>> {
    let mine: Vec<i64> = dims.iter().map(|&d| t.size()[d]).collect();
    let mine = Tensor::from_slice(&mine).f_to_device(t.device())?;
    let shape = [group.size() as i64 * dims.len() as i64];
    let mut all = Tensor::f_empty(shape, (Kind::Int64, t.device()))?;
    group.all_gather_into_tensor(&mut all, &mine)?;
    let all = Vec::<i64>::try_from(&all)?;
    Ok(all.chunks(dims.len()).map(<[i64]>::to_vec).collect())
}

/// All ranks' parts put together along `dim`; rank `r` has `sizes[r]` of it.
pub(crate) fn gather_parts(t: &Tensor, dim: usize, sizes: &[i64], group: &ProcessGroup) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let mut shape = t.size();
    shape[dim] = sizes.iter().sum();
    let whole = Tensor::f_empty(&shape, (t.kind(), t.device()))?;
    let mut outputs = views(&whole, dim, sizes)?;
    group.all_gather(&mut outputs, t)?;
    Ok(whole)
}

/// All ranks' tensors combined, and of the result this rank's part along `dim`; rank `r` gets `sizes[r]` of it.
pub(crate) fn reduce_parts(
    t: &Tensor,
    dim: usize,
    sizes: &[i64],
    op: ReduceOp,
    group: &ProcessGroup,
) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let mut shape = t.size();
    shape[dim] = sizes[group.rank()];
    let mut part = Tensor::f_empty(&shape, (t.kind(), t.device()))?;
    group.reduce_scatter(&mut part, &views(t, dim, sizes)?, op)?;
    Ok(part)
}

/// The part of length `split[r]` along `split_dim` goes to rank `r`; what comes from rank `r` has length
/// `concat[r]` along `concat_dim`.
pub(super) fn exchange_parts(
    t: &Tensor,
    (split_dim, split): (usize, &[i64]),
    (concat_dim, concat): (usize, &[i64]),
    group: &ProcessGroup,
) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let mut shape = t.size();
    shape[split_dim] = split[group.rank()];
    shape[concat_dim] = concat.iter().sum();
    let whole = Tensor::f_empty(&shape, (t.kind(), t.device()))?;
    let mut outputs = views(&whole, concat_dim, concat)?;
    group.all_to_all(&mut outputs, &views(t, split_dim, split)?)?;
    Ok(whole)
}

/// A backward that autograd cannot follow is refused where it should: gradients of gradients would lack its part.
pub(crate) fn refuse_create_graph(what: &str) -> Result<()> {
    match libtorch::grad_enabled() {
        true => Err(Error::invalid(
            "create_graph",
            format!("the backward of {what} communicates and cannot be differentiated again"),
        )),
        false => Ok(()),
    }
}

/// The gradient of a function with one output, whose backward cannot be differentiated.
pub(super) fn only(grads: &[Option<Tensor>]) -> Result<&Tensor> {
    refuse_create_graph("this collective")?;
    one(grads)
}

/// The gradient of a function with one output.
pub(super) fn one(grads: &[Option<Tensor>]) -> Result<&Tensor> {
    grads
        .first()
        .and_then(Option::as_ref)
        .ok_or_else(|| Error::Callback { reason: "backward ran without a gradient".to_owned() })
}

/// The one output of a function that has one.
pub(super) fn first(outputs: Vec<Tensor>) -> Result<Tensor> {
    let missing = || Error::Callback { reason: "a function gave no output".to_owned() };
    outputs.into_iter().next().ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_cover_the_dimension_in_order_and_differ_by_at_most_one(len in 0_i64..100, size in 1_usize..10) {
            let parts: Vec<_> = (0..size).map(|rank| shard_range(len, rank, size)).collect();
            prop_assert_eq!(parts[0].start, 0);
            prop_assert_eq!(parts[size - 1].end, len);
            prop_assert!(parts.windows(2).all(|w| w[0].end == w[1].start));
            let sizes = even_sizes(len, size);
            prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
        }
    }
}
