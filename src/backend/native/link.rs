//! What an executor needs of the links to this rank's peers.

use super::memory::{Piece, Pieces};
use crate::Result;

/// The header of every message of a collective. 48 bytes on the wire, see the README.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Head {
    /// The call's number.
    pub(crate) seq: u64,
    /// What was called.
    pub(crate) fingerprint: u128,
    /// Which message between the two ranks in this call it is.
    pub(crate) index: u32,
    /// Bytes that follow.
    pub(crate) len: u64,
    /// The sender's factor of `PremulSum`; else 1.
    pub(crate) factor: f64,
}

/// A message that can be read where its sender has it.
pub(crate) trait Lent: Send {
    /// The sender's memory, which it leaves alone until `release`; `None` when it has withdrawn.
    fn hold(&self) -> Option<&[Piece]>;
    /// Ends what `hold` began: the sender may go on.
    fn release(&self);
}

/// The links of one rank to its peers in a group, used by one run at a time. Messages of a pair of
/// ranks arrive in order.
pub(crate) trait Links: Send + 'static {
    /// How messages are lent, where they are.
    type Lent: Lent;

    /// A run begins: `sent` counts from 0 again.
    fn begin(&mut self);

    /// Puts a message in line for a peer. The pieces stay as they are until `sent` has counted it or
    /// `withdraw` was called.
    fn post(&mut self, to: usize, head: Head, pieces: Pieces);

    /// Moves what can be moved towards a peer; whether something moved.
    fn flush(&mut self, to: usize) -> Result<bool>;

    /// How many messages of this run to this peer have been read or copied, in the order posted.
    fn sent(&mut self, to: usize) -> usize;

    /// The header of the first message from a peer that has not been taken.
    fn peek(&mut self, from: usize) -> Result<Option<Head>>;

    /// Takes the first message to read it in place; `None` where this link copies.
    fn take(&mut self, from: usize) -> Option<Self::Lent>;

    /// Reads on in the first message, of which `done` bytes have been read: how many more were moved.
    /// The message is taken when all have been.
    fn read(&mut self, from: usize, into: &[Piece], done: usize) -> Result<usize>;

    /// Ends a run that failed: no piece posted is touched any more.
    fn withdraw(&mut self);
}
