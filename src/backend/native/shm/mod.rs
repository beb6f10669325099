//! Ranks of one host over shared memory. README.md describes the protocol.

mod bell;
mod bulk;
mod combine;
mod connect;
mod direct;
mod door;
mod lists;
mod machine;
#[cfg(test)]
mod model;
mod pages;
mod pool;
mod protocol;
mod segment;
mod site;
mod stages;
#[cfg(test)]
mod tests;
mod wait;

use std::iter::once;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::time::Instant;

use parking_lot::Mutex;
use tch::{Kind, Tensor};

pub(crate) use connect::connect;

use self::bell::RankBell;
use self::door::Doors;
use self::machine::Machine;
use self::protocol::{Word, arm, doze, ring, tell, watch};
use self::segment::Segment;
use self::site::Atlas;
use self::wait::{Next, Wait};
use super::bulk::Bulk;
use super::transport::{Deadline, Progress, Run, Stamp, Transport, Watch};
use crate::backend::Call;
use crate::libtorch::tensor_over;
use crate::{Error, Result};

/// The shared-memory transport of one group, as one of its ranks has it.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    inner: Arc<Inner>,
}

impl SharedMemory {
    /// A way for large messages around the sockets.
    pub(crate) fn bulk(&self) -> Arc<dyn Bulk> {
        Arc::new(bulk::Mail::new(self.inner.clone()))
    }
}

#[derive(Debug)]
struct Inner {
    segment: Segment,
    rank: usize,
    /// What the group calls the ranks that share the segment: in errors and words they have these numbers.
    numbers: Vec<usize>,
    /// What a progress engine sleeps on; without, it naps.
    doors: Option<Doors>,
    /// Whether there are more ranks than cores.
    crowded: bool,
    /// How often to look again at once where something is waited for.
    spins: AtomicU32,
    /// The number of the last call begun here.
    begun: AtomicU64,
    /// The number of the last call that ended here.
    ended: AtomicU64,
    /// How many runs there are: whether `park` may find its bell awake because it was rung.
    runs: AtomicUsize,
    /// 1 once the group has failed.
    failed: AtomicU64,
    interrupted: AtomicBool,
    /// The other ranks' memory for tensors, as far as it was seen.
    atlas: Mutex<Atlas>,
    /// Returned to the process's budget when the segment goes.
    _reserved: connect::Reserved,
}

impl Inner {
    fn new(
        segment: Segment,
        rank: usize,
        numbers: Vec<usize>,
        doors: Option<Doors>,
        reserved: connect::Reserved,
    ) -> Self {
        let ranks = segment.layout.ranks;
        let crowded = ranks > num_cpus::get();
        Self {
            segment,
            rank,
            numbers,
            doors,
            crowded,
            spins: AtomicU32::new(Wait::first_spins(ranks)),
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            runs: AtomicUsize::new(0),
            failed: AtomicU64::new(0),
            interrupted: AtomicBool::new(false),
            atlas: Mutex::default(),
            _reserved: reserved,
        }
    }

    fn ranks(&self) -> usize {
        self.segment.layout.ranks
    }

    /// The number of a rank in the group.
    fn number(&self, rank: usize) -> usize {
        self.numbers.get(rank).copied().unwrap_or(rank)
    }

    fn finished(&self) -> u64 {
        self.ended.load(Ordering::Acquire)
    }

    fn finish(&self, round: u64) {
        self.ended.store(round, Ordering::Release);
    }

    fn failed(&self) -> bool {
        self.failed.read() != 0
    }

    fn bell_of(&self, rank: usize) -> RankBell<'_> {
        RankBell { word: self.segment.bell(rank), rank, doors: self.doors.as_ref() }
    }

    fn bell(&self) -> RankBell<'_> {
        self.bell_of(self.rank)
    }

    fn other_bells(&self) -> impl Iterator<Item = RankBell<'_>> {
        (0..self.ranks()).filter(|&r| r != self.rank).map(|r| self.bell_of(r))
    }

    #[inline(always)]
    fn begin<'a>(&self, call: Call<'a>, stamp: Stamp) -> Result<Machine<'a>> {
        // A call that cannot be made has no number: nothing of it is seen by the others.
        let mut machine = Machine::new(self, call, stamp)?;
        machine.number(self.begun.fetch_add(1, Ordering::AcqRel) + 1);
        Ok(machine)
    }

    /// Runs a call to its end on this thread.
    #[inline(always)]
    fn drive(&self, machine: &mut Machine<'_>, deadline: &Deadline) -> Result<()> {
        let mut wait = Wait::new(self);
        let mut armed = false;
        loop {
            match machine.advance(self)? {
                Progress::Done => {
                    wait.moved(self);
                    return Ok(());
                }
                Progress::Moved => {
                    wait.moved(self);
                    armed = false;
                }
                Progress::Idle => {
                    let next =
                        if armed { Wait::sleep(self, deadline.at())? } else { wait.idle(self, deadline)? };
                    armed = next == Next::LookThenSleep;
                    if next == Next::Late {
                        return Err(machine.timed_out(self));
                    }
                }
            }
        }
    }
}

impl Transport for SharedMemory {
    fn start<'a>(&self, call: Call<'a>, stamp: Stamp) -> Result<Box<dyn Run + 'a>> {
        let machine = self.inner.begin(call, stamp)?;
        self.inner.runs.fetch_add(1, Ordering::AcqRel);
        Ok(Box::new(SharedRun { inner: self.inner.clone(), machine }))
    }

    fn run_inline<'a>(&self, call: Call<'a>, stamp: Stamp, deadline: &Deadline) -> Result<Option<Call<'a>>> {
        let inner = &*self.inner;
        let mut machine = inner.begin(call, stamp)?;
        let ended = inner.drive(&mut machine, deadline);
        ended.inspect_err(|_| machine.withdraw(inner))?;
        Ok(None)
    }

    fn allocate(&self, size: &[i64], kind: Kind) -> Option<Result<Tensor>> {
        Some(tensor(size, kind))
    }

    fn park(&self, until: Instant) {
        let inner = &*self.inner;
        if inner.runs.load(Ordering::Acquire) == 0 {
            arm(&inner.bell());
        }
        // A run that found nothing has armed the bell. Whoever interrupts sets the flag, then rings.
        let left = until.saturating_duration_since(Instant::now());
        if !inner.interrupted.swap(false, Ordering::SeqCst) && !left.is_zero() {
            doze(&inner.bell(), u64::try_from(left.as_nanos()).unwrap_or(u64::MAX));
        }
    }

    fn interrupt(&self) {
        self.inner.interrupted.store(true, Ordering::SeqCst);
        // The bell is looked at after the flag can be seen.
        fence(Ordering::SeqCst);
        ring(&self.inner.bell());
    }

    fn watch(&self, set: &mut Vec<Watch>) -> bool {
        let Some(doors) = &self.inner.doors else { return false };
        if !watch(&self.inner.bell()) {
            return false;
        }
        set.push(Watch { fd: doors.watch(), write: false, read: true });
        true
    }

    fn fail(&self) {
        tell(&self.inner.failed, 1, once(self.inner.bell()));
        self.interrupt();
    }
}

/// A collective driven by the progress engine.
struct SharedRun<'a> {
    inner: Arc<Inner>,
    machine: Machine<'a>,
}

impl Run for SharedRun<'_> {
    fn advance(&mut self) -> Result<Progress> {
        if let Some(doors) = &self.inner.doors {
            doors.clear();
        }
        let progress = self.machine.advance(&self.inner)?;
        if progress != Progress::Idle {
            return Ok(progress);
        }
        // The caller may sleep now: ask to be woken, and look once more.
        arm(&self.inner.bell());
        self.machine.advance(&self.inner)
    }
}

impl Drop for SharedRun<'_> {
    fn drop(&mut self) {
        if !self.machine.ended() {
            self.machine.withdraw(&self.inner);
        }
        self.inner.runs.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A tensor whose memory the other ranks of the host can read.
fn tensor(size: &[i64], kind: Kind) -> Result<Tensor> {
    let count = size.iter().try_fold(kind.elt_size_in_bytes(), |bytes, &n| {
        usize::try_from(n).ok().and_then(|n| bytes.checked_mul(n))
    });
    let bytes =
        count.ok_or_else(|| Error::invalid("size", format!("{size:?} of {kind:?} has no size in bytes")))?;
    let block = pool::allocate(bytes)?;
    // SAFETY: at least as many bytes, at the start of a page, that belong to the block alone while it lives.
    unsafe { tensor_over(block.data(), size, kind, block) }
}
