//! A way around the sockets for the bytes of large messages, where there is one.

/// Streams of bytes between the ranks of a group: at most one at a time from each rank, numbered by it. Whom it
/// is for learns the number some other way.
///
/// Nothing here blocks.
pub(crate) trait Bulk: Send + Sync {
    /// Whether a message of so many bytes may go this way.
    fn carries(&self, bytes: usize) -> bool;

    /// Begins a stream to a rank, when the one before it has been taken: its number.
    fn open(&self, to: usize) -> u64;

    /// Puts the next bytes of this rank's stream, as many as there is room for at once: how many.
    ///
    /// # Safety
    /// `data` is readable for `len` bytes, all that is left of the stream.
    unsafe fn put(&self, data: *const u8, len: usize) -> usize;

    /// Whether all has been taken that was put.
    fn taken(&self) -> bool;

    /// Takes the next bytes of a stream that another rank has opened for this one: how many.
    ///
    /// # Safety
    /// `data` is writable for `len` bytes, all that is left of the stream, and nobody else touches them.
    unsafe fn take(&self, from: usize, stream: u64, data: *mut u8, len: usize) -> usize;
}
