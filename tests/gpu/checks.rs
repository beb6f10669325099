//! Collectives and messages on CUDA tensors, and how waiting for them goes.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use tch::{Cuda, Device, Kind, Tensor};
use tch_distributed as dist;

use dist::{Error, P2pOp, ProcessGroup, ReduceOp, Result, Work};

/// A name, the smallest world in which it says something, and what every rank runs.
pub(crate) type Check = (&'static str, usize, fn(&ProcessGroup, Device) -> Result<()>);

pub(crate) const ALL: &[Check] = &[
    ("collectives on CUDA tensors of every kind", 1, collectives),
    ("views and uneven parts", 1, views),
    ("messages in a batch", 2, messages),
    ("a message to oneself", 1, own_message),
    ("wait orders the stream and does not block the host", 1, wait_orders),
    ("await resolves when the device has finished", 1, await_finishes),
    ("a copy behind an operation comes before what follows wait", 1, copies_are_ordered),
    ("objects over NCCL alone", 1, objects),
    ("sub-groups, with a stream of high priority", 1, groups),
    ("a sub-group whose communicator is split off", 2, split),
    ("CUDA tensors on native, through pinned memory", 1, staged),
    ("what NCCL cannot do is Unsupported", 1, unsupported),
];

pub(crate) fn wrong(what: impl std::fmt::Display) -> Error {
    std::io::Error::other(what.to_string()).into()
}

pub(crate) fn expect(what: &str, got: &Tensor, expected: &Tensor) -> Result<()> {
    let got = got.to_device(Device::Cpu);
    let expected = expected.to_device(Device::Cpu).to_kind(got.kind());
    match got.size() == expected.size() && got.equal(&expected) {
        true => Ok(()),
        false => Err(wrong(format_args!("{what}: {got} instead of {expected}"))),
    }
}

/// Small whole numbers of a rank, exact in every kind.
fn numbers(shape: &[i64], kind: Kind, rank: usize) -> Tensor {
    let n: i64 = shape.iter().product();
    let numbers = Tensor::arange(n, (Kind::Int64, Device::Cpu)).remainder(5) + rank as i64;
    numbers.to_kind(kind).view(shape)
}

fn sum(shape: &[i64], kind: Kind, ranks: usize) -> Tensor {
    (1..ranks).fold(numbers(shape, kind, 0), |sum, rank| sum + numbers(shape, kind, rank))
}

fn collectives(group: &ProcessGroup, device: Device) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let kinds = [
        Kind::Uint8,
        Kind::Int8,
        Kind::Int16,
        Kind::Int,
        Kind::Int64,
        Kind::Half,
        Kind::BFloat16,
        Kind::Float,
        Kind::Double,
        Kind::ComplexFloat,
    ];
    for kind in kinds {
        let shape = [7, 3];
        let mine = || numbers(&shape, kind, rank).to_device(device);
        let all: Vec<Tensor> = (0..size).map(|r| numbers(&shape, kind, r)).collect();
        let room = || numbers(&shape, kind, 50).to_device(device);
        let name = |what: &str| format!("{what} of {kind:?}");

        let mut t = mine();
        group.all_reduce(&mut t, ReduceOp::Sum)?;
        expect(&name("all_reduce"), &t, &sum(&shape, kind, size))?;
        for root in 0..size {
            let mut t = mine();
            group.broadcast(&mut t, root)?;
            expect(&name("broadcast"), &t, &all[root])?;
            let mut t = mine();
            group.reduce(&mut t, root, ReduceOp::Sum)?;
            expect(&name("reduce"), &t, &if rank == root { sum(&shape, kind, size) } else { mine() })?;
            let mut outs: Vec<Tensor> = (0..size).map(|_| room()).collect();
            group.gather((rank == root).then_some(&mut outs[..]), &mine(), root)?;
            if rank == root {
                expect(&name("gather"), &Tensor::stack(&outs, 0), &Tensor::stack(&all, 0))?;
            }
            let ins: Vec<Tensor> = all.iter().map(|t| t.to_device(device)).collect();
            let mut t = room();
            group.scatter(&mut t, (rank == root).then_some(&ins[..]), root)?;
            expect(&name("scatter"), &t, &all[rank])?;
        }
        let mut outs: Vec<Tensor> = (0..size).map(|_| room()).collect();
        group.all_gather(&mut outs, &mine())?;
        expect(&name("all_gather"), &Tensor::stack(&outs, 0), &Tensor::stack(&all, 0))?;
        let mut out = Tensor::zeros([7 * size as i64, 3], (kind, device));
        group.all_gather_into_tensor(&mut out, &mine())?;
        expect(&name("all_gather_into_tensor"), &out, &Tensor::cat(&all, 0))?;
        let whole = [7 * size as i64, 3];
        let mut out = room();
        group.reduce_scatter_tensor(
            &mut out,
            &numbers(&whole, kind, rank).to_device(device),
            ReduceOp::Sum,
        )?;
        expect(&name("reduce_scatter_tensor"), &out, &sum(&whole, kind, size).narrow(0, 7 * rank as i64, 7))?;
        let mut out = Tensor::zeros(whole, (kind, device));
        group.all_to_all_single(&mut out, &numbers(&whole, kind, rank).to_device(device), None, None)?;
        let column: Vec<Tensor> =
            (0..size).map(|r| numbers(&whole, kind, r).narrow(0, 7 * rank as i64, 7)).collect();
        expect(&name("all_to_all_single"), &out, &Tensor::cat(&column, 0))?;
    }
    let mut t = Tensor::from_slice(&[rank == 0, false]).to_device(device);
    group.all_reduce(&mut t, ReduceOp::BitOr)?;
    expect("BitOr of Bool", &t, &Tensor::from_slice(&[true, false]))?;
    let mut t = Tensor::from_slice(&[-3i64 - 2 * rank as i64]).to_device(device);
    group.all_reduce(&mut t, ReduceOp::Avg)?;
    let total: i64 = (0..size as i64).map(|r| -3 - 2 * r).sum();
    expect("Avg of Int64", &t, &Tensor::from_slice(&[total / size as i64]))?;
    for kind in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
        let mut t = Tensor::from_slice(&[2f32]).to_kind(kind).to_device(device);
        group.all_reduce(&mut t, ReduceOp::PremulSum(0.5))?;
        expect(&format!("PremulSum of {kind:?}"), &t, &Tensor::from_slice(&[size as f32]))?;
    }
    group.barrier()
}

fn views(group: &ProcessGroup, device: Device) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let base = Tensor::ones([6, 8], (Kind::Float, device));
    let mut turned = base.slice(1, 0, 8, 2).transpose(0, 1);
    let _ = turned.fill_(rank as f64 + 1.0);
    group.all_reduce(&mut turned, ReduceOp::Sum)?;
    let total = (size * (size + 1) / 2) as f64;
    expect("a strided view", &turned.contiguous(), &Tensor::full([4, 6], total, (Kind::Float, device)))?;
    expect(
        "what lies between",
        &base.slice(1, 1, 8, 2).contiguous(),
        &Tensor::ones([6, 4], (Kind::Float, device)),
    )?;
    let outs = group.all_gather_uneven(&numbers(&[rank as i64, 2], Kind::Int64, rank).to_device(device))?;
    for (r, out) in outs.iter().enumerate() {
        expect("all_gather_uneven", out, &numbers(&[r as i64, 2], Kind::Int64, r))?;
    }
    let inputs: Vec<Tensor> =
        (0..size).map(|to| Tensor::full([to as i64], (rank + to) as i64, (Kind::Int64, device))).collect();
    let mut out = Tensor::zeros([rank as i64], (Kind::Int64, device));
    group.reduce_scatter(&mut out, &inputs, ReduceOp::Sum)?;
    let total: usize = (0..size).map(|from| from + rank).sum();
    expect("uneven reduce_scatter", &out, &Tensor::full([rank as i64], total as i64, (Kind::Int64, device)))
}

fn messages(group: &ProcessGroup, device: Device) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let (next, before) = ((rank + 1) % size, (rank + size - 1) % size);
    let mine = numbers(&[5], Kind::Float, rank).to_device(device);
    let theirs = Tensor::zeros([5, 2], (Kind::Float, device)).select(1, 0);
    let ops = vec![P2pOp::send(&mine, next, 0), P2pOp::recv(&theirs, before, 0)];
    for work in group.batch_isend_irecv(ops)? {
        work.wait()?;
    }
    expect("batch_isend_irecv", &theirs.contiguous(), &numbers(&[5], Kind::Float, before))
}

fn own_message(group: &ProcessGroup, device: Device) -> Result<()> {
    let (mine, got) =
        (numbers(&[5], Kind::Float, 3).to_device(device), Tensor::zeros([5], (Kind::Float, device)));
    let sent = group.isend(&mine, group.rank(), 0)?;
    group.irecv(&got, group.rank(), 0)?.wait()?;
    sent.wait()?;
    expect("irecv from oneself", &got, &mine)
}

/// Gives the device something to do for about a third of a second.
fn keep_busy(device: Device) -> Tensor {
    static PRODUCTS: OnceLock<usize> = OnceLock::new();
    let a = Tensor::ones([2048, 2048], (Kind::Float, device)) * 1e-4;
    let products = *PRODUCTS.get_or_init(|| {
        drop(a.matmul(&a)); // the first time loads what multiplies
        finished(device);
        let start = Instant::now();
        drop(a.matmul(&a));
        finished(device);
        // No more than a device takes without letting the host wait.
        ((0.3 / start.elapsed().as_secs_f64()) as usize).clamp(1, 900)
    });
    (0..products).fold(a.shallow_clone(), |product, _| product.matmul(&a))
}

fn finished(device: Device) {
    if let Device::Cuda(index) = device {
        Cuda::synchronize(index as i64);
    }
}

fn wait_orders(group: &ProcessGroup, device: Device) -> Result<()> {
    drop(keep_busy(device)); // the first time finds out how much that is
    group.barrier()?;
    finished(device);
    let start = Instant::now();
    let _busy = keep_busy(device);
    let t = Tensor::ones([1000], (Kind::Float, device));
    let work = group.all_reduce_async(&t, ReduceOp::Sum)?;
    work.wait()?;
    let (waited, ended) = (start.elapsed(), work.is_completed());
    let after = &t + 1.0; // given to the stream that now comes after the operation
    finished(device);
    let whole = start.elapsed();
    if whole < Duration::from_millis(20) {
        return Err(wrong(format_args!("the device was busy for {whole:?} only: too little to tell")));
    }
    if ended || waited > whole / 2 {
        return Err(wrong(format_args!("wait returned after {waited:?} of {whole:?}, ended: {ended}")));
    }
    let expected = Tensor::full([1000], group.size() as f64 + 1.0, (Kind::Float, device));
    expect("what follows wait", &after, &expected)
}

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on(mut work: Work) -> Result<()> {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match Pin::new(&mut work).poll(&mut context) {
            Poll::Ready(result) => return result,
            Poll::Pending => std::thread::park_timeout(Duration::from_secs(1)),
        }
    }
}

fn await_finishes(group: &ProcessGroup, device: Device) -> Result<()> {
    group.barrier()?;
    finished(device);
    let start = Instant::now();
    let _busy = keep_busy(device);
    let t = Tensor::ones([1000], (Kind::Float, device));
    block_on(group.all_reduce_async(&t, ReduceOp::Sum)?)?;
    let awaited = start.elapsed();
    finished(device);
    let whole = start.elapsed();
    match awaited * 10 > whole * 8 {
        true => Ok(()),
        false => Err(wrong(format_args!("it resolved after {awaited:?} of {whole:?}"))),
    }
}

fn copies_are_ordered(group: &ProcessGroup, device: Device) -> Result<()> {
    let size = group.size() as f64;
    for _ in 0..20 {
        // Several buffers are packed into one, and the result is unpacked into a strided view.
        let list = [1000, 1, 70_000].map(|n| Tensor::ones([n], (Kind::Float, device)));
        let strided = Tensor::ones([300, 200], (Kind::Float, device)).slice(1, 0, 200, 2);
        let _busy = keep_busy(device);
        let works = [
            group.all_reduce_coalesced_async(&list, ReduceOp::Sum)?,
            group.all_reduce_async(&strided, ReduceOp::Sum)?,
        ];
        works.iter().try_for_each(Work::wait)?;
        let total: f64 = list.iter().chain([&strided]).map(|t| t.sum(Kind::Double).double_value(&[])).sum();
        let expected = size * (1000.0 + 1.0 + 70_000.0 + 30_000.0);
        if total != expected {
            return Err(wrong(format_args!("{total} instead of {expected}")));
        }
    }
    Ok(())
}

fn objects(group: &ProcessGroup, _: Device) -> Result<()> {
    let ranks: Vec<usize> = (0..group.size()).collect();
    let options = dist::GroupOptions::new().backend("nccl");
    let alone = group.new_group_with(&ranks, options)?.ok_or_else(|| wrong("no group"))?;
    let all = alone.all_gather_object(&format!("rank {}", alone.rank()))?;
    alone.barrier()?;
    alone.destroy()?;
    let expected: Vec<String> = ranks.iter().map(|rank| format!("rank {rank}")).collect();
    if all == expected { Ok(()) } else { Err(wrong(format_args!("{all:?}"))) }
}

fn groups(group: &ProcessGroup, device: Device) -> Result<()> {
    let ranks: Vec<usize> = (0..group.size()).step_by(2).collect();
    let options = dist::GroupOptions::new().high_priority_stream(true);
    if let Some(part) = group.new_group_with(&ranks, options)? {
        let mut t = Tensor::ones([3], (Kind::Float, device));
        part.all_reduce(&mut t, ReduceOp::Sum)?;
        expect("in a part", &t, &Tensor::full([3], part.size() as f64, (Kind::Float, device)))?;
        part.destroy()?;
    }
    Ok(())
}

fn split(group: &ProcessGroup, device: Device) -> Result<()> {
    let ranks: Vec<usize> = (0..group.size()).skip(1).collect();
    let options = dist::GroupOptions::new().split_communicator(true);
    if let Some(part) = group.new_group_with(&ranks, options)? {
        let mut t = Tensor::ones([3], (Kind::Float, device));
        part.all_reduce(&mut t, ReduceOp::Sum)?;
        expect("in a part split off", &t, &Tensor::full([3], part.size() as f64, (Kind::Float, device)))?;
        part.destroy()?;
    }
    Ok(())
}

fn staged(group: &ProcessGroup, device: Device) -> Result<()> {
    let ranks: Vec<usize> = (0..group.size()).collect();
    let options = dist::GroupOptions::new().backend("native");
    let native = group.new_group_with(&ranks, options)?.ok_or_else(|| wrong("no group"))?;
    let mut t = Tensor::full([1000], native.rank() as f64, (Kind::Float, device));
    native.all_reduce(&mut t, ReduceOp::Sum)?;
    let total = (native.size() * (native.size() - 1) / 2) as f64;
    expect("all_reduce on native", &t, &Tensor::full([1000], total, (Kind::Float, device)))?;
    let strided = Tensor::ones([64, 2], (Kind::Int64, device)).select(1, 1);
    native.all_reduce_async(&strided, ReduceOp::Sum)?.wait()?;
    let expected = Tensor::full([64], native.size() as i64, (Kind::Int64, device));
    expect("all_reduce_async on native", &strided.contiguous(), &expected)?;
    native.destroy()
}

fn unsupported(group: &ProcessGroup, device: Device) -> Result<()> {
    let mut t = Tensor::ones([1], (Kind::Int64, device));
    match group.all_reduce(&mut t, ReduceOp::BitXor) {
        Err(Error::Unsupported { .. }) => Ok(()),
        other => Err(wrong(format_args!("BitXor on Int64: {other:?}"))),
    }
}
