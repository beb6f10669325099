//! Tensors in memory that suits a group.

use tch::{Device, Kind, Tensor};

use super::ProcessGroup;
use crate::{Error, Result};

impl ProcessGroup {
    /// A dense tensor of this shape, kind and device, with unspecified contents, in memory that suits the
    /// group's backend.
    ///
    /// Between processes of one host the native engine puts it into shared memory (CPU tensors; with any
    /// other backend or transport it is an ordinary tensor). Collectives on such tensors read the other
    /// ranks' data where it lies, and write the results of an `all_reduce` there, instead of copying them through
    /// slots, which pays from about 16 KiB on. In all other ways they are tensors like any other: each
    /// rank allocates what it likes, when it likes, and may mix them with others in one call. A view counts
    /// as what it views (for `all_reduce` one that begins with a page of 4096 bytes of the tensor and ends with
    /// one, or with the tensor); a list of tensors counts if it is one run of memory, as the parts of one tensor are.
    ///
    /// The others map the memory when they first need it, and use it only in calls that were given this
    /// tensor: an `all_reduce` that fails takes its tensor away from them before it returns. Its pages go back to the
    /// system when the last tensor over it is dropped, and when the processes that map it have ended, however
    /// they do. A tensor of 8 MiB or more gets its memory at once, in huge pages where the kernel has them. Allocate
    /// once and use it often: first use takes page faults on every rank.
    ///
    /// `DistributedDataParallel` puts its buckets there with
    /// [`gradient_as_bucket_view`](crate::data_parallel::DdpOptions::gradient_as_bucket_view).
    ///
    /// # Errors
    /// `InvalidArgument` for a size that is negative or too large; `Io` when the system gives no memory; what
    /// libtorch says of a device that is not there.
    ///
    /// ```
    /// use tch::{Device, Kind};
    /// use tch_distributed::{ReduceOp, testing};
    ///
    /// testing::run_threads(2, |group| {
    ///     let mut tensor = group.allocate_tensor(&[512, 1024], (Kind::Float, Device::Cpu)).unwrap();
    ///     let _ = tensor.fill_(group.rank() as f64);
    ///     group.all_reduce(&mut tensor, ReduceOp::Sum).unwrap();
    ///     assert_eq!(tensor.double_value(&[3, 7]), 1.0);
    /// });
    /// ```
    #[doc(alias = "_allocate_tensor")]
    #[doc(alias = "_supports_tensor_alloc")]
    #[doc(alias = "symm_mem.empty")]
    #[doc(alias = "ncclMemAlloc")]
    pub fn allocate_tensor(&self, size: &[i64], options: (Kind, Device)) -> Result<Tensor> {
        if let Some(wrong) = size.iter().find(|&&n| n < 0) {
            return Err(Error::invalid("size", format!("{size:?} has {wrong}; expected no negative number")));
        }
        self.inner.backends.of(options.1)?.allocate(size, options)
    }
}
