//! Memory for tensors that the other processes of the host may read in place.
//!
//! A tensor lies in a *slab*: a memfd of this process, without a name, which goes away with the last process
//! that maps it. Other ranks open it through `/proc/PID/fd/N`, to read, when a call first says that its
//! data lies there (`site.rs`). The pages of a tensor are given back when it dies, the slab when it is empty.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::site::Site;

/// The size of a slab that several tensors share. Its pages take memory when they are first touched.
const SHARED_SLAB: usize = 32 << 20;
/// A tensor of at least this many bytes has a slab of its own.
const LARGE: usize = 8 << 20;
/// Tensors begin at pages, so that each gives back its own.
const PAGE: usize = 4096;
/// The first page of a slab has the number by which others know it.
const FIRST: usize = PAGE;

/// The slabs of this process, by address.
static SLABS: Mutex<Vec<Arc<Slab>>> = Mutex::new(Vec::new());
/// How many there are: most processes have none, and need not look.
static COUNT: AtomicUsize = AtomicUsize::new(0);

struct Slab {
    base: NonNull<u8>,
    bytes: usize,
    /// How others find it.
    site: Site,
    memory: OwnedFd,
    /// What is free, in order, without neighbours that touch.
    free: Mutex<Vec<Range<usize>>>,
}

// SAFETY: the address of a mapping; who uses what part of it is decided under the lock.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

/// A part of a slab, for one tensor.
pub(super) struct Block {
    slab: Arc<Slab>,
    range: Range<usize>,
}

impl Slab {
    fn new(bytes: usize) -> io::Result<Self> {
        let bytes = FIRST + bytes.next_multiple_of(PAGE);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("tch-distributed-tensors", flags)?;
        rustix::fs::ftruncate(&memory, bytes as u64)?;
        // Nobody can shrink it under those who read.
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, &memory, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let nonce = super::connect::nonce();
        // SAFETY: the first page, which no tensor gets; nobody else has the slab yet.
        unsafe { base.cast::<u64>().write(nonce) };
        let site = Site {
            process: std::process::id().into(),
            descriptor: memory.as_raw_fd() as u64,
            bytes: bytes as u64,
            nonce,
        };
        Ok(Self { base, bytes, site, memory, free: Mutex::new(std::iter::once(FIRST..bytes).collect()) })
    }

    /// A free part of so many bytes, a multiple of [`PAGE`].
    fn take(&self, bytes: usize) -> Option<Range<usize>> {
        let mut free = self.free.lock();
        let n = free.iter().position(|r| r.len() >= bytes)?;
        let range = free[n].start..free[n].start + bytes;
        free[n].start = range.end;
        if free[n].is_empty() {
            free.remove(n);
        }
        Some(range)
    }

    /// Takes a part back; whether nothing is in use any more.
    fn give_back(&self, range: Range<usize>) -> bool {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A failure keeps the pages until the slab goes.
        let _ = rustix::fs::fallocate(&self.memory, flags, range.start as u64, range.len() as u64);
        let mut free = self.free.lock();
        let n = free.partition_point(|r| r.start < range.start);
        free.insert(n, range);
        for left in [Some(n), n.checked_sub(1)].into_iter().flatten() {
            if left + 1 < free.len() && free[left].end == free[left + 1].start {
                free[left].end = free.remove(left + 1).end;
            }
        }
        matches!(&**free, [all] if *all == (FIRST..self.bytes))
    }

    fn addresses(&self) -> Range<usize> {
        let start = self.base.as_ptr() as usize;
        start..start + self.bytes
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and no block of it is left.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Memory for a tensor of so many bytes. It is zero at first.
pub(super) fn allocate(bytes: usize) -> io::Result<Block> {
    let bytes = bytes.max(1).next_multiple_of(PAGE);
    let mut slabs = SLABS.lock();
    if bytes < LARGE {
        for slab in slabs.iter() {
            if let Some(range) = slab.take(bytes) {
                return Ok(Block { slab: slab.clone(), range });
            }
        }
    }
    let slab = Arc::new(Slab::new(if bytes < LARGE { SHARED_SLAB } else { bytes })?);
    let range = slab.take(bytes).ok_or_else(|| io::Error::other("a new slab has no room"))?;
    let at = slabs.partition_point(|s| s.base < slab.base);
    slabs.insert(at, slab.clone());
    COUNT.store(slabs.len(), Ordering::Release);
    Ok(Block { slab, range })
}

impl Block {
    /// Where it begins.
    pub(super) fn data(&self) -> *mut u8 {
        // SAFETY: within the mapping.
        unsafe { self.slab.base.as_ptr().add(self.range.start) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // Under the lock of all slabs, so that nobody takes from a slab that goes.
        let mut slabs = SLABS.lock();
        if self.slab.give_back(self.range.clone()) {
            slabs.retain(|slab| !Arc::ptr_eq(slab, &self.slab));
            COUNT.store(slabs.len(), Ordering::Release);
        }
    }
}

/// How others find memory that begins here, and its place there, if it lies in a slab.
pub(super) fn find(data: *const u8) -> Option<(Site, usize)> {
    if COUNT.load(Ordering::Acquire) == 0 {
        return None;
    }
    let slabs = SLABS.lock();
    let at = slabs.partition_point(|s| s.addresses().end <= data as usize);
    let slab = slabs.get(at).filter(|s| s.addresses().contains(&(data as usize)))?;
    Some((slab.site, data as usize - slab.addresses().start))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The bytes of memory that a slab takes.
    fn resident(slab: &Slab) -> u64 {
        rustix::fs::fstat(&slab.memory).unwrap().st_blocks as u64 * 512
    }

    #[test]
    fn a_block_takes_memory_when_it_is_touched_and_gives_it_back_when_it_goes() {
        let slab = Arc::new(Slab::new(SHARED_SLAB).unwrap());
        let take = |bytes| Block { range: slab.take(bytes).unwrap(), slab: slab.clone() };
        let (kept, dropped) = (take(PAGE), take(1 << 20));
        assert_eq!(resident(&slab), PAGE as u64);
        // SAFETY: both blocks are mapped.
        unsafe {
            kept.data().write_bytes(1, PAGE);
            dropped.data().write_bytes(1, 1 << 20);
        }
        assert_eq!(resident(&slab), (2 * PAGE + (1 << 20)) as u64);
        drop(dropped);
        assert_eq!(resident(&slab), 2 * PAGE as u64);
        // SAFETY: still mapped.
        assert_eq!(unsafe { kept.data().read() }, 1);
    }

    #[test]
    fn a_large_block_has_a_slab_of_its_own_that_goes_with_it() {
        let block = allocate(LARGE).unwrap();
        let inside = block.data().wrapping_add(LARGE - 1);
        let (site, at) = find(inside).unwrap();
        assert_eq!((site.bytes, at), ((FIRST + LARGE) as u64, FIRST + LARGE - 1));
        drop(block);
        assert!(find(inside).is_none_or(|(other, _)| other.nonce != site.nonce));
        assert!(find(std::ptr::null()).is_none());
    }

    proptest! {
        #[test]
        fn blocks_never_overlap_and_all_comes_back(
            steps in prop::collection::vec((0_usize..40, any::<prop::sample::Index>()), 0..60)
        ) {
            let slab = Slab::new(64 * PAGE).unwrap();
            let mut taken: Vec<Range<usize>> = Vec::new();
            for (pages, which) in steps {
                if pages < 20 {
                    if let Some(range) = slab.take((pages + 1) * PAGE) {
                        prop_assert!(taken.iter().all(|t| t.end <= range.start || range.end <= t.start));
                        prop_assert!(FIRST <= range.start && range.end <= slab.bytes);
                        taken.push(range);
                    }
                } else if !taken.is_empty() {
                    let range = taken.swap_remove(which.index(taken.len()));
                    prop_assert_eq!(slab.give_back(range), taken.is_empty());
                }
            }
            let left = taken.len();
            for (n, range) in taken.into_iter().enumerate() {
                prop_assert_eq!(slab.give_back(range), n + 1 == left);
            }
        }
    }
}
