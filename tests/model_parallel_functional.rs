//! The differentiable collectives: values, and gradients against finite differences across ranks.

use std::time::Duration;

use tch::{Device, Kind, Tensor, no_grad};
use tch_distributed::autograd::{Context, Function, backward};
use tch_distributed::functional as f;
use tch_distributed::testing::{run_threads, run_threads_on};
use tch_distributed::{Error, InitOptions, ProcessGroup, ReduceOp, Result};

const D: (Kind, Device) = (Kind::Double, Device::Cpu);

/// Values that differ from rank to rank and from element to element, none of them equal or zero.
fn values(shape: &[i64], rank: usize) -> Tensor {
    let n: i64 = shape.iter().product();
    (Tensor::arange(n, D) * 0.7 + 0.9 * rank as f64 + 0.3).sin().reshape(shape) + 1.5
}

/// Weights that make each rank's loss, and each element in it, count differently.
fn loss(y: &Tensor, rank: usize) -> Tensor {
    let n = y.numel() as i64;
    let weights = (Tensor::arange(n, D) * 0.4 + rank as f64 * 1.3).cos().reshape(y.size());
    (y * weights + y.square() * 0.1 * (rank as f64 + 1.0)).sum(Kind::Double)
}

/// The gradient of the sum of all ranks' losses by every rank's input: by autograd, and by finite differences.
fn check(
    group: &ProcessGroup,
    shape_of: impl Fn(usize) -> Vec<i64>,
    function: impl Fn(&Tensor) -> Result<Tensor>,
) {
    let rank = group.rank();
    let x = values(&shape_of(rank), rank).set_requires_grad(true);
    loss(&function(&x).unwrap(), rank).backward();
    let grad = x.grad();

    let total = |x: &Tensor| {
        let mut sum = no_grad(|| loss(&function(x).unwrap(), rank));
        group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
        sum.double_value(&[])
    };
    let (flat, eps) = (x.detach().reshape([-1]), 1e-6);
    for owner in 0..group.size() {
        let elements: i64 = shape_of(owner).iter().product();
        for i in 0..elements {
            let moved = |by: f64| {
                let moved = flat.copy();
                if owner == rank {
                    let _ = moved.get(i).g_add_scalar_(by);
                }
                total(&moved.reshape(x.size()))
            };
            let expected = (moved(eps) - moved(-eps)) / (2.0 * eps);
            if owner == rank {
                let got = grad.reshape([-1]).double_value(&[i]);
                assert!(
                    (got - expected).abs() < 1e-6,
                    "rank {rank}, element {i}: {got}, expected {expected}"
                );
            }
        }
    }
}

#[test]
fn the_gradient_of_all_reduce_is_that_of_the_sum_of_all_losses_for_every_operation() {
    for n in [1, 2, 3] {
        run_threads(n, |group| {
            let factor = 0.5 + group.rank() as f64;
            for op in [
                ReduceOp::Sum,
                ReduceOp::Avg,
                ReduceOp::Product,
                ReduceOp::Min,
                ReduceOp::Max,
                ReduceOp::PremulSum(factor),
            ] {
                check(&group, |_| vec![2, 3], |x| f::all_reduce(x, op, &group));
            }
        });
    }
}

#[test]
fn ranks_that_share_a_maximum_share_its_gradient_and_a_product_with_a_zero_has_one() {
    run_threads(3, |group| {
        let x = Tensor::from_slice(&[1.0, group.rank() as f64]).set_requires_grad(true);
        let y = f::all_reduce(&x, ReduceOp::Max, &group).unwrap();
        y.sum(Kind::Double).backward();
        let share = if group.rank() == 2 { 3.0 } else { 0.0 };
        assert_eq!(Vec::<f64>::try_from(x.grad()).unwrap(), [1.0, share]);

        let x = Tensor::from_slice(&[group.rank() as f64]).set_requires_grad(true);
        f::all_reduce(&x, ReduceOp::Product, &group).unwrap().sum(Kind::Double).backward();
        let others = if group.rank() == 0 { 2.0 } else { 0.0 };
        assert_eq!(Vec::<f64>::try_from(x.grad()).unwrap(), [3.0 * others]);
    });
}

#[test]
fn gathering_and_scattering_are_differentiable_along_any_dimension_and_for_uneven_sizes() {
    for n in [1, 2, 3] {
        run_threads(n, |group| {
            for dim in [0, 1, -1] {
                check(&group, |_| vec![2, 2, 1], |x| f::all_gather(x, dim, &group));
                let uneven = |rank: usize| if dim == 0 { vec![rank as i64 + 1, 2, 1] } else { vec![1, 2, 1] };
                check(&group, uneven, |x| f::all_gather(x, dim, &group));
                check(&group, |_| vec![4, 4, 3], |x| f::reduce_scatter(x, dim, ReduceOp::Sum, &group));
            }
            let factor = 2.0 - group.rank() as f64;
            check(&group, |_| vec![5], |x| f::reduce_scatter(x, 0, ReduceOp::Avg, &group));
            check(&group, |_| vec![5], |x| f::reduce_scatter(x, 0, ReduceOp::PremulSum(factor), &group));
        });
    }
}

#[test]
fn exchanges_are_differentiable() {
    for n in [1, 2, 3] {
        run_threads(n, |group| {
            check(&group, |_| vec![4, 3], |x| f::all_to_all(x, 0, 1, &group));
            check(&group, |_| vec![3, 4], |x| f::all_to_all(x, -1, 0, &group));
            // Sizes may differ along the dimension that is put together.
            check(&group, |rank| vec![4, rank as i64 + 1], |x| f::all_to_all(x, 0, 1, &group));
            check(&group, |rank| vec![rank as i64 + 2], |x| f::all_to_all(x, 0, 0, &group));
            for src in 0..group.size() {
                check(&group, |_| vec![2, 2], |x| f::broadcast(x, src, &group));
            }
        });
    }
}

#[test]
fn what_is_sent_gets_its_gradient_back() {
    run_threads(2, |group| {
        check(
            &group,
            |_| vec![2, 3],
            |x| match group.rank() {
                0 => Ok(f::send(x, 1, 3, &group)? + x.sum(Kind::Double)),
                _ => Ok(f::recv(x, 0, 3, &group)?.sin() * x),
            },
        );
    });
}

/// Ends a test in which a rank waits for another that does not come.
fn for_a_while() -> InitOptions {
    InitOptions::new().timeout(Duration::from_secs(20))
}

#[test]
fn the_gradient_of_what_needs_none_is_taken_by_the_sender_all_the_same() {
    run_threads_on("native", for_a_while(), 2, |group| {
        // Small ones would go at once and be found by the next receive; large ones would wait to be taken.
        for n in [2, 100_000] {
            let like = Tensor::zeros([n], D);
            if group.rank() == 0 {
                let sent = f::send(&like.ones_like(), 1, 3, &group).unwrap();
                assert!(sent.requires_grad());
                backward(&sent).unwrap();
            } else {
                backward(&(f::recv(&like, 0, 3, &group).unwrap() * 5.0).sum(Kind::Double)).unwrap();
            }
            let mut next = Tensor::full([n], 7.0, D);
            match group.rank() {
                0 => drop(group.recv(&mut next, 1, 3).unwrap()),
                _ => group.send(&next, 0, 3).unwrap(),
            }
            assert_eq!(next, Tensor::full([n], 7.0, D), "not the gradient, which is 5");
            // Without gradients on either side nothing comes back.
            let answer = no_grad(|| match group.rank() {
                0 => f::send(&like, 1, 3, &group).unwrap(),
                _ => f::recv(&like, 0, 3, &group).unwrap(),
            });
            assert!(!answer.requires_grad());
        }
    });
}

/// The identity, which gives no gradient back.
struct Silent;

impl Function for Silent {
    fn forward(&mut self, _: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![inputs[0].shallow_clone()])
    }

    fn backward(&mut self, _: &Context, _: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![None])
    }
}

/// The gradients of all ranks through a function whose result gets no gradient on rank 1, and weight 1 elsewhere.
fn silent_on_rank_1(function: impl Fn(&Tensor, &ProcessGroup) -> Result<Tensor> + Sync) -> Vec<Vec<f64>> {
    run_threads_on("native", for_a_while(), 2, |group| {
        let x = Tensor::ones([2], D).set_requires_grad(true);
        let y = function(&x, &group).unwrap();
        let y = if group.rank() == 1 { Silent.apply(&[&y]).unwrap().remove(0) } else { y };
        backward(&(y.sum(Kind::Double) + x.sum(Kind::Double) * 0.0)).unwrap();
        Vec::try_from(x.grad()).unwrap()
    })
}

#[test]
fn a_result_without_a_gradient_on_one_rank_counts_as_zero_there() {
    let found = |gradients: [[f64; 2]; 2]| gradients.map(Vec::from).to_vec();
    let both = found([[1.0; 2]; 2]);
    assert_eq!(silent_on_rank_1(|x, g| f::all_reduce(x, ReduceOp::Sum, g)), both);
    assert_eq!(silent_on_rank_1(|x, g| f::all_gather(x, 0, g)), both);
    assert_eq!(silent_on_rank_1(f::copy_to_group), both);
    let first = found([[1.0, 0.0]; 2]);
    assert_eq!(silent_on_rank_1(|x, g| f::reduce_scatter(x, 0, ReduceOp::Sum, g)), first);
    assert_eq!(silent_on_rank_1(|x, g| f::all_to_all(x, 0, 0, g)), first);
    assert_eq!(silent_on_rank_1(|x, g| f::scatter_to_group(x, 0, g)), first);
    let own = found([[1.0; 2], [0.0; 2]]);
    assert_eq!(silent_on_rank_1(|x, g| f::broadcast(x, 0, g)), own);
    assert_eq!(silent_on_rank_1(f::reduce_from_group), own);
    assert_eq!(silent_on_rank_1(|x, g| f::gather_from_group(x, 0, g)), own);
    // Rank 1 sends zeros back; rank 0's own loss is the zero.
    let sent = |x: &Tensor, g: &ProcessGroup| match g.rank() {
        0 => f::send(x, 1, 0, g),
        _ => f::recv(x, 0, 0, g),
    };
    assert_eq!(silent_on_rank_1(sent), found([[0.0; 2]; 2]));
}

#[test]
fn what_is_copied_to_the_group_cannot_be_changed_behind_the_back_of_its_original() {
    run_threads(1, |group| {
        let x = Tensor::from_slice(&[-3.0, 2.0]).set_requires_grad(true);
        let h = &x + 1.0;
        let mut y = f::copy_to_group(&h, &group).unwrap();
        let error = y.f_relu_().unwrap_err().to_string();
        assert!(error.contains("inplace"), "{error}");
        assert_eq!(Vec::<f64>::try_from(&h).unwrap(), [-2.0, 3.0]);
        // Nor does a change of the original go unseen.
        let mut h = &x * 1.0;
        let loss = f::copy_to_group(&h, &group).unwrap().square().sum(Kind::Double);
        let _ = h.f_add_scalar_(1.0).unwrap();
        let error = backward(&loss).unwrap_err().to_string();
        assert!(error.contains("inplace"), "{error}");
    });
}

#[test]
fn an_undefined_tensor_is_refused_by_every_function_before_anything_is_sent() {
    run_threads(2, |group| {
        let (none, g) = (Tensor::new(), &group);
        let results = [
            f::all_reduce(&none, ReduceOp::Sum, g),
            f::all_gather(&none, 0, g),
            f::reduce_scatter(&none, 0, ReduceOp::Sum, g),
            f::all_to_all(&none, 0, 0, g),
            f::broadcast(&none, 0, g),
            f::send(&none, 1 - g.rank(), 0, g),
            f::recv(&none, 1 - g.rank(), 0, g),
            f::copy_to_group(&none, g),
            f::reduce_from_group(&none, g),
            f::scatter_to_group(&none, 0, g),
            f::gather_from_group(&none, 0, g),
        ];
        for result in results {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
            assert!(error.to_string().contains("undefined"), "{error}");
        }
        group.barrier().unwrap();
    });
}

#[test]
fn values_are_those_of_the_collectives() {
    run_threads(3, |group| {
        let rank = group.rank();
        let all: Vec<Tensor> = (0..3).map(|r| values(&[2, 7], r)).collect();
        let x = &all[rank];
        assert_eq!(f::all_gather(x, 1, &group).unwrap(), Tensor::cat(&all, 1));
        let sum = &all[0] + &all[1] + &all[2];
        let parts = sum.tensor_split(3, 1);
        assert_eq!(f::reduce_scatter(x, 1, ReduceOp::Sum, &group).unwrap(), parts[rank]);
        let mine: Vec<_> = all.iter().map(|t| t.tensor_split(3, 1)[rank].shallow_clone()).collect();
        if rank == 0 {
            assert_eq!(mine[0].size(), [2, 3]);
        }
        assert_eq!(f::all_to_all(x, 1, 0, &group).unwrap(), Tensor::cat(&mine, 0));
        assert_eq!(f::broadcast(x, 2, &group).unwrap(), all[2]);
        assert_eq!(f::scatter_to_group(x, 1, &group).unwrap(), x.tensor_split(3, 1)[rank]);
        assert_eq!(f::gather_from_group(x, 0, &group).unwrap(), Tensor::cat(&all, 0));
        assert_eq!(f::reduce_from_group(x, &group).unwrap(), sum);
        assert_eq!(f::copy_to_group(x, &group).unwrap(), *x);
        // A view that is not contiguous gives the same.
        assert_eq!(f::all_gather(&x.tr(), 0, &group).unwrap(), Tensor::cat(&all, 1).tr());
    });
}

/// A loss that is the same on every rank counts once: its gradient by a replicated input is the same as that of the
/// same computation on one rank.
#[test]
fn a_replicated_loss_through_the_region_functions_has_the_gradient_of_one_rank() {
    for n in [1, 2, 3] {
        run_threads(n, |group| {
            let rank = group.rank();
            // y = sum_r sin(x) * r, with the factor a part that each rank has of its own.
            let x = values(&[2, 5], 0).set_requires_grad(true);
            let copied = f::copy_to_group(&x, &group).unwrap();
            let y = f::reduce_from_group(&(copied.sin() * (rank as f64 + 1.0)), &group).unwrap();
            y.square().sum(Kind::Double).backward();
            let alone = values(&[2, 5], 0).set_requires_grad(true);
            let factor: f64 = (1..=n).map(|r| r as f64).sum();
            (alone.sin() * factor).square().sum(Kind::Double).backward();
            assert!(x.grad().allclose(&alone.grad(), 1e-12, 1e-12, false));

            // Taken apart along a dimension that does not divide, worked on, and put together again.
            for dim in [0, 1] {
                let x = values(&[2, 5], 0).set_requires_grad(true);
                let part = f::scatter_to_group(&x, dim, &group).unwrap();
                let y = f::gather_from_group(&part.sin(), dim, &group).unwrap();
                loss(&y, 0).backward();
                let alone = values(&[2, 5], 0).set_requires_grad(true);
                loss(&alone.sin(), 0).backward();
                assert!(x.grad().allclose(&alone.grad(), 1e-12, 1e-12, false));
            }
        });
    }
}

#[test]
fn what_has_no_gradient_is_refused_before_anything_is_sent() {
    run_threads(2, |group| {
        let x = Tensor::ones([4], D).set_requires_grad(true);
        for op in [ReduceOp::Min, ReduceOp::Max, ReduceOp::Product] {
            let error = f::reduce_scatter(&x, 0, op, &group).unwrap_err();
            assert!(
                matches!(&error, Error::Unsupported { what, .. } if what.contains("reduce_scatter")),
                "{error}"
            );
            assert_eq!(f::reduce_scatter(&x.detach(), 0, op, &group).unwrap().size(), [2]);
        }
        let error = f::all_gather(&x, 1, &group).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { argument: "dim", .. }), "{error}");
        let ragged = Tensor::ones([2, 2 + group.rank() as i64], D);
        let error = f::all_to_all(&ragged, 1, 0, &group).unwrap_err();
        assert!(matches!(error, Error::ShapeMismatch { .. }), "{error}");
        // The group is well: a refusal poisons nothing.
        group.barrier().unwrap();
    });
}

#[test]
fn integers_pass_through_without_a_gradient() {
    run_threads(2, |group| {
        let x = Tensor::from_slice(&[group.rank() as i64, 5]);
        let y = f::all_gather(&x, 0, &group).unwrap();
        assert_eq!(Vec::<i64>::try_from(&y).unwrap(), [0, 5, 1, 5]);
        assert!(!y.requires_grad());
        assert_eq!(f::all_reduce(&x, ReduceOp::BitOr, &group).unwrap().int64_value(&[0]), 1);
    });
}

#[test]
fn gradients_of_gradients_of_sums_are_those_of_the_whole_computation() {
    run_threads(2, |group| {
        let rank = group.rank() as f64;
        let cube = |y: &Tensor| (y * y * y).sum(Kind::Double) * (rank + 1.0);
        let gradient = |loss: Tensor, x: &Tensor| Tensor::run_backward(&[loss], &[x], true, true).remove(0);

        // y is the sum of the ranks' x, 1 + 2; the losses together are 3 y^3, of which the gradient is 9 y^2 = 81.
        let x = Tensor::full([2], rank + 1.0, D).set_requires_grad(true);
        let g = gradient(cube(&f::all_reduce(&x, ReduceOp::Sum, &group).unwrap()), &x);
        assert_eq!(Vec::<f64>::try_from(&g).unwrap(), [81.0; 2]);
        // Rank 0 takes it once, rank 1 twice: 3 * 18 y = 162.
        (g * (rank + 1.0)).sum(Kind::Double).backward();
        assert_eq!(Vec::<f64>::try_from(x.grad()).unwrap(), [162.0; 2]);

        // Half of everything: y = 1.5, the gradient 4.5 y^2; that of three times it 3 * 4.5 y.
        let x = Tensor::full([2], rank + 1.0, D).set_requires_grad(true);
        let g = gradient(cube(&f::all_reduce(&x, ReduceOp::Avg, &group).unwrap()), &x);
        assert_eq!(Vec::<f64>::try_from(&g).unwrap(), [10.125; 2]);
        (g * (rank + 1.0)).sum(Kind::Double).backward();
        assert_eq!(Vec::<f64>::try_from(x.grad()).unwrap(), [20.25; 2]);

        // A region: one loss, 3 x^3 where x = 3, of two parts; its gradient 9 x^2, and again 18 x.
        let x = Tensor::full([2], 3.0, D).set_requires_grad(true);
        let part = cube(&f::copy_to_group(&x, &group).unwrap());
        let g = gradient(f::reduce_from_group(&part, &group).unwrap(), &x);
        assert_eq!(Vec::<f64>::try_from(&g).unwrap(), [81.0; 2]);
        g.sum(Kind::Double).backward();
        assert_eq!(Vec::<f64>::try_from(x.grad()).unwrap(), [54.0; 2]);
    });
}

#[test]
fn a_backward_that_cannot_be_differentiated_again_refuses_to_be_recorded() {
    use tch_distributed::autograd::{BackwardOptions, backward_with};
    use tch_distributed::model_parallel::tensor::vocab_parallel_cross_entropy;
    run_threads(2, |group| {
        let x = || Tensor::ones([2, 2], D).set_requires_grad(true);
        let targets = Tensor::from_slice(&[0_i64, 3]);
        for result in [
            f::all_reduce(&x(), ReduceOp::Product, &group),
            f::all_gather(&x(), 0, &group),
            f::reduce_scatter(&x(), 0, ReduceOp::Sum, &group),
            f::all_to_all(&x(), 0, 0, &group),
            f::broadcast(&x(), 0, &group),
            f::scatter_to_group(&x(), 0, &group),
            f::gather_from_group(&x(), 0, &group),
            vocab_parallel_cross_entropy(&x(), &targets, &group),
        ] {
            let loss = result.unwrap().square().sum(Kind::Double);
            let one = Tensor::from(1.0_f64);
            let error =
                backward_with(&[&loss], &[&one], BackwardOptions::new().create_graph(true)).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { argument: "create_graph", .. }), "{error}");
        }
        group.barrier().unwrap();
    });
}
