//! What a small call costs, one JSON line each. `beside.py` prints the same of PyTorch.

use std::time::Instant;

use tch::{Cuda, Device, Kind, Tensor};
use tch_distributed as dist;

use dist::{ProcessGroup, ReduceOp, Result};

const ROUNDS: usize = 7;
const CALLS: usize = 2000;

/// The median over rounds of microseconds a call, the device's work included.
pub(crate) fn median(device: Device, calls: usize, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let finished = || {
        if let Device::Cuda(index) = device {
            Cuda::synchronize(index as i64);
        }
    };
    let mut rounds = Vec::new();
    for round in 0..=ROUNDS {
        finished();
        let start = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        finished();
        // The first round warms up.
        if round > 0 {
            rounds.push(start.elapsed().as_secs_f64() * 1e6 / calls as f64);
        }
    }
    rounds.sort_by(f64::total_cmp);
    Ok(rounds[rounds.len() / 2])
}

pub(crate) fn tell(what: &str, microseconds: f64) {
    println!("{{\"what\": \"{what}\", \"us\": {microseconds:.3}}}");
}

pub(crate) fn time(group: &ProcessGroup, device: Device) -> Result<()> {
    let size = group.size() as i64;
    for bytes in [4, 4096, 65_536] {
        let mut t = Tensor::zeros([bytes / 4], (Kind::Float, device));
        let us = median(device, CALLS, || group.all_reduce(&mut t, ReduceOp::Sum))?;
        tell(&format!("all_reduce {bytes} B"), us);
        let us = median(device, CALLS, || group.all_reduce_async(&t, ReduceOp::Sum)?.wait())?;
        tell(&format!("all_reduce {bytes} B, async and wait"), us);
        let mut out = Tensor::zeros([size * bytes / 4], (Kind::Float, device));
        let us = median(device, CALLS, || group.all_gather_into_tensor(&mut out, &t))?;
        tell(&format!("all_gather_into_tensor {bytes} B"), us);
        let us = median(device, CALLS, || group.reduce_scatter_tensor(&mut t, &out, ReduceOp::Sum))?;
        tell(&format!("reduce_scatter_tensor {bytes} B"), us);
        let us = median(device, CALLS, || group.broadcast(&mut t, 0))?;
        tell(&format!("broadcast {bytes} B"), us);
    }
    Ok(())
}
