//! Models that are on several ranks, with tensors on a device: what they give is what they give on the CPU.

use tch::nn;
use tch::{Device, Kind, Reduction, Tensor};
use tch_distributed as dist;

use dist::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use dist::{ProcessGroup, Result};

use crate::checks::{Check, expect};

pub(crate) const ALL: &[Check] =
    &[("pipelines give the losses and gradients that they give on the CPU", 2, pipelines)];

const WIDTH: i64 = 6;

/// Layers of the same numbers on every device, by their place in the model.
fn stage(vs: &nn::VarStore, place: usize) -> Stage {
    let layer = nn::linear(vs.root() / place, WIDTH, WIDTH, Default::default());
    tch::no_grad(|| {
        for (i, mut t) in
            [layer.ws.shallow_clone(), layer.bs.as_ref().unwrap().shallow_clone()].into_iter().enumerate()
        {
            let numel = t.numel() as i64;
            let numbers = Tensor::arange(numel, (Kind::Double, Device::Cpu)) * 0.7 + (place * 10 + i) as f64;
            t.copy_(&numbers.sin().view(&t.size()[..]).to_kind(t.kind()));
        }
    });
    Stage::new(nn::seq().add(layer).add_fn(|x| x.tanh()))
}

/// The losses of a few steps, and the gradients after them.
fn run(group: &ProcessGroup, device: Device, schedule: Schedule, fixed: bool) -> Result<Vec<Tensor>> {
    let chunks = if schedule == Schedule::Interleaved { 2 } else { 1 };
    let vs = nn::VarStore::new(device);
    let stages = (0..chunks).map(|c| stage(&vs, c * group.size() + group.rank())).collect();
    let micro_batches = 2 * group.size();
    let pipeline = Pipeline::new(stages, micro_batches, schedule, group)?.device(device).fixed_shapes(fixed);
    let mut seen = Vec::new();
    for step in 0..3 {
        let rows = 2 * micro_batches as i64;
        let numbers = Tensor::arange(rows * WIDTH, (Kind::Double, Device::Cpu)) + step as f64;
        let (x, y) = ((&numbers * 0.3).sin(), (&numbers * 0.9).cos());
        let on = |t: Tensor| t.view([rows, WIDTH]).to_kind(Kind::Float).to_device(device);
        let (x, y) = (on(x), on(y));
        let loss =
            pipeline.step(Some(&x), Some(&y), |out: &Tensor, y: &Tensor| out.mse_loss(y, Reduction::Mean))?;
        seen.extend(loss);
    }
    seen.extend(vs.trainable_variables().iter().map(Tensor::grad));
    Ok(seen)
}

fn pipelines(group: &ProcessGroup, device: Device) -> Result<()> {
    for schedule in [Schedule::GPipe, Schedule::OneFOneB, Schedule::Interleaved] {
        for fixed in [false, true] {
            let there = run(group, device, schedule, fixed)?;
            let here = run(group, Device::Cpu, schedule, fixed)?;
            for (there, here) in there.iter().zip(&here) {
                // What a device adds in another order differs in the last digits.
                let apart = (there.to_device(Device::Cpu) - here).abs().max();
                let what = format!("{schedule}, shapes fixed: {fixed}: further apart than 1e-5");
                expect(&what, &apart.gt(1e-5), &Tensor::from(false))?;
            }
        }
    }
    Ok(())
}
