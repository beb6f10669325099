//! How a model is made data parallel.

/// Options of [`DistributedDataParallel`](super::DistributedDataParallel). Every rank gives the same.
///
/// ```
/// use tch_distributed::data_parallel::DdpOptions;
/// let options = DdpOptions::new().bucket_cap_mb(4).find_unused_parameters(true).ignore(["frozen.embedding"]);
/// assert!(format!("{options:?}").contains("find_unused_parameters: true"));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct DdpOptions {
    pub(super) bucket_cap_mb: f64,
    pub(super) first_bucket_mb: f64,
    pub(super) broadcast_buffers: bool,
    pub(super) find_unused_parameters: bool,
    pub(super) gradient_as_bucket_view: bool,
    pub(super) static_graph: bool,
    pub(super) ignore: Vec<String>,
}

impl Default for DdpOptions {
    fn default() -> Self {
        Self {
            bucket_cap_mb: 25.0,
            first_bucket_mb: 1.0,
            broadcast_buffers: true,
            find_unused_parameters: false,
            gradient_as_bucket_view: false,
            static_graph: false,
            ignore: Vec::new(),
        }
    }
}

impl DdpOptions {
    /// What no rank can work with, in words.
    pub(super) fn what_is_wrong(&self) -> Option<String> {
        let sizes = [("bucket_cap_mb", self.bucket_cap_mb), ("first_bucket_mb", self.first_bucket_mb)];
        let (name, mb) = sizes.into_iter().find(|(_, mb)| mb.is_nan() || *mb < 0.0)?;
        Some(format!("{name} is {mb}; a number of MiB that is not negative is expected"))
    }

    /// PyTorch's defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gradients are exchanged in buckets of about this many MiB (25): a bucket is full when it holds
    /// at least as much. Smaller buckets start earlier, larger ones cost fewer operations. The last bucket
    /// starts at the end of backward.
    pub fn bucket_cap_mb(mut self, mb: impl Into<f64>) -> Self {
        self.bucket_cap_mb = mb.into();
        self
    }

    /// The size in MiB of the bucket that starts first (1), so that the exchange begins early in
    /// backward. Never more than [`bucket_cap_mb`](Self::bucket_cap_mb).
    pub fn first_bucket_mb(mut self, mb: impl Into<f64>) -> Self {
        self.first_bucket_mb = mb.into();
        self
    }

    /// Whether rank 0's buffers (running means and the like) are given to every rank before a forward
    /// in training (true). When a model is made data parallel they are given to every rank in any case.
    #[doc(alias = "forward_sync_buffers")]
    pub fn broadcast_buffers(mut self, on: bool) -> Self {
        self.broadcast_buffers = on;
        self
    }

    /// Whether a backward may leave parameters without a gradient (false: that is an error, the same
    /// one on every rank). Such a parameter counts as zero on the rank that did not use it; where no
    /// rank used it, its gradient is not touched. Costs one number per parameter in the last bucket, and
    /// the buckets that hold unused parameters, with those behind them, start at the end of backward.
    pub fn find_unused_parameters(mut self, on: bool) -> Self {
        self.find_unused_parameters = on;
        self
    }

    /// Whether gradients live inside one flat buffer a bucket (false), which the engine allocates
    /// ([`allocate_tensor`](crate::ProcessGroup::allocate_tensor)): between processes of one host the other
    /// ranks read it in place. It pays where gradients are zeroed, not dropped, between steps; a gradient
    /// that is made anew in each backward has to be copied into the buffer, which an engine that takes lists,
    /// as the native one does, saves without this option.
    pub fn gradient_as_bucket_view(mut self, on: bool) -> Self {
        self.gradient_as_bucket_view = on;
        self
    }

    /// Promises that every backward uses the same parameters equally often (false). The first one is
    /// exchanged at its end, to learn from it; then unused parameters cost nothing, and a gradient may
    /// arrive in several parts, as it does when activations are computed again in a nested backward.
    pub fn static_graph(mut self, on: bool) -> Self {
        self.static_graph = on;
        self
    }

    /// Names (as in the `VarStore`) of parameters and buffers to leave alone: they are neither compared,
    /// nor broadcast, nor reduced.
    #[doc(alias = "_set_params_and_buffers_to_ignore_for_model")]
    pub fn ignore(mut self, names: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        self.ignore = names.into_iter().map(|name| name.as_ref().to_owned()).collect();
        self
    }
}
