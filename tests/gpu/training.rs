//! `DistributedDataParallel` on a GPU: right, overlapped, and what a step costs.

use std::time::Duration;

use tch::nn::{self, Module, ModuleT, OptimizerConfig};
use tch::{Device, Kind, Tensor};
use tch_distributed as dist;

use dist::data_parallel::{DdpOptions, DistributedDataParallel};
use dist::profile::{ProfileOptions, Profiler};
use dist::{ProcessGroup, Result};

use crate::calls::{median, tell};
use crate::checks::{Check, wrong};
use crate::models::{CONTEXT, Gpt, VOCABULARY, cross_entropy};

pub(crate) const ALL: &[Check] = &[
    ("hooks run on autograd's thread of the device, with the group that they hold", 1, hooks),
    ("DDP trains as one process on the CPU does", 1, trains_as_alone),
    ("buckets are exchanged while backward runs: see the trace", 1, overlaps),
];

/// An MLP of the same numbers on every device.
fn mlp(vs: &nn::VarStore, layers: usize, width: i64) -> nn::Sequential {
    let mut net = nn::seq();
    for layer in 0..layers {
        net = net.add(nn::linear(vs.root() / layer, width, width, Default::default())).add_fn(|x| x.tanh());
    }
    tch::no_grad(|| {
        for (index, mut tensor) in vs.trainable_variables().into_iter().enumerate() {
            let (numel, kind) = (tensor.numel() as i64, tensor.kind());
            let numbers = Tensor::arange(numel, (Kind::Double, Device::Cpu)) * 0.7 + index as f64;
            tensor.copy_(&(numbers.sin() / width as f64).to_kind(kind).view(&tensor.size()[..]));
        }
    });
    net
}

fn inputs(step: i64, rows: i64, width: i64, rank: usize, device: Device) -> Tensor {
    let numbers = Tensor::arange(rows * width, (Kind::Double, Device::Cpu)) + (step * 31 + rank as i64 * 7);
    (numbers * 0.37).sin().view([rows, width]).to_device(device)
}

fn hooks(group: &ProcessGroup, device: Device) -> Result<()> {
    let w = Tensor::ones([4], (Kind::Float, device)).set_requires_grad(true);
    let (group, caller) = (group.clone(), std::thread::current().id());
    let (send, received) = std::sync::mpsc::channel();
    let _hook = dist::autograd::on_grad_accumulated(&w, move |w| {
        let mut grad = w.grad();
        group.all_reduce(&mut grad, dist::ReduceOp::Avg)?;
        send.send(std::thread::current().id()).map_err(|e| wrong(e))
    })?;
    dist::autograd::backward(&(&w * 3.0).sum(Kind::Float))?;
    let thread = received.recv_timeout(Duration::from_secs(10)).map_err(|e| wrong(e))?;
    let grad = Vec::<f32>::try_from(&w.grad().to_device(Device::Cpu))?;
    match thread != caller && grad == [3.0; 4] {
        true => Ok(()),
        false => Err(wrong(format_args!("another thread: {}, gradient {grad:?}", thread != caller))),
    }
}

fn trains_as_alone(group: &ProcessGroup, device: Device) -> Result<()> {
    const WIDTH: i64 = 32;
    for view in [false, true] {
        let mut vs = nn::VarStore::new(device);
        let net = mlp(&vs, 3, WIDTH);
        vs.double();
        let options = DdpOptions::new().bucket_cap_mb(0.01).gradient_as_bucket_view(view);
        let ddp = DistributedDataParallel::new(net, &vs, group, options)?;
        let mut optimizer = nn::Adam::default().build(&vs, 0.01)?;
        let mut alone_vs = nn::VarStore::new(Device::Cpu);
        let alone = mlp(&alone_vs, 3, WIDTH);
        alone_vs.double();
        let mut alone_optimizer = nn::Adam::default().build(&alone_vs, 0.01)?;
        for step in 0..10 {
            optimizer.zero_grad();
            let output = ddp.forward(&inputs(step, 8, WIDTH, group.rank(), device))?;
            ddp.backward(&output.square().mean(Kind::Double))?;
            optimizer.step();
            alone_optimizer.zero_grad();
            let all: Vec<Tensor> =
                (0..group.size()).map(|rank| inputs(step, 8, WIDTH, rank, Device::Cpu)).collect();
            alone.forward(&Tensor::cat(&all, 0)).square().mean(Kind::Double).backward();
            alone_optimizer.step();
        }
        let pairs = vs.trainable_variables().into_iter().zip(alone_vs.trainable_variables());
        for (ours, theirs) in pairs {
            let apart = (ours.to_device(Device::Cpu) - &theirs).abs().max().double_value(&[]);
            if apart > 1e-8 {
                return Err(wrong(format_args!("parameters are {apart:e} apart (bucket views: {view})")));
            }
        }
    }
    Ok(())
}

/// The folder where traces go.
fn traces() -> std::path::PathBuf {
    std::env::var_os("GPU_TRACES").map_or_else(std::env::temp_dir, Into::into)
}

/// Communication of a step, from its profile, that did not lengthen it. At world size 1 there is little of it.
fn overlaps(group: &ProcessGroup, device: Device) -> Result<()> {
    let vs = nn::VarStore::new(device);
    let net = mlp(&vs, 24, 2048);
    let ddp = DistributedDataParallel::new(net, &vs, group, DdpOptions::new())?;
    let input = inputs(0, 512, 2048, group.rank(), device).to_kind(Kind::Float);
    let step = || ddp.backward(&ddp.forward(&input)?.square().mean(Kind::Float));
    for _ in 0..3 {
        step()?;
    }
    let file = traces().join(format!("ddp-{}-ranks.json", group.size()));
    let options = ProfileOptions::new().enabled(true).trace_file(&file);
    let profiler = Profiler::new(group, options)?;
    for _ in 0..5 {
        profiler.step(&step)?;
    }
    if let Some(report) = profiler.finish()?
        && group.rank() == 0
    {
        println!("{report}\ntrace: {}", file.display());
    }
    Ok(())
}

/// Microseconds a step of each model, alone and data parallel.
pub(crate) fn time(group: &ProcessGroup, device: Device) -> Result<()> {
    resnet(group, device)?;
    gpt(group, device)
}

fn resnet(group: &ProcessGroup, device: Device) -> Result<()> {
    let images = Tensor::randn([32, 3, 224, 224], (Kind::Float, device));
    let labels = Tensor::randint(1000, [32], (Kind::Int64, device));
    {
        let vs = nn::VarStore::new(device);
        let net = tch::vision::resnet::resnet50(&vs.root(), 1000);
        let mut optimizer = nn::Sgd::default().build(&vs, 1e-3)?;
        let us = median(device, 5, || {
            optimizer.zero_grad();
            dist::autograd::backward(&cross_entropy(&net.forward_t(&images, true), &labels))?;
            optimizer.step();
            Ok(())
        })?;
        tell("ResNet-50 step, alone", us);
    }
    let vs = nn::VarStore::new(device);
    let net = tch::vision::resnet::resnet50(&vs.root(), 1000);
    let ddp = DistributedDataParallel::new(net, &vs, group, DdpOptions::new())?;
    let mut optimizer = nn::Sgd::default().build(&vs, 1e-3)?;
    let us = median(device, 5, || {
        optimizer.zero_grad();
        ddp.backward(&cross_entropy(&ddp.forward_t(&images, true)?, &labels))?;
        optimizer.step();
        Ok(())
    })?;
    tell("ResNet-50 step, DDP", us);
    Ok(())
}

fn gpt(group: &ProcessGroup, device: Device) -> Result<()> {
    let tokens = Tensor::randint(VOCABULARY, [4, CONTEXT], (Kind::Int64, device));
    let targets = Tensor::randint(VOCABULARY, [4, CONTEXT], (Kind::Int64, device));
    {
        let vs = nn::VarStore::new(device);
        let net = Gpt::new(&vs.root());
        let mut optimizer = nn::Sgd::default().build(&vs, 1e-3)?;
        let us = median(device, 5, || {
            optimizer.zero_grad();
            dist::autograd::backward(&cross_entropy(&net.forward(&tokens), &targets))?;
            optimizer.step();
            Ok(())
        })?;
        tell("GPT-2 small step, alone", us);
    }
    let vs = nn::VarStore::new(device);
    let ddp = DistributedDataParallel::new(Gpt::new(&vs.root()), &vs, group, DdpOptions::new())?;
    let mut optimizer = nn::Sgd::default().build(&vs, 1e-3)?;
    let us = median(device, 5, || {
        optimizer.zero_grad();
        ddp.backward(&cross_entropy(&ddp.forward(&tokens)?, &targets))?;
        optimizer.step();
        Ok(())
    })?;
    tell("GPT-2 small step, DDP", us);
    Ok(())
}
