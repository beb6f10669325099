//! libtorch's Gloo: CPU tensors, on any number of hosts, with Python ranks if need be.

use std::sync::Arc;

use super::engine::{Engine, millis};
use super::inquest::Witness;
use crate::backend::{BackendContext, CollectiveBackend};
use crate::libtorch::{C10dBackend, C10dMember, C10dStore};
use crate::{Error, Result};

/// Connects to the other ranks of the group.
pub(crate) fn create(context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
    let BackendContext { store, rank, size, ranks, timeout, group_name } = context;
    let server = ranks.iter().position(|global| *global == 0);
    let witness = Witness { store: store.clone(), rank, size, server };
    witness.arrive()?;
    let unreachable = |reason: String| Error::Rendezvous { reason };
    let store = C10dStore::from_rust(store).map_err(unreachable)?;
    store.set_timeout(timeout).map_err(unreachable)?;
    let member =
        C10dMember { store: &store, rank, ranks: &ranks, name: &group_name, timeout_ms: millis(timeout) };
    let backend = C10dBackend::gloo(&member).map_err(|text| {
        let absent = match &witness.absent()[..] {
            [] => String::new(),
            absent => format!(" (ranks {absent:?} of this crate have not come)"),
        };
        Error::Rendezvous { reason: format!("gloo could not connect group {group_name}{absent}: {text}") }
    })?;
    witness.settle()?;
    Ok(Arc::new(Engine::gloo(backend, witness)))
}
