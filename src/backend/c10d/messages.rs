//! Point-to-point messages.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::combine::Flavor;
use super::engine::{Shared, alone_at_the_recorder, millis};
use super::flat::bytes;
use super::inquest::Failure;
use super::lookout::{Charge, Given};
use super::own::{Asking, FromAny};
use super::peers::WATCH_TAG;
use super::waiters;
use crate::backend::{Completion, Direction, Receipt, Transfer, WriteBack};
use crate::libtorch::{C10dBackend, C10dWork, Told};
use crate::{Error, Result};

/// A message to or from another rank, and its bytes.
struct Message {
    transfer: Transfer,
    flat: Tensor,
    /// There for a receive from any rank.
    asking: Option<Asking>,
}

impl Shared {
    pub(super) fn transfer(self: &Arc<Self>, transfers: Vec<Transfer>) {
        let mut far = Vec::new();
        for mut transfer in transfers {
            if let Some(cause) = self.cause() {
                transfer.done.complete(Err(Error::Poisoned { cause }));
                continue;
            }
            let rank = self.witness.rank;
            let flat = match bytes(&transfer.buffer.tensor()) {
                Ok(flat) => flat,
                Err(error) => {
                    transfer.done.complete(Err(error));
                    continue;
                }
            };
            let Transfer { direction, tag, timeout, .. } = transfer;
            let waits = match direction {
                Direction::Send { dst } if dst == rank => {
                    self.own.send(tag, flat, transfer.done).unwrap_or_else(|done| {
                        done.complete(Err(self.no_self_send(tag)));
                        None
                    })
                }
                Direction::Recv { src: Some(src) } if src == rank => self.own.recv(tag, flat, transfer.done),
                // In a group of one only oneself can send.
                Direction::Recv { src: None } if self.witness.size == 1 => {
                    self.own.recv(tag, flat, transfer.done)
                }
                Direction::Recv { src: None } => {
                    if let FromAny::Engine(done, asking) = self.own.recv_any(tag, &flat, transfer.done) {
                        transfer.done = done;
                        far.push(Message { transfer, flat, asking: Some(asking) });
                    }
                    None
                }
                _ => {
                    far.push(Message { transfer, flat, asking: None });
                    None
                }
            };
            if let Some(number) = waits {
                self.limit_own(direction, tag, number, timeout);
            }
        }
        match self.flavor {
            Flavor::Gloo => far.into_iter().for_each(|message| self.message(message)),
            Flavor::Nccl => self.messages_at_once(far),
        }
    }

    /// A message to oneself has a time limit like any other.
    fn limit_own(self: &Arc<Self>, direction: Direction, tag: u32, number: u64, timeout: Duration) {
        let (own, shared, start) = (self.own.clone(), Arc::downgrade(self), Instant::now());
        waiters::run(move || {
            let Some(done) = own.overdue(tag, number, timeout) else { return };
            // Where the group is gone it ends with the completion.
            let Some(shared) = shared.upgrade() else { return };
            let op = match direction {
                Direction::Send { .. } => "send to oneself",
                Direction::Recv { .. } => "recv from oneself",
            };
            let failure = shared.failure_of(format!("{op} (tag {tag})"));
            let text = "timed out: its other side did not come".to_owned();
            shared.failed(Failure { text, elapsed: start.elapsed(), ..failure }, done);
        });
    }

    fn no_self_send(&self, tag: u32) -> Error {
        Error::Unsupported {
            backend: self.flavor.name().to_owned(),
            what: format!(
                "a message to oneself while a receive from any rank with its tag, {tag}, is under way: send before \
                 receiving, or name the rank"
            ),
        }
    }

    /// One message through Gloo, which can only be waited for.
    fn message(self: &Arc<Self>, message: Message) {
        let Message { transfer, flat, asking } = message;
        let Some(backend) = &self.backend else { return };
        let Some(tag) = i32::try_from(transfer.tag).ok().filter(|tag| *tag < WATCH_TAG) else {
            return transfer.done.complete(Err(Error::invalid(
                "tag",
                format_args!("{} was given; gloo takes tags below {WATCH_TAG}", transfer.tag),
            )));
        };
        let (op, work) = {
            let _order = self.order.lock();
            let _alone = alone_at_the_recorder();
            match transfer.direction {
                Direction::Send { dst } => (format!("send to rank {dst}"), backend.send(&flat, dst, tag)),
                Direction::Recv { src: Some(src) } => {
                    (format!("recv from rank {src}"), backend.recv(&flat, Some(src), tag))
                }
                Direction::Recv { src: None } => {
                    ("recv from any rank".to_owned(), receive_from_any(backend, &flat, tag))
                }
            }
        };
        let suspect = match transfer.direction {
            Direction::Send { dst } => Some(dst),
            Direction::Recv { src } => src,
        };
        let failure = Failure { suspect, ..self.failure_of(format!("{op} (tag {tag})")) };
        let Transfer { direction, timeout, done, buffer, .. } = transfer;
        let work = match work {
            Ok(work) => work,
            Err(text) => return self.failed(Failure { text, ..failure }, done),
        };
        let (underway, ms, start) = (self.begin(), millis(timeout), Instant::now());
        let work = Arc::new(work);
        let listening = (self.listeners.add(&work, asking.is_some()), asking);
        waiters::run(move || {
            let result = work.wait(ms);
            drop(listening);
            let keep = Box::new(move || {
                drop(buffer);
                Ok(match direction {
                    Direction::Recv { src } => src.or_else(|| work.source()),
                    Direction::Send { .. } => None,
                })
            });
            underway.end(result, keep, Failure { elapsed: start.elapsed(), ..failure }, done);
        });
    }

    /// Messages through NCCL: one operation, in the order in which both sides give them. NCCL knows no tags.
    fn messages_at_once(self: &Arc<Self>, messages: Vec<Message>) {
        let (messages, refused): (Vec<Message>, Vec<Message>) =
            messages.into_iter().partition(|message| message.asking.is_none());
        for message in refused {
            message.transfer.done.complete(Err(Error::Unsupported {
                backend: self.flavor.name().to_owned(),
                what: "a receive from any rank: name one".to_owned(),
            }));
        }
        if messages.is_empty() {
            return;
        }
        let ms = messages.iter().map(|message| millis(message.transfer.timeout)).max().unwrap_or(1);
        let (mut dones, mut writes, mut keep) = (Vec::new(), Vec::new(), Vec::new());
        let mut parts = Vec::new();
        for Message { mut transfer, flat, .. } in messages {
            let source = match transfer.direction {
                Direction::Recv { src } => src,
                Direction::Send { .. } => None,
            };
            writes.extend(transfer.done.take_write_back());
            parts.push((transfer.direction, flat.shallow_clone()));
            dones.push((transfer.done, source));
            keep.push((transfer.buffer, flat));
        }
        let asked = Instant::now();
        let met = self.meet(Duration::from_millis(ms.unsigned_abs()));
        let (failure, started) = {
            let order = self.order.lock();
            let started = met.and_then(|()| self.exchange(&parts, writes));
            (self.failure_at("batch of messages".to_owned(), *order), started)
        };
        if let Ok(given) = &started {
            for (done, source) in &dones {
                given_order(done, Receipt { source: *source }, given);
            }
        }
        let all = Completion::from_fn(move |result| {
            for (done, source) in dones {
                done.complete(match &result {
                    Ok(_) => Ok(Receipt { source }),
                    Err(error) => Err(error.duplicate()),
                });
            }
        });
        match started {
            Ok(given) => {
                let keep = Box::new(move || {
                    drop(keep);
                    Ok(None)
                });
                let (underway, start) = (self.begin(), Instant::now());
                self.look_after(Charge { underway, given, keep, failure, start, ms, done: all });
            }
            Err(text) => self.failed(Failure { text, elapsed: asked.elapsed(), ..failure }, all),
        }
    }

    /// Starts the messages as one operation, and what has to be written after it.
    fn exchange(&self, parts: &[(Direction, Tensor)], writes: Vec<WriteBack>) -> Told<Arc<Given>> {
        let Some(backend) = &self.backend else { return Err("the group is gone".to_owned()) };
        let start = || at_once(backend, parts);
        let side = match &self.side {
            Some(side) if !writes.is_empty() => side,
            _ => return Ok(Arc::new(Given { work: start()?, mark: None })),
        };
        let (work, mark) = side.lock().run(|| {
            let work = start()?;
            work.order()?;
            writes.into_iter().try_for_each(|write| write()).map_err(|error| error.to_string())?;
            Ok::<_, String>(work)
        })?;
        Ok(Arc::new(Given { work: work?, mark: Some(mark) }))
    }

    fn failure_of(&self, op: String) -> Failure {
        let seq = *self.order.lock();
        self.failure_at(op, seq)
    }

    fn failure_at(&self, op: String, seq: u64) -> Failure {
        let (print, text) = (String::new(), String::new());
        Failure { op, seq, print, elapsed: Duration::ZERO, text, suspect: None }
    }
}

/// Starts messages as one operation, which is all that NCCL's messages can be.
pub(super) fn at_once(backend: &C10dBackend, parts: &[(Direction, Tensor)]) -> Told<C10dWork> {
    backend.start_group()?;
    let mut outcome = Ok(());
    for (direction, flat) in parts {
        let one = match *direction {
            Direction::Send { dst } => backend.send(flat, dst, 0),
            Direction::Recv { src } => backend.recv(flat, src, 0),
        };
        outcome = outcome.and(one.map(drop));
    }
    // Also where one was refused: what was started must be closed.
    let work = backend.end_group();
    outcome.and(work)
}

/// Gloo refuses a place of no bytes for a receive from any rank; a message may be shorter than its place.
fn receive_from_any(backend: &C10dBackend, flat: &Tensor, tag: i32) -> Told<C10dWork> {
    if flat.numel() > 0 {
        return backend.recv(flat, None, tag);
    }
    let place = Tensor::f_empty([1], (Kind::Uint8, Device::Cpu)).map_err(|error| error.to_string())?;
    backend.recv(&place, None, tag)
}

/// Whoever waits for it from now on orders a stream instead.
pub(super) fn given_order(done: &Completion, receipt: Receipt, given: &Arc<Given>) {
    let given = given.clone();
    done.given(receipt, Arc::new(move || -> Result<()> { given.order().map_err(torch) }));
}

pub(super) fn torch(text: String) -> Error {
    Error::Torch(tch::TchError::Torch(text))
}
