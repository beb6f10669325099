//! How gradients travel: hooks that replace the plain average of a bucket.
//!
//! A hook is given each bucket as soon as its gradients are there, while backward goes on; it starts its
//! exchange and returns at once, with what is left to do when the exchange has ended. It is called for the
//! same buckets in the same order on every rank.

use tch::{Kind, Tensor};

use crate::process_group::{ProcessGroup, Work};
use crate::{ReduceOp, Result};

/// The gradients of one bucket, to be averaged in place.
#[derive(Debug)]
pub struct GradBucket {
    pub(super) index: usize,
    pub(super) is_last: bool,
    pub(super) gradients: Vec<Tensor>,
    pub(super) parameters: Vec<Tensor>,
    pub(super) names: Vec<String>,
}

impl GradBucket {
    /// The bucket's number, from 0 in each step.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Whether no bucket follows in this step.
    pub fn is_last(&self) -> bool {
        self.is_last
    }

    /// The tensors to average in place over the ranks: a gradient for each parameter, in the order of
    /// [`parameters`](Self::parameters), or one flat tensor with all of them, where
    /// [`gradient_as_bucket_view`](super::DdpOptions::gradient_as_bucket_view) is on.
    #[doc(alias = "buffer")]
    pub fn gradients(&self) -> &[Tensor] {
        &self.gradients
    }

    /// The parameters whose gradients these are.
    pub fn parameters(&self) -> &[Tensor] {
        &self.parameters
    }

    /// Their names.
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

/// An exchange under way, and what is left to do when it has ended.
#[must_use = "an exchange that is not finished leaves its gradients half done"]
pub struct Exchange(Box<dyn FnOnce() -> Result<()> + Send>);

impl Exchange {
    /// `finish` waits for the exchange and leaves the averages in the bucket's gradients. It runs on the
    /// thread that runs backward, at its end.
    pub fn new(finish: impl FnOnce() -> Result<()> + Send + 'static) -> Self {
        Self(Box::new(finish))
    }

    pub(super) fn finish(self) -> Result<()> {
        self.0()
    }
}

impl From<Work> for Exchange {
    fn from(work: Work) -> Self {
        Self::new(move || work.wait())
    }
}

impl std::fmt::Debug for Exchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Exchange")
    }
}

/// How the gradients of a bucket are averaged. Implemented for closures too.
///
/// ```
/// use tch_distributed as dist;
/// use dist::data_parallel::hooks::{CommHook, Exchange, GradBucket};
/// /// The sum instead of the average.
/// struct Summed;
/// impl CommHook for Summed {
///     fn start(&mut self, bucket: GradBucket, group: &dist::ProcessGroup) -> dist::Result<Exchange> {
///         Ok(group.all_reduce_coalesced_async(bucket.gradients(), dist::ReduceOp::Sum)?.into())
///     }
/// }
/// ```
pub trait CommHook: Send + 'static {
    /// Starts the exchange of one bucket and returns without waiting for it.
    ///
    /// An error or a panic, here or in the exchange, is an error of backward on this rank. What this rank
    /// has sent of the bucket is then unknown, so it ends the group: the other ranks get an error that names
    /// this rank. The model that is exchanged cannot be called from here, nor a backward run through it.
    fn start(&mut self, bucket: GradBucket, group: &ProcessGroup) -> Result<Exchange>;
}

impl<F> CommHook for F
where
    F: FnMut(GradBucket, &ProcessGroup) -> Result<Exchange> + Send + 'static,
{
    fn start(&mut self, bucket: GradBucket, group: &ProcessGroup) -> Result<Exchange> {
        self(bucket, group)
    }
}

/// Gradients travel as `Half`: half the bytes of `Float`, 11 bits of precision, and nothing above 65504.
/// Those of other kinds than `Float` and `Double` travel as they are.
///
/// ```
/// # use tch::{Device, nn};
/// # use tch_distributed as dist;
/// # use dist::data_parallel::{DdpOptions, DistributedDataParallel};
/// use dist::data_parallel::hooks;
/// dist::testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let model = nn::linear(vs.root(), 3, 1, Default::default());
///     let ddp = DistributedDataParallel::new(model, &vs, &group, DdpOptions::new()).unwrap();
///     ddp.set_comm_hook(hooks::Fp16Compress).unwrap();
/// });
/// ```
#[doc(alias = "fp16_compress_hook")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Fp16Compress;

/// Gradients travel as `BFloat16`: half the bytes of `Float`, 8 bits of precision, and its range. Those of
/// other kinds than `Float` and `Double` travel as they are.
#[doc(alias = "bf16_compress_hook")]
#[derive(Clone, Copy, Debug, Default)]
pub struct Bf16Compress;

impl CommHook for Fp16Compress {
    fn start(&mut self, bucket: GradBucket, group: &ProcessGroup) -> Result<Exchange> {
        compressed(bucket, group, Kind::Half)
    }
}

impl CommHook for Bf16Compress {
    fn start(&mut self, bucket: GradBucket, group: &ProcessGroup) -> Result<Exchange> {
        compressed(bucket, group, Kind::BFloat16)
    }
}

/// Averages copies of a narrower kind, and copies them back. Gradients that are as narrow already go as they
/// are, and so do complex ones, which would lose their imaginary part.
fn compressed(bucket: GradBucket, group: &ProcessGroup, kind: Kind) -> Result<Exchange> {
    if !bucket.gradients.iter().all(|gradient| matches!(gradient.kind(), Kind::Float | Kind::Double)) {
        return Ok(group.all_reduce_coalesced_async(&bucket.gradients, ReduceOp::Avg)?.into());
    }
    let narrow = |gradient: &Tensor| gradient.f_to_kind(kind);
    let copies = bucket.gradients.iter().map(narrow).collect::<Result<Vec<_>, _>>()?;
    let work = group.all_reduce_coalesced_async(&copies, ReduceOp::Avg)?;
    Ok(Exchange::new(move || {
        work.wait()?;
        tch::no_grad(|| {
            for (gradient, copy) in bucket.gradients.iter().zip(&copies) {
                gradient.shallow_clone().f_copy_(copy)?;
            }
            Ok(())
        })
    }))
}
