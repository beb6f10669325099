//! libtorch's NCCL: CUDA tensors.

use std::sync::Arc;

use tch::{Cuda, Device};

use super::combine::Flavor;
use super::engine::{Engine, millis};
use super::inquest::Witness;
use crate::backend::{BackendContext, CollectiveBackend};
use crate::libtorch::{C10dBackend, C10dMember, C10dStore, has_nccl};
use crate::{Error, Result};

/// Why NCCL cannot work here; `None` where it can.
pub(crate) fn unavailable() -> Option<String> {
    if !has_nccl() {
        return Some("this build of the crate does not contain libtorch's NCCL".to_owned());
    }
    if !Cuda::is_available() {
        return Some("libtorch finds no CUDA device on this machine".to_owned());
    }
    None
}

/// Makes the engine. The device is the one whose index is the rank among this host's ranks, unless the
/// tensors say otherwise: a communicator is made for the device of the first operation.
pub(crate) fn create(context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
    if let Some(reason) = unavailable() {
        return Err(Error::BackendUnavailable { backend: "nccl".to_owned(), reason });
    }
    let BackendContext { store, rank, size, ranks, timeout, group_name } = context;
    let witness = Witness { store: store.clone(), rank, size };
    witness.arrive()?;
    let unreachable = |reason: String| Error::Rendezvous { reason };
    let store = C10dStore::from_rust(store).map_err(unreachable)?;
    store.set_timeout(timeout).map_err(unreachable)?;
    let member =
        C10dMember { store: &store, rank, ranks: &ranks, name: &group_name, timeout_ms: millis(timeout) };
    let backend = C10dBackend::nccl(&member, false).map_err(|text| Error::Rendezvous {
        reason: format!("nccl could not be made for group {group_name}: {text}"),
    })?;
    witness.settle()?;
    let devices = usize::try_from(Cuda::device_count()).unwrap_or(1).max(1);
    let local =
        std::env::var("LOCAL_RANK").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(ranks[rank]);
    Ok(Arc::new(Engine::new(Flavor::Nccl, backend, Device::Cuda(local % devices), witness)))
}
