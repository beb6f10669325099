//! The memory that the ranks of one host share: who may write where.
//!
//! Each rank has an area that it alone writes (but for its bell):
//!
//! | offset | what |
//! |---|---|
//! | 0 | progress: three words, steps filled, reduced and gathered; then chunks of messages put |
//! | 64 | in the first rank's area: a number that says whose segment this is |
//! | 128 | bell |
//! | 192 | withdrawn: the round in which the rank gave up: its tensors may change under those who still read them; else 0 |
//! | 256 | sizes, twice: the bytes for each rank, 8 each |
//! | then | chunks taken of each rank's messages, 8 each |
//! | then | header, twice: a line of [`Header`] whose end and what follows is the payload of a small message, or says where a large one can be read in place ([`Site`], then an offset for each segment, 8 each) |
//! | page | staging: [`DEPTH`] times (a chunk for each rank, a chunk for all); [`MAIL_DEPTH`] chunks of messages |
//!
//! "Twice" is for calls of even and odd rounds. Staging takes memory when it is first touched.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::protocol::{Notice, Word, retract, retracted};
use super::site::Site;

/// How many chunks of a stream may be under way.
pub(super) const DEPTH: usize = 4;
/// How many chunks of a message from one rank to another may be under way.
pub(super) const MAIL_DEPTH: usize = 8;
/// The largest payload that goes with its header.
pub(super) const SMALL: usize = 8 << 10;
/// Where the payload begins within a header.
pub(super) const PAYLOAD: usize = 48;

const PAGE: usize = 4096;
const PUT: usize = 24;
const SIGNATURE: usize = 64;
const BELL: usize = 128;
const WITHDRAWN: usize = 192;
const SIZES: usize = 256;

/// What a rank says of its call: everybody reads it before any data moves.
#[repr(C)]
pub(super) struct Header {
    /// The round; written last.
    pub(super) flag: AtomicU64,
    /// The rest belongs to the writer until the flag has the round, then to the readers.
    pub(super) seq: u64,
    pub(super) fingerprint: [u64; 2],
    /// How many bytes this rank contributes, times 2^22, plus how many steps that takes: none where
    /// the payload is here.
    pub(super) extent: u64,
    /// The factor of its `PremulSum`.
    pub(super) factor: f64,
}

const _: () = assert!(size_of::<Header>() == PAYLOAD);

/// The sizes that follow from the number of ranks and of bytes in a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) ranks: usize,
    pub(super) chunk: usize,
    taken: usize,
    header: usize,
    staging: usize,
    area: usize,
}

impl Layout {
    pub(super) fn new(ranks: usize, chunk: usize) -> Self {
        let sizes = (ranks * 8).next_multiple_of(128);
        let taken = SIZES + 2 * sizes;
        let header = taken + sizes;
        let staging = (header + 2 * Self::HEADER).next_multiple_of(PAGE);
        let area = (staging + Self::staging(ranks, chunk)).next_multiple_of(PAGE);
        Self { ranks, chunk, taken, header, staging, area }
    }

    /// The bytes of all slots of one rank.
    pub(super) fn staging(ranks: usize, chunk: usize) -> usize {
        (DEPTH * (ranks + 1) + MAIL_DEPTH) * chunk
    }

    const HEADER: usize = (PAYLOAD + SMALL).next_multiple_of(128);

    pub(super) fn bytes(&self) -> usize {
        self.area * self.ranks
    }
}

impl Notice for AtomicU64 {
    fn look(&self) -> u64 {
        self.load(Ordering::Relaxed)
    }

    fn raise(&self, round: u64) {
        self.store(round, Ordering::Relaxed);
    }

    fn fence(ordering: Ordering) {
        std::sync::atomic::fence(ordering);
    }
}

/// A mapping of the shared memory.
#[derive(Debug)]
pub(super) struct Segment {
    base: NonNull<u8>,
    pub(super) layout: Layout,
}

// SAFETY: a segment is memory that many processes write; `protocol` says who may when.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    /// New memory without a name, which goes away with the last process that maps it.
    pub(super) fn create(layout: Layout) -> io::Result<(Self, OwnedFd)> {
        let fd =
            rustix::fs::memfd_create("tch-distributed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, layout.bytes() as u64)?;
        // Nobody can shrink it under us.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let segment = Self::map(fd.as_fd(), layout)?;
        Ok((segment, fd))
    }

    /// Maps memory that another process created: only if it belongs to the same user, cannot shrink
    /// and has the size expected.
    pub(super) fn open(fd: impl AsFd, layout: Layout) -> io::Result<Self> {
        let fd = fd.as_fd();
        let stat = rustix::fs::fstat(fd)?;
        let seals = rustix::fs::fcntl_get_seals(fd)?;
        if stat.st_uid != rustix::process::geteuid().as_raw()
            || stat.st_size != layout.bytes() as i64
            || !seals.contains(SealFlags::SHRINK)
        {
            return Err(io::Error::other("what was found there is not the group's segment"));
        }
        Self::map(fd, layout)
    }

    fn map(fd: BorrowedFd<'_>, layout: Layout) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), layout.bytes(), protection, MapFlags::SHARED, fd, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        Ok(Self { base, layout })
    }

    /// Writes the number by which the others know that this is the segment they look for.
    pub(super) fn sign(&self, nonce: u64) -> u64 {
        self.signature_word().store(nonce, Ordering::Release);
        nonce
    }

    pub(super) fn signature(&self) -> u64 {
        self.signature_word().load(Ordering::Acquire)
    }

    fn signature_word(&self) -> &AtomicU64 {
        // SAFETY: as in `progress`.
        unsafe { &*self.at(0, SIGNATURE).cast() }
    }

    fn at(&self, rank: usize, offset: usize) -> *mut u8 {
        debug_assert!(rank < self.layout.ranks && offset < self.layout.area);
        // SAFETY: within the mapping.
        unsafe { self.base.as_ptr().add(rank * self.layout.area + offset) }
    }

    /// How many steps a rank has filled (0), reduced (1), gathered (2).
    pub(super) fn progress(&self, rank: usize, stage: usize) -> &AtomicU64 {
        debug_assert!(stage < 3);
        // SAFETY: aligned, mapped for as long as `self`, and an atomic wherever it is used.
        unsafe { &*self.at(rank, stage * 8).cast() }
    }

    /// How many chunks of which message a rank has put.
    pub(super) fn put(&self, rank: usize) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { &*self.at(rank, PUT).cast() }
    }

    /// How many chunks of which message of another rank a rank has taken.
    pub(super) fn taken(&self, rank: usize, from: usize) -> &AtomicU64 {
        debug_assert!(from < self.layout.ranks);
        // SAFETY: as above.
        unsafe { &*self.at(rank, self.layout.taken + 8 * from).cast() }
    }

    pub(super) fn bell(&self, rank: usize) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { &*self.at(rank, BELL).cast() }
    }

    /// Says that what this rank's call of a round lent to others is not theirs to read any more.
    pub(super) fn withdraw(&self, rank: usize, round: u64) {
        retract(self.withdrawn_word(rank), round);
    }

    /// Whether a rank has withdrawn in this round or before: if not, all that was read of its tensors until now was
    /// what it lent.
    pub(super) fn withdrawn(&self, rank: usize, round: u64) -> bool {
        retracted(self.withdrawn_word(rank), round)
    }

    fn withdrawn_word(&self, rank: usize) -> &AtomicU64 {
        // SAFETY: as in `progress`.
        unsafe { &*self.at(rank, WITHDRAWN).cast() }
    }

    pub(super) fn header(&self, rank: usize, round: u64) -> *mut Header {
        self.at(rank, self.layout.header + (round & 1) as usize * Layout::HEADER).cast()
    }

    /// The flag of a header, the only part of it that is read while it may be written.
    pub(super) fn flag(&self, rank: usize, round: u64) -> &AtomicU64 {
        // SAFETY: as in `progress`.
        unsafe { &(*self.header(rank, round)).flag }
    }

    pub(super) fn payload(&self, rank: usize, round: u64) -> *mut u8 {
        // SAFETY: within the mapping.
        unsafe { self.header(rank, round).cast::<u8>().add(PAYLOAD) }
    }

    /// Where the data of a large message can be read in place; behind it an offset for each segment.
    pub(super) fn site(&self, rank: usize, round: u64) -> *mut Site {
        const { assert!(PAYLOAD.is_multiple_of(align_of::<Site>())) };
        self.payload(rank, round).cast()
    }

    /// For how many segments there is room for offsets.
    pub(super) const OFFSETS: usize = (SMALL - size_of::<Site>()) / 8;

    /// The bytes that `rank` has for each rank.
    pub(super) fn sizes(&self, rank: usize, round: u64) -> *mut u64 {
        let one = (self.layout.ranks * 8).next_multiple_of(128);
        self.at(rank, SIZES + (round & 1) as usize * one).cast()
    }

    /// The chunk that `rank` fills for `reader` alone at a step.
    pub(super) fn chunk_for(&self, rank: usize, reader: usize, step: usize) -> *mut u8 {
        let slot = step % DEPTH * (self.layout.ranks + 1) + reader;
        self.at(rank, self.layout.staging + slot * self.layout.chunk)
    }

    /// Where `rank` puts a chunk of a message.
    pub(super) fn mail(&self, rank: usize, chunk: u64) -> *mut u8 {
        let slot = DEPTH * (self.layout.ranks + 1) + (chunk % MAIL_DEPTH as u64) as usize;
        self.at(rank, self.layout.staging + slot * self.layout.chunk)
    }

    /// The chunk that `rank` fills for all at a step.
    pub(super) fn chunk_for_all(&self, rank: usize, step: usize) -> *mut u8 {
        self.chunk_for(rank, self.layout.ranks, step)
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nothing borrows from a segment that is dropped. A failure would
        // leave the mapping, which is all that could be done about it anyway.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.layout.bytes()) };
    }
}

impl Word for AtomicU64 {
    #[inline(always)]
    fn read(&self) -> u64 {
        self.load(Ordering::Acquire)
    }

    #[inline(always)]
    fn publish(&self, value: u64) {
        if cfg!(target_arch = "x86_64") {
            // An exchange is a full fence there, and cheaper than `mfence`.
            self.swap(value, Ordering::SeqCst);
        } else {
            self.store(value, Ordering::Release);
            std::sync::atomic::fence(Ordering::SeqCst);
        }
    }
}
