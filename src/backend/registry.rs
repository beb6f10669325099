//! Backends by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use once_cell::sync::Lazy;
use parking_lot::RwLock;

use super::{BackendFactory, native};
use crate::{Error, Result};

static REGISTRY: Lazy<RwLock<BTreeMap<String, Arc<dyn BackendFactory>>>> = Lazy::new(|| {
    let mut map = BTreeMap::<String, Arc<dyn BackendFactory>>::new();
    map.insert("native".to_owned(), Arc::new(native::create));
    RwLock::new(map)
});

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
/// ```
/// assert!(tch_distributed::is_backend_available("native"));
/// assert!(!tch_distributed::is_backend_available("carrier-pigeon"));
/// ```
pub fn is_backend_available(name: &str) -> bool {
    REGISTRY.read().contains_key(&name.to_lowercase())
}

/// libtorch's engines, which not every build has.
const OPTIONAL: [(&str, &str); 2] = [
    ("gloo", "this build of the crate does not contain libtorch's Gloo"),
    (
        "nccl",
        "this build of the crate does not contain libtorch's NCCL: it needs CUDA and the feature `nccl`",
    ),
];

/// The factory of a name, or an error that lists the known ones.
pub(crate) fn factory(name: &str) -> Result<Arc<dyn BackendFactory>> {
    let name = name.to_lowercase();
    let found = REGISTRY.read().get(&name).cloned();
    found.ok_or_else(|| match OPTIONAL.iter().find(|(optional, _)| *optional == name) {
        Some((_, reason)) => Error::BackendUnavailable { backend: name, reason: (*reason).to_owned() },
        None => Error::UnknownBackend { name, known: known_backends() },
    })
}

/// Every known name.
pub(crate) fn known_backends() -> Vec<String> {
    REGISTRY.read().keys().cloned().collect()
}
