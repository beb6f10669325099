//! Lists of buffers as streams of bytes, and parts of them.

use std::ops::Range;

use smallvec::SmallVec;

use crate::backend::Buffer;
use crate::backend::native::kernels::copy_past_cache;

/// A list of buffers that stands for their concatenation.
#[derive(Debug)]
pub(super) struct List {
    pieces: SmallVec<[Piece; 1]>,
    bytes: usize,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    data: *mut u8,
    /// Where it begins in the concatenation.
    start: usize,
    bytes: usize,
}

impl List {
    pub(super) fn new(segment: &[Buffer<'_>]) -> Self {
        let mut bytes = 0;
        let mut pieces = SmallVec::<[Piece; 1]>::new();
        for buffer in segment.iter().filter(|b| b.bytes() > 0) {
            match pieces.last_mut() {
                // Views of one tensor, in order, are one run.
                Some(last) if std::ptr::eq(last.data.wrapping_add(last.bytes), buffer.data_ptr()) => {
                    last.bytes += buffer.bytes();
                }
                _ => pieces.push(Piece { data: buffer.data_ptr(), start: bytes, bytes: buffer.bytes() }),
            }
            bytes += buffer.bytes();
        }
        Self { pieces, bytes }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where the list begins, if it is one run; nowhere where it is empty.
    pub(super) fn one_run(&self) -> Option<*const u8> {
        match &*self.pieces {
            [] => Some(std::ptr::null()),
            [one] => Some(one.data.cast_const()),
            _ => None,
        }
    }

    /// The contiguous runs of a range, with where each begins within the range.
    pub(super) fn runs(&self, range: Range<usize>) -> impl Iterator<Item = (*mut u8, usize, usize)> {
        let first = match self.pieces.len() {
            0 | 1 => 0,
            _ => self.pieces.partition_point(|p| p.start + p.bytes <= range.start),
        };
        let Range { start, end } = range;
        self.pieces[first..].iter().take_while(move |p| p.start < end).map(move |p| {
            let from = start.max(p.start);
            let to = end.min(p.start + p.bytes);
            // SAFETY: `from` lies within the piece.
            (unsafe { p.data.add(from - p.start) }, from - start, to.saturating_sub(from))
        })
    }

    /// Copies a range out.
    ///
    /// # Safety
    /// `dst` is writable for the range; the buffers are alive.
    pub(super) unsafe fn read(&self, range: Range<usize>, dst: *mut u8) {
        for (data, at, bytes) in self.runs(range) {
            // SAFETY: the caller's promise.
            unsafe { dst.add(at).copy_from_nonoverlapping(data, bytes) };
        }
    }

    /// Copies a range in; past the caches if that is better.
    ///
    /// # Safety
    /// `src` is readable for the range; the buffers are alive and may be written.
    pub(super) unsafe fn write(&self, range: Range<usize>, src: *const u8, past_cache: bool) {
        for (data, at, bytes) in self.runs(range) {
            // SAFETY: the caller's promise.
            unsafe {
                match past_cache {
                    true => copy_past_cache(src.add(at), data, bytes),
                    false => data.copy_from_nonoverlapping(src.add(at), bytes),
                }
            }
        }
    }
}

/// The number of bytes in a segment.
pub(super) fn segment_bytes(segment: &[Buffer<'_>]) -> usize {
    segment.iter().map(Buffer::bytes).sum()
}

/// The common runs of ranges of two lists, which may be cut differently: both pointers, where they
/// begin within the ranges, and how long they are.
pub(super) fn common_runs<'l>(
    a: (&'l List, Range<usize>),
    b: (&'l List, Range<usize>),
) -> impl Iterator<Item = (*mut u8, *mut u8, usize, usize)> {
    let mut left = a.0.runs(a.1);
    let mut right = b.0.runs(b.1);
    let mut l = left.next();
    let mut r = right.next();
    std::iter::from_fn(move || {
        let (ldata, lat, lbytes) = l?;
        let (rdata, rat, rbytes) = r?;
        let at = lat.max(rat);
        let end = (lat + lbytes).min(rat + rbytes);
        // SAFETY: `at` lies within both runs.
        let common = unsafe { (ldata.add(at - lat), rdata.add(at - rat), at, end - at) };
        if lat + lbytes == end {
            l = left.next();
        }
        if rat + rbytes == end {
            r = right.next();
        }
        Some(common)
    })
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    fn list(cuts: &[i64], tensors: &mut Vec<Tensor>) -> List {
        let start = tensors.len();
        tensors.extend(cuts.iter().map(|&n| Tensor::zeros([n], (Kind::Uint8, tch::Device::Cpu))));
        let buffers: Vec<_> =
            tensors[start..].iter().map(|t| Buffer::new(t.shallow_clone()).unwrap()).collect();
        List::new(&buffers)
    }

    #[test]
    fn differently_cut_lists_meet_byte_for_byte() {
        let mut tensors = Vec::new();
        let a = list(&[3, 0, 4, 1, 8], &mut tensors);
        let b = list(&[5, 11], &mut tensors);
        assert_eq!((a.bytes(), b.bytes()), (16, 16));
        let source: Vec<u8> = (0..16).collect();
        // SAFETY: 16 bytes each.
        unsafe { a.write(0..16, source.as_ptr(), false) };
        for (from, to, _, bytes) in common_runs((&a, 1..15), (&b, 1..15)) {
            // SAFETY: both are runs of that many bytes.
            unsafe { to.copy_from_nonoverlapping(from, bytes) };
        }
        let mut got = vec![99; 16];
        // SAFETY: 16 bytes each.
        unsafe { b.read(0..16, got.as_mut_ptr()) };
        let mut want = source;
        (want[0], want[15]) = (0, 0);
        assert_eq!(got, want);
    }

    #[test]
    fn an_empty_range_has_no_runs_with_bytes() {
        let mut tensors = Vec::new();
        let a = list(&[3, 4], &mut tensors);
        assert_eq!(a.runs(3..3).map(|r| r.2).sum::<usize>(), 0);
        assert_eq!(a.runs(7..7).count(), 0);
        let none = list(&[], &mut tensors);
        assert_eq!(none.runs(0..0).count(), 0);
    }
}
