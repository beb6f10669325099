//! The default group: made, found, destroyed.

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tch::Device;

use super::ProcessGroup;
use super::formation::{Formation, form};

use super::spec::BackendSpec;
use super::state::Universe;
use crate::backend::factory;
use crate::rendezvous::{RendezvousRequest, rendezvous};
use crate::store::{PrefixStore, Store};
use crate::{Error, Result};

/// How long a call may take unless told otherwise.
pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// The same where NCCL is the only backend.
pub(super) const DEFAULT_NCCL_TIMEOUT: Duration = Duration::from_secs(10 * 60);

/// How the ranks of a new world meet, and what holds for it.
///
/// What is not given comes from the environment, as torchrun sets it: `RANK`, `WORLD_SIZE`,
/// `MASTER_ADDR`, `MASTER_PORT`. With a world size of 1 nothing else is needed.
///
/// ```
/// use std::time::Duration;
/// use tch_distributed as dist;
/// let options = dist::InitOptions::new().rank(0).world_size(1).timeout(Duration::from_secs(60));
/// let group = dist::init_process_group("native", options)?;
/// assert_eq!((group.rank(), group.size()), (0, 1));
/// dist::destroy_process_group()?;
/// # Ok::<(), dist::Error>(())
/// ```
#[derive(Clone, Default)]
#[must_use]
pub struct InitOptions {
    pub(super) init_method: Option<String>,
    pub(super) store: Option<Arc<dyn Store>>,
    pub(super) rank: Option<usize>,
    pub(super) world_size: Option<usize>,
    pub(super) timeout: Option<Duration>,
    pub(super) device: Option<Device>,
    pub(super) high_priority_stream: bool,
    pub(super) group_name: Option<String>,
    pub(super) detail: Option<bool>,
}

impl InitOptions {
    /// Everything from the environment (`env://`).
    pub fn new() -> Self {
        Self::default()
    }

    /// Where the ranks meet: `env://`, `tcp://host:port` or `file:///path`.
    pub fn init_method(mut self, url: &str) -> Self {
        self.init_method = Some(url.to_owned());
        self
    }

    /// A store that all ranks reach, instead of an init method. Needs rank and world size.
    pub fn store(mut self, store: impl Store) -> Self {
        self.store = Some(Arc::new(store));
        self
    }

    /// This rank.
    pub fn rank(mut self, rank: usize) -> Self {
        self.rank = Some(rank);
        self
    }

    /// How many ranks there are.
    pub fn world_size(mut self, world_size: usize) -> Self {
        self.world_size = Some(world_size);
        self
    }

    /// How long meeting, and later each call, may take. 30 minutes unless given; 10 for NCCL.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// This rank's device, for backends of devices; else the one of the rank's number on its host. NCCL then connects the
    /// ranks at once instead of with the first operation: all ranks name theirs, or none. With NCCL it becomes the
    /// current CUDA device of the thread that calls [`init_process_group`].
    #[doc(alias = "device_id")]
    pub fn device(mut self, device: Device) -> Self {
        self.device = Some(device);
        self
    }

    /// Whether NCCL's operations run on a stream of high priority, before what else the device has to do.
    #[doc(alias = "is_high_priority_stream")]
    pub fn high_priority_stream(mut self, high: bool) -> Self {
        self.high_priority_stream = high;
        self
    }

    /// The default group's name; `0` unless given.
    pub fn group_name(mut self, name: &str) -> Self {
        self.group_name = Some(name.to_owned());
        self
    }

    /// Whether every collective is compared among all ranks (operation, kind, shapes) before it runs,
    /// so that a disagreement is the same error on all ranks, with the line of each call. Costs one
    /// small exchange a call. Unless given, on when `TORCH_DISTRIBUTED_DEBUG` is `DETAIL`. All ranks
    /// must agree on it.
    #[doc(alias = "TORCH_DISTRIBUTED_DEBUG")]
    pub fn debug_detail(mut self, on: bool) -> Self {
        self.detail = Some(on);
        self
    }
}

impl fmt::Debug for InitOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InitOptions")
            .field("init_method", &self.init_method)
            .field("store", &self.store.as_ref().map(|_| "given"))
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("timeout", &self.timeout)
            .field("device", &self.device)
            .field("group_name", &self.group_name)
            .finish_non_exhaustive()
    }
}

/// The process's default group.
static PROCESS: RwLock<Option<ProcessGroup>> = RwLock::new(None);
/// Held while the process's default group is being made.
static MAKING: Mutex<()> = Mutex::new(());

/// Whose default group a thread sees.
enum Scope {
    /// The process's.
    Process,
    /// Its own: it is a rank.
    RankThread(Option<ProcessGroup>),
}

thread_local! {
    static SCOPE: RefCell<Scope> = const { RefCell::new(Scope::Process) };
}

/// Makes this thread a rank with a default group of its own.
pub(crate) fn enter_rank_thread() {
    SCOPE.set(Scope::RankThread(None));
}

fn default_group() -> Option<ProcessGroup> {
    SCOPE.with_borrow(|scope| match scope {
        Scope::Process => PROCESS.read().clone(),
        Scope::RankThread(group) => group.clone(),
    })
}

fn replace_default(new: Option<ProcessGroup>) -> Option<ProcessGroup> {
    SCOPE.with_borrow_mut(|scope| match scope {
        Scope::Process => std::mem::replace(&mut *PROCESS.write(), new),
        Scope::RankThread(group) => std::mem::replace(group, new),
    })
}

/// Makes the default group: meets the other ranks and connects to them. Every rank calls it.
///
/// # Errors
/// `AlreadyInitialized`; `MissingArgument` when rank or world size is neither given nor in the
/// environment; `RankOutOfRange`; `InvalidArgument` for a store together with an init method;
/// `UnknownBackend`, `BackendUnavailable`; `Rendezvous` or `Timeout` when the ranks do not meet;
/// `Rendezvous` at once when two processes or threads claim one rank, or another thread of this process
/// is in this function.
///
/// ```
/// use tch_distributed as dist;
/// let group = dist::init_process_group("native", dist::InitOptions::new().rank(0).world_size(1))?;
/// assert_eq!(dist::rank()?, 0);
/// assert!(dist::init_process_group("native", dist::InitOptions::new()).is_err(), "once is enough");
/// dist::destroy_process_group()?;
/// # drop(group);
/// # Ok::<(), dist::Error>(())
/// ```
pub fn init_process_group(backend: impl Into<BackendSpec>, options: InitOptions) -> Result<ProcessGroup> {
    let in_process = SCOPE.with_borrow(|scope| matches!(scope, Scope::Process));
    let making = in_process.then(|| MAKING.try_lock());
    if default_group().is_some() {
        return Err(Error::AlreadyInitialized);
    }
    if let Some(None) = making {
        // That one waits for ranks, maybe for this one: it must not be waited for.
        return Err(Error::Rendezvous {
            reason:
                "another thread of this process is in init_process_group: a process is one rank, with one \
                     default group; ranks that are threads are made by testing::run_threads"
                    .to_owned(),
        });
    }
    let group = form_world(backend.into(), options)?;
    replace_default(Some(group.clone()));
    Ok(group)
}

fn form_world(spec: BackendSpec, options: InitOptions) -> Result<ProcessGroup> {
    let (cpu, cuda) = spec.resolve()?;
    let timeout = options.timeout.unwrap_or_else(|| default_timeout(&spec));
    let names: Vec<&str> = cpu.iter().chain(&cuda).map(String::as_str).collect();
    // Before anything is waited for: a backend that cannot be is an error on the spot.
    for name in &names {
        factory(name)?;
    }
    let met = rendezvous(RendezvousRequest {
        init_method: options.init_method,
        store: options.store,
        rank: options.rank,
        world_size: options.world_size,
        timeout,
        group_name: options.group_name.clone().unwrap_or_default(),
        // The same on ranks with and without a GPU where the user left the choice to us.
        backend_name: names.first().copied().unwrap_or_default().to_owned(),
        pytorch_keys: names.iter().all(|name| matches!(*name, "gloo" | "nccl")),
        names_device: (cuda.as_deref() == Some("nccl")).then_some(options.device.is_some()),
    })?;
    let base = PrefixStore::new("0/", met.store);
    let local_rank = met.local_rank;
    let detail = options.detail.unwrap_or_else(|| {
        std::env::var("TORCH_DISTRIBUTED_DEBUG").is_ok_and(|level| level.eq_ignore_ascii_case("detail"))
    });
    form(Formation {
        name: options.group_name.unwrap_or_else(|| "0".to_owned()),
        rank: met.rank,
        ranks: (0..met.world_size).collect(),
        store: Arc::new(base),
        spec,
        timeout,
        universe: Universe::new(
            met.rank,
            met.world_size,
            local_rank,
            met.claim,
            options.device,
            options.high_priority_stream,
        ),
        high_priority_stream: options.high_priority_stream,
        split_from: None,
        detail,
        world: true,
    })
}

fn default_timeout(spec: &BackendSpec) -> Duration {
    match spec.resolve() {
        Ok((None, Some(_))) => DEFAULT_NCCL_TIMEOUT,
        _ => DEFAULT_TIMEOUT,
    }
}

/// Leaves all groups of this rank in good order, the newest first, and forgets the default one.
/// Every rank calls it. [`init_process_group`] may be called again afterwards.
///
/// # Errors
/// `NotInitialized` when there is no default group; `Desync` when a rank called something that others
/// did not; `Timeout` and `PeerLost` when a rank does not come. The groups are gone all the same.
/// A failure that a caller was told before is no second error.
pub fn destroy_process_group() -> Result<()> {
    let group = replace_default(None).ok_or(Error::NotInitialized)?;
    group.inner.universe.leave();
    let mut outcome = Ok(());
    for group in group.inner.universe.groups().iter().rev() {
        let ended = group.destroy(group.timeout());
        if outcome.is_ok() {
            outcome = ended;
        }
    }
    outcome
}

/// Whether this thread sees a default group.
pub fn is_initialized() -> bool {
    default_group().is_some()
}

/// The default group.
///
/// # Errors
/// `NotInitialized` before [`init_process_group`], and on threads that a rank of
/// [`testing::run_threads`](crate::testing::run_threads) spawned.
#[doc(alias = "GroupMember.WORLD")]
#[doc(alias = "group.WORLD")]
pub fn world() -> Result<ProcessGroup> {
    default_group().ok_or(Error::NotInitialized)
}

/// This rank in the default group.
///
/// # Errors
/// `NotInitialized`.
#[doc(alias = "get_rank")]
pub fn rank() -> Result<usize> {
    Ok(world()?.rank())
}

/// How many ranks the default group has.
///
/// # Errors
/// `NotInitialized`.
#[doc(alias = "get_world_size")]
pub fn world_size() -> Result<usize> {
    Ok(world()?.size())
}

/// This rank among the ranks of its host: `LOCAL_RANK`, or counted when the ranks met.
///
/// # Errors
/// `NotInitialized`; `MissingArgument` where `LOCAL_RANK` is not set and ranks of Python are in the world, who do
/// not say where they are.
#[doc(alias = "get_node_local_rank")]
pub fn local_rank() -> Result<usize> {
    world()?.inner.universe.local_rank()
}

/// The name of the default group's backend.
///
/// # Errors
/// `NotInitialized`.
#[doc(alias = "get_backend")]
pub fn backend_name() -> Result<String> {
    Ok(world()?.backend_name())
}
