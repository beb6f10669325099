//! One Rust rank in a world that it shares with PyTorch (`rank.py` does the same, step by step): every
//! collective and message over Gloo or NCCL, sub-groups, and one model trained by both to the same parameters.
//!
//! `cargo xtask interop` runs it with a real PyTorch over Gloo, and `cargo xtask gpu-simulated world` over NCCL on a
//! simulated GPU. By hand, on two terminals:
//!
//! ```text
//! RANK=0 WORLD_SIZE=2 python examples/interop/rank.py tcp://127.0.0.1:29500
//! RANK=1 WORLD_SIZE=2 cargo run --example interop tcp://127.0.0.1:29500
//! ```
//!
//! Over NCCL both take one more word, `nccl`, cargo takes `--features nccl`, and each rank its `LOCAL_RANK`.

use std::collections::BTreeSet;
use std::env;
use std::sync::OnceLock;
use std::time::Duration;

use tch::kind::Element;
use tch::{Cuda, Device, Kind, Tensor, no_grad};
use tch_distributed as dist;

use dist::{P2pOp, ProcessGroup, ReduceOp, Result};

/// Where tensors are made, as `torch.set_default_device` says in `rank.py`.
static DEVICE: OnceLock<Device> = OnceLock::new();

fn device() -> Device {
    *DEVICE.get_or_init(|| Device::Cpu)
}

fn tensor<T: Element>(values: &[T]) -> Tensor {
    Tensor::from_slice(values).to_device(device())
}

fn check(name: &str, got: &Tensor, expected: &[f64]) {
    let got = Vec::<f64>::try_from(got.to_kind(Kind::Double).reshape([-1])).unwrap();
    let close = got.len() == expected.len() && got.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6);
    assert!(close, "{name} on a Rust rank: got {got:?}, expected {expected:?}");
}

fn zeros(n: usize, kind: Kind) -> Tensor {
    Tensor::zeros([n as i64], (kind, device()))
}

fn list(n: usize, numel: usize) -> Vec<Tensor> {
    (0..n).map(|_| zeros(numel, Kind::Float)).collect()
}

fn flat(tensors: &[Tensor]) -> Tensor {
    Tensor::cat(tensors, 0)
}

fn collectives(group: &ProcessGroup) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let (r, n) = (rank as f32, size as f64);
    let mut t = tensor(&[r + 1.0, 10.0 * r]);
    group.all_reduce(&mut t, ReduceOp::Sum)?;
    check("all_reduce", &t, &[n * (n + 1.0) / 2.0, 10.0 * n * (n - 1.0) / 2.0]);
    let mut t = tensor(&[rank as i64, -(rank as i64)]);
    group.all_reduce(&mut t, ReduceOp::Max)?;
    check("all_reduce max", &t, &[n - 1.0, 0.0]);
    let mut t = tensor(&[r + 1.0]).to_kind(Kind::BFloat16);
    group.all_reduce(&mut t, ReduceOp::Sum)?;
    check("all_reduce bf16", &t, &[n * (n + 1.0) / 2.0]);
    let mut t = tensor(&[r]);
    group.all_reduce(&mut t, ReduceOp::Avg)?;
    check("all_reduce avg", &t, &[(n - 1.0) / 2.0]);
    let mut t = Tensor::complex(&tensor(&[r]), &tensor(&[1.0f32]));
    group.all_reduce(&mut t, ReduceOp::Sum)?;
    check("all_reduce complex", &t.view_as_real(), &[n * (n - 1.0) / 2.0, n]);
    for root in 0..size {
        let is_root = rank == root;
        let mut t = tensor(&[r; 3]);
        group.broadcast(&mut t, root)?;
        check("broadcast", &t, &[root as f64; 3]);
        let mut t = tensor(&[rank as i64 + 1]);
        group.reduce(&mut t, root, ReduceOp::Sum)?;
        check("reduce", &t, &[if is_root { n * (n + 1.0) / 2.0 } else { f64::from(r) + 1.0 }]);
        let mine = tensor(&[rank as i64, 100 + rank as i64]);
        let mut outs: Vec<Tensor> = (0..size).map(|_| zeros(2, Kind::Int64)).collect();
        group.gather(is_root.then_some(&mut outs[..]), &mine, root)?;
        if is_root {
            let expected: Vec<f64> = (0..size).flat_map(|i| [i as f64, 100.0 + i as f64]).collect();
            check("gather", &flat(&outs), &expected);
        }
        let ins: Vec<Tensor> = (0..size).map(|i| tensor(&[(10 * root + i) as f32])).collect();
        let mut t = zeros(1, Kind::Float);
        group.scatter(&mut t, is_root.then_some(&ins[..]), root)?;
        check("scatter", &t, &[(10 * root + rank) as f64]);
    }
    let mut outs = list(size, 2);
    group.all_gather(&mut outs, &tensor(&[r, -r]))?;
    check("all_gather", &flat(&outs), &(0..size).flat_map(|i| [i as f64, -(i as f64)]).collect::<Vec<_>>());
    let mut out = zeros(2 * size, Kind::Float);
    group.all_gather_into_tensor(&mut out, &tensor(&[r, 7.0]))?;
    check("all_gather_into_tensor", &out, &(0..size).flat_map(|i| [i as f64, 7.0]).collect::<Vec<_>>());
    let mut out = zeros(2, Kind::Float);
    let input = Tensor::arange(2 * size as i64, (Kind::Float, device())) + f64::from(r);
    group.reduce_scatter_tensor(&mut out, &input, ReduceOp::Sum)?;
    let (base, first) = (n * (n - 1.0) / 2.0, 2.0 * f64::from(r));
    check("reduce_scatter_tensor", &out, &[n * first + base, n * (first + 1.0) + base]);
    let mut out = zeros(size, Kind::Float);
    let input = Tensor::arange(size as i64, (Kind::Float, device())) + 10.0 * f64::from(r);
    group.all_to_all_single(&mut out, &input, None, None)?;
    let column: Vec<f64> = (0..size).map(|s| (10 * s + rank) as f64).collect();
    check("all_to_all_single", &out, &column);
    // Rank s sends t + 1 elements to rank t.
    let ins: Vec<f32> = (0..size).flat_map(|to| vec![(10 * rank + to) as f32; to + 1]).collect();
    let mut out = zeros(size * (rank + 1), Kind::Float);
    let splits: Vec<i64> = (1..=size as i64).collect();
    let (input, mine) = (tensor(&ins), vec![rank as i64 + 1; size]);
    group.all_to_all_single(&mut out, &input, Some(&mine), Some(&splits))?;
    let expected: Vec<f64> = column.iter().flat_map(|v| vec![*v; rank + 1]).collect();
    check("all_to_all_single uneven", &out, &expected);
    let ins: Vec<Tensor> = (0..size).map(|to| tensor(&[(10 * rank + to) as f32])).collect();
    let mut outs = list(size, 1);
    group.all_to_all(&mut outs, &ins)?;
    check("all_to_all", &flat(&outs), &column);
    group.barrier()
}

/// What PyTorch's Gloo does not have, or does another way.
fn of_nccl(group: &ProcessGroup) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let n = size as f64;
    let mut t = tensor(&[rank == 0, false]);
    group.all_reduce(&mut t, ReduceOp::Sum)?;
    check("all_reduce bool", &t, &[1.0, 0.0]);
    let ins: Vec<Tensor> = (0..size).map(|to| tensor(&[(10 * rank + to) as f32; 2])).collect();
    let mut out = zeros(2, Kind::Float);
    group.reduce_scatter(&mut out, &ins, ReduceOp::Sum)?;
    check("reduce_scatter", &out, &[5.0 * n * (n - 1.0) + n * rank as f64; 2]);
    // More than any buffer on the way.
    let mut t = tensor(&vec![rank as f64; 300_000]);
    group.all_reduce(&mut t, ReduceOp::Sum)?;
    check("all_reduce of much", &t, &vec![n * (n - 1.0) / 2.0; 300_000]);
    let (to, from) = ((rank + 1) % size, (rank + size - 1) % size);
    let (got, mine) = (zeros(300_000, Kind::Double), t + rank as f64);
    for work in group.batch_isend_irecv(vec![P2pOp::recv(&got, from, 0), P2pOp::send(&mine, to, 0)])? {
        work.wait()?;
    }
    check("much sent", &got, &vec![n * (n - 1.0) / 2.0 + from as f64; 300_000]);
    Ok(())
}

/// What NCCL has of messages too: all at once, or one by one in an order that both sides know.
fn messages(group: &ProcessGroup) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let (to, from) = ((rank + 1) % size, (rank + size - 1) % size);
    let (got, mine) = (zeros(1, Kind::Float), tensor(&[rank as f32 + 0.5]));
    for work in group.batch_isend_irecv(vec![P2pOp::recv(&got, from, 0), P2pOp::send(&mine, to, 0)])? {
        work.wait()?;
    }
    check("batch_isend_irecv", &got, &[from as f64 + 0.5]);
    if rank > 0 {
        return group.send(&tensor(&[rank as i32; 3]), 0, 0);
    }
    for other in 1..size {
        let mut got = zeros(3, Kind::Int);
        group.recv(&mut got, Some(other), 0)?;
        check("send, recv", &got, &[other as f64; 3]);
    }
    Ok(())
}

/// Messages with tags, from one rank or from anybody.
fn tagged_messages(group: &ProcessGroup) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let (to, from) = ((rank + 1) % size, (rank + size - 1) % size);
    let got = zeros(3, Kind::Float);
    let sent = group.isend(&tensor(&[rank as f32; 3]), to, 5)?;
    group.irecv(&got, from, 5)?.wait()?;
    sent.wait()?;
    check("isend, irecv", &got, &[from as f64; 3]);
    if rank == 0 {
        let mut senders = BTreeSet::new();
        for _ in 1..size {
            let mut got = zeros(1, Kind::Int16);
            let sender = group.recv(&mut got, None, 6)?;
            check("recv from anybody", &got, &[sender as f64]);
            senders.insert(sender);
        }
        assert!(senders.into_iter().eq(1..size));
    } else {
        group.send(&tensor(&[rank as i16]), 0, 6)?;
    }
    Ok(())
}

fn groups(group: &ProcessGroup) -> Result<()> {
    let size = group.size();
    for ranks in [vec![0, size - 1], (0..size).step_by(2).collect(), (0..size).collect()] {
        if let Some(part) = group.new_group(&ranks)? {
            let mut t = tensor(&[group.rank() as f32 + 1.0]);
            part.all_reduce(&mut t, ReduceOp::Sum)?;
            check("all_reduce in a part", &t, &[(ranks.iter().sum::<usize>() + ranks.len()) as f64]);
        }
    }
    Ok(())
}

/// A regression, by gradients that all ranks average as one flat tensor.
fn train(group: &ProcessGroup) -> Result<()> {
    let double = (Kind::Double, device());
    let mut w = Tensor::zeros([3], double).set_requires_grad(true);
    let rows: Vec<f64> = (0..4).flat_map(|i| [group.rank() as f64 + 1.0, 2.0, f64::from(i)]).collect();
    let x = tensor(&rows).view([4, 3]);
    let y = x.mv(&tensor(&[1.0, -2.0, 0.5]));
    for _ in 0..50 {
        let loss = (x.mv(&w) - &y).square().mean(Kind::Double);
        dist::autograd::backward(&loss)?;
        let mut grad = w.grad();
        group.all_reduce(&mut grad, ReduceOp::Sum)?;
        no_grad(|| w -= grad * (0.02 / group.size() as f64));
        dist::autograd::set_grad(&mut w, None)?;
    }
    let mut all: Vec<Tensor> = (0..group.size()).map(|_| zeros(3, Kind::Double)).collect();
    group.all_gather(&mut all, &w.detach())?;
    for other in &all {
        let apart = (other - &w).abs().max().double_value(&[]);
        assert!(apart < 1e-12, "{other} is not {w}");
    }
    Ok(())
}

fn main() -> Result<()> {
    tch::set_num_threads(1);
    let method = env::args().nth(1).unwrap_or_else(|| "env".to_owned());
    let backend = env::args().nth(2).unwrap_or_else(|| "gloo".to_owned());
    if backend == "nccl" {
        let local: usize = env::var("LOCAL_RANK").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
        // More ranks than devices share them.
        DEVICE.get_or_init(|| Device::Cuda(local % Cuda::device_count().max(1) as usize));
    }
    let mut options = dist::InitOptions::new().timeout(Duration::from_secs(60));
    if method != "env" {
        options = options.init_method(&method);
    }
    let group = dist::init_process_group(&backend, options)?;
    collectives(&group)?;
    messages(&group)?;
    match &*backend {
        "nccl" => of_nccl(&group)?,
        _ => tagged_messages(&group)?,
    }
    groups(&group)?;
    train(&group)?;
    group.barrier()?;
    println!("Rust rank {} of {}: all as expected", group.rank(), group.size());
    dist::destroy_process_group()
}
