//! Which samples a rank sees.

use crate::process_group::ProcessGroup;
use crate::random::Generator;
use crate::{Error, Result};

/// Deals the samples `0..len` of a data set out to the ranks of a group, in an order that changes with
/// the epoch and is the same on every rank.
///
/// The indices are those of PyTorch's `torch.utils.data.DistributedSampler` for the same seed and epoch:
/// the permutation is libtorch's own `randperm`, from a generator of the CPU seeded with `seed + epoch`.
/// Rank r gets places r, r + size, r + 2 size, … of it.
///
/// Every rank gets equally many samples, because ranks that take unequal numbers of steps wait for one
/// another: by default the permutation is filled up from its own start; with [`drop_last`](Self::drop_last)
/// its tail is cut. For an evaluation, where no step is exchanged and a sample seen twice falsifies the
/// result, [`even(false)`](Self::even) does neither.
///
/// ```
/// use tch_distributed::data_parallel::DistributedSampler;
/// let sampler = |rank| DistributedSampler::with_ranks(5, rank, 2).unwrap().shuffle(false);
/// assert_eq!(sampler(0).indices(), [0, 2, 4]);
/// assert_eq!(sampler(1).indices(), [1, 3, 0]); // padded with the first
/// assert_eq!(sampler(0).drop_last(true).indices(), [0, 2]);
/// assert_eq!(sampler(1).even(false).indices(), [1, 3]); // each sample once
///
/// let mut shuffled = DistributedSampler::with_ranks(1000, 0, 2)?;
/// let first = shuffled.indices();
/// shuffled.set_epoch(1);
/// assert_ne!(shuffled.indices(), first);
/// # Ok::<(), tch_distributed::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DistributedSampler {
    samples: usize,
    rank: usize,
    ranks: usize,
    shuffle: bool,
    seed: u64,
    epoch: u64,
    drop_last: bool,
    even: bool,
}

impl DistributedSampler {
    /// Samples `0..len`, dealt out to the ranks of a group. Shuffles, with seed 0 and epoch 0, and pads.
    pub fn new(len: usize, group: &ProcessGroup) -> Self {
        Self::of(len, group.rank(), group.size())
    }

    /// The same for a rank and a number of ranks given as numbers.
    ///
    /// # Errors
    /// [`RankOutOfRange`](Error::RankOutOfRange) unless `rank < world`.
    #[doc(alias = "num_replicas")]
    pub fn with_ranks(len: usize, rank: usize, world: usize) -> Result<Self> {
        if rank >= world {
            return Err(Error::RankOutOfRange { rank, size: world });
        }
        Ok(Self::of(len, rank, world))
    }

    fn of(samples: usize, rank: usize, ranks: usize) -> Self {
        Self { samples, rank, ranks, shuffle: true, seed: 0, epoch: 0, drop_last: false, even: true }
    }

    /// Whether the samples are put in random order (true).
    pub fn shuffle(mut self, on: bool) -> Self {
        self.shuffle = on;
        self
    }

    /// The seed of the random order (0). Every rank gives the same.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Whether the tail that cannot be dealt out evenly is left out, rather than padded (false).
    pub fn drop_last(mut self, on: bool) -> Self {
        self.drop_last = on;
        self
    }

    /// Whether every rank gets equally many samples (true). With `false` nothing is padded and nothing
    /// dropped, whatever [`drop_last`](Self::drop_last) says: each sample comes exactly once, and the
    /// first ranks may get one more. Made for evaluation.
    pub fn even(mut self, on: bool) -> Self {
        self.even = on;
        self
    }

    /// Sets the epoch, and with it the order. Without it every epoch has the order of epoch 0.
    pub fn set_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
    }

    /// How many samples this rank sees.
    pub fn len(&self) -> usize {
        let (n, ranks) = (self.samples, self.ranks);
        if !self.even {
            n / ranks + usize::from(self.rank < n % ranks)
        } else if self.drop_last {
            n / ranks
        } else {
            n.div_ceil(ranks)
        }
    }

    /// Whether this rank sees no sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// This rank's samples in this epoch, in order.
    pub fn indices(&self) -> Vec<i64> {
        let n = self.samples;
        let order = self.shuffle.then(|| permutation(n, self.seed.wrapping_add(self.epoch)));
        (0..self.len())
            .map(|step| {
                // Beyond the end the permutation starts again: that is the padding.
                let place = (self.rank + step * self.ranks) % n;
                order.as_ref().map_or(place as i64, |order| order[place])
            })
            .collect()
    }
}

/// PyTorch's permutation of `0..len` for this seed.
fn permutation(len: usize, seed: u64) -> Vec<i64> {
    let drawn = || Ok::<_, Error>(Vec::try_from(&Generator::new(seed)?.randperm(len)?)?);
    // As with a `Vec` of this length, only a lack of memory can be in the way.
    drawn().expect("a permutation fits in memory")
}
