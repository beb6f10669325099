//! Parameters without a gradient, and backwards that fail: nobody hangs, and everybody learns the same.

use tch::{Device, Kind, Tensor, nn};
use tch_distributed as dist;

use dist::Error;
use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::{flat, scalar, within};

/// Two layers of one weight, each of which a step may leave out.
#[derive(Debug)]
struct Pair {
    a: Tensor,
    b: Tensor,
}

fn pair(group: &dist::ProcessGroup, options: DdpOptions) -> DistributedDataParallel<Pair> {
    let vs = nn::VarStore::new(Device::Cpu);
    let root = vs.root();
    let pair = Pair { a: root.ones("a", &[2]), b: root.ones("b", &[3]) };
    DistributedDataParallel::new(pair, &vs, group, options.bucket_cap_mb(0.000001)).unwrap()
}

/// The gradient of `a` is `factor`, that of `b` too, where they are used.
fn step(ddp: &DistributedDataParallel<Pair>, a: bool, b: bool, factor: f64) -> dist::Result<()> {
    ddp.backward(&loss(ddp, a, b, factor)?)
}

fn loss(ddp: &DistributedDataParallel<Pair>, a: bool, b: bool, factor: f64) -> dist::Result<Tensor> {
    ddp.forward_with(|pair| {
        let mut loss = Tensor::zeros([], (Kind::Float, Device::Cpu));
        if a {
            loss += pair.a.sum(Kind::Float) * factor;
        }
        if b {
            loss += pair.b.sum(Kind::Float) * factor;
        }
        loss
    })
}

fn zero(ddp: &DistributedDataParallel<Pair>) {
    for parameter in [&ddp.module().a, &ddp.module().b] {
        dist::autograd::set_grad(&mut parameter.shallow_clone(), None).unwrap();
    }
}

/// A full step works, on every rank.
fn recovers(ddp: &DistributedDataParallel<Pair>, group: &dist::ProcessGroup) {
    zero(ddp);
    step(ddp, true, true, group.rank() as f64).unwrap();
    let mean = (group.size() - 1) as f64 / 2.0;
    assert_eq!(flat(&ddp.module().a.grad()), [mean; 2]);
    assert_eq!(flat(&ddp.module().b.grad()), [mean; 3]);
}

#[test]
fn a_parameter_left_out_on_one_rank_is_the_same_error_everywhere_in_that_step_and_poisons_nothing() {
    within(60, || {
        let errors = dist::testing::run_threads(3, |group| {
            let ddp = pair(&group, DdpOptions::new());
            recovers(&ddp, &group);
            let error = step(&ddp, true, group.rank() != 1, 1.0).unwrap_err();
            recovers(&ddp, &group);
            assert!(
                matches!(&error, Error::UnusedParameters { missing } if *missing == [(1, vec!["b".to_owned()])])
            );
            error.to_string()
        });
        assert!(errors[0].contains("b on rank 1"), "{}", errors[0]);
        assert!(errors.iter().all(|e| *e == errors[0]), "{errors:?}");
    });
}

#[test]
fn a_rank_on_which_no_gradient_arrives_does_not_hang_the_others() {
    within(60, || {
        dist::testing::run_threads(3, |group| {
            let ddp = pair(&group, DdpOptions::new());
            let used = group.rank() != 2;
            match step(&ddp, used, used, 1.0).unwrap_err() {
                Error::UnusedParameters { missing } => {
                    assert_eq!(missing, [(2, vec!["a".to_owned(), "b".to_owned()])]);
                }
                other => panic!("{other}"),
            }
            recovers(&ddp, &group);
        });
    });
}

#[test]
fn plain_backward_gives_the_error_as_text() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let ddp = pair(&group, DdpOptions::new());
            let loss = loss(&ddp, true, group.rank() == 0, 1.0).unwrap();
            let error = loss.f_backward().unwrap_err().to_string();
            assert!(error.contains("b on rank 1") && !error.contains("on rank 0"), "{error}");
            recovers(&ddp, &group);
        });
    });
}

fn allowed() -> [DdpOptions; 2] {
    let options = DdpOptions::new().find_unused_parameters(true);
    [options.clone(), options.gradient_as_bucket_view(true)]
}

#[test]
fn where_it_is_allowed_a_parameter_that_one_rank_left_out_gets_the_average() {
    within(60, || {
        for options in allowed() {
            dist::testing::run_threads(2, |group| {
                let ddp = pair(&group, options.clone());
                for _ in 0..3 {
                    zero(&ddp);
                    step(&ddp, true, group.rank() == 1, 4.0).unwrap();
                    assert_eq!(flat(&ddp.module().a.grad()), [4.0; 2]);
                    assert_eq!(flat(&ddp.module().b.grad()), [2.0; 3]);
                }
                zero(&ddp);
                step(&ddp, group.rank() == 0, group.rank() == 0, 4.0).unwrap();
                assert_eq!(flat(&ddp.module().b.grad()), [2.0; 3]);
            });
        }
    });
}

#[test]
fn where_it_is_allowed_a_parameter_that_no_rank_used_keeps_its_gradient() {
    within(60, || {
        for options in allowed() {
            dist::testing::run_threads(3, |group| {
                let ddp = pair(&group, options.clone());
                step(&ddp, true, false, 1.0).unwrap();
                assert!(!ddp.module().b.grad().defined());
                step(&ddp, false, true, 0.1).unwrap();
                step(&ddp, true, false, 1.0).unwrap();
                assert_eq!(flat(&ddp.module().a.grad()), [2.0; 2]);
                assert_eq!(flat(&ddp.module().b.grad()), [f64::from(0.1f32); 3]);
            });
        }
    });
}

#[test]
fn a_static_graph_may_leave_parameters_out_for_good() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let ddp = pair(&group, DdpOptions::new().static_graph(true));
            for _ in 0..3 {
                zero(&ddp);
                step(&ddp, true, group.rank() == 0, 6.0).unwrap();
                assert_eq!(flat(&ddp.module().a.grad()), [6.0; 2]);
                assert_eq!(flat(&ddp.module().b.grad()), [3.0; 3]);
            }
            // Leaving out one more breaks the promise.
            let error = step(&ddp, false, group.rank() == 0, 1.0).unwrap_err();
            assert!(error.to_string().contains("a on rank 0; a on rank 1"), "{error}");
        });
    });
}

#[test]
fn a_backward_that_fails_on_one_rank_fails_on_all_and_the_next_step_is_sound() {
    within(60, || {
        dist::testing::run_threads(3, |group| {
            let ddp = pair(&group, DdpOptions::new());
            let fails = (group.rank() == 1).then(|| {
                let fail = |_: &Tensor| Err(Error::Io(std::io::Error::other("no more paper")));
                dist::autograd::on_grad_accumulated(&ddp.module().b, fail).unwrap()
            });
            let error = step(&ddp, true, true, 1.0).unwrap_err();
            drop(fails);
            match group.rank() {
                1 => assert!(matches!(error, Error::Io(_)), "{error}"),
                _ => {
                    let text = error.to_string();
                    assert!(text.contains("rank 1") && text.contains("no more paper"), "{text}");
                }
            }
            recovers(&ddp, &group);
        });
    });
}

#[test]
fn a_plain_backward_that_failed_is_settled_by_the_next_forward() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let ddp = pair(&group, DdpOptions::new());
            let fail = |_: &Tensor| Err(Error::Io(std::io::Error::other("no more paper")));
            let fails = dist::autograd::on_grad_accumulated(&ddp.module().a, fail).unwrap();
            loss(&ddp, true, true, 1.0).unwrap().f_backward().unwrap_err();
            drop(fails);
            recovers(&ddp, &group);
            group.barrier().unwrap();
        });
    });
}

#[test]
fn what_was_used_under_no_sync_counts_as_used() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let ddp = pair(&group, DdpOptions::new());
            ddp.no_sync(|| step(&ddp, false, true, group.rank() as f64)).unwrap();
            step(&ddp, true, false, 1.0).unwrap();
            assert_eq!(flat(&ddp.module().b.grad()), [0.5; 3]);
            assert_eq!(scalar(&ddp.module().a.grad()), 2.0);
        });
    });
}
