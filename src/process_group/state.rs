//! What a group is made of, and what happens to it when something fails.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use once_cell::sync::OnceCell;
use parking_lot::Mutex;
use tch::Device;

use super::spec::{BackendSpec, Backends};
use crate::backend::Placement;
use crate::profile::{self, GroupInstrument, RankInstrument};
use crate::rendezvous::Claim;
use crate::store::Store;
use crate::{Error, Result};

const USABLE: u8 = 0;
const FAILED: u8 = 1;
/// `destroy` waits for the others.
const LEAVING: u8 = 2;
const DESTROYED: u8 = 3;

/// The key under which the ranks of a group agree on what it is.
pub(super) const AGREEMENT: &str = "tchd/group";

/// One group, shared by all its handles.
pub(super) struct Inner {
    pub(super) name: String,
    pub(super) rank: usize,
    /// The global rank of each rank.
    pub(super) ranks: Vec<usize>,
    pub(super) backends: Backends,
    pub(super) spec: BackendSpec,
    /// Keys of this group and of the groups made from it.
    pub(super) store: Arc<dyn Store>,
    pub(super) universe: Arc<Universe>,
    /// Its flight recorder, and where its events go while somebody profiles.
    pub(super) instrument: Arc<GroupInstrument>,
    /// Every collective is compared among all ranks before it runs.
    pub(super) detail: bool,
    /// How many groups were made from this one (on every rank, members or not).
    pub(super) children: AtomicU64,
    /// How many monitored barriers there were.
    pub(super) monitored: AtomicU64,
    /// How many calls were compared.
    pub(super) compared: AtomicU64,
    timeout: AtomicU64,
    state: AtomicU8,
    cause: Mutex<Option<Arc<Error>>>,
    /// Whether a caller was given the failure.
    told: AtomicBool,
    abort_passed_on: AtomicBool,
}

/// All groups of one rank that come from one `init_process_group`.
pub(super) struct Universe {
    live: Mutex<Vec<Weak<Inner>>>,
    /// Stores of groups that are gone, in which a key of theirs is left.
    left_behind: Mutex<Vec<Arc<dyn Store>>>,
    /// This rank's number in the world, until it leaves.
    claim: Mutex<Option<Claim>>,
    /// Unknown at first where the ranks have met as PyTorch's do.
    local_rank: OnceCell<usize>,
    /// The device that the user named.
    device: Option<Device>,
    pub(super) high_priority_stream: bool,
    /// This rank in the world.
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) instrument: Arc<RankInstrument>,
    /// Whether a caller was given a failure of any group, also of one that is gone.
    told: AtomicBool,
}

impl Universe {
    pub(super) fn new(
        rank: usize,
        world_size: usize,
        local_rank: Option<usize>,
        claim: Option<Claim>,
        device: Option<Device>,
        high_priority_stream: bool,
    ) -> Arc<Self> {
        let instrument = Arc::<RankInstrument>::default();
        profile::dump_on_signal(&instrument, rank, world_size);
        let local_rank = local_rank.map_or_else(OnceCell::new, OnceCell::with_value);
        Arc::new(Self {
            live: Mutex::default(),
            left_behind: Mutex::default(),
            claim: Mutex::new(claim),
            local_rank,
            device,
            high_priority_stream,
            rank,
            world_size,
            instrument,
            told: AtomicBool::new(false),
        })
    }

    /// This rank among those of its host.
    pub(super) fn local_rank(&self) -> Result<usize> {
        let missing = Error::MissingArgument {
            argument: "local_rank",
            builder: "the launcher",
            variable: "LOCAL_RANK",
        };
        self.local_rank.get().copied().ok_or(missing)
    }

    /// This rank's device, and how it is used.
    pub(super) fn placement(&self) -> Placement {
        Placement {
            device: self.device,
            // Where nobody has counted yet: the rank, which is the same on one host.
            local_rank: self.local_rank.get().copied().unwrap_or(self.rank),
            high_priority_stream: self.high_priority_stream,
        }
    }

    pub(super) fn knows_local_rank(&self) -> bool {
        self.local_rank.get().is_some()
    }

    /// It has been counted.
    pub(super) fn set_local_rank(&self, counted: usize) {
        // A second count gives the same.
        let _ = self.local_rank.set(counted);
    }

    pub(super) fn add(&self, group: &Arc<Inner>) {
        let mut live = self.live.lock();
        live.retain(|g| g.strong_count() > 0);
        live.push(Arc::downgrade(group));
    }

    /// Deletes what groups that are gone have left in their stores. Not done where they go: a handle may be
    /// dropped anywhere, and a store may be slow.
    pub(super) fn sweep(&self) {
        for store in std::mem::take(&mut *self.left_behind.lock()) {
            if let Err(error) = store.delete(AGREEMENT) {
                tracing::debug!(%error, "a key stays in the store");
            }
        }
    }

    /// This rank leaves the world: its number is free.
    pub(super) fn leave(&self) {
        self.claim.lock().take();
    }

    /// Whether a caller was given a failure of any group of this rank.
    pub(super) fn told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    /// The groups that still exist, in the order they were made.
    pub(super) fn groups(&self) -> Vec<Arc<Inner>> {
        self.live.lock().iter().filter_map(Weak::upgrade).collect()
    }
}

/// The parts of a new group.
pub(super) struct Parts {
    pub(super) name: String,
    pub(super) rank: usize,
    pub(super) ranks: Vec<usize>,
    pub(super) backends: Backends,
    pub(super) spec: BackendSpec,
    pub(super) store: Arc<dyn Store>,
    pub(super) universe: Arc<Universe>,
    pub(super) detail: bool,
    pub(super) timeout: Duration,
}

impl Inner {
    pub(super) fn new(parts: Parts) -> Arc<Self> {
        let instrument = GroupInstrument::new(&parts.universe.instrument, &parts.name, &parts.ranks);
        let inner = Arc::new(Self {
            instrument,
            name: parts.name,
            rank: parts.rank,
            ranks: parts.ranks,
            backends: parts.backends,
            spec: parts.spec,
            store: parts.store,
            universe: parts.universe,
            detail: parts.detail,
            children: AtomicU64::new(0),
            monitored: AtomicU64::new(0),
            compared: AtomicU64::new(0),
            timeout: AtomicU64::new(nanoseconds(parts.timeout)),
            state: AtomicU8::new(USABLE),
            cause: Mutex::new(None),
            told: AtomicBool::new(false),
            abort_passed_on: AtomicBool::new(false),
        });
        inner.universe.add(&inner);
        inner
    }

    pub(super) fn timeout(&self) -> Duration {
        Duration::from_nanos(self.timeout.load(Ordering::Relaxed))
    }

    pub(super) fn set_timeout(&self, timeout: Duration) {
        self.timeout.store(nanoseconds(timeout), Ordering::Relaxed);
    }

    /// Ok while the group neither failed nor was destroyed.
    #[inline]
    pub(super) fn usable(&self) -> Result<()> {
        match self.state.load(Ordering::Relaxed) {
            USABLE => Ok(()),
            _ => Err(self.unusable()),
        }
    }

    #[cold]
    fn unusable(&self) -> Error {
        match (self.state.load(Ordering::Acquire), self.cause()) {
            (FAILED, Some(cause)) => {
                self.tell();
                Error::Poisoned { cause }
            }
            _ => Error::invalid("group", format!("process group {} was destroyed", self.name)),
        }
    }

    /// The first failure.
    pub(super) fn cause(&self) -> Option<Arc<Error>> {
        self.cause.lock().clone()
    }

    /// The global rank that was lost, if that is the first failure.
    fn lost(&self) -> Option<usize> {
        match self.cause().as_deref() {
            Some(&Error::PeerLost { rank, .. }) => self.ranks.get(rank).copied(),
            _ => None,
        }
    }

    /// Makes every later call fail with this cause, unless there is an earlier one.
    pub(super) fn poison(&self, cause: Arc<Error>) {
        let mut first = self.cause.lock();
        if first.is_none() {
            tracing::warn!(group = %self.name, rank = self.rank, %cause, "process group failed");
            let universe = &self.universe;
            profile::dump_on_failure(&universe.instrument, universe.rank, universe.world_size, &cause);
            *first = Some(cause);
            let _ = self.state.compare_exchange(USABLE, FAILED, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    /// Records what an operation's failure means for this group and, where a peer was lost, for all
    /// others that contain it. Takes no lock of any backend: completions call it.
    #[cold]
    pub(super) fn note(&self, error: &Error) {
        let cause = match error {
            Error::Poisoned { cause } => cause.clone(),
            failure if failure.poisons() => Arc::new(failure.duplicate()),
            _ => return,
        };
        self.poison(cause.clone());
        if let Error::PeerLost { rank, .. } = *cause
            && let Some(&lost) = self.ranks.get(rank)
        {
            for group in self.universe.groups() {
                if let Some(rank) = group.ranks.iter().position(|&global| global == lost)
                    && let Error::PeerLost { op, source, .. } = cause.duplicate()
                {
                    group.poison(Arc::new(Error::PeerLost { rank, op, source }));
                }
            }
        }
    }

    /// Records a failure on the caller's thread, where backends may be called: what is pending on
    /// groups that failed with this one ends too.
    #[cold]
    pub(super) fn fail(&self, error: Error) -> Error {
        self.note(&error);
        if matches!(error, Error::Poisoned { .. }) || error.poisons() {
            self.tell();
            let lost = self.lost();
            for group in self.universe.groups() {
                group.pass_on();
                if lost.is_some() && group.lost() == lost {
                    // It is the same failure.
                    group.told.store(true, Ordering::Relaxed);
                }
            }
        }
        error
    }

    /// Ends everything on this group, with this cause.
    pub(super) fn abort(&self, cause: Arc<Error>) {
        self.tell();
        self.poison(cause);
        self.pass_on();
    }

    /// Ok while there is something that can be aborted.
    pub(super) fn abortable(&self) -> Result<()> {
        match self.state.load(Ordering::Acquire) {
            LEAVING => Ok(()),
            _ => self.usable(),
        }
    }

    /// Ends what is pending on a group that has failed.
    pub(super) fn pass_on(&self) {
        let Some(cause) = self.cause() else { return };
        // A `destroy` that waits is freed as well.
        let live = self.state.load(Ordering::Acquire) != DESTROYED;
        if live && !self.abort_passed_on.swap(true, Ordering::AcqRel) {
            for backend in self.backends.all() {
                backend.abort(&cause);
            }
        }
    }

    /// A caller is given a failure of this group.
    fn tell(&self) {
        self.told.store(true, Ordering::Relaxed);
        self.universe.told.store(true, Ordering::Relaxed);
    }

    /// Whether a caller was given a failure of this group.
    fn told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    /// Leaves in good order. The first time only; a group that failed has nothing to wait for, and
    /// nothing to say unless nobody was told.
    pub(super) fn destroy(&self, timeout: Duration) -> Result<()> {
        let leave = |state| (state < LEAVING).then_some(LEAVING);
        let Ok(before) = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, leave) else {
            return Ok(());
        };
        if before == FAILED {
            self.pass_on();
        }
        let mut outcome = match self.cause() {
            Some(cause) if before == FAILED && !self.told() => Err(cause.duplicate()),
            _ => Ok(()),
        };
        for backend in self.backends.all() {
            let timeout = if before == FAILED { Duration::ZERO } else { timeout };
            let ended = backend.shutdown(timeout);
            if before == USABLE && outcome.is_ok() {
                outcome = ended;
            }
        }
        self.state.store(DESTROYED, Ordering::Release);
        if let Err(error) = &outcome {
            self.note(error);
        }
        outcome
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Other groups' entries go with the next group that is made; this keeps the list short when
        // none is.
        self.universe.live.lock().retain(|g| g.strong_count() > 0);
        if self.rank == 0 {
            self.universe.left_behind.lock().push(self.store.clone());
        }
    }
}

fn nanoseconds(timeout: Duration) -> u64 {
    u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tch::{Device, Kind, Tensor};

    use crate::{Error, InitOptions, testing};

    fn lost() -> Error {
        Error::PeerLost { rank: 1, op: "all_reduce".to_owned(), source: None }
    }

    /// Two ranks, in a group beside the default one; calls may take long.
    fn beside(run: impl Fn(crate::ProcessGroup, crate::ProcessGroup) + Send + Sync) {
        let options = InitOptions::new().timeout(Duration::from_secs(300));
        testing::run_threads_on("native", options, 2, |group| {
            let own = group.new_group(&[0, 1]).unwrap().unwrap();
            run(group, own);
        });
    }

    #[test]
    fn abort_and_destroy_free_who_waits_in_a_group_that_failed_because_of_another() {
        for destroy in [false, true] {
            beside(|group, own| {
                let mut tensor = Tensor::zeros([2], (Kind::Float, Device::Cpu));
                if group.rank() == 1 {
                    // The other rank ends this.
                    assert!(own.recv(&mut tensor, 0, 0).is_err());
                    return;
                }
                let pending = own.irecv(&tensor, 1, 0).unwrap();
                own.inner.note(&lost());
                if destroy {
                    assert!(matches!(own.destroy(), Err(Error::PeerLost { rank: 1, .. })));
                } else {
                    own.abort().unwrap();
                }
                let error = pending.wait().unwrap_err();
                let lost = |error: &Error| matches!(error, Error::PeerLost { rank: 1, .. });
                let named = match &error {
                    Error::Poisoned { cause } => lost(cause),
                    other => lost(other),
                };
                assert!(named, "{error}");
            });
        }
    }

    #[test]
    fn a_loss_that_a_caller_was_told_of_is_no_second_error_of_a_group_beside() {
        beside(|group, own| {
            if group.rank() == 0 {
                group.inner.fail(lost());
                own.destroy().unwrap();
            }
        });
    }

    #[test]
    fn destroy_waits_as_long_as_calls_through_its_handle() {
        beside(|group, own| {
            if group.rank() == 0 {
                let error = own.with_timeout(Duration::from_secs(1)).destroy().unwrap_err();
                let Error::Timeout { elapsed, missing, .. } = &error else { panic!("{error}") };
                assert!(*elapsed < Duration::from_secs(100) && *missing == [1], "{error}");
            }
            group.barrier().unwrap();
        });
    }
}
