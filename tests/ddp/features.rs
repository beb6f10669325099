//! Frozen and ignored parameters, accumulation, kinds.

use tch::nn::{self, ModuleT};
use tch::{Device, Kind, Tensor};
use tch_distributed as dist;

use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::{Net, batch, flat, scalar, set, values, within};

#[test]
fn frozen_parameters_are_broadcast_and_ignored_ones_left_alone() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let rank = group.rank() as f64;
            let make = |name: &str| {
                let tensor = vs.root().ones(name, &[2]);
                set(&tensor, rank + 1.0);
                tensor
            };
            let (trained, frozen, ignored) = (make("trained"), make("frozen"), make("ignored"));
            let _ = frozen.set_requires_grad(false);
            let ddp =
                DistributedDataParallel::new((), &vs, &group, DdpOptions::new().ignore(["ignored"])).unwrap();
            assert_eq!((flat(&trained), flat(&frozen)), (vec![1.0; 2], vec![1.0; 2]));
            assert_eq!(flat(&ignored), [rank + 1.0; 2]);
            let loss =
                ddp.forward_with(|()| ((&trained + &frozen + &ignored) * rank).sum(Kind::Float)).unwrap();
            ddp.backward(&loss).unwrap();
            assert_eq!(flat(&trained.grad()), [0.5; 2]);
            assert_eq!(flat(&ignored.grad()), [rank; 2]);
            assert!(!frozen.grad().defined());
            // What is unfrozen later would not be averaged.
            let _ = frozen.set_requires_grad(true);
            let error = ddp.forward_with(|()| ()).unwrap_err().to_string();
            assert!(error.contains("frozen"), "{error}");
        });
    });
}

#[test]
fn no_sync_accumulates_and_the_next_backward_averages_the_total() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let weight = vs.root().ones("weight", &[1]);
            let ddp = DistributedDataParallel::new((), &vs, &group, DdpOptions::new()).unwrap();
            let rank = group.rank() as f64;
            let forward = |factor: f64| ddp.forward_with(|()| (&weight * factor).sum(Kind::Float));
            ddp.backward(&forward(1.0 + rank).unwrap()).unwrap();
            assert_eq!(scalar(&weight.grad()), 1.5);
            // PyTorch: [1.5], then 1 and 2 more without exchange, then 1 and 2 with it: 4.5 on both.
            ddp.no_sync(|| ddp.backward(&forward(1.0 + rank)?)).unwrap();
            assert_eq!(scalar(&weight.grad()), 2.5 + rank);
            ddp.backward(&forward(1.0 + rank).unwrap()).unwrap();
            assert_eq!(scalar(&weight.grad()), 4.5);
            // A forward inside counts, as in PyTorch, and so does plain backward.
            let loss = ddp.no_sync(|| forward(rank)).unwrap();
            loss.backward();
            assert_eq!(scalar(&weight.grad()), 4.5 + rank);
            // An error inside does not leave it on.
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                ddp.no_sync(|| std::panic::resume_unwind(Box::new("out")))
            }));
            assert!(caught.is_err());
            ddp.backward(&forward(0.0).unwrap()).unwrap();
            assert_eq!(scalar(&weight.grad()), 5.0);
        });
    });
}

#[test]
fn the_last_forward_in_training_decides_whether_a_backward_is_averaged() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let weight = vs.root().ones("weight", &[1]);
            let ddp = DistributedDataParallel::new((), &vs, &group, DdpOptions::new()).unwrap();
            let rank = group.rank() as f64;
            let forward = || ddp.forward_with(|()| (&weight * rank).sum(Kind::Float)).unwrap();
            let outside = forward();
            let inside = ddp.no_sync(forward);
            ddp.backward(&outside).unwrap();
            ddp.backward(&inside).unwrap();
            assert_eq!(scalar(&weight.grad()), 2.0 * rank);
            // An evaluation between changes nothing.
            let last = forward();
            let _ = ddp.no_sync(|| tch::no_grad(forward));
            ddp.backward(&last).unwrap();
            assert_eq!(scalar(&weight.grad()), 1.5);
        });
    });
}

#[test]
fn two_forwards_before_their_backwards_are_both_averaged() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let weight = vs.root().ones("weight", &[1]);
            let ddp = DistributedDataParallel::new((), &vs, &group, DdpOptions::new()).unwrap();
            let forward = |factor: f64| ddp.forward_with(|()| (&weight * factor).sum(Kind::Float)).unwrap();
            let (first, second) = (forward(group.rank() as f64), forward(2.0 * group.rank() as f64));
            ddp.backward(&first).unwrap();
            ddp.backward(&second).unwrap();
            assert_eq!(scalar(&weight.grad()), 1.5);
        });
    });
}

#[test]
fn parameters_of_several_kinds_are_averaged_each_in_its_own() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let kinds =
                [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half, Kind::ComplexFloat, Kind::Float];
            let tensors: Vec<Tensor> = kinds
                .iter()
                .enumerate()
                .map(|(index, &kind)| {
                    let tensor = Tensor::ones([2], (kind, Device::Cpu)).set_requires_grad(true);
                    vs.root().add(&format!("p{index}"), tensor, true)
                })
                .collect();
            let ddp = DistributedDataParallel::new((), &vs, &group, DdpOptions::new()).unwrap();
            for _ in 0..2 {
                let loss = ddp.forward_with(|()| {
                    let real = |t: &Tensor| {
                        if t.kind() == Kind::ComplexFloat { t.real() } else { t.shallow_clone() }
                    };
                    let sums = tensors.iter().map(|t| real(t).to_kind(Kind::Double).sum(Kind::Double));
                    sums.fold(Tensor::from(0.0), |a, b| a + b) * (group.rank() as f64 + 1.0)
                });
                ddp.backward(&loss.unwrap()).unwrap();
                for tensor in &tensors {
                    let mut gradient = tensor.grad();
                    assert_eq!(gradient.kind(), tensor.kind());
                    assert_eq!(
                        scalar(&if gradient.is_complex() {
                            gradient.real()
                        } else {
                            gradient.shallow_clone()
                        }),
                        3.0
                    );
                    let _ = gradient.zero_();
                }
            }
        });
    });
}

#[test]
fn a_model_taken_back_is_not_exchanged_any_more() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let net = Net::new(&vs);
            let ddp = DistributedDataParallel::new(net, &vs, &group, DdpOptions::new()).unwrap();
            let before = values(&vs);
            let net = ddp.into_inner();
            assert_eq!(values(&vs), before);
            let output = net.forward_t(&batch(0, 4, Kind::Float).0, true).sum(Kind::Float);
            (output * (group.rank() as f64)).backward();
            assert_eq!(flat(&net.last.bs.as_ref().unwrap().grad()), [4.0 * group.rank() as f64; 3]);
        });
    });
}
