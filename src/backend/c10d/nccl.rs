//! libtorch's NCCL: CUDA tensors.
//!
//! It compiles and links, in CI too, and has never yet been run on a GPU by us. What differs from PyTorch:
//! * The end of an operation is found by polling its CUDA event on a thread: `Work::wait` blocks the host until the
//!   device has finished, where PyTorch's only orders streams. tch uses one stream a device, so results are ordered
//!   with what the program does next.
//! * libtorch's watchdog and monitor are told, by their environment variables, not to end the process
//!   (`src/libtorch/c10d/nccl.cpp`); we watch the time and abort.
//! * Messages always go as a batch: the Python side of one is `batch_isend_irecv`, not `send`.

use std::sync::Arc;

use tch::{Cuda, Device};

use super::combine::Flavor;
use super::engine::{Engine, millis};
use super::inquest::Witness;
use crate::backend::{BackendContext, CollectiveBackend};
use crate::libtorch::{C10dBackend, C10dMember, C10dStore, why_no_nccl};
use crate::{Error, Result};

/// Makes the engine. The device is the one whose index is the rank among this host's ranks, unless the
/// tensors say otherwise: a communicator is made for the device of the first operation.
pub(crate) fn create(context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
    if let Some(reason) = why_no_nccl() {
        return Err(Error::BackendUnavailable { backend: "nccl".to_owned(), reason });
    }
    let BackendContext { store, rank, size, ranks, timeout, group_name } = context;
    let devices = usize::try_from(Cuda::device_count()).unwrap_or(1).max(1);
    let local =
        std::env::var("LOCAL_RANK").ok().and_then(|text| text.trim().parse().ok()).unwrap_or(ranks[rank]);
    let device = local % devices;
    let witness = Witness { store: store.clone(), rank, size };
    witness.arrive()?;
    let unreachable = |reason: String| Error::Rendezvous { reason };
    let store = C10dStore::from_rust(store).map_err(unreachable)?;
    store.set_timeout(timeout).map_err(unreachable)?;
    let member =
        C10dMember { store: &store, rank, ranks: &ranks, name: &group_name, timeout_ms: millis(timeout) };
    let backend = C10dBackend::nccl(&member, device, false).map_err(|text| Error::Rendezvous {
        reason: format!("nccl could not be made for group {group_name}: {text}"),
    })?;
    witness.settle()?;
    Ok(Arc::new(Engine::new(Flavor::Nccl, backend, Device::Cuda(device), witness)))
}
