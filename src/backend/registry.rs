//! Backends by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use once_cell::sync::Lazy;
use parking_lot::RwLock;

use super::{BackendFactory, c10d, native};
use crate::{Error, Result};

static REGISTRY: Lazy<RwLock<BTreeMap<String, Arc<dyn BackendFactory>>>> = Lazy::new(|| {
    let mut map = BTreeMap::<String, Arc<dyn BackendFactory>>::new();
    map.insert("native".to_owned(), Arc::new(native::create));
    map.insert("gloo".to_owned(), Arc::new(c10d::create_gloo));
    map.insert("nccl".to_owned(), Arc::new(c10d::create_nccl));
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
