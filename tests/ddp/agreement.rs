//! Ranks whose models differ are told so, all of them, before anything is exchanged.

use tch::{Device, Kind, nn};
use tch_distributed as dist;

use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::within;

/// The error of every rank, after which the group still works.
fn errors(
    ranks: usize,
    build: impl Fn(usize, &nn::VarStore) + Send + Sync,
    options: impl Fn(usize) -> DdpOptions + Send + Sync,
) -> Vec<dist::Error> {
    dist::testing::run_threads(ranks, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        build(group.rank(), &vs);
        let error = DistributedDataParallel::new((), &vs, &group, options(group.rank())).unwrap_err();
        group.barrier().unwrap();
        error
    })
}

fn same_everywhere(errors: &[dist::Error], parts: &[&str]) {
    for error in errors {
        let text = error.to_string();
        assert_eq!(text, errors[0].to_string());
        assert!(parts.iter().all(|part| text.contains(part)), "{text:?} lacks one of {parts:?}");
    }
}

#[test]
fn a_different_shape_is_named_on_every_rank() {
    within(60, || {
        let build = |rank, vs: &nn::VarStore| {
            let _ = nn::linear(vs.root() / "one", 4, 4, Default::default());
            let _ = nn::linear(vs.root() / "two", if rank == 2 { 5 } else { 4 }, 3, Default::default());
        };
        let errors = errors(4, build, |_| DdpOptions::new());
        same_everywhere(&errors, &["two.weight", "[3, 4]", "[3, 5] on rank 2"]);
        assert!(matches!(errors[0], dist::Error::ShapeMismatch { .. }));
    });
}

#[test]
fn a_different_kind_is_named_on_every_rank() {
    within(60, || {
        let build = |rank, vs: &nn::VarStore| {
            let kind = if rank == 1 { Kind::Double } else { Kind::Float };
            let tensor = tch::Tensor::ones([2], (kind, Device::Cpu));
            let _ = vs.root().add("scale", tensor.set_requires_grad(true), true);
        };
        let errors = errors(2, build, |_| DdpOptions::new());
        same_everywhere(&errors, &["scale", "Float", "Double on rank 1"]);
        assert!(matches!(errors[0], dist::Error::KindMismatch { .. }));
    });
}

#[test]
fn a_parameter_too_many_and_another_name_are_named_on_every_rank() {
    within(60, || {
        let more = |rank, vs: &nn::VarStore| {
            let _ = vs.root().ones("a", &[2]);
            if rank == 1 {
                let _ = vs.root().ones("b", &[2]);
            }
        };
        same_everywhere(&errors(3, more, |_| DdpOptions::new()), &["rank 1", "parameter b [2]", "nothing"]);
        let other = |rank, vs: &nn::VarStore| drop(vs.root().ones(["x", "y"][rank], &[2]));
        same_everywhere(&errors(2, other, |_| DdpOptions::new()), &["parameter x", "parameter y", "rank 1"]);
    });
}

#[test]
fn a_parameter_frozen_on_one_rank_only_is_an_error_on_every_rank() {
    within(60, || {
        let build = |rank, vs: &nn::VarStore| {
            let _ = vs.root().ones("a", &[2]);
            let b = vs.root().ones("b", &[2]);
            let _ = b.set_requires_grad(rank == 0);
        };
        same_everywhere(&errors(2, build, |_| DdpOptions::new()), &["parameter b", "frozen parameter b"]);
    });
}

#[test]
fn a_model_without_parameters_on_one_rank_is_an_error_on_every_rank() {
    within(60, || {
        let build = |rank, vs: &nn::VarStore| {
            if rank == 0 {
                let _ = vs.root().ones("a", &[2]);
            }
        };
        same_everywhere(&errors(2, build, |_| DdpOptions::new()), &["rank 1", "no parameter"]);
    });
}

#[test]
fn different_options_are_an_error_on_every_rank() {
    within(60, || {
        let build = |_, vs: &nn::VarStore| drop(vs.root().ones("a", &[2]));
        let options = |rank| DdpOptions::new().bucket_cap_mb(1 + rank as i32);
        same_everywhere(&errors(2, build, options), &["options", "bucket_cap_mb: 2.0", "rank 1"]);
    });
}

#[test]
fn a_bucket_size_that_is_negative_or_no_number_is_an_error_on_every_rank() {
    within(60, || {
        let build = |_, vs: &nn::VarStore| drop(vs.root().ones("a", &[2]));
        let wrong = |rank| if rank == 1 { f64::NAN } else { 1.0 };
        let options = |rank| DdpOptions::new().bucket_cap_mb(wrong(rank));
        same_everywhere(&errors(2, build, options), &["options", "rank 1", "bucket_cap_mb is NaN"]);
        let options = |_| DdpOptions::new().first_bucket_mb(-1);
        same_everywhere(&errors(2, build, options), &["options", "rank 0", "first_bucket_mb is -1"]);
    });
}
