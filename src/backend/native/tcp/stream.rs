//! Non-blocking reads and writes on lists of memory pieces.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};
use smallvec::SmallVec;

use crate::backend::native::memory::Piece;

/// How many pieces one system call takes.
const MANY: usize = 32;

/// The pieces that are left after the first `done` bytes, at most [`MANY`].
fn rest(pieces: &[Piece], mut done: usize) -> SmallVec<[Piece; 4]> {
    let mut left = SmallVec::new();
    for piece in pieces {
        if done >= piece.len {
            done -= piece.len;
            continue;
        }
        left.push(Piece { ptr: piece.ptr.wrapping_add(done), len: piece.len - done });
        done = 0;
        if left.len() == MANY {
            break;
        }
    }
    left
}

/// What a read or write did; `None` when it would block.
fn outcome(result: rustix::io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(n) => Ok(Some(n)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Writes `head` and then `pieces`, of all of which `done` bytes have been written already.
///
/// # Safety
/// The pieces can be read.
pub(super) unsafe fn write(
    fd: &OwnedFd,
    head: &[u8],
    pieces: &[Piece],
    done: usize,
) -> io::Result<Option<usize>> {
    let mut slices = SmallVec::<[IoSlice<'_>; 8]>::new();
    if done < head.len() {
        slices.push(IoSlice::new(&head[done..]));
    }
    for piece in rest(pieces, done.saturating_sub(head.len())) {
        // SAFETY: the caller's promise.
        slices.push(IoSlice::new(unsafe { std::slice::from_raw_parts(piece.ptr, piece.len) }));
    }
    outcome(rustix::net::sendmsg(fd, &slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL))
}

/// Whether a read or write of `n` bytes did less than it could have: the socket is empty or full, and
/// asking again at once would only tell so.
pub(super) fn fell_short(n: usize, pieces: &[Piece], done: usize, beside: usize) -> bool {
    n < rest(pieces, done).iter().map(|p| p.len).sum::<usize>() + beside
}

/// Reads into `pieces`, of which `done` bytes have been read already, and what comes after them into
/// `spare`. `Some(0)`: the peer has closed.
///
/// # Safety
/// The pieces can be written, and nobody else touches them.
pub(super) unsafe fn read(
    fd: &OwnedFd,
    pieces: &[Piece],
    done: usize,
    spare: &mut [u8],
) -> io::Result<Option<usize>> {
    let left = rest(pieces, done);
    let mut slices = SmallVec::<[IoSliceMut<'_>; 8]>::new();
    for piece in &left {
        // SAFETY: the caller's promise.
        slices.push(IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(piece.ptr, piece.len) }));
    }
    if left.len() < MANY && !spare.is_empty() {
        slices.push(IoSliceMut::new(spare));
    }
    outcome(rustix::io::readv(fd, &mut slices))
}
