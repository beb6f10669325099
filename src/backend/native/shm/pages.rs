//! Mappings of slabs: so that the kernel can map huge pages, and huge pages for those that are large.
//!
//! Where memory is larger than the caches every 4 KiB of a stream need a walk through the page tables, under a
//! hypervisor through two of them; and to touch it for the first time takes a fault for each.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};

/// What one entry of the middle level of page tables maps, with pages of 4 KiB.
const HUGE: usize = 2 << 20;

const PAGE: usize = 4096;

/// Maps memory, at a multiple of the size of huge pages where it is larger than one.
pub(super) fn map(memory: impl AsFd, bytes: usize, protection: ProtFlags) -> io::Result<NonNull<u8>> {
    let (wide, fixed) = match bytes > HUGE {
        true => (bytes + HUGE, MapFlags::FIXED),
        false => (0, MapFlags::empty()),
    };
    let mut at = std::ptr::null_mut();
    if wide > 0 {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping, of addresses only, where the kernel chooses.
        let start = unsafe { rustix::mm::mmap_anonymous(at, wide, ProtFlags::empty(), flags)? };
        let head = start.align_offset(HUGE);
        at = start.wrapping_byte_add(head);
        let end = at.wrapping_byte_add(bytes.next_multiple_of(PAGE));
        let rest = (start as usize + wide).saturating_sub(end as usize);
        for (unused, bytes) in [(start, head), (end, rest)] {
            if bytes > 0 {
                // SAFETY: parts of that mapping that nobody uses. What stays mapped by a failure is no memory.
                let _ = unsafe { rustix::mm::munmap(unused, bytes) };
            }
        }
    }
    // SAFETY: a new mapping, where the kernel chooses or over addresses that are ours and unused.
    let base = unsafe { rustix::mm::mmap(at, bytes, protection, MapFlags::SHARED | fixed, memory, 0)? };
    NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))
}

/// Gives what a mapping by [`map`] has of whole huge pages its memory, at once. Where the
/// kernel has no huge page to give, small ones come when they are touched, as they would have.
pub(super) fn enlarge(base: NonNull<u8>, bytes: usize) {
    let whole = bytes / HUGE * HUGE;
    for at in (0..whole).step_by(HUGE) {
        // SAFETY: within the mapping. It has a page from now on: what has none is not made into a huge one.
        unsafe { base.as_ptr().add(at).read_volatile() };
    }
    if whole > 0 {
        // SAFETY: within the mapping; its contents stay as they are. An older kernel refuses the advice.
        let _ = unsafe { libc::madvise(base.as_ptr().cast(), whole, libc::MADV_COLLAPSE) };
    }
}

/// Puts private memory with the same contents in the place of whole pages.
pub(super) fn replace(at: *mut u8, bytes: usize) -> io::Result<()> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, where the kernel chooses.
    let new =
        unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE)? };
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: both are mapped, and the first is the caller's alone; it moves to where the second was, in one step.
    let moved = unsafe {
        new.cast::<u8>().copy_from_nonoverlapping(at, bytes);
        libc::mremap(new, bytes, bytes, flags, at)
    };
    if moved == libc::MAP_FAILED {
        let error = io::Error::last_os_error();
        // SAFETY: mapped above; nobody else knows of it.
        let _ = unsafe { rustix::mm::munmap(new, bytes) };
        return Err(error);
    }
    Ok(())
}

/// Gives back the memory of private pages in a range of a mapping. What is shared is the descriptor's and stays.
pub(super) fn discard(base: NonNull<u8>, range: Range<usize>) {
    // SAFETY: within the mapping, and nobody's.
    let _ = unsafe { libc::madvise(base.as_ptr().add(range.start).cast(), range.len(), libc::MADV_DONTNEED) };
}
