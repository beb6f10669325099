//! libtorch's NCCL: CUDA tensors.
//!
//! It has been run on simulated devices (`tests/gpu/simulated`), never yet on a GPU by us. What differs from PyTorch:
//! * libtorch's watchdog and monitor are told, by their environment variables, not to end the process
//!   (`src/libtorch/c10d/nccl.cpp`); [`lookout`](super::lookout) watches the time and aborts.
//! * Copies that go with an operation, into one buffer and out of it, run on a stream of their own, beside the program's.
//! * Before ranks connect they meet in the store, so that one that does not come is missed in time. Ranks of Python do not
//!   say there that they come: who waits for one waits in NCCL, as PyTorch's own ranks do.
//! * Gathers and scatters may be uneven: the root's side goes as a batch of messages.
//! * Messages always go as a batch: the Python side of one is `batch_isend_irecv`, not `send`.
//! * A group of ranks that named their devices is connected anew for a sub-group, unless
//!   [`split_communicator`](crate::GroupOptions::split_communicator) is asked for. PyTorch splits the communicator then, by
//!   colours of its own: where sub-groups are shared with Python, neither side names a device.

use std::sync::Arc;
use std::time::Duration;

use tch::{Cuda, Device};

use super::engine::{Engine, millis};
use super::inquest::Witness;
use crate::backend::{BackendContext, CollectiveBackend, Placement};
use crate::libtorch::{C10dBackend, C10dMember, C10dStore, NcclPlan, SideStream, use_device, why_no_nccl};
use crate::store::HashStore;
use crate::{Error, Result};

/// For what is not waited for.
const TIMEOUT: Duration = Duration::from_secs(60);

fn plan(placement: Placement, timeout: Duration) -> NcclPlan {
    NcclPlan {
        device: placement.cuda() as i32,
        eager: placement.device.is_some(),
        high_priority: placement.high_priority_stream,
        timeout_ms: millis(timeout),
    }
}

/// Makes the engine, bound to this rank's device. Where the user named the device, ranks connect at once; else with the
/// first operation.
pub(crate) fn create(context: BackendContext, placement: Placement) -> Result<Arc<dyn CollectiveBackend>> {
    if let Some(reason) = why_no_nccl() {
        return Err(Error::BackendUnavailable { backend: "nccl".to_owned(), reason });
    }
    let devices = usize::try_from(Cuda::device_count()).unwrap_or(0);
    match placement.device {
        Some(Device::Cuda(index)) if index < devices => {}
        None => {}
        Some(other) => {
            return Err(Error::invalid(
                "device",
                format!(
                    "{other:?} was given; nccl takes a CUDA device from 0 to {}",
                    devices.saturating_sub(1)
                ),
            ));
        }
    }
    let BackendContext { store, rank, size, ranks, timeout, group_name } = context;
    let device = placement.cuda();
    let server = ranks.iter().position(|global| *global == 0);
    let witness = Witness { store: store.clone(), rank, size, server };
    witness.arrive()?;
    let unreachable = |reason: String| Error::Rendezvous { reason };
    let store = C10dStore::from_rust(store).map_err(unreachable)?;
    store.set_timeout(timeout).map_err(unreachable)?;
    let member =
        C10dMember { store: &store, rank, ranks: &ranks, name: &group_name, timeout_ms: millis(timeout) };
    let plan = plan(placement, timeout);
    let made = || {
        use_device(device)?;
        let backend = C10dBackend::nccl(&member, plan)?;
        Ok((backend, SideStream::new(device, plan.high_priority)?))
    };
    let (backend, side) = made().map_err(|text: String| Error::Rendezvous {
        reason: format!("nccl could not be made for group {group_name} on cuda device {device}: {text}"),
    })?;
    witness.settle()?;
    Ok(Arc::new(Engine::nccl(backend, device, side, witness, plan.eager)))
}

/// Whether a group's backend has a communicator of NCCL, which can be split.
pub(crate) fn has_communicator(backend: &dyn CollectiveBackend) -> bool {
    engine(backend).is_some()
}

fn engine(backend: &dyn CollectiveBackend) -> Option<&Engine> {
    backend.as_any().and_then(|any| any.downcast_ref::<Engine>()).filter(|engine| engine.is_nccl())
}

fn not_split(text: impl Into<String>) -> Error {
    Error::Rendezvous { reason: format!("nccl could not split a group: {}", text.into()) }
}

/// The engine of some ranks of an NCCL group, whose communicator is split off the group's instead of connected anew:
/// `members` are ranks of the group, which connected when it was made. The other ranks call [`leave_split`].
pub(crate) fn split(
    parent: &dyn CollectiveBackend,
    members: &[usize],
    context: BackendContext,
    placement: Placement,
) -> Result<Arc<dyn CollectiveBackend>> {
    let parent = engine(parent).ok_or_else(|| not_split("it has no communicator"))?;
    let BackendContext { store, rank, size, ranks, timeout, group_name } = context;
    let server = ranks.iter().position(|global| *global == 0);
    let witness = Witness { store: store.clone(), rank, size, server };
    witness.arrive()?;
    let store = C10dStore::from_rust(store).map_err(not_split)?;
    store.set_timeout(timeout).map_err(not_split)?;
    let member =
        C10dMember { store: &store, rank, ranks: &ranks, name: &group_name, timeout_ms: millis(timeout) };
    let plan = plan(placement, timeout);
    let backend = parent.split(&member, members, plan).map_err(not_split)?;
    let backend = backend.ok_or_else(|| not_split("this rank was left out"))?;
    let device = placement.cuda();
    let side = SideStream::new(device, plan.high_priority).map_err(not_split)?;
    witness.settle()?;
    Ok(Arc::new(Engine::nccl(backend, device, side, witness, true)))
}

/// This rank's part in the split for a group that it is not in.
pub(crate) fn leave_split(
    parent: &dyn CollectiveBackend,
    members: &[usize],
    placement: Placement,
) -> Result<()> {
    let parent = engine(parent).ok_or_else(|| not_split("it has no communicator"))?;
    // No key of it is read.
    let nowhere = C10dStore::from_rust(Arc::new(HashStore::new())).map_err(not_split)?;
    let plan = plan(placement, TIMEOUT);
    let member = C10dMember { store: &nowhere, rank: 0, ranks: &[], name: "", timeout_ms: plan.timeout_ms };
    parent.split(&member, members, plan).map(drop).map_err(not_split)
}
