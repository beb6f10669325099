//! The plainest backend: everything goes through the store, every reduction is the model's. Slow, and
//! short enough to be right. It shows that the suite is about the contract, not about one engine.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use once_cell::sync::OnceCell;
use parking_lot::Mutex;
use tch::{Kind, Tensor};
use tch_distributed::backend::{
    BackendContext, Buffer, Call, CollectiveBackend, Completion, Direction, Op, Receipt, Transfer,
};
use tch_distributed::{Error, ReduceOp, Result};

use super::model;

pub fn create(context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
    let shared =
        Arc::new(Shared { context, next: AtomicU64::new(0), failed: OnceCell::new(), p2p: Mutex::default() });
    let (queue, jobs) = channel::<(u64, Call<'static>, Completion)>();
    let worker = shared.clone();
    std::thread::spawn(move || {
        for (seq, call, done) in jobs {
            let result = worker.collective(seq, call);
            done.complete(result.map(|()| Receipt::default()));
        }
    });
    Ok(Arc::new(Plain { shared, queue: Mutex::new(queue) }))
}

struct Plain {
    shared: Arc<Shared>,
    queue: Mutex<Sender<(u64, Call<'static>, Completion)>>,
}

struct Shared {
    context: BackendContext,
    next: AtomicU64,
    failed: OnceCell<Arc<Error>>,
    /// How many messages went by, for each (source, destination, tag).
    p2p: Mutex<HashMap<(usize, usize, u32), u64>>,
}

impl CollectiveBackend for Plain {
    fn name(&self) -> &str {
        "plain"
    }

    fn submit(&self, call: Call<'static>, done: Completion) {
        let queue = self.queue.lock();
        let seq = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let _ = queue.send((seq, call, done));
    }

    fn transfer(&self, transfers: Vec<Transfer>) {
        for transfer in transfers {
            let number = match transfer.direction {
                Direction::Send { dst } => {
                    Some(self.shared.number(self.shared.context.rank, dst, transfer.tag))
                }
                Direction::Recv { src: Some(src) } => {
                    // Receives count apart from sends: only to oneself both come by here.
                    Some(self.shared.number(
                        src,
                        self.shared.context.rank + self.shared.context.size,
                        transfer.tag,
                    ))
                }
                _ => None,
            };
            let shared = self.shared.clone();
            std::thread::spawn(move || {
                let result = shared.message(&transfer, number);
                transfer.done.complete(result);
            });
        }
    }

    fn abort(&self, cause: &Arc<Error>) {
        if self.shared.failed.set(cause.clone()).is_ok() {
            let _ = self.shared.context.store.set("failed", cause.to_string().as_bytes());
        }
    }

    fn shutdown(&self, timeout: Duration) -> Result<()> {
        let (context, made) = (&self.shared.context, self.shared.next.load(Ordering::Relaxed));
        if self.shared.failed.get().is_some() {
            return Ok(());
        }
        context.store.set(&format!("left/{}", context.rank), made.to_string().as_bytes())?;
        for rank in 0..context.size {
            let theirs = self.shared.fetch(&format!("left/{rank}"), rank, "destroy", made, timeout)?;
            let theirs = String::from_utf8_lossy(&theirs).into_owned();
            if theirs != made.to_string() {
                let (op, ours) = ("destroy".to_owned(), format!("{made} calls"));
                return Err(Error::Desync { op, seq: made, rank, theirs: format!("{theirs} calls"), ours });
            }
        }
        // Rank 0 may take the store along when it goes.
        if context.rank != 0 {
            return context.store.set(&format!("gone/{}", context.rank), b"");
        }
        let others: Vec<String> = (1..context.size).map(|rank| format!("gone/{rank}")).collect();
        context.store.wait(&others.iter().map(String::as_str).collect::<Vec<_>>(), timeout)
    }
}

/// The bytes of a segment.
fn bytes(segment: &[Buffer<'_>]) -> Vec<u8> {
    segment
        .iter()
        .flat_map(|b| {
            if b.bytes() == 0 {
                &[][..]
            } else {
                // SAFETY: the buffer is `bytes()` long and alive; nobody writes to it while it is an input.
                unsafe { std::slice::from_raw_parts(b.data_ptr(), b.bytes()) }
            }
        })
        .copied()
        .collect()
}

/// Fills a segment.
fn fill(segment: &[Buffer<'_>], mut data: &[u8]) -> Result<(), usize> {
    let room: usize = segment.iter().map(Buffer::bytes).sum();
    if room != data.len() {
        return Err(room);
    }
    for buffer in segment.iter().filter(|b| b.bytes() > 0) {
        let (mine, rest) = data.split_at(buffer.bytes());
        // SAFETY: the buffer is `bytes()` long, alive, and ours to write as an output.
        unsafe { std::ptr::copy_nonoverlapping(mine.as_ptr(), buffer.data_ptr(), mine.len()) };
        data = rest;
    }
    Ok(())
}

impl Shared {
    fn number(&self, src: usize, dst: usize, tag: u32) -> u64 {
        let mut counts = self.p2p.lock();
        let count = counts.entry((src, dst, tag)).or_default();
        *count += 1;
        *count - 1
    }

    /// Waits for a key that `rank` sets; a failure of the group or the time ends the wait.
    fn fetch(&self, key: &str, rank: usize, op: &str, seq: u64, timeout: Duration) -> Result<Vec<u8>> {
        let begin = Instant::now();
        let store = &self.context.store;
        loop {
            if let Some(cause) = self.failed.get() {
                return Err(Error::Poisoned { cause: cause.clone() });
            }
            if store.wait(&[key], Duration::from_millis(20)).is_ok() {
                return store.get(key);
            }
            if store.check(&["failed"])? {
                self.failed.get_or_init(|| Arc::new(Error::Aborted));
                return Err(Error::Aborted);
            }
            if begin.elapsed() > timeout {
                let missing = vec![rank];
                return Err(Error::Timeout { op: op.to_owned(), seq, elapsed: begin.elapsed(), missing });
            }
        }
    }

    fn collective(&self, seq: u64, call: Call<'static>) -> Result<()> {
        let (me, size) = (self.context.rank, self.context.size);
        // Each rank's own factor is applied before anything is sent.
        let op =
            call.op.reduce_op().map(|op| if let ReduceOp::PremulSum(_) = op { ReduceOp::Sum } else { op });
        let ours = match (call.op.root(), op) {
            (Some(root), Some(op)) => format!("{}({op}, root {root}) of {:?}", call.op.name(), call.kind),
            (None, Some(op)) => format!("{}({op}) of {:?}", call.op.name(), call.kind),
            _ => format!("{} of {:?}", call.op, call.kind),
        };
        let send: Vec<Vec<u8>> = match call.op {
            Op::AllReduce(_) | Op::Broadcast { .. } => vec![bytes(&call.outputs[0])],
            _ => call.inputs.iter().map(|s| bytes(s)).collect(),
        };
        let send: Vec<Vec<u8>> = match call.op.reduce_op() {
            Some(ReduceOp::PremulSum(factor)) => send
                .iter()
                .map(|part| {
                    let scaled = self.elements(part, call.kind) * factor;
                    bytes(&[Buffer::new(scaled).expect("contiguous")])
                })
                .collect(),
            _ => send,
        };
        let mut message = ours.clone().into_bytes();
        message.push(0);
        for part in &send {
            message.extend((part.len() as u64).to_le_bytes());
            message.extend(part);
        }
        self.context.store.set(&format!("{seq}/{me}"), &message)?;
        // parts[r][i]: the i-th segment of rank r.
        let mut parts: Vec<Vec<Vec<u8>>> = Vec::new();
        for rank in 0..size {
            let message = self.fetch(&format!("{seq}/{rank}"), rank, call.op.name(), seq, call.timeout)?;
            let end = message.iter().position(|&b| b == 0).unwrap_or(message.len());
            let theirs = String::from_utf8_lossy(&message[..end]).into_owned();
            if theirs != ours {
                return Err(Error::Desync { op: call.op.name().to_owned(), seq, rank, theirs, ours });
            }
            let mut rest = &message[end + 1..];
            let mut segments = Vec::new();
            while let Some((length, tail)) = rest.split_first_chunk::<8>() {
                let (part, tail) = tail.split_at(u64::from_le_bytes(*length) as usize);
                segments.push(part.to_vec());
                rest = tail;
            }
            parts.push(segments);
        }
        let combine = |index: usize| -> Vec<u8> {
            let tensors: Vec<Tensor> = parts.iter().map(|p| self.elements(&p[index], call.kind)).collect();
            let result = model::reduce(op.unwrap_or_default(), &tensors).contiguous();
            bytes(&[Buffer::new(result).expect("contiguous")])
        };
        let results: Vec<Vec<u8>> = match call.op {
            Op::AllReduce(_) => vec![combine(0)],
            Op::Reduce { dst, .. } if dst == me => vec![combine(0)],
            Op::Broadcast { src } if src != me => vec![parts[src][0].clone()],
            Op::AllGather => parts.iter().map(|p| p[0].clone()).collect(),
            Op::Gather { dst } if dst == me => parts.iter().map(|p| p[0].clone()).collect(),
            Op::Scatter { src } => vec![parts[src][me].clone()],
            Op::ReduceScatter(_) => vec![combine(me)],
            Op::AllToAll => parts.iter().map(|p| p[me].clone()).collect(),
            _ => Vec::new(),
        };
        for (rank, (segment, result)) in call.outputs.iter().zip(&results).enumerate() {
            fill(segment, result).map_err(|room| Error::Desync {
                op: call.op.name().to_owned(),
                seq,
                rank: call.op.root().unwrap_or(rank),
                theirs: format!("{ours}, {} bytes", result.len()),
                ours: format!("{ours}, {room} bytes"),
            })?;
        }
        Ok(())
    }

    fn elements(&self, part: &[u8], kind: Kind) -> Tensor {
        Tensor::from_data_size(part, &[(part.len() / kind.elt_size_in_bytes()) as i64], kind)
    }

    fn message(&self, transfer: &Transfer, number: Option<u64>) -> Result<Receipt> {
        let me = self.context.rank;
        let key = |src: usize, dst: usize, n: u64| format!("p2p/{src}/{dst}/{}/{n}", transfer.tag);
        match transfer.direction {
            Direction::Send { dst } => {
                let data = bytes(std::slice::from_ref(&transfer.buffer));
                self.context.store.set(&key(me, dst, number.unwrap_or_default()), &data)?;
                Ok(Receipt::default())
            }
            Direction::Recv { src } => {
                let begin = Instant::now();
                let (from, data) = match src {
                    Some(src) => {
                        let key = key(src, me, number.unwrap_or_default());
                        (src, self.fetch(&key, src, "recv", 0, transfer.timeout)?)
                    }
                    None => self.any_source(transfer, begin)?,
                };
                fill(std::slice::from_ref(&transfer.buffer), &data).map_err(|room| Error::Desync {
                    op: "recv".to_owned(),
                    seq: 0,
                    rank: from,
                    theirs: format!("send of {} bytes", data.len()),
                    ours: format!("recv of {room} bytes"),
                })?;
                Ok(Receipt { source: Some(from) })
            }
            _ => Err(Error::Aborted),
        }
    }

    fn any_source(&self, transfer: &Transfer, begin: Instant) -> Result<(usize, Vec<u8>)> {
        let (me, size) = (self.context.rank, self.context.size);
        loop {
            for src in 0..size {
                let mut counts = self.p2p.lock();
                let count = counts.entry((src, me + size, transfer.tag)).or_default();
                let key = format!("p2p/{src}/{me}/{}/{count}", transfer.tag);
                if self.context.store.check(&[&key])? {
                    *count += 1;
                    return Ok((src, self.context.store.get(&key)?));
                }
            }
            if begin.elapsed() > transfer.timeout {
                let (op, missing) = ("recv".to_owned(), (0..size).filter(|&r| r != me).collect());
                return Err(Error::Timeout { op, seq: 0, elapsed: begin.elapsed(), missing });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
