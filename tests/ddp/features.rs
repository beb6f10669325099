//! Buffers, frozen and ignored parameters, accumulation, kinds, communication hooks.

use tch::nn::{self, ModuleT};
use tch::{Device, Kind, Tensor};
use tch_distributed as dist;

use dist::data_parallel::hooks::{Bf16Compress, CommHook, Exchange, Fp16Compress, GradBucket};
use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::{Net, batch, fill, flat, scalar, values, within};

fn set(tensor: &Tensor, value: f64) {
    tch::no_grad(|| drop(tensor.shallow_clone().fill_(value)));
}

#[test]
fn buffers_come_from_rank_0_at_the_start_and_before_every_forward_in_training() {
    within(60, || {
        dist::testing::run_threads(3, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let norm = nn::batch_norm1d(vs.root() / "norm", 2, Default::default());
            let counter = Tensor::from_slice(&[group.rank() as i64]);
            let counter = vs.root().add("counter", counter, false);
            let rank = group.rank() as f64;
            set(&norm.running_mean, rank + 7.0);
            let ddp = DistributedDataParallel::new(norm, &vs, &group, DdpOptions::new()).unwrap();
            assert_eq!(flat(&ddp.module().running_mean), [7.0; 2]);
            assert_eq!(flat(&counter), [0.0]);
            set(&ddp.module().running_mean, rank + 3.0);
            set(&counter, rank + 5.0);
            let seen = ddp.forward_with(|norm| flat(&norm.running_mean)).unwrap();
            assert_eq!((seen, flat(&counter)), (vec![3.0; 2], vec![5.0]));
            // Training goes on: every rank updates the running mean with data of its own.
            let input = Tensor::ones([4, 2], (Kind::Float, Device::Cpu)) * rank;
            for _ in 0..2 {
                ddp.backward(&ddp.forward_t(&input, true).unwrap().square().sum(Kind::Float)).unwrap();
            }
            // An evaluation on rank 0 alone, without gradients, waits for nobody after the first.
            let _ = tch::no_grad(|| ddp.forward_t(&input, false)).unwrap();
            if group.rank() == 0 {
                let _ = tch::no_grad(|| ddp.forward_t(&input, false)).unwrap();
            }
        });
    });
}

#[test]
fn buffers_may_be_left_to_each_rank() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let norm = nn::batch_norm1d(vs.root() / "norm", 2, Default::default());
            let options = DdpOptions::new().broadcast_buffers(false);
            let ddp = DistributedDataParallel::new(norm, &vs, &group, options).unwrap();
            let rank = group.rank() as f64;
            set(&ddp.module().running_mean, rank);
            assert_eq!(ddp.forward_with(|norm| flat(&norm.running_mean)).unwrap(), [rank; 2]);
        });
    });
}

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

/// The gradients of one step under a hook.
fn gradients(hook: Option<impl CommHook + Clone + Sync>, options: DdpOptions) -> Vec<Vec<Vec<f64>>> {
    dist::testing::run_threads(2, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let net = Net::new(&vs);
        fill(&vs, 1.0);
        let ddp = DistributedDataParallel::new(net, &vs, &group, options.clone()).unwrap();
        if let Some(hook) = hook.clone() {
            ddp.set_comm_hook(hook).unwrap();
        }
        let (input, target) = batch(group.rank(), 8, Kind::Float);
        ddp.backward(&(ddp.forward(&input).unwrap() - target).square().mean(Kind::Float)).unwrap();
        vs.trainable_variables().iter().map(|p| flat(&p.grad())).collect()
    })
}

#[test]
fn compressed_gradients_are_near_the_exact_ones_and_the_same_on_every_rank() {
    within(60, || {
        for options in [DdpOptions::new(), DdpOptions::new().gradient_as_bucket_view(true)] {
            let exact = gradients(None::<Fp16Compress>, options.clone());
            for (found, tolerance) in [
                (gradients(Some(Fp16Compress), options.clone()), 1e-3),
                (gradients(Some(Bf16Compress), options.clone()), 8e-3),
            ] {
                assert_eq!(found[0], found[1]);
                assert_ne!(found[0], exact[0]);
                for (found, exact) in found[0].iter().zip(&exact[0]) {
                    let largest = exact.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                    let near = |(a, b): (&f64, &f64)| (a - b).abs() <= tolerance * largest;
                    assert!(found.iter().zip(exact).all(near), "{found:?} {exact:?}");
                }
            }
        }
    });
}

#[test]
fn a_hook_of_ones_own_sees_every_bucket_in_order_and_decides_what_becomes_of_it() {
    within(60, || {
        let seen = dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let net = Net::new(&vs);
            let options = DdpOptions::new().bucket_cap_mb(0.00001);
            let ddp = DistributedDataParallel::new(net, &vs, &group, options).unwrap();
            let (tell, told) = std::sync::mpsc::channel();
            let sum = move |bucket: GradBucket, group: &dist::ProcessGroup| {
                assert_eq!(bucket.gradients().len(), bucket.parameters().len());
                tell.send((bucket.index(), bucket.names().join(","), bucket.is_last())).unwrap();
                let work = group.all_reduce_coalesced_async(bucket.gradients(), dist::ReduceOp::Sum)?;
                Ok(Exchange::from(work))
            };
            ddp.set_comm_hook(sum).unwrap();
            let output = ddp.forward(&batch(0, 4, Kind::Float).0).unwrap();
            ddp.backward(&(output.sum(Kind::Float) * (group.rank() as f64 + 1.0))).unwrap();
            // d(sum of outputs)/d(last bias) is the number of rows: 4, and 8 on rank 1.
            assert_eq!(flat(&ddp.module().last.bs.as_ref().unwrap().grad()), [12.0; 3]);
            drop(ddp);
            told.iter().collect::<Vec<_>>()
        });
        assert_eq!(seen[0], seen[1]);
        assert_eq!(seen[0].len(), 6);
        assert!(seen[0].iter().enumerate().all(|(i, (index, _, last))| i == *index && *last == (i == 5)));
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
