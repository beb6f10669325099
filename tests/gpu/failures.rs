//! What happens when a rank does not come: errors, and a process that lives on.

use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tch_distributed as dist;

use dist::{Error, ProcessGroup, ReduceOp, Result};

use crate::checks::{Check, expect, wrong};

pub(crate) const ALL: &[Check] = &[
    ("a timeout is an error on the rank that came, and its process lives on", 2, timeout),
    ("an abort ends what is pending, and the process lives on", 2, abort),
];

/// A group of all ranks on NCCL alone.
fn of_its_own(group: &ProcessGroup, timeout: Duration) -> Result<ProcessGroup> {
    let ranks: Vec<usize> = (0..group.size()).collect();
    let options = dist::GroupOptions::new().backend("nccl").timeout(timeout);
    group.new_group_with(&ranks, options)?.ok_or_else(|| wrong("no group"))
}

/// One call that works, so that communicators exist.
fn warm_up(group: &ProcessGroup, device: Device) -> Result<()> {
    let mut t = Tensor::ones([8], (Kind::Float, device));
    group.all_reduce(&mut t, ReduceOp::Sum)?;
    expect("all_reduce", &t, &Tensor::full([8], group.size() as f64, (Kind::Float, device)))?;
    group.barrier()
}

/// The end of a work, which is not what `wait` waits for.
fn end_of(work: &dist::Work) -> Result<()> {
    match work.wait_timeout(Duration::from_secs(60))? {
        true => Ok(()),
        false => Err(wrong("it had not ended after a minute")),
    }
}

/// A new group of the same process works.
fn lives_on(group: &ProcessGroup, device: Device) -> Result<()> {
    let next = of_its_own(group, Duration::from_secs(60))?;
    warm_up(&next, device)?;
    next.destroy()
}

fn timeout(group: &ProcessGroup, device: Device) -> Result<()> {
    let own = of_its_own(group, Duration::from_secs(60))?;
    warm_up(&own, device)?;
    let hurried = own.with_timeout(Duration::from_secs(3));
    if group.rank() > 0 {
        let t = Tensor::ones([8], (Kind::Float, device));
        let start = Instant::now();
        let outcome = end_of(&hurried.all_reduce_async(&t, ReduceOp::Sum)?);
        match outcome {
            Err(Error::Timeout { .. }) if start.elapsed() < Duration::from_secs(30) => {}
            other => return Err(wrong(format_args!("{other:?} after {:?}", start.elapsed()))),
        }
        match hurried.barrier() {
            Err(Error::Poisoned { .. }) => {}
            other => return Err(wrong(format_args!("the next call: {other:?}"))),
        }
    } else {
        std::thread::sleep(Duration::from_secs(6));
    }
    group.barrier()?;
    drop((own, hurried));
    lives_on(group, device)
}

fn abort(group: &ProcessGroup, device: Device) -> Result<()> {
    let own = of_its_own(group, Duration::from_secs(60))?;
    warm_up(&own, device)?;
    if group.rank() > 0 {
        let t = Tensor::ones([8], (Kind::Float, device));
        let work = own.all_reduce_async(&t, ReduceOp::Sum)?;
        std::thread::sleep(Duration::from_millis(500));
        own.abort()?;
        match end_of(&work) {
            Err(Error::Aborted | Error::Poisoned { .. }) => {}
            other => return Err(wrong(format_args!("{other:?}"))),
        }
    }
    group.barrier()?;
    drop(own);
    lives_on(group, device)
}
