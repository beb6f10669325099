//! Groups made from groups.
//!
//! Names and keys are PyTorch's, so that a gloo world can be shared with Python: the default group is
//! `0`, the n-th group made from it `n`, counted on every rank, members or not. The keys of a group lie
//! under those of its parent, with the prefix `n/`, and those of its backends under `cpu/` or `cuda/`
//! there. What this crate adds lies under `tchd/`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::ProcessGroup;
use super::formation::{Formation, form};
use super::parting::{self, Intent};
use super::spec::BackendSpec;
use crate::backend::{CollectiveBackend, factory, has_communicator, leave_split};
use crate::store::{PrefixStore, Store};
use crate::{Error, Result};

/// What a new group has of its own; the rest it has from its parent.
///
/// ```
/// use std::time::Duration;
/// use tch_distributed::{GroupOptions, testing};
/// testing::run_threads(3, |group| {
///     let options = GroupOptions::new().keep_order(true).timeout(Duration::from_secs(60));
///     if let Some(reversed) = group.new_group_with(&[2, 1, 0], options).unwrap() {
///         assert_eq!(reversed.ranks(), [2, 1, 0]);
///         assert_eq!(reversed.rank(), 2 - group.rank());
///     }
/// });
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct GroupOptions {
    backend: Option<BackendSpec>,
    timeout: Option<Duration>,
    group_name: Option<String>,
    keep_order: bool,
    high_priority_stream: Option<bool>,
    split_communicator: bool,
}

impl GroupOptions {
    /// Everything as in the parent.
    pub fn new() -> Self {
        Self::default()
    }

    /// Another backend.
    pub fn backend(mut self, backend: impl Into<BackendSpec>) -> Self {
        self.backend = Some(backend.into());
        self
    }

    /// How long a call may take; as in the parent unless given.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// A name for messages; its number in the order of creation unless given.
    #[doc(alias = "group_desc")]
    pub fn group_name(mut self, name: &str) -> Self {
        self.group_name = Some(name.to_owned());
        self
    }

    /// Whether ranks keep the order of the list instead of being sorted.
    #[doc(alias = "sort_ranks")]
    pub fn keep_order(mut self, keep: bool) -> Self {
        self.keep_order = keep;
        self
    }

    /// Whether NCCL's operations run on a stream of high priority; as in the world unless given.
    #[doc(alias = "is_high_priority_stream")]
    pub fn high_priority_stream(mut self, high: bool) -> Self {
        self.high_priority_stream = Some(high);
        self
    }

    /// Whether NCCL splits the new group's communicator off the parent's instead of connecting its ranks anew. It is
    /// for worlds of this crate's ranks alone, and all of them named their [`device`](crate::InitOptions::device): where
    /// none did, ranks connect anew; where only some did, it is an error on every rank, which says who did not. Every rank
    /// of the parent gives the same, and waits for the others. Other backends take no notice.
    #[doc(alias = "split_from")]
    pub fn split_communicator(mut self, split: bool) -> Self {
        self.split_communicator = split;
        self
    }
}

impl ProcessGroup {
    /// Makes a group of some ranks of this one. Every rank of this group calls it, with the same
    /// ranks, in the same order as other `new_group` calls; ranks outside the new group get `None`.
    ///
    /// `ranks` are ranks of this group. They are sorted; see [`GroupOptions::keep_order`].
    ///
    /// # Errors
    /// `InvalidArgument` for an empty list, a rank given twice, or ranks that disagree about the list;
    /// `RankOutOfRange`; failures of the group.
    ///
    /// ```
    /// tch_distributed::testing::run_threads(3, |group| match group.new_group(&[0, 2]).unwrap() {
    ///     Some(pair) => assert_eq!(pair.size(), 2),
    ///     None => assert_eq!(group.rank(), 1),
    /// });
    /// ```
    pub fn new_group(&self, ranks: &[usize]) -> Result<Option<Self>> {
        self.new_group_with(ranks, GroupOptions::new())
    }

    /// [`new_group`](Self::new_group) with options.
    ///
    /// # Errors
    /// As there; `UnknownBackend`, `BackendUnavailable`.
    pub fn new_group_with(&self, ranks: &[usize], options: GroupOptions) -> Result<Option<Self>> {
        self.inner.usable()?;
        self.check_members(ranks, "ranks")?;
        if let Some(spec) = &options.backend {
            let (cpu, cuda) = spec.resolve()?;
            cpu.iter().chain(&cuda).try_for_each(|name| factory(name).map(|_| ()))?;
        }
        let mut ranks = ranks.to_vec();
        if !options.keep_order {
            ranks.sort_unstable();
        }
        let number = self.inner.children.fetch_add(1, Ordering::Relaxed) + 1;
        self.child(&ranks, number, &format!("{number}/"), options)
    }

    /// The group under a prefix; `None` where this rank is not in it.
    fn child(
        &self,
        ranks: &[usize],
        number: u64,
        prefix: &str,
        options: GroupOptions,
    ) -> Result<Option<Self>> {
        let inner = &self.inner;
        let store: Arc<dyn Store> = Arc::new(PrefixStore::new(prefix, inner.store.clone()));
        let spec = options.backend.unwrap_or_else(|| inner.spec.clone());
        let split_from = match options.split_communicator {
            true => self.to_be_split(ranks, &*store, &spec)?,
            false => None,
        };
        let Some(rank) = ranks.iter().position(|&rank| rank == self.rank()) else {
            if let Some(parent) = split_from {
                leave_split(&*parent, ranks, inner.universe.placement())?;
            }
            return Ok(None);
        };
        let name = options.group_name.unwrap_or_else(|| {
            // Groups of the default group are numbered as PyTorch numbers them.
            if inner.name == "0" { number.to_string() } else { format!("{}.{number}", inner.name) }
        });
        form(Formation {
            name,
            rank,
            ranks: ranks.iter().map(|&rank| inner.ranks[rank]).collect(),
            store,
            spec,
            timeout: options.timeout.unwrap_or_else(|| self.timeout()),
            universe: inner.universe.clone(),
            detail: inner.detail,
            high_priority_stream: options.high_priority_stream.unwrap_or(inner.universe.high_priority_stream),
            split_from: split_from.map(|parent| (parent, ranks.to_vec())),
            world: false,
        })
        .map(Some)
    }

    /// The backend whose communicator all ranks of this group will split for the new one, if they will.
    fn to_be_split(
        &self,
        ranks: &[usize],
        store: &dyn Store,
        spec: &BackendSpec,
    ) -> Result<Option<Arc<dyn CollectiveBackend>>> {
        let inner = &self.inner;
        let Some(parent) = inner.backends.cuda.clone().filter(|parent| has_communicator(&**parent)) else {
            return Ok(None);
        };
        let mine = Intent {
            backend: spec.resolve()?.1.unwrap_or_default(),
            ranks: ranks.to_vec(),
            names_device: inner.universe.placement().device.is_some(),
        };
        let split = parting::agree(store, self.rank(), self.size(), &mine, self.timeout())?;
        Ok(split.then_some(parent))
    }

    fn check_members(&self, ranks: &[usize], argument: &'static str) -> Result<()> {
        if ranks.is_empty() {
            return Err(Error::invalid(argument, "a group has at least one rank, the list is empty"));
        }
        for (i, &rank) in ranks.iter().enumerate() {
            self.check_rank(rank)?;
            if ranks[..i].contains(&rank) {
                return Err(Error::invalid(argument, format!("rank {rank} is given twice in {ranks:?}")));
            }
        }
        Ok(())
    }

    /// Cuts this group into groups of `group_size` consecutive ranks. Gives this rank's group, and the
    /// ranks (of this group) of every one.
    ///
    /// # Errors
    /// `InvalidArgument` when the size is 0, greater than this group, or does not divide it.
    ///
    /// ```
    /// tch_distributed::testing::run_threads(4, |group| {
    ///     let (pair, all) = group.new_subgroups(2).unwrap();
    ///     assert_eq!(all, [[0, 1], [2, 3]]);
    ///     assert_eq!(pair.rank(), group.rank() % 2);
    /// });
    /// ```
    pub fn new_subgroups(&self, group_size: usize) -> Result<(Self, Vec<Vec<usize>>)> {
        let size = self.size();
        if group_size == 0 || !size.is_multiple_of(group_size) {
            return Err(Error::invalid(
                "group_size",
                format!("must divide the number of ranks, {size}; got {group_size}"),
            ));
        }
        let all: Vec<Vec<usize>> =
            (0..size / group_size).map(|i| (i * group_size..(i + 1) * group_size).collect()).collect();
        let mine = self.new_subgroups_by_enumeration(&all)?;
        let (rank, group) = (self.rank(), self.inner.name.clone());
        Ok((mine.ok_or(Error::NotMember { rank, group })?, all))
    }

    /// Makes several disjoint groups at once and gives the one that holds this rank, `None` where none
    /// does. Lists hold ranks of this group.
    ///
    /// # Errors
    /// `InvalidArgument` when there is no list, a list is empty, or a rank is given twice;
    /// `RankOutOfRange`.
    ///
    /// ```
    /// tch_distributed::testing::run_threads(3, |group| {
    ///     let mine = group.new_subgroups_by_enumeration(&[vec![2, 0]]).unwrap();
    ///     assert_eq!(mine.is_some(), group.rank() != 1);
    /// });
    /// ```
    pub fn new_subgroups_by_enumeration(&self, ranks_per_group: &[Vec<usize>]) -> Result<Option<Self>> {
        self.inner.usable()?;
        if ranks_per_group.is_empty() {
            return Err(Error::invalid("ranks_per_group", "at least one group is expected"));
        }
        for ranks in ranks_per_group {
            self.check_members(ranks, "ranks_per_group")?;
        }
        self.check_members(&ranks_per_group.concat(), "ranks_per_group")?;
        let mut mine = None;
        for ranks in ranks_per_group {
            mine = self.new_group(ranks)?.or(mine);
        }
        Ok(mine)
    }

    /// Makes a group of all ranks that give the same colour, in the order of their keys (then of their
    /// ranks). A rank without colour gets `None`. Every rank of this group calls it.
    ///
    /// # Errors
    /// Failures of the group.
    ///
    /// ```
    /// tch_distributed::testing::run_threads(4, |group| {
    ///     let rank = group.rank();
    ///     let half = group.split(Some(rank as i64 % 2), -(rank as i64)).unwrap().unwrap();
    ///     assert_eq!(half.ranks(), [rank % 2 + 2, rank % 2]);
    /// });
    /// ```
    #[doc(alias = "split_group")]
    #[track_caller]
    pub fn split(&self, color: Option<i64>, key: i64) -> Result<Option<Self>> {
        let mine = [i64::from(color.is_some()), color.unwrap_or(0), key];
        let all = self.exchange_numbers(&mine)?;
        let number = self.inner.children.fetch_add(1, Ordering::Relaxed) + 1;
        let Some(color) = color else { return Ok(None) };
        let mut members: Vec<(i64, usize)> = all
            .chunks_exact(3)
            .enumerate()
            .filter(|(_, theirs)| theirs[0] == 1 && theirs[1] == color)
            .map(|(rank, theirs)| (theirs[2], rank))
            .collect();
        members.sort_unstable();
        let ranks: Vec<usize> = members.into_iter().map(|(_, rank)| rank).collect();
        self.child(&ranks, number, &format!("{number}/color/{color}"), GroupOptions::new())
    }
}
