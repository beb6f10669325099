//! What moves the bytes of collectives, below the engine and above threads, shared memory and TCP.
//!
//! A collective in flight is a [`Run`]: a state machine that never blocks, driven either by the
//! thread that made a blocking call or by the progress engine. The engine numbers calls, keeps them
//! in order, watches deadlines and failures; a transport only moves.

use std::cell::OnceCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use tch::{Kind, Tensor};

use crate::Result;
use crate::backend::Call;

/// Sequence number and fingerprint of a call: travel with the data, compared on arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// The call's number in its group.
    pub(crate) seq: u64,
    /// Operation, kind, count, root and reduce op, packed so that a mismatch can be told in words.
    pub(crate) fingerprint: u128,
}

/// When a blocking call has to have ended. Time begins when somebody first asks: a call that is over before it
/// has to wait never looks at the clock, which would cost it as much as all else that it does in front of the
/// transport.
#[derive(Debug)]
pub(crate) struct Deadline {
    timeout: Duration,
    begun: OnceCell<Instant>,
}

impl Deadline {
    pub(crate) fn after(timeout: Duration) -> Self {
        Self { timeout, begun: OnceCell::new() }
    }

    /// When the call began, as far as anybody asked.
    pub(crate) fn begun(&self) -> Instant {
        *self.begun.get_or_init(Instant::now)
    }

    /// When it has to have ended; in the far future for a timeout that no clock can show.
    pub(crate) fn at(&self) -> Instant {
        let begun = self.begun();
        begun.checked_add(self.timeout).unwrap_or(begun + FAR)
    }
}

/// So far away that nobody waits for it.
pub(crate) const FAR: Duration = Duration::from_secs(60 * 60 * 24 * 365);

/// What one step of a run did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The operation has ended: outputs are written, buffers are no longer touched.
    Done,
    /// Something moved; call again soon.
    Moved,
    /// Nothing moved; worth waiting before the next call.
    Idle,
}

/// One collective in flight.
pub(crate) trait Run: Send {
    /// Moves what can be moved without blocking.
    fn advance(&mut self) -> Result<Progress>;
}

/// What connects the ranks of one group.
///
/// Errors of `start`, `run_inline` and [`Run::advance`] are first findings: of `Desync` the rank and
/// what it called, of `PeerLost` the rank; `Timeout` just by its name. The engine asks the other ranks
/// how far they are before it decides what the failure is.
pub(crate) trait Transport: Send + Sync {
    /// Begins a collective. The stamp is this rank's; what arrives is compared with it.
    fn start<'a>(&self, call: Call<'a>, stamp: Stamp) -> Result<Box<dyn Run + 'a>>;

    /// Runs a whole collective at once where that is possible without a state machine (the shared
    /// memory fast path for small messages); gives the call back where it is not.
    fn run_inline<'a>(
        &self,
        call: Call<'a>,
        _stamp: Stamp,
        _deadline: &Deadline,
    ) -> Result<Option<Call<'a>>> {
        Ok(Some(call))
    }

    /// Sleeps until something may have moved, `interrupt` was called, or the time has come.
    fn park(&self, until: Instant);

    /// Ends a `park`, from any thread.
    fn interrupt(&self);

    /// The group has failed: a `run_inline` in progress returns [`Error::Aborted`](crate::Error) soon,
    /// and the engine puts the cause in its place. Called once, from any thread.
    fn fail(&self) {
        self.interrupt();
    }

    /// A tensor, with unspecified contents, whose data this transport moves at less cost than another's;
    /// `None` where every tensor is alike.
    fn allocate(&self, _size: &[i64], _kind: Kind) -> Option<Result<Tensor>> {
        None
    }

    /// Adds the descriptors that become ready when an idle run may move, for the progress engine to
    /// sleep on; false where there are none (it then naps).
    fn watch(&self, _set: &mut Vec<Watch>) -> bool {
        false
    }
}

impl Watch {
    /// The same for `poll`.
    pub(crate) fn flags(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.read);
        flags.set(PollFlags::OUT, self.write);
        flags
    }
}

/// A descriptor to sleep on.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    /// The descriptor.
    pub(crate) fd: Arc<OwnedFd>,
    /// Wait until it can be written as well.
    pub(crate) write: bool,
    /// Wait until there is something to read.
    pub(crate) read: bool,
}
