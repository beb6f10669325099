//! How the ranks of a host come to share a segment.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fmt, io};

use once_cell::sync::Lazy;
use rustix::fs::{Mode, OFlags};

use super::door::Door;
use super::segment::{Layout, Segment};
use super::{Inner, SharedMemory};
use crate::backend::BackendContext;
use crate::backend::native::meet::{Meeting, random};
use crate::{Error, Result};

/// The most staging memory of a process, over all its groups.
pub(super) const BUDGET: usize = 32 << 20;
/// The chunk: a few of them, and what they are combined with, stay in a second-level cache.
const CHUNK: usize = 128 << 10;
/// The smallest.
const CHUNK_LEAST: usize = 4 << 10;
/// The largest that can be asked for.
const CHUNK_MOST: usize = 4 << 20;

/// Where rank 0 says what it made.
const SEGMENT: &str = "shm/segment";

/// How much memory for slots there is, and what groups have taken of it.
#[derive(Debug)]
pub(super) struct Budget {
    limit: usize,
    taken: AtomicUsize,
}

/// This process's. In tests of this crate it has the ranks of many worlds at once.
static OURS: Lazy<Arc<Budget>> =
    Lazy::new(|| Arc::new(Budget::new(if cfg!(test) { 32 * BUDGET } else { BUDGET })));

impl Budget {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, taken: AtomicUsize::new(0) }
    }

    /// The chunk that can be afforded: at most a quarter of the budget for one group, and a quarter of what is
    /// left; 0 where that is too little.
    pub(super) fn affordable(&self, ranks: usize, asked: Option<usize>) -> usize {
        let left = self.limit.saturating_sub(self.taken.load(Ordering::Acquire));
        let mut chunk = asked.unwrap_or(CHUNK).min(CHUNK_MOST).next_power_of_two().max(CHUNK_LEAST);
        while Layout::staging(ranks, chunk) > left / 4 {
            chunk /= 2;
            if chunk < CHUNK_LEAST {
                return 0;
            }
        }
        chunk
    }

    /// Takes a part, until it is dropped.
    pub(super) fn reserve(self: &Arc<Self>, bytes: usize) -> Reserved {
        self.taken.fetch_add(bytes, Ordering::AcqRel);
        Reserved { bytes, of: self.clone() }
    }
}

/// A part of a budget.
#[derive(Debug)]
pub(super) struct Reserved {
    bytes: usize,
    of: Arc<Budget>,
}

impl Reserved {
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.of.taken.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Connects the ranks of a group that are all on one host, through keys `shm/…` of its store. Errors name them by
/// `numbers`. Each may ask for the size of its chunks.
///
/// # Errors
/// `BackendUnavailable`, on all ranks, when one of them cannot map the memory, or has too many groups with slots
/// already: then another transport is needed. What the meeting fails with.
pub(crate) fn connect(
    context: &BackendContext,
    meeting: &Meeting,
    numbers: Vec<usize>,
    chunk: Option<usize>,
) -> Result<SharedMemory> {
    let ranks = context.size;
    meeting.leaves(&[SEGMENT.to_owned()]);
    // What this rank can afford, and the name of its door: none where it has none.
    let name = format!("tch-distributed/{:x}{:x}", nonce(), nonce());
    let door = Door::new(&name).ok();
    let offers =
        meeting.exchange("shm/offer", &(OURS.affordable(ranks, chunk), door.is_some().then_some(name)))?;
    if let Some(rank) = offers.iter().position(|(chunk, _)| *chunk < CHUNK_LEAST) {
        let used = "has used up its memory for slots with other groups";
        return Err(unavailable(&format!("rank {} {used} (32 MiB a process)", numbers[rank])));
    }
    let chunk = offers.iter().fold(CHUNK_MOST, |least, (chunk, _)| least.min(*chunk));
    let names: Option<Vec<String>> = offers.into_iter().map(|(_, name)| name).collect();
    let doors = door.zip(names).and_then(|(door, names)| door.among(&names).ok());
    // The leader's descriptor stays open until everybody has had the chance to open it.
    let (attempt, _descriptor) = if context.rank == 0 {
        let layout = Layout::new(ranks, chunk);
        match Segment::create(layout) {
            Ok((segment, descriptor)) => {
                let nonce = segment.sign(nonce());
                let process = std::process::id();
                let words = format!("{process} {} {chunk} {nonce}", descriptor.as_raw_fd());
                context.store.set(SEGMENT, words.as_bytes())?;
                (Ok(segment), Some(descriptor))
            }
            Err(e) => {
                context.store.set(SEGMENT, b"")?;
                (Err(e), None)
            }
        }
    } else {
        (open(ranks, &meeting.get(SEGMENT, 0)?), None)
    };
    // All or none.
    let refusal = attempt.as_ref().err().map(|reason| format!("rank {}: {reason}", numbers[context.rank]));
    let refusal = meeting.exchange("shm/refusal", &refusal)?.into_iter().flatten().next();
    match (attempt, refusal) {
        (Ok(segment), None) => {
            let reserved = OURS.reserve(Layout::staging(ranks, segment.layout.chunk));
            let inner = Inner::new(segment, context.rank, numbers, doors, reserved);
            Ok(SharedMemory { inner: Arc::new(inner) })
        }
        (_, refusal) => Err(unavailable(&refusal.unwrap_or_default())),
    }
}

fn unavailable(reason: &str) -> Error {
    Error::BackendUnavailable {
        backend: "native".to_owned(),
        reason: format!("ranks cannot share memory: {reason}"),
    }
}

/// Opens the leader's segment through `/proc`, and makes sure that it is that.
fn open(ranks: usize, words: &[u8]) -> io::Result<Segment> {
    let words = String::from_utf8_lossy(words);
    let mut words = words.split(' ');
    let mut number = || words.next().and_then(|w| w.parse::<u64>().ok());
    let (Some(process), Some(descriptor), Some(chunk), Some(nonce)) =
        (number(), number(), number(), number())
    else {
        return Err(io::Error::other("the first rank of the host has no segment"));
    };
    let path = format!("/proc/{process}/fd/{descriptor}");
    let failed = |e: &dyn fmt::Display| io::Error::other(format!("{path}: {e}"));
    let descriptor: OwnedFd =
        rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| failed(&e))?;
    let chunk = chunk as usize;
    if !chunk.is_power_of_two() || !(CHUNK_LEAST..=CHUNK_MOST).contains(&chunk) {
        return Err(failed(&"its chunk size makes no sense"));
    }
    let segment = Segment::open(&descriptor, Layout::new(ranks, chunk)).map_err(|e| failed(&e))?;
    if segment.signature() != nonce {
        return Err(failed(&"it belongs to another group"));
    }
    Ok(segment)
}

/// A number that no other group has.
pub(super) fn nonce() -> u64 {
    random() as u64
}
