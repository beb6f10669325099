//! libtorch's own collective engines, through what they have in common: `c10d::Backend`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cxx::{CxxString, UniquePtr};
use parking_lot::Mutex;
use tch::Tensor;

use super::list;
use super::store::{C10dStore, panic_text};
use super::tensor::at;

#[allow(unreachable_pub, unused_qualifications, clippy::undocumented_unsafe_blocks)]
#[cxx::bridge(namespace = "tchd")]
mod ffi {
    /// How NCCL is to work for a group.
    #[derive(Clone, Copy, Debug)]
    struct NcclPlan {
        /// The index of this rank's device.
        device: i32,
        /// Whether it connects at once.
        eager: bool,
        high_priority: bool,
        timeout_ms: i64,
    }
    extern "Rust" {
        type WorkEnd;
        fn work_ended(end: &WorkEnd, error: &CxxString);
    }
    #[namespace = "at"]
    unsafe extern "C++" {
        include!("tch-distributed/src/libtorch/catch.h");
        include!("tch-distributed/src/libtorch/c10d.h");
        type Tensor = crate::libtorch::tensor::AtTensor;
    }
    unsafe extern "C++" {
        type Tensors = crate::libtorch::list::ffi::Tensors;
        type StoreHandle = crate::libtorch::store::ffi::StoreHandle;

        type C10dWork;
        fn wait(self: &C10dWork, timeout_ms: i64) -> Result<bool>;
        fn abort(self: &C10dWork) -> Result<()>;
        fn order(self: &C10dWork) -> Result<()>;
        fn completed(self: &C10dWork) -> Result<bool>;
        fn check(self: &C10dWork) -> Result<()>;
        fn source(self: &C10dWork) -> Result<i32>;
        fn tell(self: &C10dWork, end: Box<WorkEnd>) -> Result<bool>;

        type C10dBackend;
        fn all_reduce(
            self: &C10dBackend,
            tensor: &Tensor,
            op: u8,
            factor: f64,
            timeout_ms: i64,
        ) -> Result<UniquePtr<C10dWork>>;
        fn reduce(
            self: &C10dBackend,
            tensor: &Tensor,
            op: u8,
            factor: f64,
            root: i32,
            timeout_ms: i64,
        ) -> Result<UniquePtr<C10dWork>>;
        fn broadcast(
            self: &C10dBackend,
            tensor: &Tensor,
            root: i32,
            timeout_ms: i64,
        ) -> Result<UniquePtr<C10dWork>>;
        fn all_gather(
            self: &C10dBackend,
            outputs: &Tensors,
            input: &Tensor,
            timeout_ms: i64,
        ) -> Result<UniquePtr<C10dWork>>;
        fn all_gather_flat(
            self: &C10dBackend,
            output: &Tensor,
            input: &Tensor,
            timeout_ms: i64,
        ) -> Result<UniquePtr<C10dWork>>;
        fn gather(
            self: &C10dBackend,
            outputs: &Tensors,
            input: &Tensor,
            root: i32,
            timeout_ms: i64,
        ) -> Result<UniquePtr<C10dWork>>;
        fn scatter(
            self: &C10dBackend,
            output: &Tensor,
            inputs: &Tensors,
            root: i32,
            timeout_ms: i64,
        ) -> Result<UniquePtr<C10dWork>>;
        fn reduce_scatter(
            self: &C10dBackend,
            output: &Tensor,
            input: &Tensor,
            op: u8,
            factor: f64,
            timeout_ms: i64,
        ) -> Result<UniquePtr<C10dWork>>;
        fn all_to_all(
            self: &C10dBackend,
            output: &Tensor,
            input: &Tensor,
            output_splits: &[i64],
            input_splits: &[i64],
            timeout_ms: i64,
        ) -> Result<UniquePtr<C10dWork>>;
        fn barrier(self: &C10dBackend, cuda: i32, timeout_ms: i64) -> Result<UniquePtr<C10dWork>>;
        fn send(self: &C10dBackend, tensor: &Tensor, dst: i32, tag: i32) -> Result<UniquePtr<C10dWork>>;
        fn recv(self: &C10dBackend, tensor: &Tensor, src: i32, tag: i32) -> Result<UniquePtr<C10dWork>>;
        fn recv_any(self: &C10dBackend, tensor: &Tensor, tag: i32) -> Result<UniquePtr<C10dWork>>;
        fn start_group(self: &C10dBackend) -> Result<()>;
        fn end_group(self: &C10dBackend) -> Result<UniquePtr<C10dWork>>;
        fn abort(self: &C10dBackend) -> Result<()>;
        fn shutdown(self: &C10dBackend) -> Result<()>;

        fn new_gloo(
            store: &StoreHandle,
            rank: i32,
            size: i32,
            ranks: &[u64],
            name: &str,
            timeout_ms: i64,
        ) -> Result<UniquePtr<C10dBackend>>;
        fn why_no_nccl() -> Result<String>;
        fn new_nccl(
            store: &StoreHandle,
            rank: i32,
            ranks: &[u64],
            name: &str,
            plan: &NcclPlan,
        ) -> Result<UniquePtr<C10dBackend>>;
        fn split_nccl(
            parent: &C10dBackend,
            store: &StoreHandle,
            members: &[i32],
            ranks: &[u64],
            name: &str,
            plan: &NcclPlan,
        ) -> Result<UniquePtr<C10dBackend>>;
    }
}

// SAFETY: a work object is a reference-counted heap object whose methods lock it.
unsafe impl Send for ffi::C10dWork {}
// SAFETY: as above.
unsafe impl Sync for ffi::C10dWork {}
// SAFETY: a c10d backend is a reference-counted heap object with no tie to a thread.
unsafe impl Send for ffi::C10dBackend {}
// SAFETY: submissions to one backend are not thread-safe in c10d; `Engine` makes them under its lock.
// `abort` may come from any thread.
unsafe impl Sync for ffi::C10dBackend {}

pub(crate) use ffi::NcclPlan;

/// Why NCCL cannot be used here; `None` where it can.
pub(crate) fn why_no_nccl() -> Option<String> {
    match ffi::why_no_nccl() {
        Ok(reason) => Some(reason).filter(|reason| !reason.is_empty()),
        Err(exception) => Some(told(exception)),
    }
}

/// What failed, in the engine's words.
pub(crate) type Told<T> = Result<T, String>;

pub(super) fn told(exception: cxx::Exception) -> String {
    exception.what().to_owned()
}

/// An operation under way.
pub(crate) struct C10dWork(UniquePtr<ffi::C10dWork>);

impl C10dWork {
    /// Blocks until the end; a timeout breaks Gloo's connections.
    pub(crate) fn wait(&self, timeout_ms: i64) -> Told<()> {
        match self.0.wait(timeout_ms) {
            Ok(true) => Ok(()),
            Ok(false) => Err("the operation was aborted".to_owned()),
            Err(exception) => Err(told(exception)),
        }
    }

    /// Ends the waiting for one of Gloo's messages, and any later one.
    pub(crate) fn abort(&self) -> Told<()> {
        self.0.abort().map_err(told)
    }

    /// What this thread's current stream does from now on comes after it (NCCL). Does not block.
    pub(crate) fn order(&self) -> Told<()> {
        self.0.order().map_err(told)
    }

    /// Whether it has ended, and how.
    pub(crate) fn poll(&self) -> Option<Told<()>> {
        match self.0.completed() {
            Ok(false) => None,
            Ok(true) => Some(self.0.check().map_err(told)),
            Err(e) => Some(Err(told(e))),
        }
    }

    /// For a receive that has ended: the sender.
    pub(crate) fn source(&self) -> Option<usize> {
        self.0.source().ok().and_then(|rank| usize::try_from(rank).ok())
    }

    /// Calls `then` when the operation has ended, on a thread of the engine or (if it has ended) on this
    /// one. Gives it back where the engine cannot tell, as with Gloo's point-to-point.
    pub(crate) fn tell(&self, then: impl FnOnce(Told<()>) + Send + 'static) -> Told<bool> {
        self.0.tell(Box::new(WorkEnd(Mutex::new(Some(Box::new(then)))))).map_err(told)
    }
}

type Then = Box<dyn FnOnce(Told<()>) + Send>;

/// What happens at the end of an operation. Dropped without being called where nobody will.
pub(super) struct WorkEnd(Mutex<Option<Then>>);

fn work_ended(end: &WorkEnd, error: &CxxString) {
    let Some(then) = end.0.lock().take() else { return };
    let result = if error.is_empty() { Ok(()) } else { Err(first_line(&error.to_string_lossy())) };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| then(result))) {
        tracing::error!("the end of an operation panicked: {}", panic_text(&*panic));
    }
}

/// The message without c10's stack.
fn first_line(text: &str) -> String {
    text.split("\nException raised from").next().unwrap_or(text).trim().to_owned()
}

/// How to combine, as c10d numbers it, with the factor of `PremulSum`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct C10dReduce {
    pub(crate) op: u8,
    pub(crate) factor: f64,
}

/// What every engine is made of.
pub(crate) struct C10dMember<'a> {
    pub(crate) store: &'a C10dStore,
    pub(crate) rank: usize,
    pub(crate) ranks: &'a [usize],
    pub(crate) name: &'a str,
    pub(crate) timeout_ms: i64,
}

/// An engine of libtorch, for one group on this rank. Operations must be started by one thread at a
/// time. Tensors are flat.
pub(crate) struct C10dBackend(UniquePtr<ffi::C10dBackend>);

type Started = Told<C10dWork>;

fn started(work: Result<UniquePtr<ffi::C10dWork>, cxx::Exception>) -> Started {
    work.map(C10dWork).map_err(told)
}

impl C10dBackend {
    /// Connects to the other ranks.
    pub(crate) fn gloo(member: &C10dMember<'_>) -> Told<Self> {
        let ranks: Vec<u64> = member.ranks.iter().map(|&rank| rank as u64).collect();
        let (rank, size) = (member.rank as i32, ranks.len() as i32);
        let made = ffi::new_gloo(member.store.handle(), rank, size, &ranks, member.name, member.timeout_ms);
        made.map(Self).map_err(told)
    }

    /// Makes the engine.
    pub(crate) fn nccl(member: &C10dMember<'_>, plan: NcclPlan) -> Told<Self> {
        let ranks: Vec<u64> = member.ranks.iter().map(|&rank| rank as u64).collect();
        let (store, rank) = (member.store.handle(), member.rank as i32);
        ffi::new_nccl(store, rank, &ranks, member.name, &plan).map(Self).map_err(told)
    }

    /// The engine of some ranks of this NCCL group, by its communicator split. Every rank calls it; `None` on those that
    /// are not among `members`.
    pub(crate) fn split(
        &self,
        member: &C10dMember<'_>,
        members: &[usize],
        plan: NcclPlan,
    ) -> Told<Option<Self>> {
        let ranks: Vec<u64> = member.ranks.iter().map(|&rank| rank as u64).collect();
        let members: Vec<i32> = members.iter().map(|&rank| rank as i32).collect();
        let made = ffi::split_nccl(&self.0, member.store.handle(), &members, &ranks, member.name, &plan);
        made.map(|made| (!made.is_null()).then_some(Self(made))).map_err(told)
    }

    pub(crate) fn all_reduce(&self, tensor: &Tensor, how: C10dReduce, timeout_ms: i64) -> Started {
        started(self.0.all_reduce(at(tensor), how.op, how.factor, timeout_ms))
    }

    /// Leaves partial results in the tensors of other ranks than the root.
    pub(crate) fn reduce(&self, tensor: &Tensor, how: C10dReduce, root: usize, timeout_ms: i64) -> Started {
        started(self.0.reduce(at(tensor), how.op, how.factor, root as i32, timeout_ms))
    }

    pub(crate) fn broadcast(&self, tensor: &Tensor, root: usize, timeout_ms: i64) -> Started {
        started(self.0.broadcast(at(tensor), root as i32, timeout_ms))
    }

    /// All of one size.
    pub(crate) fn all_gather(&self, outputs: &[Tensor], input: &Tensor, timeout_ms: i64) -> Started {
        started(self.0.all_gather(&list::to_cpp(outputs), at(input), timeout_ms))
    }

    /// The inputs, of one size, one behind the other.
    pub(crate) fn all_gather_flat(&self, output: &Tensor, input: &Tensor, timeout_ms: i64) -> Started {
        started(self.0.all_gather_flat(at(output), at(input), timeout_ms))
    }

    /// All of one size; `outputs` is empty but on the root.
    pub(crate) fn gather(&self, outputs: &[Tensor], input: &Tensor, root: usize, timeout_ms: i64) -> Started {
        started(self.0.gather(&list::to_cpp(outputs), at(input), root as i32, timeout_ms))
    }

    /// All of one size; `inputs` is empty but on the root.
    pub(crate) fn scatter(
        &self,
        output: &Tensor,
        inputs: &[Tensor],
        root: usize,
        timeout_ms: i64,
    ) -> Started {
        started(self.0.scatter(at(output), &list::to_cpp(inputs), root as i32, timeout_ms))
    }

    /// `input` is cut evenly.
    pub(crate) fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        how: C10dReduce,
        timeout_ms: i64,
    ) -> Started {
        started(self.0.reduce_scatter(at(output), at(input), how.op, how.factor, timeout_ms))
    }

    /// Cut by the splits, evenly where they are empty.
    pub(crate) fn all_to_all(
        &self,
        output: &Tensor,
        input: &Tensor,
        output_splits: &[i64],
        input_splits: &[i64],
        timeout_ms: i64,
    ) -> Started {
        started(self.0.all_to_all(at(output), at(input), output_splits, input_splits, timeout_ms))
    }

    /// On the CUDA device of this index, where the engine is one of devices.
    pub(crate) fn barrier(&self, cuda: Option<usize>, timeout_ms: i64) -> Started {
        started(self.0.barrier(cuda.map_or(-1, |index| index as i32), timeout_ms))
    }

    pub(crate) fn send(&self, tensor: &Tensor, dst: usize, tag: i32) -> Started {
        started(self.0.send(at(tensor), dst as i32, tag))
    }

    pub(crate) fn recv(&self, tensor: &Tensor, src: Option<usize>, tag: i32) -> Started {
        match src {
            Some(src) => started(self.0.recv(at(tensor), src as i32, tag)),
            None => started(self.0.recv_any(at(tensor), tag)),
        }
    }

    /// What follows is one operation (NCCL).
    pub(crate) fn start_group(&self) -> Told<()> {
        self.0.start_group().map_err(told)
    }

    /// The end of what is one operation.
    pub(crate) fn end_group(&self) -> Started {
        started(self.0.end_group())
    }

    /// Ends everything that is pending (NCCL; Gloo ignores it).
    pub(crate) fn abort(&self) -> Told<()> {
        self.0.abort().map_err(told)
    }

    /// Frees what the engine holds.
    pub(crate) fn shutdown(&self) -> Told<()> {
        self.0.shutdown().map_err(told)
    }
}
