//! What several ranks compute of one model, with tensors on a device: the same as on the CPU.

use tch::nn;
use tch::{Device, Kind, Reduction, Tensor};
use tch_distributed as dist;

use dist::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use dist::model_parallel::tensor::{
    Activation, ParallelLinearConfig, ParallelMlp, join_sequence, split_sequence,
    vocab_parallel_cross_entropy,
};
use dist::{ProcessGroup, ReduceOp, Result, functional};

use crate::checks::{Check, expect};

pub(crate) const ALL: &[Check] = &[
    ("collectives that autograd follows, as on the CPU", 1, differentiable),
    ("tensor-parallel layers, as on the CPU", 1, layers),
    ("pipelines of every schedule, as on the CPU", 2, pipelines),
];

/// A device adds in another order: results differ in the last digits.
fn alike(what: &str, there: &[Tensor], here: &[Tensor]) -> Result<()> {
    let count = |all: &[Tensor]| Tensor::from(all.len() as i64);
    expect(&format!("{what}: how many results"), &count(there), &count(here))?;
    for (there, here) in there.iter().zip(here) {
        let apart = (there.to_device(Device::Cpu) - here).abs().max();
        expect(&format!("{what}: further apart than 1e-5"), &apart.gt(1e-5), &Tensor::from(false))?;
    }
    Ok(())
}

fn wave(shape: &[i64], phase: f64, device: Device) -> Tensor {
    let numel: i64 = shape.iter().product();
    let numbers = Tensor::arange(numel, (Kind::Double, Device::Cpu)) * 0.7 + phase;
    numbers.sin().view(shape).to_kind(Kind::Float).to_device(device)
}

/// Gives every variable numbers of its own.
fn fill(vs: &nn::VarStore, phase: f64) {
    tch::no_grad(|| {
        for (i, mut t) in vs.trainable_variables().into_iter().enumerate() {
            t.copy_(&wave(&t.size(), phase + i as f64, vs.device()));
        }
    });
}

fn backward(out: &Tensor) -> Result<()> {
    dist::autograd::backward(&(out * wave(&out.size(), 0.3, out.device())).sum(Kind::Float))
}

type Way = fn(&Tensor, &ProcessGroup) -> Result<Tensor>;

const WAYS: [(&str, Way); 9] = [
    ("all_reduce", |t, g| functional::all_reduce(t, ReduceOp::Sum, g)),
    ("all_gather", |t, g| functional::all_gather(t, 1, g)),
    ("reduce_scatter", |t, g| functional::reduce_scatter(t, 0, ReduceOp::Avg, g)),
    ("all_to_all", |t, g| functional::all_to_all(t, 0, 1, g)),
    ("broadcast", |t, g| functional::broadcast(t, g.size() - 1, g)),
    ("copy and reduce", |t, g| functional::reduce_from_group(&functional::copy_to_group(t, g)?, g)),
    ("scatter and gather", |t, g| {
        functional::gather_from_group(&functional::scatter_to_group(t, 0, g)?, 0, g)
    }),
    ("split and join", |t, g| join_sequence(&split_sequence(t, g)?, g)),
    ("cross entropy", |t, g| {
        let targets = Tensor::arange(t.size()[0], (Kind::Int64, t.device())).remainder(3);
        vocab_parallel_cross_entropy(t, &targets, g)
    }),
];

fn differentiable(group: &ProcessGroup, device: Device) -> Result<()> {
    let n = group.size() as i64;
    for (name, way) in WAYS {
        let run = |device: Device| -> Result<[Tensor; 2]> {
            let x = wave(&[2 * n, 3 * n], group.rank() as f64, device).set_requires_grad(true);
            let out = way(&x, group)?;
            backward(&out)?;
            Ok([out.detach(), x.grad()])
        };
        alike(name, &run(device)?, &run(Device::Cpu)?)?;
    }
    Ok(())
}

fn layers(group: &ProcessGroup, device: Device) -> Result<()> {
    let n = group.size() as i64;
    for sequence_parallel in [false, true] {
        let run = |device: Device| -> Result<Vec<Tensor>> {
            let vs = nn::VarStore::new(device);
            let config = ParallelLinearConfig { sequence_parallel, ..Default::default() };
            let mlp = ParallelMlp::new(vs.root(), 4 * n, 8 * n, Activation::Gelu, config, group)?;
            fill(&vs, 0.0);
            let rows = if sequence_parallel { 2 } else { 2 * n };
            let x = wave(&[rows, 4 * n], 0.1, device).set_requires_grad(true);
            let out = mlp.f_forward(&x)?;
            backward(&out)?;
            let grads = vs.trainable_variables().iter().map(Tensor::grad).collect::<Vec<_>>();
            Ok([out.detach(), x.grad()].into_iter().chain(grads).collect())
        };
        alike(&format!("sequence parallel: {sequence_parallel}"), &run(device)?, &run(Device::Cpu)?)?;
    }
    Ok(())
}

/// The losses of a few steps, and the gradients after them.
fn pipeline(group: &ProcessGroup, device: Device, schedule: Schedule, fixed: bool) -> Result<Vec<Tensor>> {
    const WIDTH: i64 = 6;
    let chunks = if schedule == Schedule::Interleaved { 2 } else { 1 };
    let vs = nn::VarStore::new(device);
    let stage = |chunk: usize| {
        let layer = nn::linear(vs.root() / chunk, WIDTH, WIDTH, Default::default());
        Stage::new(nn::seq().add(layer).add_fn(|x| x.tanh()))
    };
    let stages = (0..chunks).map(stage).collect();
    fill(&vs, group.rank() as f64);
    let micro_batches = 2 * group.size();
    let pipeline = Pipeline::new(stages, micro_batches, schedule, group)?.device(device).fixed_shapes(fixed);
    let mut seen = Vec::new();
    for step in 0..3 {
        let shape = [2 * micro_batches as i64, WIDTH];
        let (x, y) = (wave(&shape, step.into(), device), wave(&shape, 0.5, device));
        let loss = |out: &Tensor, y: &Tensor| out.mse_loss(y, Reduction::Mean);
        seen.extend(pipeline.step(Some(&x), Some(&y), loss)?);
    }
    seen.extend(vs.trainable_variables().iter().map(Tensor::grad));
    Ok(seen)
}

fn pipelines(group: &ProcessGroup, device: Device) -> Result<()> {
    for schedule in [Schedule::GPipe, Schedule::OneFOneB, Schedule::Interleaved] {
        for fixed in [false, true] {
            let there = pipeline(group, device, schedule, fixed)?;
            let here = pipeline(group, Device::Cpu, schedule, fixed)?;
            alike(&format!("{schedule}, shapes fixed: {fixed}"), &there, &here)?;
        }
    }
    Ok(())
}
