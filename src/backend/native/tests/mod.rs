//! The engine through its trait, among ranks that are threads of the test.

/// Makes each of these functions a test on every transport.
macro_rules! on_every_transport {
    ($($name:ident,)*) => {
        mod threads {
            $(#[test] fn $name() { crate::backend::native::tests::on("threads", super::$name) })*
        }
        mod shm {
            $(#[test] fn $name() { crate::backend::native::tests::on("shm", super::$name) })*
        }
        mod unix {
            $(#[test] fn $name() { crate::backend::native::tests::on("unix", super::$name) })*
        }
        mod tcp {
            $(#[test] fn $name() { crate::backend::native::tests::on("tcp", super::$name) })*
        }
        mod hosts {
            $(#[test] fn $name() { crate::backend::native::tests::on("hosts", super::$name) })*
        }
    };
}

mod agreement;
mod executor;
mod failures;
mod groups;
mod hosts;
mod links;
mod messages;
mod operations;
mod processes;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use smallvec::SmallVec;
use tch::{Kind, Tensor};

use super::Options;
use crate::Result;
use crate::backend::{
    BackendContext, Buffer, Call, CollectiveBackend, Completion, Direction, Op, Receipt, Segment, Segments,
    Transfer,
};
use crate::store::around::{Altered, Around};
use crate::store::{HashStore, Store};

/// How long any of these tests may take, on a machine that is busy.
const LIMIT: Duration = Duration::from_secs(300);
/// The timeout of calls that are expected to end.
const LONG: Duration = Duration::from_secs(30);

thread_local! {
    /// The transport of the groups that this thread's test makes.
    static TRANSPORT: Cell<&'static str> = const { Cell::new("threads") };
}

/// Runs a test on a transport.
pub(super) fn on(transport: &'static str, test: fn()) {
    TRANSPORT.set(transport);
    test();
}

/// One rank of a test.
pub(super) struct Rank {
    pub(super) backend: Arc<dyn CollectiveBackend>,
    pub(super) rank: usize,
    pub(super) world: usize,
}

/// What a test wants to know when an operation has ended.
pub(super) struct Pending(mpsc::Receiver<Result<Receipt>>);

impl Pending {
    pub(super) fn wait(self) -> Result<Receipt> {
        self.0.recv_timeout(LIMIT).expect("the operation should have ended")
    }
}

pub(super) fn buffer(tensor: &Tensor) -> Buffer<'static> {
    Buffer::new(tensor.shallow_clone()).unwrap()
}

/// One segment that holds these tensors.
pub(super) fn segment(tensors: &[&Tensor]) -> Segment<'static> {
    tensors.iter().map(|t| buffer(t)).collect()
}

/// One segment for each tensor.
pub(super) fn segments(tensors: &[Tensor]) -> Segments<'static> {
    tensors.iter().map(|t| segment(&[t])).collect()
}

pub(super) fn none() -> Segments<'static> {
    SmallVec::new()
}

fn promise() -> (Completion, Pending) {
    let (sender, receiver) = mpsc::channel();
    // A test that has failed does not listen any more.
    (Completion::from_fn(move |result| drop(sender.send(result))), Pending(receiver))
}

impl Rank {
    pub(super) fn call(
        op: Op,
        kind: Kind,
        inputs: Segments<'static>,
        outputs: Segments<'static>,
    ) -> Call<'static> {
        Call { op, kind, inputs, outputs, timeout: LONG }
    }

    pub(super) fn run(
        &self,
        op: Op,
        kind: Kind,
        inputs: Segments<'static>,
        outputs: Segments<'static>,
    ) -> Result<()> {
        self.backend.run(Self::call(op, kind, inputs, outputs))
    }

    pub(super) fn submit(&self, call: Call<'static>) -> Pending {
        let (done, pending) = promise();
        self.backend.submit(call, done);
        pending
    }

    pub(super) fn barrier(&self) -> Result<()> {
        self.run(Op::Barrier, Kind::Float, none(), none())
    }

    /// All-reduces one tensor, in place.
    pub(super) fn all_reduce(&self, tensor: &Tensor, op: crate::ReduceOp) -> Result<()> {
        self.run(Op::AllReduce(op), tensor.kind(), none(), segments(&[tensor.shallow_clone()]))
    }

    pub(super) fn transfer(&self, direction: Direction, tag: u32, tensor: &Tensor) -> Pending {
        self.transfer_within(direction, tag, tensor, LONG)
    }

    pub(super) fn transfer_within(
        &self,
        direction: Direction,
        tag: u32,
        tensor: &Tensor,
        timeout: Duration,
    ) -> Pending {
        let (done, pending) = promise();
        let transfer =
            Transfer { direction, tag, kind: tensor.kind(), buffer: buffer(tensor), timeout, done };
        self.backend.transfer(vec![transfer]);
        pending
    }

    pub(super) fn shutdown(&self) -> Result<()> {
        self.backend.shutdown(LONG)
    }
}

/// What a factory is told about a group.
pub(super) fn context(store: Arc<dyn Store>, rank: usize, world: usize) -> BackendContext {
    BackendContext {
        store,
        rank,
        size: world,
        ranks: (0..world).collect(),
        timeout: LONG,
        group_name: "test".to_owned(),
    }
}

/// How a rank of a test is connected: `hosts` pretends that ranks of even and of odd numbers are on two
/// hosts.
pub(super) fn options(transport: &str, rank: usize) -> Options {
    match transport {
        "hosts" => Options::new().host(format!("host {}", rank % 2)),
        other => Options::new().transport(other),
    }
}

/// A store in which one rank reads what a function makes of what others wrote.
pub(super) fn altered(
    store: Arc<dyn Store>,
    read: impl Fn(&str, Vec<u8>) -> Vec<u8> + Send + Sync + 'static,
) -> Arc<dyn Store> {
    Arc::new(Altered(Reads(store, read)))
}

struct Reads<F>(Arc<dyn Store>, F);

impl<F: Fn(&str, Vec<u8>) -> Vec<u8> + Send + Sync + 'static> Around for Reads<F> {
    fn below(&self) -> &dyn Store {
        &*self.0
    }
    fn read(&self, key: &str, value: Vec<u8>) -> Vec<u8> {
        self.1(key, value)
    }
}

/// Runs `body` on `world` rank threads with a group of their own; what each returned.
pub(super) fn ranks<T: Send + 'static>(
    world: usize,
    body: impl Fn(Rank) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let transport = TRANSPORT.get();
    ranks_with(world, move |rank| options(transport, rank), body)
}

/// The same, each with options of its own.
pub(super) fn ranks_with<T: Send + 'static>(
    world: usize,
    options: impl Fn(usize) -> Options + Send + Sync + 'static,
    body: impl Fn(Rank) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let (options, body) = (Arc::new(options), Arc::new(body));
    let (sender, receiver) = mpsc::channel();
    for rank in 0..world {
        let (store, options, body, sender) = (store.clone(), options.clone(), body.clone(), sender.clone());
        std::thread::spawn(move || {
            let backend =
                options(rank).create(context(store, rank, world)).expect("the group should come up");
            let result = body(Rank { backend, rank, world });
            let _ = sender.send((rank, result));
        });
    }
    drop(sender);
    let mut results: Vec<Option<T>> = (0..world).map(|_| None).collect();
    for _ in 0..world {
        let (rank, result) = receiver.recv_timeout(LIMIT).expect("a rank hangs or has panicked");
        results[rank] = Some(result);
    }
    results.into_iter().flatten().collect()
}
