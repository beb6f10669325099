//! What ranks of a group tell one another besides the data of collectives.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::cause::Cause;
use super::ledger::Report;
use crate::Error;
use crate::backend::{Helper, Transfer};

/// Whether a peer is still there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// It is.
    Here,
    /// It shut the group down after this many calls, and waits for the others to.
    Left(u64),
    /// It closed the group without a shutdown, after completing this many calls; everything that
    /// belongs to those has been sent.
    Closed(u64),
    /// It ended without a word; what the system said of it.
    Lost(String),
}

/// The side channel of one rank to its peers: small messages about the group, and point-to-point.
///
/// Nothing here blocks. What peers say comes to the engine as a [`Listener`].
pub(crate) trait Control: Send + Sync {
    /// Says who listens; called once, before anything else.
    fn attach(&self, listener: Weak<dyn Listener>);

    /// Asks every peer how far it is and what it called at `seq`.
    fn ask(&self, seq: u64);

    /// Each rank's answer to the last question so far; `None` for this rank and for who has not answered.
    fn answers(&self) -> Vec<Option<Report>>;

    /// Who is still there; this rank is `Here`.
    fn presence(&self) -> Vec<Presence>;

    /// Hears what peers have said by now, whatever the progress engine is doing; whether one told of a
    /// failure, which then reaches the engine in a moment.
    fn listen(&self) -> bool;

    /// Tells every peer that the group has failed.
    fn tell(&self, cause: &Cause);

    /// Tells every peer that this rank makes no more calls.
    fn leave(&self, calls: u64);

    /// Starts point-to-point messages.
    fn transfer(&self, transfers: Vec<Transfer>);

    /// Who moves messages on for a thread that waits for one; `None` where they need nobody.
    fn helper(&self) -> Option<Weak<dyn Helper>> {
        None
    }

    /// The earliest deadline of pending messages.
    fn deadline(&self) -> Option<Instant>;

    /// A pending message whose deadline has passed.
    fn overdue(&self, now: Instant) -> Option<Overdue>;

    /// A message of this rank that waits for a peer that is not there any more.
    fn stranded(&self) -> Option<Stranded>;

    /// How many messages have not ended.
    fn pending(&self) -> usize;

    /// Ends every pending message of this rank.
    fn fail_transfers(&self, error: &Arc<Error>);

    /// Closes the group for this rank, after `completed` calls.
    fn close(&self, completed: u64);
}

/// A message whose other side does not come.
#[derive(Clone, Debug)]
pub(crate) struct Stranded {
    /// What it is, in words.
    pub(crate) what: String,
    /// The peer that is gone.
    pub(crate) peer: usize,
}

/// For whom a receive from any rank waits in vain: a peer that ended without a word (the group has lost
/// it), or the first where all have left.
pub(crate) fn nobody_sends(presence: &[Presence], own: usize) -> Option<usize> {
    let mut others = presence.iter().enumerate().filter(|&(rank, _)| rank != own);
    if let Some((lost, _)) = others.clone().find(|(_, p)| matches!(p, Presence::Lost(_))) {
        return Some(lost);
    }
    let first = others.clone().next().map(|(rank, _)| rank);
    first.filter(|_| others.all(|(_, p)| *p != Presence::Here))
}

/// A message that did not come in time.
#[derive(Clone, Debug)]
pub(crate) struct Overdue {
    /// What it was, in words.
    pub(crate) what: String,
    /// How long it was waited for.
    pub(crate) elapsed: Duration,
    /// The peer; `None` where it could have been any.
    pub(crate) peer: Option<usize>,
}

/// The engine, as its control channel sees it.
pub(crate) trait Listener: Send + Sync {
    /// The group has failed, as a peer says or the channel found itself.
    fn failed(&self, cause: &Cause);

    /// The presence of a peer has changed, or an answer came.
    fn changed(&self);
}

/// A listener that writes down what it hears.
#[cfg(test)]
pub(crate) struct Heard(parking_lot::Mutex<Vec<Cause>>);

#[cfg(test)]
impl Heard {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(parking_lot::Mutex::default()))
    }

    pub(crate) fn listener(self: &Arc<Self>) -> Weak<dyn Listener> {
        let this: Arc<dyn Listener> = self.clone();
        Arc::downgrade(&this)
    }

    pub(crate) fn causes(&self) -> Vec<Cause> {
        self.0.lock().clone()
    }
}

#[cfg(test)]
impl Listener for Heard {
    fn failed(&self, cause: &Cause) {
        self.0.lock().push(cause.clone());
    }

    fn changed(&self) {}
}
