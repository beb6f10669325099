//! The handle.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tch::Device;

use super::state::Inner;
use crate::backend::has_communicator;
use crate::profile::GroupInstrument;
use crate::{Error, Result};

/// A group of ranks that communicate: every collective is a method here.
///
/// A handle is cheap to clone and may be moved to other threads. Rank arguments of its methods are
/// ranks *within the group*, 0 to `size() - 1`; [`ranks`](Self::ranks) maps them to global ranks.
///
/// ```
/// use tch::Tensor;
/// use tch_distributed::{ReduceOp, testing};
///
/// let sums = testing::run_threads(4, |group| {
///     let mut tensor = Tensor::from_slice(&[group.rank() as i64, 1]);
///     group.all_reduce(&mut tensor, ReduceOp::Sum).unwrap();
///     Vec::<i64>::try_from(tensor).unwrap()
/// });
/// assert_eq!(sums, vec![vec![6, 4]; 4]);
/// ```
#[derive(Clone)]
pub struct ProcessGroup {
    pub(super) inner: Arc<Inner>,
    pub(super) timeout: Option<Duration>,
}

impl ProcessGroup {
    pub(super) fn of(inner: Arc<Inner>) -> Self {
        Self { inner, timeout: None }
    }

    /// What watches this group.
    pub(crate) fn instrument(&self) -> &Arc<GroupInstrument> {
        &self.inner.instrument
    }

    /// How many ranks the world has that this group belongs to.
    pub(crate) fn global_world_size(&self) -> usize {
        self.inner.universe.world_size
    }

    /// This rank within the group.
    #[doc(alias = "get_rank")]
    #[doc(alias = "get_group_rank")]
    pub fn rank(&self) -> usize {
        self.inner.rank
    }

    /// How many ranks the group has.
    #[doc(alias = "get_world_size")]
    pub fn size(&self) -> usize {
        self.inner.ranks.len()
    }

    /// The global rank of each rank of the group.
    #[doc(alias = "get_process_group_ranks")]
    #[doc(alias = "get_global_rank")]
    pub fn ranks(&self) -> &[usize] {
        &self.inner.ranks
    }

    /// The rank within the group of a global rank; `None` for one outside it.
    #[doc(alias = "get_group_rank")]
    pub fn group_rank(&self, global_rank: usize) -> Option<usize> {
        self.inner.ranks.iter().position(|&rank| rank == global_rank)
    }

    /// The group's name: `0` for the default group, then a number in the order of creation, unless
    /// a name was given.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The backend's name, or `cpu:NAME,cuda:NAME` where there are two.
    #[doc(alias = "get_backend")]
    #[doc(alias = "get_backend_config")]
    pub fn backend_name(&self) -> String {
        self.inner.backends.names()
    }

    /// How long a call may take.
    pub fn timeout(&self) -> Duration {
        self.timeout.unwrap_or_else(|| self.inner.timeout())
    }

    /// Sets how long calls may take, for all handles of this group on this rank (but those that
    /// [`with_timeout`](Self::with_timeout) made).
    #[doc(alias = "_set_pg_timeout")]
    pub fn set_timeout(&self, timeout: Duration) {
        self.inner.set_timeout(timeout);
    }

    /// The same group; calls through this handle may take this long.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     group.with_timeout(Duration::from_secs(5)).barrier().unwrap();
    /// });
    /// ```
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { inner: self.inner.clone(), timeout: Some(timeout) }
    }

    /// Ends everything that is pending on this group, on all ranks: pending calls return
    /// [`Aborted`](Error::Aborted), later ones [`Poisoned`](Error::Poisoned). May be called from
    /// any thread; this is how a thread that waits is freed, one in [`destroy`](Self::destroy) too.
    ///
    /// # Errors
    /// `InvalidArgument` when the group was destroyed. Aborting twice is no error.
    ///
    /// ```
    /// use tch_distributed::{Error, testing};
    /// testing::run_threads(1, |group| {
    ///     group.abort().unwrap();
    ///     assert!(matches!(group.barrier(), Err(Error::Poisoned { .. })));
    /// });
    /// ```
    #[doc(alias = "_abort_process_group")]
    pub fn abort(&self) -> Result<()> {
        match self.inner.abortable() {
            Ok(()) => self.inner.abort(Arc::new(Error::Aborted)),
            // What is pending may not know yet: of a rank that was lost in another group, say.
            Err(Error::Poisoned { .. }) => self.inner.pass_on(),
            Err(destroyed) => return Err(destroyed),
        }
        Ok(())
    }

    /// Whether messages between tensors on a device are matched by their order alone, and wait there for one another.
    pub(crate) fn orders_messages(&self, device: Device) -> bool {
        device.is_cuda() && self.inner.backends.cuda.as_deref().is_some_and(has_communicator)
    }

    /// Whether calls may be made: it has not failed, and has not been destroyed.
    pub(crate) fn is_well(&self) -> bool {
        self.inner.usable().is_ok()
    }

    /// The same with a cause of one's own, which the other ranks get to see.
    pub(crate) fn abort_because(&self, cause: Error) {
        if self.inner.abortable().is_ok() {
            self.inner.abort(Arc::new(cause));
        }
    }

    /// Ends the group because this rank failed elsewhere, in its step. `words` tell the others of it.
    pub(crate) fn abort_after(&self, words: &str) {
        self.abort_because(failed_in_its_step(self.rank(), words));
    }

    /// Leaves this group in good order: waits for what is pending and checks that every rank made as
    /// many calls. To be called on every rank of it; later calls are refused. A second time it does
    /// nothing.
    ///
    /// # Errors
    /// A failure that nobody was told, of a [`Work`](crate::Work) that was dropped say; `Desync` when a
    /// rank called something that this one did not; `Timeout` when a rank does not come; `PeerLost`.
    ///
    /// ```
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     let pair = group.new_group(&[0, 1]).unwrap().unwrap();
    ///     pair.barrier().unwrap();
    ///     pair.destroy().unwrap();
    ///     assert!(pair.barrier().is_err());
    /// });
    /// ```
    pub fn destroy(&self) -> Result<()> {
        self.inner.destroy(self.timeout())
    }

    /// Whether a caller was told that this group or one beside it has failed.
    pub(crate) fn failure_was_told(&self) -> bool {
        self.inner.universe.told()
    }

    /// Rank `rank` of the world that this group came from is gone: ends everything on all groups that
    /// contain it.
    pub(crate) fn lose_all(&self, rank: usize, why: &str) {
        for group in self.inner.universe.groups() {
            if let Some(rank) = group.ranks.iter().position(|&global| global == rank) {
                let source = Some(std::io::Error::other(why.to_owned()));
                let op = "its own work".to_owned();
                group.abort(Arc::new(Error::PeerLost { rank, op, source }));
            }
        }
    }

    /// Ends the groups in which this rank meets no other rank of this group, because it failed: a mesh's other axes.
    /// `words` tell the others of it. The world that this group came from stays.
    pub(crate) fn abort_crossing(&self, words: &str) {
        let universe = &self.inner.universe;
        for group in universe.groups() {
            let common = group.ranks.iter().filter(|rank| self.inner.ranks.contains(rank)).count();
            let is_axis = (2..universe.world_size).contains(&group.ranks.len());
            if common == 1 && is_axis && group.abortable().is_ok() {
                group.abort(Arc::new(failed_in_its_step(group.rank, words)));
            }
        }
    }

    pub(super) fn check_rank(&self, rank: usize) -> Result<()> {
        let size = self.size();
        if rank < size { Ok(()) } else { Err(Error::RankOutOfRange { rank, size }) }
    }
}

fn failed_in_its_step(rank: usize, words: &str) -> Error {
    let source = Some(std::io::Error::other(words.to_owned()));
    Error::PeerLost { rank, op: "its step".to_owned(), source }
}

impl fmt::Debug for ProcessGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessGroup")
            .field("name", &self.name())
            .field("rank", &self.rank())
            .field("ranks", &self.ranks())
            .field("backend", &self.backend_name())
            .finish()
    }
}

impl fmt::Display for ProcessGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ProcessGroup{{{}, rank {} of {:?}, {}}}",
            self.name(),
            self.rank(),
            self.ranks(),
            self.backend_name()
        )
    }
}
