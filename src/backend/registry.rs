//! Backends by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use once_cell::sync::Lazy;
use parking_lot::RwLock;
use tch::{Cuda, Device};

use super::{BackendContext, BackendFactory, CollectiveBackend, c10d, native};
use crate::{Error, Result};

static REGISTRY: Lazy<RwLock<BTreeMap<String, Arc<dyn BackendFactory>>>> = Lazy::new(|| {
    let mut map = BTreeMap::<String, Arc<dyn BackendFactory>>::new();
    map.insert("native".to_owned(), Arc::new(native::create));
    map.insert("gloo".to_owned(), Arc::new(c10d::create_gloo));
    let nccl = |context: BackendContext| {
        let placement = Placement::of_process(context.ranks[context.rank]);
        c10d::create_nccl(context, placement)
    };
    map.insert("nccl".to_owned(), Arc::new(nccl));
    RwLock::new(map)
});

/// Where a rank's tensors are, and how its device is used: what this crate's own engines of devices are told besides the
/// context.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placement {
    /// The device that the user named.
    pub(crate) device: Option<Device>,
    /// Among the ranks of this host.
    pub(crate) local_rank: usize,
    pub(crate) high_priority_stream: bool,
}

impl Placement {
    /// As `LOCAL_RANK` says, or else the rank.
    pub(crate) fn of_process(rank: usize) -> Self {
        let local = std::env::var("LOCAL_RANK").ok().and_then(|text| text.trim().parse().ok());
        Self { device: None, local_rank: local.unwrap_or(rank), high_priority_stream: false }
    }

    /// The index of this rank's CUDA device: the one that the user named, or the one of its number on this host.
    pub(crate) fn cuda(&self) -> usize {
        match self.device {
            Some(Device::Cuda(index)) => index,
            _ => self.local_rank % usize::try_from(Cuda::device_count()).unwrap_or(1).max(1),
        }
    }
}

/// Makes the backend of this name, e.g. for one that wraps it.
///
/// # Errors
/// `UnknownBackend`, `BackendUnavailable`, and what its set-up fails with.
///
/// ```
/// use tch_distributed::{backend, register_backend, testing};
/// register_backend("mine", |context| backend::create("gloo", context))?;
/// let names = testing::run_threads_on("mine", Default::default(), 2, |group| group.backend_name());
/// assert_eq!(names, ["gloo", "gloo"]);
/// # Ok::<(), tch_distributed::Error>(())
/// ```
pub fn create(name: &str, context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
    factory(name)?.create(context)
}

/// [`create`] on a rank whose place is known.
pub(crate) fn make(
    name: &str,
    context: BackendContext,
    placement: Placement,
) -> Result<Arc<dyn CollectiveBackend>> {
    let factory = factory(name)?;
    match name {
        "nccl" => c10d::create_nccl(context, placement),
        _ => factory.create(context),
    }
}

/// Makes a backend known under a name, for [`init_process_group`](crate::init_process_group).
///
/// # Errors
/// `InvalidArgument` when the name is taken, empty, or holds `:` or `,`.
pub fn register_backend(name: &str, factory: impl BackendFactory) -> Result<()> {
    if name.is_empty() || name.contains([':', ',']) || name.chars().any(char::is_whitespace) {
        return Err(Error::invalid(
            "name",
            format!("{name:?} cannot name a backend (empty, or holds ':', ',' or space)"),
        ));
    }
    let name = name.to_lowercase();
    let mut registry = REGISTRY.write();
    if registry.contains_key(&name) {
        return Err(Error::invalid("name", format!("a backend named {name:?} is registered already")));
    }
    registry.insert(name, Arc::new(factory));
    Ok(())
}

/// Whether a backend of this name can be used here: `native`, `gloo`, `nccl`, or a registered name.
///
/// `nccl` needs the cargo feature of that name and a CUDA device; without them
/// [`init_process_group`](crate::init_process_group) says which is missing.
///
/// ```
/// assert!(tch_distributed::is_backend_available("native"));
/// assert!(tch_distributed::is_backend_available("gloo"));
/// assert!(!tch_distributed::is_backend_available("carrier-pigeon"));
/// ```
pub fn is_backend_available(name: &str) -> bool {
    factory(name).is_ok()
}

/// The factory of a name, or why there is none.
pub(crate) fn factory(name: &str) -> Result<Arc<dyn BackendFactory>> {
    let name = name.to_lowercase();
    let found = REGISTRY.read().get(&name).cloned();
    let found = found.ok_or_else(|| Error::UnknownBackend { name: name.clone(), known: known_backends() })?;
    if name == "nccl"
        && let Some(reason) = c10d::why_no_nccl()
    {
        return Err(Error::BackendUnavailable { backend: name, reason });
    }
    Ok(found)
}

/// Every known name.
pub(crate) fn known_backends() -> Vec<String> {
    REGISTRY.read().keys().cloned().collect()
}
