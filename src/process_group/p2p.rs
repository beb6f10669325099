//! From one rank to another.

use std::panic::Location;

use smallvec::smallvec;
use tch::{Kind, Tensor};

use super::checks::{disjoint, see};
use super::draft::Memory;
use super::{ProcessGroup, Work};
use crate::backend::{Buffer, CollectiveBackend, Direction, Transfer};
use crate::profile::{Activity, Envelope};
use crate::{Error, Result};

/// One message of a batch: see [`ProcessGroup::batch_isend_irecv`].
#[doc(alias = "P2POp")]
#[derive(Debug)]
pub struct P2pOp {
    tensor: Tensor,
    direction: Direction,
    tag: u32,
}

impl P2pOp {
    /// A tensor goes to rank `peer` of the group.
    pub fn send(tensor: &Tensor, peer: usize, tag: u32) -> Self {
        Self { tensor: tensor.shallow_clone(), direction: Direction::Send { dst: peer }, tag }
    }

    /// A tensor is filled by rank `peer` of the group (any, for `None`).
    pub fn recv(tensor: &Tensor, peer: impl Into<Option<usize>>, tag: u32) -> Self {
        Self { tensor: tensor.shallow_clone(), direction: Direction::Recv { src: peer.into() }, tag }
    }
}

impl ProcessGroup {
    /// Sends a tensor to rank `dst`. Returns when the tensor may be used again, which may be before it
    /// is received. Messages between two ranks with the same tag arrive in the order they were sent.
    ///
    /// # Errors
    /// `RankOutOfRange`; `InvalidArgument` for a send to oneself (use [`isend`](Self::isend));
    /// failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     if group.rank() == 0 {
    ///         group.send(&Tensor::from_slice(&[1.5f32]), 1, 7).unwrap();
    ///     } else {
    ///         let mut tensor = Tensor::zeros([1], (Kind::Float, Device::Cpu));
    ///         assert_eq!(group.recv(&mut tensor, 0, 7).unwrap(), 0);
    ///         assert_eq!(tensor.double_value(&[0]), 1.5);
    ///     }
    /// });
    /// ```
    #[track_caller]
    pub fn send(&self, tensor: &Tensor, dst: usize, tag: u32) -> Result<()> {
        self.inner.usable()?;
        self.check_rank(dst)?;
        if dst == self.rank() {
            return Err(Error::invalid(
                "dst",
                format!("rank {dst} cannot send to itself and wait: use isend"),
            ));
        }
        self.isend(tensor, dst, tag)?.wait()
    }

    /// Receives a tensor from rank `src`, or from any rank for `None`, and gives the sender's rank.
    /// The tensor has the kind and number of elements of what is sent.
    ///
    /// # Errors
    /// `RankOutOfRange`; `InvalidArgument` for a receive from oneself, or when elements of the tensor
    /// share memory; failures of the group.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(2, |group| {
    ///     if group.rank() == 1 {
    ///         group.send(&Tensor::from_slice(&[3i64]), 0, 0).unwrap();
    ///     } else {
    ///         let mut tensor = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
    ///         assert_eq!(group.recv(&mut tensor, None, 0).unwrap(), 1);
    ///     }
    /// });
    /// ```
    #[track_caller]
    pub fn recv(&self, tensor: &mut Tensor, src: impl Into<Option<usize>>, tag: u32) -> Result<usize> {
        self.inner.usable()?;
        let src = src.into();
        if let Some(src) = src {
            self.check_rank(src)?;
            if src == self.rank() {
                return Err(Error::invalid(
                    "src",
                    format!("rank {src} cannot receive from itself and wait: use irecv"),
                ));
            }
        }
        let receipt = self.irecv(tensor, src, tag)?.receipts(None)?;
        receipt.and_then(|r| r.source).or(src).ok_or(Error::Aborted)
    }

    /// Starts to send a tensor to rank `dst`, which may be this one.
    ///
    /// # Errors
    /// `RankOutOfRange`; failures come from the [`Work`].
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::testing;
    /// testing::run_threads(1, |group| {
    ///     let sent = group.isend(&Tensor::from_slice(&[3i64]), 0, 0).unwrap();
    ///     let tensor = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
    ///     let received = group.irecv(&tensor, 0, 0).unwrap();
    ///     received.wait().unwrap();
    ///     sent.wait().unwrap();
    ///     assert_eq!(received.source_rank(), Some(0));
    ///     assert_eq!(tensor.int64_value(&[0]), 3);
    /// });
    /// ```
    #[track_caller]
    pub fn isend(&self, tensor: &Tensor, dst: usize, tag: u32) -> Result<Work> {
        self.start(&P2pOp::send(tensor, dst, tag))
    }

    /// Starts to receive a tensor from rank `src`, which may be this one, or from any for `None`.
    ///
    /// # Errors
    /// `RankOutOfRange`; `InvalidArgument` when elements of the tensor share memory; failures come from
    /// the [`Work`].
    #[track_caller]
    pub fn irecv(&self, tensor: &Tensor, src: impl Into<Option<usize>>, tag: u32) -> Result<Work> {
        self.start(&P2pOp::recv(tensor, src, tag))
    }

    /// Starts a batch of messages at once, in any order, without deadlock. Gives a [`Work`] for each.
    ///
    /// # Errors
    /// `RankOutOfRange`, `InvalidArgument` as in [`isend`](Self::isend) and [`irecv`](Self::irecv):
    /// then nothing of the batch is started. An empty batch is no error.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::{P2pOp, testing};
    /// testing::run_threads(3, |group| {
    ///     let (rank, size) = (group.rank(), group.size());
    ///     let mine = Tensor::from_slice(&[rank as i64]);
    ///     let theirs = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
    ///     let ring = vec![
    ///         P2pOp::send(&mine, (rank + 1) % size, 0),
    ///         P2pOp::recv(&theirs, (rank + size - 1) % size, 0),
    ///     ];
    ///     for work in group.batch_isend_irecv(ring).unwrap() {
    ///         work.wait().unwrap();
    ///     }
    ///     assert_eq!(theirs.int64_value(&[0]), ((rank + size - 1) % size) as i64);
    /// });
    /// ```
    #[track_caller]
    pub fn batch_isend_irecv(&self, ops: Vec<P2pOp>) -> Result<Vec<Work>> {
        self.inner.usable()?;
        // All are checked before the first is promised anything.
        let checked = ops.iter().map(|op| self.check_message(op)).collect::<Result<Vec<_>>>()?;
        let mut batches: Vec<(&dyn CollectiveBackend, Vec<Transfer>)> = Vec::new();
        let mut works = Vec::with_capacity(ops.len());
        for message in checked {
            let backend = message.backend;
            let (transfer, work) = self.promise(message);
            works.push(work);
            match batches.iter_mut().find(|(b, _)| std::ptr::addr_eq(*b, backend)) {
                Some((_, batch)) => batch.push(transfer),
                None => batches.push((backend, vec![transfer])),
            }
        }
        for (backend, batch) in batches {
            backend.transfer(batch);
        }
        Ok(works)
    }

    #[track_caller]
    fn start(&self, op: &P2pOp) -> Result<Work> {
        self.inner.usable()?;
        let message = self.check_message(op)?;
        let backend = message.backend;
        let (transfer, work) = self.promise(message);
        backend.transfer(vec![transfer]);
        Ok(work)
    }

    fn check_message(&self, op: &P2pOp) -> Result<Message<'_>> {
        let seen = see(&op.tensor, "tensor")?;
        let backend = &**self.inner.backends.of(seen.facts.device)?;
        let mut memory = Memory::new(backend);
        let buffer = match op.direction {
            Direction::Send { dst } => {
                self.check_rank(dst)?;
                memory.read(&seen)?
            }
            Direction::Recv { src } => {
                src.map_or(Ok(()), |src| self.check_rank(src))?;
                disjoint(&[seen])?;
                memory.write(&seen, false)?
            }
        };
        let buffer = buffer.whole().into_owned();
        Ok(Message { backend, memory, buffer, direction: op.direction, tag: op.tag, kind: seen.facts.kind })
    }

    /// From here on the message ends in its Work, and a failure is one of the group.
    #[track_caller]
    fn promise(&self, message: Message<'_>) -> (Transfer, Work) {
        let Message { memory, buffer, direction, tag, kind, .. } = message;
        let (activity, peer) = match direction {
            Direction::Send { dst } => (Activity::Send, Some(dst)),
            Direction::Recv { src } => (Activity::Recv, src),
        };
        let envelope = Envelope { peer, tag };
        let bytes = buffer.bytes();
        let watch = self.inner.instrument.begin_message(activity, bytes, envelope, Location::caller());
        let (done, ticket) = memory.promise(self.inner.clone(), watch);
        let transfer = Transfer { direction, tag, kind, buffer, timeout: self.timeout(), done };
        (transfer, Work::new(self.clone(), smallvec![ticket]))
    }
}

/// A message that was checked.
struct Message<'a> {
    backend: &'a dyn CollectiveBackend,
    memory: Memory<'a>,
    buffer: Buffer<'static>,
    direction: Direction,
    tag: u32,
    kind: Kind,
}
