//! The native CPU engine: threads, shared memory, TCP.

pub(crate) mod kernels;
pub(crate) mod transport;

use std::sync::Arc;

use super::{BackendContext, CollectiveBackend};
use crate::{Error, Result};

/// Makes the native backend for a group: threads of one process, processes of one host, or hosts,
/// whichever the ranks turn out to be. An outside backend can wrap what it returns.
pub fn create(context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
    Err(Error::BackendUnavailable { backend: "native".to_owned(), reason: context.group_name })
}
