//! Gradients and parameters that lie in memory in unusual ways.

use std::time::Duration;

use tch::{Device, Kind, Tensor, nn};
use tch_distributed as dist;

use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::{flat, numbers, within};

/// One bucket a parameter; all in one; flat buffers; the two ways to leave parameters out.
fn all_options() -> [DdpOptions; 5] {
    let small = DdpOptions::new().bucket_cap_mb(0.000001);
    [
        small.clone(),
        DdpOptions::new(),
        small.clone().gradient_as_bucket_view(true),
        small.clone().find_unused_parameters(true),
        small.static_graph(true),
    ]
}

/// Numbers of a shape that a gradient is wanted for, under this name.
fn parameter(root: &nn::Path, name: &str, shape: &[i64]) -> Tensor {
    let count = shape.iter().product();
    let values = numbers(count, name.len() as f64).view(shape).to_kind(Kind::Double);
    root.add(name, values.set_requires_grad(true), true)
}

/// A function that makes parameters.
fn with<F: Fn(&nn::Path) -> Vec<Tensor> + Send + Sync>(build: F) -> F {
    build
}

/// Two ranks that average what `loss` gives for each in three steps have the gradients that one process
/// has for the mean of the two losses.
fn check(
    build: impl Fn(&nn::Path) -> Vec<Tensor> + Send + Sync,
    loss: impl Fn(&[Tensor], usize) -> Tensor + Send + Sync,
) {
    let vs = nn::VarStore::new(Device::Cpu);
    let parameters = build(&vs.root());
    let mut expected: Vec<Vec<f64>> = parameters.iter().map(|p| vec![0.0; p.numel()]).collect();
    for rank in 0..2 {
        let gradients = Tensor::run_backward(&[loss(&parameters, rank)], &parameters, false, false);
        for (sum, gradient) in expected.iter_mut().zip(gradients) {
            sum.iter_mut().zip(flat(&gradient)).for_each(|(sum, g)| *sum += g / 2.0);
        }
    }
    for options in all_options() {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let parameters = build(&vs.root());
            let ddp = DistributedDataParallel::new((), &vs, &group, options.clone()).unwrap();
            for step in 0..3 {
                for parameter in &parameters {
                    dist::autograd::set_grad(&mut parameter.shallow_clone(), None).unwrap();
                }
                let loss = || ddp.forward_with(|()| loss(&parameters, group.rank())).unwrap();
                // Twice: once into gradients that are not there yet, once on top of them.
                ddp.no_sync(|| ddp.backward(&loss())).unwrap();
                ddp.backward(&loss()).unwrap();
                for (parameter, expected) in parameters.iter().zip(&expected) {
                    for (got, expected) in flat(&parameter.grad()).iter().zip(expected) {
                        let near = (got - 2.0 * expected).abs() < 1e-12;
                        assert!(near, "{options:?}, step {step}: {got} instead of 2 * {expected}");
                    }
                }
                // And without accumulation.
                for parameter in &parameters {
                    dist::autograd::set_grad(&mut parameter.shallow_clone(), None).unwrap();
                }
                ddp.backward(&loss()).unwrap();
                for (parameter, expected) in parameters.iter().zip(&expected) {
                    for (got, expected) in flat(&parameter.grad()).iter().zip(expected) {
                        let near = (got - expected).abs() < 1e-12;
                        assert!(near, "{options:?}, step {step}: {got} instead of {expected}");
                    }
                }
            }
        });
    }
}

#[test]
fn an_average_does_not_write_into_the_gradient_that_still_flows() {
    within(100, || {
        let build = with(|root| vec![parameter(root, "w", &[4, 3]), parameter(root, "position", &[3])]);
        check(build, |parameters, rank| {
            let hidden = numbers(4, rank as f64).view([1, 4]).matmul(&parameters[0]);
            // The position's gradient is there now, and so may its average be before `w` has its own.
            let late = |_: &Tensor| {
                std::thread::sleep(Duration::from_millis(20));
                Ok(None)
            };
            dist::autograd::on_grad(&hidden, late).unwrap().detach();
            (hidden + parameters[1].view([1, 3])).square().sum(Kind::Double)
        });
    });
}

#[test]
fn two_parameters_may_get_one_gradient_through_views() {
    within(100, || {
        let build = with(|root| vec![parameter(root, "a", &[4]), parameter(root, "bb", &[4])]);
        check(build, |parameters, rank| {
            let sum = parameters[0].view([2, 2]).view([4]) + parameters[1].view([4]);
            (sum * numbers(4, rank as f64)).square().sum(Kind::Double)
        });
    });
}

#[test]
fn two_parameters_may_get_parts_of_one_gradient() {
    within(100, || {
        let build = with(|root| vec![parameter(root, "a", &[4]), parameter(root, "bb", &[3])]);
        check(build, |parameters, rank| {
            let all = Tensor::cat(parameters, 0);
            (all * numbers(7, rank as f64)).square().sum(Kind::Double)
        });
    });
}

#[test]
fn a_weight_with_two_names_is_averaged_once() {
    within(100, || {
        let build = with(|root| {
            let embedding = parameter(root, "embedding", &[5, 3]);
            let _ = root.add("head", embedding.shallow_clone(), true);
            vec![embedding, parameter(root, "bias", &[5])]
        });
        check(build, |parameters, rank| {
            let token = Tensor::from_slice(&[rank as i64, 3]);
            let hidden = parameters[0].index_select(0, &token).tanh();
            (hidden.matmul(&parameters[0].tr()) + &parameters[1]).square().sum(Kind::Double)
        });
    });
}

#[test]
fn parameters_without_elements_and_in_channels_last_order_are_averaged() {
    within(100, || {
        let build = with(|root| {
            let plain = numbers(4 * 3 * 3 * 2, 1.0).view([4, 3, 3, 2]);
            let kernel = plain.permute([0, 3, 1, 2]).set_requires_grad(true);
            assert!(!kernel.is_contiguous() && kernel.is_leaf());
            vec![
                parameter(root, "empty", &[0, 3]),
                root.add("kernel", kernel, true),
                parameter(root, "none", &[0]),
                parameter(root, "bias", &[4]),
            ]
        });
        check(build, |parameters, rank| {
            let [empty, kernel, none, bias] = parameters else { unreachable!() };
            let image = numbers(2 * 5 * 5, rank as f64).view([1, 2, 5, 5]);
            let output = image.conv2d(kernel, Some(bias), 1, 0, 1, 1);
            output.square().sum(Kind::Double) + empty.sum(Kind::Double) + none.sum(Kind::Double)
        });
    });
}
