//! How one dimension of a full tensor is dealt to the ranks.

use std::ops::Range;

use tch::Tensor;

use crate::functional::shard_range;
use crate::{Error, Result};

/// A dimension cut into parts (one; or several, as in a fused QKV weight), each of which is split over the ranks: a
/// rank holds its share of every part, one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) dim: usize,
    pub(super) parts: Vec<i64>,
    pub(super) size: usize,
}

impl Split {
    pub(super) fn new(dim: usize, parts: &[i64], size: usize) -> Self {
        Self { dim, parts: parts.to_vec(), size }
    }

    /// The length of the full dimension.
    pub(super) fn full(&self) -> i64 {
        self.parts.iter().sum()
    }

    /// What a rank holds, as ranges of the full dimension.
    pub(super) fn ranges(&self, rank: usize) -> Vec<Range<i64>> {
        let mut start = 0;
        self.parts
            .iter()
            .map(|&len| {
                let own = shard_range(len, rank, self.size);
                start += len;
                start - len + own.start..start - len + own.end
            })
            .collect()
    }

    /// How much a rank holds.
    pub(super) fn len(&self, rank: usize) -> i64 {
        self.ranges(rank).iter().map(|r| r.end - r.start).sum()
    }

    /// How much each rank holds.
    pub(super) fn lens(&self) -> Vec<i64> {
        (0..self.size).map(|rank| self.len(rank)).collect()
    }

    /// A rank's shard of the full tensor.
    pub(super) fn take(&self, full: &Tensor, rank: usize) -> Result<Tensor> {
        let got = full.size();
        if got.get(self.dim) != Some(&self.full()) {
            return Err(Error::ShapeMismatch {
                argument: "weight",
                expected: format!("{} in dimension {}", self.full(), self.dim),
                got: format!("{got:?}"),
            });
        }
        let pieces = self
            .ranges(rank)
            .into_iter()
            .map(|r| full.f_narrow(self.dim as i64, r.start, r.end - r.start))
            .collect::<Result<Vec<_>, _>>()?;
        // `cat` copies even a single piece, so the shard does not keep the full tensor alive.
        Ok(Tensor::f_cat(&pieces, self.dim as i64)?)
    }

    /// The full tensor, from all ranks' shards one after another along `dim`.
    pub(super) fn join(&self, shards: &Tensor, dim: usize) -> Result<Tensor> {
        if self.parts.len() == 1 {
            return Ok(shards.shallow_clone());
        }
        let mut pieces = vec![Vec::new(); self.parts.len()];
        let mut start = 0;
        for rank in 0..self.size {
            for (part, range) in self.ranges(rank).into_iter().enumerate() {
                let len = range.end - range.start;
                pieces[part].push((start, len));
                start += len;
            }
        }
        let pieces = pieces
            .concat()
            .into_iter()
            .map(|(start, len)| shards.f_narrow(dim as i64, start, len))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Tensor::f_cat(&pieces, dim as i64)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fused_weight_gives_each_rank_its_share_of_every_part_and_comes_together_again() {
        for size in 1..5 {
            let split = Split::new(0, &[4, 3, 5], size);
            let full = Tensor::arange(12, (tch::Kind::Int64, tch::Device::Cpu));
            let shards: Vec<_> = (0..size).map(|r| split.take(&full, r).unwrap()).collect();
            assert_eq!(split.lens(), shards.iter().map(|s| s.size()[0]).collect::<Vec<_>>());
            assert_eq!(split.join(&Tensor::cat(&shards, 0), 0).unwrap(), full);
        }
        assert_eq!(Split::new(0, &[4, 4], 2).ranges(1), [2..4, 6..8]);
    }
}
