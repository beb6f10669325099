//! Memory for tensors that the other processes of the host may read in place.
//!
//! A tensor lies in a *slab*: a memfd of this process, without a name, which goes away with the last process
//! that maps it. Other ranks open it through `/proc/PID/fd/N` when a call first says that its data lies
//! there (`site.rs`). The pages of a tensor are given back when it dies, the slab when it is empty.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::ProtFlags;

use super::pages;
use super::site::Site;

/// The size of a slab that several tensors share. Its pages take memory when they are first touched.
const SHARED_SLAB: usize = 32 << 20;
/// A tensor of at least this many bytes has a slab of its own, which has its memory at once, in huge pages if
/// there are any.
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
    /// Where tensors end that do not end with a page: what is left of that is nobody's.
    ends: Mutex<BTreeSet<usize>>,
    /// Whether some of it is not the others' memory any more: nothing of it is lent.
    closed: AtomicBool,
}

// SAFETY: the address of a mapping; who uses what part of it is decided under the lock.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

/// A part of a slab, for one tensor.
pub(super) struct Block {
    slab: Arc<Slab>,
    range: Range<usize>,
    /// How much of the range was asked for.
    bytes: usize,
}

impl Slab {
    fn new(bytes: usize) -> io::Result<Self> {
        let bytes = FIRST + bytes.next_multiple_of(PAGE);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("tch-distributed-tensors", flags)?;
        rustix::fs::ftruncate(&memory, bytes as u64)?;
        // Nobody can shrink it under those who read.
        rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let base = pages::map(&memory, bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        let nonce = super::connect::nonce();
        // SAFETY: the first page, which no tensor gets; nobody else has the slab yet.
        unsafe { base.cast::<u64>().write(nonce) };
        let site = Site {
            process: std::process::id().into(),
            descriptor: memory.as_raw_fd() as u64,
            bytes: bytes as u64,
            nonce,
        };
        let free = Mutex::new(std::iter::once(FIRST..bytes).collect());
        Ok(Self { base, bytes, site, memory, free, ends: Mutex::default(), closed: AtomicBool::new(false) })
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
        if self.closed.load(Ordering::Acquire) {
            pages::discard(self.base, range.clone());
        }
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
pub(super) fn allocate(asked: usize) -> io::Result<Block> {
    let bytes = asked.max(1).next_multiple_of(PAGE);
    // Nobody else waits while a large one gets its memory.
    let own = match bytes >= LARGE {
        true => Some(Slab::new(bytes)?),
        false => None,
    };
    if let Some(slab) = &own {
        pages::enlarge(slab.base, slab.bytes);
    }
    let mut slabs = SLABS.lock();
    if own.is_none() {
        for slab in slabs.iter().filter(|s| !s.closed.load(Ordering::Acquire)) {
            if let Some(range) = slab.take(bytes) {
                return Ok(Block::new(slab.clone(), range, asked));
            }
        }
    }
    let slab = Arc::new(match own {
        Some(slab) => slab,
        None => Slab::new(SHARED_SLAB)?,
    });
    let range = slab.take(bytes).ok_or_else(|| io::Error::other("a new slab has no room"))?;
    let at = slabs.partition_point(|s| s.base < slab.base);
    slabs.insert(at, slab.clone());
    COUNT.store(slabs.len(), Ordering::Release);
    Ok(Block::new(slab, range, asked))
}

impl Block {
    fn new(slab: Arc<Slab>, range: Range<usize>, bytes: usize) -> Self {
        if !bytes.is_multiple_of(PAGE) {
            slab.ends.lock().insert(range.start + bytes);
        }
        Self { slab, range, bytes }
    }

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
        self.slab.ends.lock().remove(&(self.range.start + self.bytes));
        if self.slab.give_back(self.range.clone()) {
            slabs.retain(|slab| !Arc::ptr_eq(slab, &self.slab));
            COUNT.store(slabs.len(), Ordering::Release);
        }
    }
}

/// The slab in which this address lies, and its place there.
fn slab_of(data: *const u8) -> Option<(Arc<Slab>, usize)> {
    if COUNT.load(Ordering::Acquire) == 0 {
        return None;
    }
    let slabs = SLABS.lock();
    let at = slabs.partition_point(|s| s.addresses().end <= data as usize);
    let slab = slabs.get(at).filter(|s| s.addresses().contains(&(data as usize)))?;
    Some((slab.clone(), data as usize - slab.addresses().start))
}

/// Memory that can be lent.
pub(super) struct Found {
    /// How others find its slab.
    pub(super) site: Site,
    /// Its place there.
    pub(super) offset: usize,
    /// Whether nothing else lies in its pages.
    pub(super) own_pages: bool,
}

/// What others have to know of so many bytes that begin here, if they lie in a slab.
pub(super) fn find(data: *const u8, bytes: usize) -> Option<Found> {
    let (slab, offset) = slab_of(data)?;
    let end = offset + bytes;
    let own_pages =
        offset.is_multiple_of(PAGE) && (end.is_multiple_of(PAGE) || slab.ends.lock().contains(&end));
    (!slab.closed.load(Ordering::Acquire)).then_some(Found { site: slab.site, offset, own_pages })
}

/// Gives so many bytes that begin here, in pages of their own, memory that nobody else can reach, with the same
/// contents, at the same address. Who writes there late, through another mapping, changes nothing.
pub(super) fn take_away(data: *const u8, bytes: usize) {
    let Some((slab, _)) = slab_of(data) else { return };
    slab.closed.store(true, Ordering::Release);
    if let Err(error) = pages::replace(data.cast_mut(), bytes.next_multiple_of(PAGE)) {
        tracing::warn!(%error, "a tensor of a call that failed may be written to by ranks that come late");
    }
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
        let take = |bytes| Block::new(slab.clone(), slab.take(bytes).unwrap(), bytes);
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
        let found = find(inside, 1).unwrap();
        assert_eq!((found.site.bytes, found.offset), ((FIRST + LARGE) as u64, FIRST + LARGE - 1));
        drop(block);
        assert!(find(inside, 1).is_none_or(|other| other.site.nonce != found.site.nonce));
        assert!(find(std::ptr::null(), 1).is_none());
    }

    #[test]
    fn pages_are_a_tensors_own_where_no_other_part_of_it_lies_in_them() {
        let block = allocate(3 * PAGE + 100).unwrap();
        let own = |from: usize, bytes| find(block.data().wrapping_add(from), bytes).unwrap().own_pages;
        assert!(own(0, 3 * PAGE + 100) && own(PAGE, PAGE) && own(2 * PAGE, PAGE + 100));
        assert!(!own(0, 100) && !own(8, 2 * PAGE - 8) && !own(PAGE, PAGE + 100) && !own(PAGE, PAGE - 4));
    }

    #[test]
    fn what_is_taken_away_keeps_its_contents_and_is_out_of_reach_and_its_slab_lends_nothing_more() {
        let mine = allocate(LARGE + 8).unwrap();
        let (site, offset) = find(mine.data(), LARGE + 8).map(|f| (f.site, f.offset)).unwrap();
        let theirs = super::super::site::Atlas::default().map(site, 2).unwrap();
        let late = theirs.at(offset, LARGE + 8).unwrap();
        // SAFETY: both are mapped; nobody else uses them.
        let (read, write) = (
            |at: usize| unsafe { mine.data().add(at).read() },
            |at: usize, x| unsafe {
                late.add(at).write(x);
            },
        );
        for at in [0, PAGE, LARGE + 7] {
            write(at, 5);
            assert_eq!(read(at), 5);
        }
        take_away(mine.data(), LARGE + 8);
        for at in [0, PAGE, LARGE + 7] {
            write(at, 6);
            assert_eq!(read(at), 5);
        }
        assert!(find(mine.data(), LARGE + 8).is_none());
        drop(mine);
        let other = allocate(PAGE).unwrap();
        assert!(find(other.data(), PAGE).is_some_and(|found| found.own_pages));
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
