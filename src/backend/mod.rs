//! The seam between the API above and the engines below.
//!
//! A backend sees validated calls only: [`Call`]s on flat contiguous buffers and point-to-point
//! [`Transfer`]s. Everything else (argument checks, non-contiguous tensors, object forms,
//! coalescing, uneven shapes, blocking forms) is derived above it, once.

mod c10d;
mod call;
mod completion;
mod registry;

pub mod native;

use std::sync::Arc;
use std::time::Duration;

use tch::{Device, Kind, Tensor};

pub(crate) use c10d::{has_communicator, leave_split, split_nccl};
pub use call::{Buffer, Call, Direction, Op, Segment, Segments, Transfer, segment_numel};
pub use completion::{Completion, Receipt};
pub(crate) use completion::{Helper, Ticket, WriteBack, contained};
pub(crate) use registry::{Placement, factory, make};
pub use registry::{create, is_backend_available, register_backend};

use crate::store::Store;
use crate::{Error, Result};

/// An engine that moves and combines data among the ranks of one group.
///
/// # What an implementor provides
/// * [`submit`](Self::submit): start a collective, return at once, and complete the
///   [`Completion`] exactly once, when outputs are written, from any thread. Calls of one group are
///   numbered in the order in which `submit` and [`run`](Self::run) are entered, take effect in that
///   order, and mean the same number on every rank. [`Op`] says which buffers each operation has.
/// * [`transfer`](Self::transfer): start a batch of point-to-point messages, in any order without
///   deadlock (a batch may hold a send to and a receive from every rank, this one included). They are
///   matched by (source, tag) and are outside the order of collectives.
/// * [`abort`](Self::abort) and [`shutdown`](Self::shutdown).
///
/// # What it guarantees
/// * No panic and no block in `submit` and `transfer`; a failure is the result of the completion.
/// * Operands are combined as [`ReduceOp`](crate::ReduceOp) says, the result is the same bits on every rank.
/// * After `Desync`, `Timeout`, `PeerLost` or `Aborted` it touches no buffer of a completed call, and
///   completes whatever is still pending with that error; calls that come later end at once with
///   [`Error::Poisoned`] and the first cause.
/// * Completions are completed outside its locks: what they run may call back into the backend.
/// * Dropping it without a shutdown frees the same; peers whose calls do not need this rank go on.
///
/// # What it may rely on
/// * Ranks are in range, kinds agree on this rank, buffers are contiguous, outputs do not overlap.
/// * A call that [`supports`](Self::supports) refused never comes.
pub trait CollectiveBackend: Send + Sync + 'static {
    /// The backend's name.
    fn name(&self) -> &str;

    /// Whether buffers may lie in the memory of this device. Tensors of other devices are copied to
    /// the CPU and back.
    fn accepts(&self, device: Device) -> bool {
        device == Device::Cpu
    }

    /// Whether the backend can do `op` on tensors of this kind; if not, what it cannot do, in words.
    fn supports(&self, _op: &Op, _kind: Kind) -> Result<(), String> {
        Ok(())
    }

    /// A dense tensor with unspecified contents, in memory that suits this backend best: the native one
    /// gives memory that the other ranks of the host can read in place.
    fn allocate(&self, size: &[i64], options: (Kind, Device)) -> Result<Tensor> {
        Ok(Tensor::f_empty(size, options)?)
    }

    /// Starts a collective.
    fn submit(&self, call: Call<'static>, done: Completion);

    /// Runs a collective on the caller's thread until it has ended.
    fn run(&self, call: Call<'_>) -> Result<()> {
        let (done, ticket) = Completion::new(None);
        self.submit(call.into_owned(), done);
        ticket.wait_until(None).unwrap_or(Err(Error::Aborted)).map(|_| ())
    }

    /// Starts a batch of point-to-point messages.
    fn transfer(&self, transfers: Vec<Transfer>);

    /// Itself, where this crate's own code is to find its own engine again.
    #[doc(hidden)]
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        None
    }

    /// The failure that made this backend unusable, once there is one (a peer's abort, say).
    fn failure(&self) -> Option<Arc<Error>> {
        None
    }

    /// Ends everything that is pending, here and on the other ranks, with `cause`; later calls end
    /// with [`Error::Poisoned`]. The first cause stays. Idempotent.
    fn abort(&self, cause: &Arc<Error>);

    /// Leaves in good order: waits up to `timeout` for what is pending, checks that every rank has
    /// made as many calls, and frees what the backend holds. Idempotent.
    fn shutdown(&self, timeout: Duration) -> Result<()>;
}

/// What a factory knows of the group it makes a backend for.
#[derive(Clone)]
pub struct BackendContext {
    /// A store of the group's own: keys of this group alone.
    pub store: Arc<dyn Store>,
    /// This rank within the group.
    pub rank: usize,
    /// How many ranks the group has.
    pub size: usize,
    /// The global rank of each rank of the group.
    pub ranks: Vec<usize>,
    /// How long set-up may take, and the default of later calls.
    pub timeout: Duration,
    /// The group's name.
    pub group_name: String,
}

/// Makes a backend for a group. Implemented for closures.
pub trait BackendFactory: Send + Sync + 'static {
    /// Called on every rank of the group; returns when this rank can take calls.
    fn create(&self, context: BackendContext) -> Result<Arc<dyn CollectiveBackend>>;
}

impl<F> BackendFactory for F
where
    F: Fn(BackendContext) -> Result<Arc<dyn CollectiveBackend>> + Send + Sync + 'static,
{
    fn create(&self, context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
        self(context)
    }
}

impl std::fmt::Debug for BackendContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BackendContext")
            .field("group_name", &self.group_name)
            .field("rank", &self.rank)
            .field("ranks", &self.ranks)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}
