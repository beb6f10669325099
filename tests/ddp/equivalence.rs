//! N ranks with batches of B/N train as one process with batches of B.

use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Tensor};
use tch_distributed as dist;

use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::{Net, assert_close, batch, fill, values, within};

const STEPS: usize = 20;
const ROWS: i64 = 24;

type Trace = Vec<Vec<(String, Vec<f64>)>>;

fn store(kind: Kind) -> (nn::VarStore, Net) {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let net = Net::new(&vs);
    if kind == Kind::Double {
        vs.double();
    }
    (vs, net)
}

fn loss(output: &Tensor, target: &Tensor) -> Tensor {
    (output - target).square().mean(target.kind())
}

/// One process, the whole batch: the parameters after every step.
fn alone(kind: Kind) -> Trace {
    let (vs, net) = store(kind);
    fill(&vs, 0.0);
    let mut optimizer = nn::sgd(0.9, 0.0, 0.0, false).build(&vs, 0.05).unwrap();
    let step = |step| {
        let (input, target) = batch(step, ROWS, kind);
        optimizer.backward_step(&loss(&input.apply(&net), &target));
        values(&vs)
    };
    (0..STEPS).map(step).collect()
}

/// This rank's share of the same.
pub(crate) fn as_rank(group: &dist::ProcessGroup, kind: Kind, options: DdpOptions) -> dist::Result<Trace> {
    let (vs, net) = store(kind);
    fill(&vs, group.rank() as f64); // what rank 0 has must win
    let ddp = DistributedDataParallel::new(net, &vs, group, options)?;
    let mut optimizer = nn::sgd(0.9, 0.0, 0.0, false).build(&vs, 0.05)?;
    let rows = ROWS / group.size() as i64;
    (0..STEPS)
        .map(|step| {
            let (input, target) = batch(step, ROWS, kind);
            let mine = |t: &Tensor| t.narrow(0, rows * group.rank() as i64, rows);
            optimizer.zero_grad();
            ddp.backward(&loss(&ddp.forward(&mine(&input))?, &mine(&target)))?;
            optimizer.step();
            Ok(values(&vs))
        })
        .collect()
}

/// What the ranks did against what one process does.
pub(crate) fn compare(ranks: &[Trace], kind: Kind, what: &str) {
    let tolerance = if kind == Kind::Double { 1e-10 } else { 1e-5 };
    let reference = alone(kind);
    for (step, expected) in reference.iter().enumerate() {
        for trace in ranks {
            assert_eq!(trace[step], ranks[0][step], "{what}: ranks differ in step {step}");
        }
        assert_close(&ranks[0][step], expected, tolerance, &format!("{what}, step {step}"));
    }
    assert_ne!(reference[0], reference[STEPS - 1]);
}

fn in_threads(ranks: usize, kind: Kind, options: DdpOptions) {
    let what = format!("{ranks} ranks, {kind:?}, {options:?}");
    let traces = dist::testing::run_threads(ranks, |group| as_rank(&group, kind, options.clone()).unwrap());
    compare(&traces, kind, &what);
}

#[test]
fn one_to_four_ranks_train_as_one_process_does_in_f32() {
    within(100, || (1..=4).for_each(|ranks| in_threads(ranks, Kind::Float, DdpOptions::new())));
}

#[test]
fn one_to_four_ranks_train_as_one_process_does_in_f64() {
    within(100, || (1..=4).for_each(|ranks| in_threads(ranks, Kind::Double, DdpOptions::new())));
}

#[test]
fn so_they_do_with_many_small_buckets() {
    let options = DdpOptions::new().bucket_cap_mb(0.0005).first_bucket_mb(0.0001);
    within(100, || in_threads(3, Kind::Float, options));
}

#[test]
fn so_they_do_with_gradients_in_flat_buffers() {
    let options = DdpOptions::new().gradient_as_bucket_view(true).bucket_cap_mb(0.0005);
    within(100, || in_threads(3, Kind::Float, options));
}

#[test]
fn so_they_do_with_a_static_graph() {
    let options = DdpOptions::new().static_graph(true).bucket_cap_mb(0.0005);
    within(100, || in_threads(3, Kind::Double, options));
}

#[test]
fn so_they_do_when_unused_parameters_are_looked_for_and_there_are_none() {
    let options = DdpOptions::new().find_unused_parameters(true).bucket_cap_mb(0.0005);
    within(100, || in_threads(2, Kind::Double, options));
}

#[test]
fn plain_backward_of_tch_is_exchanged_too() {
    within(100, || {
        let gradients = dist::testing::run_threads(2, |group| {
            let (vs, net) = store(Kind::Float);
            let ddp = DistributedDataParallel::new(net, &vs, &group, DdpOptions::new()).unwrap();
            let (input, target) = batch(group.rank(), 4, Kind::Float);
            loss(&ddp.forward(&input).unwrap(), &target).backward();
            crate::support::flat(&ddp.module().first.ws.grad())
        });
        assert_eq!(gradients[0], gradients[1]);
        assert!(gradients[0].iter().any(|g| *g != 0.0));
    });
}
