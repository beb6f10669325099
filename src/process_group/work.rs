//! An operation under way.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::ProcessGroup;
use crate::backend::{Receipt, Ticket};
use crate::{Error, Result};

/// An operation under way: wait for it, poll it, or await it on any executor, which resolves when it has ended (on
/// CUDA: when the device has finished).
///
/// Dropping it does not cancel the operation: the engine keeps the tensors alive and completes it.
/// Until it is done, its tensors belong to it: touching them is a race.
///
/// ```
/// use tch::Tensor;
/// use tch_distributed::{ReduceOp, testing};
/// testing::run_threads(2, |group| {
///     let tensor = Tensor::from_slice(&[1.0f32, 2.0]);
///     let work = group.all_reduce_async(&tensor, ReduceOp::Sum).unwrap();
///     // … compute something else meanwhile …
///     work.wait().unwrap();
///     assert_eq!(Vec::<f32>::try_from(tensor).unwrap(), [2.0, 4.0]);
/// });
/// ```
#[must_use = "an operation under way should be waited for"]
pub struct Work {
    group: ProcessGroup,
    tickets: SmallVec<[Ticket; 1]>,
}

impl Work {
    pub(super) fn new(group: ProcessGroup, tickets: SmallVec<[Ticket; 1]>) -> Self {
        Self { group, tickets }
    }

    /// One Work for all of several.
    pub(super) fn join(group: &ProcessGroup, works: Vec<Self>) -> Self {
        Self { group: group.clone(), tickets: works.into_iter().flat_map(|w| w.tickets).collect() }
    }

    /// Waits until the operation has ended. May be called again: the result is the same.
    ///
    /// For CUDA tensors on NCCL it orders the calling thread's current stream behind the operation and does not block
    /// the host: what the program gives the device from now on sees the result. A failure of the device comes out of
    /// [`is_completed`](Self::is_completed), of `.await`, or of a later call, which is `Poisoned`.
    ///
    /// # Errors
    /// Those of the operation: `Desync`, `Timeout`, `PeerLost`, `Aborted`, `Poisoned`.
    pub fn wait(&self) -> Result<()> {
        self.receipts(None)?;
        Ok(())
    }

    /// Waits for a time; false when the operation is still running then. Nothing is poisoned by that. On CUDA too it
    /// blocks the host, until the device has finished.
    ///
    /// # Errors
    /// Those of the operation.
    pub fn wait_timeout(&self, timeout: Duration) -> Result<bool> {
        Ok(self.receipts(Some(timeout))?.is_some())
    }

    /// Whether the operation has ended, well or not. Does not wait.
    pub fn is_completed(&self) -> bool {
        self.tickets.iter().all(|ticket| ticket.result().is_some())
    }

    /// For a receive that has ended well: the rank of the group that sent.
    #[doc(alias = "_source_rank")]
    pub fn source_rank(&self) -> Option<usize> {
        self.tickets.first()?.result()?.ok()?.source
    }

    /// Waits for all; the first failure counts.
    pub(super) fn receipts(&self, timeout: Option<Duration>) -> Result<Option<Receipt>> {
        // A time too far away to be told is no limit.
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut first = Ok(Receipt::default());
        for (i, ticket) in self.tickets.iter().enumerate() {
            let waited = self.group.inner.universe.instrument.blocked(|| match timeout {
                None => Some(ticket.settle()),
                Some(_) => ticket.wait_until(deadline),
            });
            let Some(result) = waited else { return Ok(None) };
            match result {
                Ok(receipt) if i == 0 => first = Ok(receipt),
                Err(error) if first.is_ok() => first = Err(error),
                _ => {}
            }
        }
        first.map(Some).map_err(|e| self.group.inner.fail(e))
    }
}

impl Future for Work {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        for ticket in &self.tickets {
            if ticket.poll(context.waker()).is_none() {
                return Poll::Pending;
            }
        }
        Poll::Ready(self.receipts(None).and_then(|r| r.map(|_| ()).ok_or(Error::Aborted)))
    }
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work")
            .field("group", &self.group.name())
            .field("completed", &self.is_completed())
            .finish()
    }
}
