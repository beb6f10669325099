//! The buffers of a call as raw memory, addressed by the ranges of a plan.

use std::marker::PhantomData;

use smallvec::SmallVec;

use super::plan::{Place, Range};
use crate::backend::{Call, Segments};

/// A run of bytes somewhere in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) ptr: *mut u8,
    pub(crate) len: usize,
}

// SAFETY: a piece is an address; whoever reads or writes through it says why that is sound.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

/// Pieces that stand for their concatenation. None is empty.
pub(crate) type Pieces = SmallVec<[Piece; 2]>;

/// A segment: its pieces, and where each starts.
struct Segment {
    pieces: SmallVec<[Piece; 1]>,
    /// The byte at which each piece starts.
    starts: SmallVec<[usize; 1]>,
}

/// Memory that a call lends for as long as its run lives.
pub(crate) struct Memory<'a> {
    inputs: SmallVec<[Segment; 4]>,
    outputs: SmallVec<[Segment; 4]>,
    size: usize,
    _held: Held<'a>,
}

/// Keeps a call's tensors alive, untouched.
struct Held<'a> {
    _call: Call<'a>,
    _lent: PhantomData<&'a ()>,
}

// SAFETY: owned tensors are `Send`; of borrowed ones nothing is used on another thread: the pointers
// were taken when the buffers were made.
unsafe impl Send for Held<'_> {}

impl<'a> Memory<'a> {
    pub(crate) fn new(call: Call<'a>) -> Self {
        let size = call.kind.elt_size_in_bytes();
        let lay = |segments: &Segments<'_>| {
            let lay_one = |buffers: &crate::backend::Segment<'_>| {
                let mut segment = Segment { pieces: SmallVec::new(), starts: SmallVec::new() };
                let mut at = 0;
                for buffer in buffers.iter().filter(|b| b.bytes() > 0) {
                    segment.pieces.push(Piece { ptr: buffer.data_ptr(), len: buffer.bytes() });
                    segment.starts.push(at);
                    at += buffer.bytes();
                }
                segment
            };
            segments.iter().map(lay_one).collect()
        };
        Self {
            inputs: lay(&call.inputs),
            outputs: lay(&call.outputs),
            size,
            _held: Held { _call: call, _lent: PhantomData },
        }
    }

    /// The pieces of a range of an input or output.
    pub(crate) fn resolve(&self, range: Range, out: &mut Pieces) {
        let segment = match range.place {
            Place::Input(n) => &self.inputs[n],
            Place::Output(n) => &self.outputs[n],
            Place::Slot(_) => unreachable!("slots are the executor's"),
        };
        let (mut at, end) = (range.start * self.size, (range.start + range.len) * self.size);
        let mut n = segment.starts.partition_point(|&s| s <= at).saturating_sub(1);
        while at < end {
            let (piece, start) = (segment.pieces[n], segment.starts[n]);
            let len = (start + piece.len).min(end) - at;
            out.push(Piece { ptr: piece.ptr.wrapping_add(at - start), len });
            at += len;
            n += 1;
        }
    }
}

/// The total length of pieces, in bytes.
pub(crate) fn total(pieces: &[Piece]) -> usize {
    pieces.iter().map(|p| p.len).sum()
}

/// Where one is in a list of pieces.
pub(crate) struct Cursor<'p> {
    pieces: &'p [Piece],
    index: usize,
    offset: usize,
}

impl<'p> Cursor<'p> {
    pub(crate) fn new(pieces: &'p [Piece]) -> Self {
        Self { pieces, index: 0, offset: 0 }
    }

    /// What is left of the current piece; null and 0 at the end.
    pub(crate) fn here(&self) -> (*mut u8, usize) {
        match self.pieces.get(self.index) {
            Some(p) => (p.ptr.wrapping_add(self.offset), p.len - self.offset),
            None => (std::ptr::null_mut(), 0),
        }
    }

    /// Moves on by `n` bytes, at most to the end of the current piece.
    pub(crate) fn advance(&mut self, n: usize) {
        self.offset += n;
        if self.pieces.get(self.index).is_some_and(|p| p.len == self.offset) {
            self.index += 1;
            self.offset = 0;
        }
    }
}

/// Copies pieces onto pieces of the same total length.
///
/// # Safety
/// All pieces are valid, `to` for writing; nobody else touches them meanwhile.
pub(crate) unsafe fn copy(from: &[Piece], to: &[Piece]) {
    let (mut from, mut to) = (Cursor::new(from), Cursor::new(to));
    loop {
        let ((src, a), (dst, b)) = (from.here(), to.here());
        let n = a.min(b);
        if n == 0 {
            return;
        }
        if !std::ptr::eq(src, dst) {
            // SAFETY: the caller's promise; `copy` allows overlap.
            unsafe { std::ptr::copy(src, dst, n) };
        }
        from.advance(n);
        to.advance(n);
    }
}

/// Scratch memory, aligned for every kind; what it holds at first is unspecified.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    blocks: Vec<u128>,
}

impl Scratch {
    /// At least `bytes` bytes.
    pub(crate) fn reserve(&mut self, bytes: usize) -> *mut u8 {
        let blocks = bytes.div_ceil(16);
        if self.blocks.len() < blocks {
            self.blocks.resize(blocks, 0);
        }
        self.blocks.as_mut_ptr().cast()
    }
}
