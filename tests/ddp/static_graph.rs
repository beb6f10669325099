//! A graph that is promised to be the same in every step.

use tch::{Device, Kind, Tensor, nn};
use tch_distributed as dist;

use dist::autograd::{Context, Function};
use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::{flat, numbers, within};

/// `tanh(x w)`, which keeps `x` alone and computes the rest again, in a backward of its own.
struct Again {
    weight: Tensor,
}

impl Again {
    fn run(&self, x: &Tensor) -> Tensor {
        x.matmul(&self.weight).tanh()
    }
}

impl Function for Again {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> dist::Result<Vec<Tensor>> {
        ctx.save_for_backward(&[&inputs[0]]);
        Ok(vec![self.run(&inputs[0])])
    }

    fn backward(&mut self, ctx: &Context, grads: &[Option<Tensor>]) -> dist::Result<Vec<Option<Tensor>>> {
        let Some(grad) = &grads[0] else { return Ok(vec![None]) };
        let x = ctx.saved()[0].detach().set_requires_grad(true);
        let y = tch::with_grad(|| self.run(&x));
        dist::autograd::backward_with_grad(&[&y], &[grad])?;
        Ok(vec![Some(x.grad())])
    }
}

#[test]
fn activations_computed_again_in_nested_backwards_give_the_gradients_of_the_plain_model() {
    within(60, || {
        let input = |rank: usize| numbers(6, rank as f64).view([2, 3]).set_requires_grad(true);
        let build = |vs: &nn::VarStore| {
            let make = |name, seed| {
                let values = numbers(9, seed).view([3, 3]).set_requires_grad(true);
                vs.root().add(name, values, true)
            };
            [make("twice", 1.0), make("once", 2.0)]
        };
        let vs = nn::VarStore::new(Device::Cpu);
        let weights = build(&vs);
        for rank in 0..2 {
            let tanh = |x: &Tensor, weight: &Tensor| x.matmul(weight).tanh();
            let output = tanh(&tanh(&tanh(&input(rank), &weights[0]), &weights[1]), &weights[0]);
            (output.square().sum(Kind::Double) / 2.0).backward();
        }
        let expected = weights.map(|weight| flat(&weight.grad()));
        let options = DdpOptions::new().bucket_cap_mb(0.000001);
        for options in [options.clone(), options.gradient_as_bucket_view(true)] {
            dist::testing::run_threads(2, |group| {
                let vs = nn::VarStore::new(Device::Cpu);
                let weights = build(&vs);
                let train = |options: DdpOptions, steps: usize| -> dist::Result<()> {
                    let ddp = DistributedDataParallel::new((), &vs, &group, options)?;
                    for _ in 0..steps {
                        let again = |x: &Tensor, weight: &Tensor| {
                            Again { weight: weight.shallow_clone() }
                                .apply(&[x])
                                .map(|mut outputs| outputs.remove(0))
                        };
                        let output = ddp.forward_with(|()| {
                            again(
                                &again(&again(&input(group.rank()), &weights[0])?, &weights[1])?,
                                &weights[0],
                            )
                        })??;
                        for weight in &weights {
                            dist::autograd::set_grad(&mut weight.shallow_clone(), None)?;
                        }
                        ddp.backward(&output.square().sum(Kind::Double))?;
                        for (weight, expected) in weights.iter().zip(&expected) {
                            for (got, expected) in flat(&weight.grad()).iter().zip(expected) {
                                assert!((got - expected).abs() < 1e-12, "{got} instead of {expected}");
                            }
                        }
                    }
                    Ok(())
                };
                train(options.clone().static_graph(true), 4).unwrap();
                // Without the promise it is an error that says so, on every rank.
                let error = train(options.clone(), 1).unwrap_err().to_string();
                assert!(error.contains("static_graph"), "{error}");
            });
        }
    });
}

#[test]
fn a_first_step_that_uses_nothing_teaches_nothing() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let weight = vs.root().ones("weight", &[2]);
            let options = DdpOptions::new().static_graph(true);
            let ddp = DistributedDataParallel::new((), &vs, &group, options).unwrap();
            let nothing = ddp.forward_with(|()| Tensor::from(1.0f32)).unwrap();
            ddp.backward(&nothing).unwrap();
            assert!(!weight.grad().defined());
            for step in 1..4 {
                let rank = group.rank() as f64;
                let loss = ddp.forward_with(|()| (&weight * rank).sum(Kind::Float)).unwrap();
                ddp.backward(&loss).unwrap();
                assert_eq!(flat(&weight.grad()), [0.5 * f64::from(step); 2]);
            }
        });
    });
}
