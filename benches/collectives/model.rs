//! The staged model: an all_reduce of private f32 buffers through cache-sized shared slots, as plain as it can be.
//! It has no headers, no failures, no lists, one kind and one op: what a good implementation comes close to.
//!
//! Each rank copies the parts that the others reduce into its slots; all meet; each reduces its part, into
//! its own buffer and a slot; all meet; each copies the others' results. A small buffer goes in one piece, and
//! everybody sums everything.

use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::time::Instant;

use super::cases::{Case, Collective};
use tch::Kind;

/// How large slots are tried; the best counts.
const SLOTS: [usize; 4] = [16 << 10, 64 << 10, 256 << 10, 1 << 20];
/// The largest buffer that goes in one piece.
const ONE_SHOT: usize = 1 << 20;

/// Whether the model does this.
pub(crate) fn does(case: &Case) -> bool {
    case.collective == Collective::AllReduce && case.kind == Kind::Float
}

#[repr(align(128))]
#[derive(Default)]
struct Flag(AtomicU32);

/// What the ranks, threads of one process, share.
pub(crate) struct Shared {
    flags: Vec<Flag>,
    /// Of each rank: a slot for each rank, and two for its results.
    slots: Vec<AtomicPtr<f32>>,
    patience: u32,
}

/// The elements of a slot.
const SLOT: usize = (1 << 20) / 4;

impl Shared {
    pub(crate) fn new(world: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let area = || AtomicPtr::new(vec![0_f32; (world + 2) * SLOT].leak().as_mut_ptr());
        Self {
            flags: (0..world).map(|_| Flag::default()).collect(),
            slots: (0..world).map(|_| area()).collect(),
            patience: if world > cores { 200 } else { u32::MAX },
        }
    }

    fn slot(&self, rank: usize, slot: usize) -> *mut f32 {
        // SAFETY: there are so many slots.
        unsafe { self.slots[rank].load(Ordering::Relaxed).add(slot * SLOT) }
    }
}

/// One rank of the model.
pub(crate) struct Rank<'s> {
    shared: &'s Shared,
    rank: usize,
    meetings: u32,
    steps: usize,
}

impl<'s> Rank<'s> {
    pub(crate) fn new(shared: &'s Shared, rank: usize) -> Self {
        Self { shared, rank, meetings: 0, steps: 0 }
    }

    fn meet(&mut self) {
        self.meetings += 1;
        self.shared.flags[self.rank].0.store(self.meetings, Ordering::Release);
        for flag in &self.shared.flags {
            let mut tries = 0;
            while flag.0.load(Ordering::Acquire) < self.meetings {
                tries += 1;
                if tries < self.shared.patience { std::hint::spin_loop() } else { std::thread::yield_now() }
            }
        }
    }

    /// Times of so many runs, in nanoseconds, for each size of slots; and whether a result was wrong.
    pub(crate) fn run(&mut self, bytes: usize, iterations: usize) -> (Vec<u128>, bool) {
        let ranks = self.shared.flags.len();
        let mut buffer = vec![0.0; bytes / 4];
        let mut times = Vec::new();
        let mut wrong = false;
        let staged = SLOTS.iter().map(|&s| Some(s)).filter(|s| s.is_none_or(|s| s * ranks <= bytes));
        for slot in staged.chain((bytes <= ONE_SHOT).then_some(None)) {
            buffer.fill(self.rank as f32 + 1.0);
            for n in 0..=iterations {
                self.meet();
                let start = Instant::now();
                match slot {
                    Some(slot) => self.staged(&mut buffer, slot / 4),
                    None => self.at_once(&mut buffer),
                }
                if n > 0 {
                    times.push(start.elapsed().as_nanos());
                    continue;
                }
                wrong |= buffer.iter().any(|&x| x != (ranks * (ranks + 1) / 2) as f32);
                buffer.fill(0.0);
            }
        }
        (times, wrong)
    }

    fn at_once(&mut self, buffer: &mut [f32]) {
        let (shared, rank, ranks) = (self.shared, self.rank, self.shared.flags.len());
        self.steps += 1;
        let parity = self.steps % 2;
        // SAFETY: the slot of this parity was read before the meeting that began this run.
        unsafe { shared.slot(rank, parity).copy_from_nonoverlapping(buffer.as_ptr(), buffer.len()) };
        self.meet();
        for r in (0..ranks).filter(|&r| r != rank) {
            // SAFETY: written before the meeting; not again before the next but one.
            let theirs = unsafe { std::slice::from_raw_parts(shared.slot(r, parity), buffer.len()) };
            add(buffer, theirs);
        }
    }

    fn staged(&mut self, buffer: &mut [f32], slot: usize) {
        let (shared, rank, ranks) = (self.shared, self.rank, self.shared.flags.len());
        for part in buffer.chunks_mut(slot * ranks) {
            let (len, each) = (part.len(), part.len().div_ceil(ranks));
            let range = |r: usize| (r * each).min(len)..((r + 1) * each).min(len);
            for r in (0..ranks).filter(|&r| r != rank) {
                let own = &part[range(r)];
                // SAFETY: read before the last meeting but one.
                unsafe { shared.slot(rank, r).copy_from_nonoverlapping(own.as_ptr(), own.len()) };
            }
            self.meet();
            self.steps += 1;
            let parity = self.steps % 2;
            let mine = range(rank);
            let result = &mut part[mine];
            for r in (0..ranks).filter(|&r| r != rank) {
                // SAFETY: written before the meeting, and not again before the next one.
                let theirs = unsafe { std::slice::from_raw_parts(shared.slot(r, rank), result.len()) };
                let last = r == (if rank == ranks - 1 { ranks - 2 } else { ranks - 1 });
                // SAFETY: the slot of this parity was read two meetings ago.
                let share = last.then(|| unsafe {
                    std::slice::from_raw_parts_mut(shared.slot(rank, ranks + parity), result.len())
                });
                match share {
                    Some(share) => add_and_share(result, theirs, share),
                    None => add(result, theirs),
                }
            }
            self.meet();
            for r in (1..ranks).map(|n| (rank + n) % ranks) {
                let theirs = &mut part[range(r)];
                let from = shared.slot(r, ranks + parity);
                // SAFETY: written before the meeting, and not again before the next but one.
                unsafe { theirs.as_mut_ptr().copy_from_nonoverlapping(from, theirs.len()) };
            }
        }
    }
}

macro_rules! vectorised {
    ($(fn $name:ident $compiled:ident($($arg:ident: $type:ty),*) $body:block)*) => {$(
        fn $name($($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn $compiled($($arg: $type),*) $body
                if is_x86_feature_detected!("avx512f") {
                    // SAFETY: the processor has it.
                    return unsafe { $compiled($($arg),*) };
                }
            }
            $body
        }
    )*};
}

vectorised! {
    fn add add_wide(to: &mut [f32], from: &[f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t += f;
        }
    }
    fn add_and_share add_and_share_wide(to: &mut [f32], from: &[f32], share: &mut [f32]) {
        for ((t, f), s) in to.iter_mut().zip(from).zip(share) {
            let sum = *t + f;
            *t = sum;
            *s = sum;
        }
    }
}
