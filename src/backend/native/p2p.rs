//! What point-to-point messages are matched and compared by, on every transport.

use super::stamp;
use crate::backend::{Buffer, Transfer};

/// What the two sides of a message have to agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pattern {
    pub(crate) tag: u32,
    /// The kind's code.
    pub(crate) kind: u8,
    pub(crate) numel: u64,
}

impl Pattern {
    pub(crate) fn of(transfer: &Transfer) -> Self {
        Self {
            tag: transfer.tag,
            kind: stamp::kind_code(transfer.kind),
            numel: transfer.buffer.numel() as u64,
        }
    }

    /// e.g. `recv of 4 Float elements from rank 1 (tag 0)`.
    pub(crate) fn words(&self, send: bool, peer: Option<usize>) -> String {
        let (name, way) = if send { ("send", "to") } else { ("recv", "from") };
        let kind = stamp::kind_name(self.kind);
        let peer = peer.map_or_else(|| "any rank".to_owned(), |p| format!("rank {p}"));
        let elements = if self.numel == 1 { "element" } else { "elements" };
        format!("{name} of {} {kind} {elements} {way} {peer} (tag {})", self.numel, self.tag)
    }
}

/// How many bytes a message of this pattern has; `None` for what cannot be.
pub(crate) fn bytes(pattern: &Pattern) -> Option<usize> {
    let size = stamp::kind_size(pattern.kind)?;
    usize::try_from(pattern.numel).ok()?.checked_mul(size)
}

/// Copies a buffer onto another of the same size.
pub(crate) fn copy(from: &Buffer<'_>, to: &Buffer<'_>) {
    debug_assert_eq!(from.bytes(), to.bytes());
    if from.bytes() > 0 {
        // SAFETY: both are dense runs of as many bytes, kept alive by their buffers; `copy` allows
        // overlap (a rank may send a tensor to itself).
        unsafe { std::ptr::copy(from.data_ptr(), to.data_ptr(), from.bytes()) };
    }
}
