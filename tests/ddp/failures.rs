//! A step that goes wrong on one rank goes wrong on all, and calls that make no sense are refused.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use tch::{Device, Kind, Tensor, nn};
use tch_distributed as dist;

use dist::Error;
use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::{flat, scalar, within};

type Model = DistributedDataParallel<[Tensor; 3]>;

fn model(group: &dist::ProcessGroup, options: DdpOptions) -> Model {
    let vs = nn::VarStore::new(Device::Cpu);
    let weights = ["a", "b", "c"].map(|name| vs.root().ones(name, &[2]));
    DistributedDataParallel::new(weights, &vs, group, options).unwrap()
}

/// Every gradient is `factor`.
fn step(ddp: &Model, factor: f64) -> dist::Result<()> {
    ddp.backward(
        &ddp.forward_with(|weights| weights.iter().map(|w| w.sum(Kind::Float)).sum::<Tensor>() * factor)?,
    )
}

/// A step works, on every rank.
fn recovers(ddp: &Model, group: &dist::ProcessGroup) {
    for weight in ddp.module() {
        dist::autograd::set_grad(&mut weight.shallow_clone(), None).unwrap();
    }
    step(ddp, group.rank() as f64).unwrap();
    let mean = (group.size() - 1) as f64 / 2.0;
    ddp.module().iter().for_each(|weight| assert_eq!(flat(&weight.grad()), [mean; 2]));
}

/// Steps in which a hook on one weight, called when our own was, fails on rank 1.
fn fails_on_rank_1(options: &DdpOptions, error: impl Fn() -> Error + Clone + Send + Sync + 'static) {
    dist::testing::run_threads(3, |group| {
        let ddp = model(&group, options.clone());
        for weight in ddp.module() {
            recovers(&ddp, &group);
            let error = error.clone();
            let hook = (group.rank() == 1)
                .then(|| dist::autograd::on_grad_accumulated(weight, move |_| Err(error())).unwrap());
            let text = step(&ddp, 1.0).unwrap_err().to_string();
            drop(hook);
            assert!(text.contains("no more paper"), "{text}");
            assert_eq!(text.contains("backward failed on rank 1"), group.rank() != 1, "{text}");
        }
        recovers(&ddp, &group);
    });
}

#[test]
fn a_failure_behind_the_last_gradient_is_an_error_on_every_rank_too() {
    within(60, || {
        let small = DdpOptions::new().bucket_cap_mb(0.000001);
        for options in [small.clone(), DdpOptions::new(), small.gradient_as_bucket_view(true)] {
            fails_on_rank_1(&options, || Error::Io(std::io::Error::other("no more paper")));
        }
    });
}

#[test]
fn a_failure_of_another_group_in_backward_ends_the_step_for_all() {
    within(60, || {
        fails_on_rank_1(&DdpOptions::new(), || Error::PeerLost {
            rank: 2,
            op: "an all_reduce of tensor parallelism (no more paper)".to_owned(),
            source: None,
        });
    });
}

#[test]
fn forward_and_backward_inside_a_backward_are_refused_and_the_step_goes_on() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let ddp = model(&group, DdpOptions::new());
            let loss = |factor: f64| {
                ddp.forward_with(|weights| {
                    weights.iter().map(|w| w.sum(Kind::Float)).sum::<Tensor>() * factor
                })
            };
            let hidden = loss(group.rank() as f64).unwrap();
            let weights = ddp.module().each_ref().map(Tensor::shallow_clone);
            let shared = Arc::new(Mutex::new(ddp));
            let (tell, told) = channel();
            let inner = shared.clone();
            let _hook = dist::autograd::on_grad(&hidden, move |_| {
                let ddp = inner.lock().unwrap();
                let other = Tensor::from(1.0).set_requires_grad(true) * 2.0;
                tell.send(ddp.forward_with(|_| ()).unwrap_err()).unwrap();
                tell.send(ddp.backward(&other).unwrap_err()).unwrap();
                Ok(None)
            })
            .unwrap();
            (&hidden * 1.0).f_backward().unwrap();
            let errors: Vec<Error> = told.try_iter().collect();
            assert_eq!(errors.len(), 2);
            for error in errors {
                assert!(matches!(&error, Error::InvalidArgument { .. }), "{error}");
                assert!(error.to_string().contains("inside a backward"), "{error}");
            }
            weights.iter().for_each(|weight| assert_eq!(scalar(&weight.grad()), 1.0));
        });
    });
}
