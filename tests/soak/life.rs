//! What the ranks do while they are watched: small collectives, and groups that come and go.

use tch::{Device, Kind, Tensor};
use tch_distributed::store::Store;
use tch_distributed::{Error, P2pOp, ProcessGroup, ReduceOp, Result};

use super::meter::{self, Holdings};

/// How often the holdings are looked at.
pub const LOOKS: usize = 10;

/// So many of a thing, in tenths; this process's holdings after each.
pub fn watched(
    group: &ProcessGroup,
    store: &dyn Store,
    count: usize,
    body: impl Fn(&ProcessGroup, usize) -> Result<()>,
) -> Result<Vec<Holdings>> {
    let mut looks: Vec<Holdings> = Vec::with_capacity(LOOKS);
    for tenth in 0..LOOKS {
        for n in count * tenth / LOOKS..count * (tenth + 1) / LOOKS {
            body(group, n)?;
        }
        group.barrier()?;
        if tenth == 0 {
            // What is measured first is what all the rest is compared with.
            std::thread::sleep(meter::LAST_WORDS);
            group.barrier()?;
        }
        // While the others stand still.
        for turn in 0..group.size() {
            if turn == group.rank() {
                looks.push(meter::settled(looks.first(), || store.num_keys().unwrap_or(usize::MAX)));
            }
            group.barrier()?;
        }
    }
    Ok(looks)
}

fn numbers(n: i64) -> Tensor {
    Tensor::ones([n], (Kind::Float, Device::Cpu))
}

/// One small collective: each kind of call has its turn.
pub fn collective(group: &ProcessGroup, n: usize) -> Result<()> {
    let (me, size) = (group.rank(), group.size());
    let mut tensor = numbers(1 + (n % 64) as i64);
    match n % 16 {
        0 => group.barrier(),
        1 => group.broadcast(&mut tensor, n % size),
        2 => group.all_gather_into_tensor(&mut numbers(size as i64 * tensor.size()[0]), &tensor),
        3 => group.reduce(&mut tensor, n % size, ReduceOp::Max),
        4 => group.all_to_all_single(&mut numbers(size as i64), &numbers(size as i64), None, None),
        5 => group.all_reduce_async(&tensor, ReduceOp::Sum)?.wait(),
        6 => {
            // Nobody waits for this one.
            drop(group.all_reduce_async(&tensor, ReduceOp::Avg)?);
            Ok(())
        }
        7 => ring(group, &tensor),
        8 => group.all_gather_object(&me).map(|_| ()),
        9 => group.reduce_scatter_tensor(&mut numbers(1), &numbers(size as i64), ReduceOp::Sum),
        _ => group.all_reduce(&mut tensor, ReduceOp::Sum),
    }
}

/// A message to the next rank.
fn ring(group: &ProcessGroup, tensor: &Tensor) -> Result<()> {
    let (me, size) = (group.rank(), group.size());
    let received = tensor.zeros_like();
    let ops =
        vec![P2pOp::recv(&received, (me + size - 1) % size, 1), P2pOp::send(tensor, (me + 1) % size, 1)];
    group.batch_isend_irecv(ops)?.iter().try_for_each(|work| work.wait())
}

/// A group that fails: one rank gives it up while the others wait in it.
pub fn failed_group(group: &ProcessGroup, n: usize) -> Result<()> {
    let all: Vec<usize> = (0..group.size()).collect();
    let own = group.new_group(&all)?.ok_or(Error::NotInitialized)?;
    // A rank that is late learns of it in the first of these that it comes to.
    let use_it = || {
        own.barrier()?;
        let pending = own.irecv(&numbers(2), (own.rank() + 1) % own.size(), 9)?;
        if own.rank() == n % own.size() {
            own.abort()?;
        }
        own.all_reduce(&mut numbers(3), ReduceOp::Sum).and(pending.wait())
    };
    match use_it() {
        Err(Error::Aborted | Error::Poisoned { .. }) => {}
        other => panic!("a group that was aborted gives {other:?}"),
    }
    if n.is_multiple_of(2) { own.destroy() } else { Ok(()) }
}

/// One group: made, used, and destroyed or dropped. Now and then a part of the ranks, a group of a group
/// that outlives it, a monitored barrier.
pub fn one_group(group: &ProcessGroup, n: usize) -> Result<()> {
    let all: Vec<usize> = (0..group.size()).collect();
    let own = match n % 8 {
        0 => group.split(Some((group.rank() % 2) as i64), 0)?,
        1 => group.new_group(&all[..all.len().div_ceil(2)])?,
        2 => {
            let parent = group.new_group(&all)?;
            parent.map(|parent| parent.new_group(&all)).transpose()?.flatten()
        }
        _ => group.new_group(&all)?,
    };
    let Some(own) = own else { return Ok(()) };
    own.all_reduce(&mut numbers(8), ReduceOp::Sum)?;
    match n % 4 {
        0 => ring(&own, &numbers(3))?,
        1 => own.all_reduce_async(&numbers(5), ReduceOp::Sum)?.wait()?,
        2 => own.monitored_barrier(own.timeout(), true)?,
        _ => own.barrier()?,
    }
    if n.is_multiple_of(2) { own.destroy() } else { Ok(()) }
}
