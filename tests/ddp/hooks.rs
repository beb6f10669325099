//! Communication hooks: what they are given, the ones that come with the crate, and those that fail.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor, nn};
use tch_distributed as dist;

use dist::data_parallel::hooks::{Bf16Compress, CommHook, Exchange, Fp16Compress, GradBucket};
use dist::data_parallel::{DdpOptions, DistributedDataParallel};
use dist::{Error, ProcessGroup, ReduceOp};

use crate::support::{Net, batch, fill, flat, within};

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
            let sum = move |bucket: GradBucket, group: &ProcessGroup| {
                assert_eq!(bucket.gradients().len(), bucket.parameters().len());
                tell.send((bucket.index(), bucket.names().join(","), bucket.is_last())).unwrap();
                let work = group.all_reduce_coalesced_async(bucket.gradients(), ReduceOp::Sum)?;
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
fn grad_mode_is_off_in_every_part_of_a_hook_whichever_bucket_and_backward() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let net = Net::new(&vs);
            let options = DdpOptions::new().bucket_cap_mb(0.00001);
            let ddp = DistributedDataParallel::new(net, &vs, &group, options).unwrap();
            let (tell, told) = std::sync::mpsc::channel();
            // What is computed from something that requires a gradient tells whether grad mode is on.
            let records = || (Tensor::from(1.0).set_requires_grad(true) * 2.0).requires_grad();
            let hook = move |bucket: GradBucket, group: &ProcessGroup| {
                tell.send(records()).unwrap();
                let work = group.all_reduce_coalesced_async(bucket.gradients(), ReduceOp::Sum)?;
                let tell = tell.clone();
                Ok(Exchange::new(move || {
                    tell.send(records()).unwrap();
                    work.wait()
                }))
            };
            ddp.set_comm_hook(hook).unwrap();
            for plain in [false, true] {
                let loss = ddp.forward(&batch(0, 4, Kind::Float).0).unwrap().sum(Kind::Float);
                if plain {
                    loss.backward()
                } else {
                    ddp.backward(&loss).unwrap()
                }
                assert!(records(), "left as it was");
                assert_eq!(told.try_iter().collect::<Vec<_>>(), [false; 12]);
            }
        });
    });
}

#[test]
fn compression_leaves_alone_what_is_narrow_already_and_complex_gradients() {
    fn gradients(hook: impl CommHook + Clone + Sync) {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let kinds = [Kind::ComplexFloat, Kind::ComplexDouble, Kind::Half, Kind::BFloat16];
            let ones = |kind| Tensor::ones([2], (kind, Device::Cpu)).set_requires_grad(true);
            let add = |(i, &kind): (usize, &Kind)| vs.root().add(&format!("p{i}"), ones(kind), true);
            let tensors: Vec<Tensor> = kinds.iter().enumerate().map(add).collect();
            let ddp = DistributedDataParallel::new((), &vs, &group, DdpOptions::new()).unwrap();
            ddp.set_comm_hook(hook.clone()).unwrap();
            let rank = group.rank() as f64;
            let parts = |t: &Tensor| if t.is_complex() { t.real() + t.imag() } else { t.shallow_clone() };
            let sum = |t: &Tensor| parts(t).to_kind(Kind::Double).sum(Kind::Double);
            let loss = ddp.forward_with(|()| tensors.iter().map(sum).sum::<Tensor>() * (rank + 1.0)).unwrap();
            ddp.backward(&loss).unwrap();
            for (tensor, kind) in tensors.iter().zip(kinds) {
                let gradient = tensor.grad();
                assert_eq!(gradient.kind(), kind);
                let (real, imaginary) = match gradient.is_complex() {
                    true => (flat(&gradient.real()), flat(&gradient.imag())),
                    false => (flat(&gradient), vec![1.5; 2]),
                };
                assert_eq!((real, imaginary), (vec![1.5; 2], vec![1.5; 2]), "{kind:?}");
            }
        });
    }
    within(60, || {
        gradients(Fp16Compress);
        gradients(Bf16Compress);
    });
}

/// How the hook of rank 1 fails.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Start,
    StartInItsOwnWay,
    StartPanics,
    Finish,
    FinishPanics,
}

/// The average, until a bucket on rank 1.
struct Failing {
    bucket: usize,
    fault: Fault,
}

impl CommHook for Failing {
    fn start(&mut self, bucket: GradBucket, group: &ProcessGroup) -> dist::Result<Exchange> {
        let fault = (group.rank() == 1 && bucket.index() == self.bucket).then_some(self.fault);
        match fault {
            Some(Fault::Start) => return Err(Error::Callback { reason: "out of luck".into() }),
            Some(Fault::StartInItsOwnWay) => {
                return Err(Error::Io(std::io::Error::other("out of luck")));
            }
            Some(Fault::StartPanics) => panic!("out of luck"),
            _ => {}
        }
        let work = group.all_reduce_coalesced_async(bucket.gradients(), ReduceOp::Avg)?;
        Ok(Exchange::new(move || {
            work.wait()?;
            match fault {
                Some(Fault::Finish) => Err(Error::Callback { reason: "out of luck".into() }),
                Some(Fault::FinishPanics) => panic!("out of luck"),
                _ => Ok(()),
            }
        }))
    }
}

#[test]
fn a_hook_that_fails_on_one_rank_ends_the_group_with_its_cause_and_nobody_waits() {
    use Fault::{Finish, FinishPanics, Start, StartInItsOwnWay, StartPanics};
    within(100, || {
        for fault in [Start, StartInItsOwnWay, StartPanics, Finish, FinishPanics] {
            for bucket in [0, 2, 5] {
                let what = format!("{fault:?} in bucket {bucket}");
                let all_well = Barrier::new(3);
                dist::testing::run_threads(3, |group| {
                    let vs = nn::VarStore::new(Device::Cpu);
                    let options = DdpOptions::new().bucket_cap_mb(0.00001);
                    let ddp = DistributedDataParallel::new(Net::new(&vs), &vs, &group, options).unwrap();
                    let step = || {
                        let (input, target) = batch(group.rank(), 4, Kind::Float);
                        ddp.backward(&(ddp.forward(&input)? - target).square().mean(Kind::Float))
                    };
                    step().unwrap();
                    // Not a collective: rank 1 could leave that first, and end the others' with its failure.
                    all_well.wait();
                    ddp.set_comm_hook(Failing { bucket, fault }).unwrap();
                    let begun = Instant::now();
                    let first = step();
                    let own = group.rank() == 1;
                    // Where the exchange itself went well, the others may have ended the step before.
                    if own || !matches!(fault, Finish | FinishPanics) {
                        let text = first.unwrap_err().to_string();
                        assert!(text.contains("out of luck"), "{what}: {text}");
                        assert!(own || text.contains("rank 1"), "{what}: {text}");
                    }
                    let text = step().unwrap_err().to_string();
                    assert!(text.contains("out of luck"), "{what}: {text}");
                    assert!(group.barrier().is_err());
                    assert!(begun.elapsed() < Duration::from_secs(30), "{what}");
                });
            }
        }
    });
}

#[test]
fn a_hook_that_runs_a_backward_through_its_own_model_is_refused() {
    within(60, || {
        let errors = dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let ddp = DistributedDataParallel::new(Net::new(&vs), &vs, &group, DdpOptions::new()).unwrap();
            let nested = |bucket: GradBucket, group: &ProcessGroup| {
                let loss = tch::with_grad(|| bucket.parameters()[0].square().sum(Kind::Float));
                dist::autograd::backward(&loss)?;
                Ok(Exchange::from(group.all_reduce_coalesced_async(bucket.gradients(), ReduceOp::Avg)?))
            };
            ddp.set_comm_hook(nested).unwrap();
            let output = ddp.forward(&batch(0, 4, Kind::Float).0).unwrap();
            ddp.backward(&output.sum(Kind::Float)).unwrap_err().to_string()
        });
        assert!(
            errors.iter().all(|error| error.contains("a communication hook ran a backward")),
            "{errors:?}"
        );
    });
}
