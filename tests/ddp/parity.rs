//! The same initial weights and batches through PyTorch's DistributedDataParallel and through ours end in the same
//! parameters. `tests/fixtures/parity.py` ran PyTorch and wrote the files.

use std::collections::HashMap;
use std::path::Path;

use tch::nn::{self, Module, ModuleT, OptimizerConfig};
use tch::{Device, Kind, Tensor};
use tch_distributed as dist;

use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::within;

const STEPS: i64 = 20;
const RANKS: usize = 2;

/// The same as `Net` in the script, with the same names.
#[derive(Debug)]
struct Net {
    a: nn::Linear,
    norm: nn::BatchNorm,
    b: nn::Linear,
    c: nn::Linear,
}

impl Net {
    fn new(root: &nn::Path) -> Self {
        Self {
            // No bias before the norm: its gradient is rounding alone, which Adam would blow up.
            a: nn::linear(root / "a", 5, 8, nn::LinearConfig { bias: false, ..Default::default() }),
            norm: nn::batch_norm1d(root / "norm", 8, Default::default()),
            b: nn::linear(root / "b", 8, 8, Default::default()),
            c: nn::linear(root / "c", 8, 3, Default::default()),
        }
    }
}

impl ModuleT for Net {
    fn forward_t(&self, input: &Tensor, train: bool) -> Tensor {
        let x = self.norm.forward_t(&self.a.forward(input), train).tanh();
        self.c.forward(&(&x + self.b.forward(&x).tanh()))
    }
}

struct Fixture(HashMap<String, Tensor>);

impl Fixture {
    fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        Self(Tensor::read_safetensors(path).unwrap().into_iter().collect())
    }

    fn of(&self, step: i64, rank: usize, name: &str) -> Tensor {
        self.0[name].get(step).get(rank as i64)
    }
}

fn largest(tensor: &Tensor) -> f64 {
    tensor.abs().max().to_kind(Kind::Double).double_value(&[])
}

/// Trains as the script does; what differs by more than `tolerance`, relative to the largest element.
fn train<C: OptimizerConfig>(
    group: &dist::ProcessGroup,
    file: &str,
    kind: Kind,
    config: C,
    lr: f64,
    tolerance: f64,
) {
    let fixture = Fixture::read(file);
    let rank = group.rank();
    let mut vs = nn::VarStore::new(Device::Cpu);
    let net = Net::new(&vs.root());
    vs.set_kind(kind);
    if rank == 0 {
        tch::no_grad(|| {
            for (name, mut tensor) in vs.variables() {
                tensor.copy_(&fixture.0[&format!("init.{name}")]);
            }
        });
    }
    let options = DdpOptions::new().bucket_cap_mb(0.0005);
    let model = DistributedDataParallel::new(net, &vs, group, options).unwrap();
    let mut optimizer = config.build(&vs, lr).unwrap();
    for step in 0..STEPS {
        let output = model.forward_t(&fixture.of(step, rank, "inputs"), true).unwrap();
        let loss = (output - fixture.of(step, rank, "targets")).square().mean(kind);
        optimizer.zero_grad();
        model.backward(&loss).unwrap();
        optimizer.step();
        let theirs = fixture.of(step, rank, "losses");
        let apart = largest(&(&loss - &theirs));
        assert!(
            apart <= tolerance * largest(&theirs),
            "{file}, rank {rank}: loss {loss} at step {step}, {theirs}"
        );
    }
    let variables = vs.variables();
    let finals = fixture.0.keys().filter(|name| name.starts_with("final.")).count();
    assert_eq!(variables.len(), finals, "{file} has as many tensors as the model");
    for (name, tensor) in &variables {
        // Between its broadcasts each rank has statistics of its own batch.
        if rank != 0 && name.contains("running") {
            continue;
        }
        let theirs = &fixture.0[&format!("final.{name}")];
        assert_eq!(tensor.kind(), kind);
        let (apart, most) = (largest(&(tensor - theirs)), largest(theirs));
        assert!(apart <= tolerance * most, "{file}, rank {rank}: {name} is {apart:e} apart, of {most:e}");
        let moved = largest(&(theirs - &fixture.0[&format!("init.{name}")]));
        assert!(moved > 1e-3 * most, "{file}: {name} was not trained");
    }
}

#[test]
fn twenty_steps_of_sgd_with_momentum_in_f32_end_where_pytorchs_ddp_ends() {
    within(60, || {
        dist::testing::run_threads(RANKS, |group| {
            let config = nn::Sgd { momentum: 0.9, wd: 1e-3, ..Default::default() };
            train(&group, "parity_sgd_f32.safetensors", Kind::Float, config, 0.05, 1e-5);
        });
    });
}

#[test]
fn twenty_steps_of_adam_in_f64_end_where_pytorchs_ddp_ends() {
    within(60, || {
        dist::testing::run_threads(RANKS, |group| {
            train(&group, "parity_adam_f64.safetensors", Kind::Double, nn::Adam::default(), 0.01, 1e-10);
        });
    });
}
