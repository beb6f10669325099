//! What is done with gradients over all axes: scaling for half precision, clipping, averaging.

use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Reduction, Tensor};
use tch_distributed::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use tch_distributed::model_parallel::tensor::Layout;
use tch_distributed::model_parallel::{LossScaler, clip_grad_norm, sync_gradients};
use tch_distributed::testing::run_threads;
use tch_distributed::{Error, functional};

const F: (Kind, Device) = (Kind::Float, Device::Cpu);

fn grad(t: &Tensor) -> Vec<f32> {
    Vec::try_from(t.grad().reshape([-1])).unwrap()
}

#[test]
fn scaled_gradients_survive_half_precision_and_are_what_they_should_be_after_unscaling() {
    run_threads(2, |group| {
        // The gradient is 2e-8, which is nothing in half precision.
        let gradient = |scale: f64| {
            let vs = nn::VarStore::new(Device::Cpu);
            let w = vs.root().ones("w", &[3]);
            let loss = (w.to_kind(Kind::Half) * 2e-4).sum(Kind::Half).to_kind(Kind::Float) * 1e-4;
            (loss * scale).backward();
            (vs, w)
        };
        let (_, lost) = gradient(1.0);
        assert_eq!(grad(&lost), [0.0; 3]);
        let mut scaler = LossScaler::new(65536.0);
        let (vs, kept) = gradient(scaler.scale());
        assert!(scaler.unscale(&vs, &group).unwrap());
        assert!(grad(&kept).iter().all(|g| (g / 2e-8 - 1.0).abs() < 0.01), "{:?}", grad(&kept));
    });
}

#[test]
fn an_overflow_on_one_rank_leaves_the_step_out_on_all_and_good_steps_let_the_scale_grow() {
    run_threads(3, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let w = vs.root().ones("w", &[2]);
        // Without a gradient of its own on this rank, as on a pipeline's other stage.
        let _idle = vs.root().ones("idle", &[2]);
        let mut optimizer = nn::Sgd::default().build(&vs, 0.5).unwrap();
        let mut scaler = LossScaler::new(8.0).growth_interval(3);
        let overflows_on = [None, None, Some(1), None, None, None, Some(2)];
        let mut scales = Vec::new();
        for bad in overflows_on {
            optimizer.zero_grad();
            let slope = if bad == Some(group.rank()) { f64::INFINITY } else { 1.0 };
            (&w * slope * scaler.scale()).sum(Kind::Float).backward();
            let good = scaler.unscale(&vs, &group).unwrap();
            assert_eq!(good, bad.is_none());
            if good {
                assert_eq!(grad(&w), [1.0, 1.0]);
                optimizer.step();
            }
            scales.push(scaler.scale());
        }
        // Halved by an overflow, which also begins the count of good steps anew; doubled after three.
        assert_eq!(scales, [8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 4.0]);
        // Five good steps of 0.5.
        assert_eq!(Vec::<f32>::try_from(&w).unwrap(), [-1.5, -1.5]);
    });
}

#[test]
fn a_pipeline_s_scaled_loss_gives_the_same_gradients_after_unscaling_and_the_same_loss() {
    let train = |scale: f64| {
        run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let w =
                vs.root().add("w", Tensor::from_slice(&[0.5_f32, -0.25, 1.0, 0.75]).reshape([2, 2]), true);
            let used = w.shallow_clone();
            let stage = Stage::new(nn::func(move |xs| xs.matmul(&used).tanh()));
            let pipeline = Pipeline::new(vec![stage], 2, Schedule::OneFOneB, &group).unwrap();
            let mut scaler = LossScaler::new(scale);
            pipeline.set_loss_scale(scaler.scale());
            let xs = Tensor::arange(8, F).reshape([4, 2]) / 8.0;
            let mse = |ys: &Tensor, ts: &Tensor| ys.mse_loss(ts, Reduction::Mean);
            let loss = pipeline.step(Some(&xs), Some(&xs), mse).unwrap();
            let raw = grad(&w);
            assert!(scaler.unscale(&vs, &group).unwrap());
            (loss.map(|l| l.double_value(&[])), raw, grad(&w))
        })
    };
    for (one, scaled) in train(1.0).iter().zip(&train(1024.0)) {
        assert_eq!(one.0, scaled.0, "the loss stays what it is");
        assert_eq!(one.2, scaled.2, "a power of two is exact");
        assert!(one.1.iter().zip(&scaled.1).all(|(a, b)| a * 1024.0 == *b));
    }
}

#[test]
fn the_norm_counts_shards_on_each_rank_whole_parameters_once_and_copies_not_at_all() {
    run_threads(2, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let ((), mut layout) = Layout::record(&group, || {
            use tch_distributed::model_parallel::tensor::{ColumnParallelLinear, ParallelLinearConfig};
            let config = ParallelLinearConfig { bias: false, ..Default::default() };
            ColumnParallelLinear::new(vs.root() / "split", 1, 4, config, &group).unwrap();
            let _ = vs.root().zeros("whole", &[1]);
            let _ = vs.root().zeros("copy", &[1]);
        });
        layout.mark_copy("copy");
        let all = vs.variables();
        let rank = group.rank() as f64;
        // Shards have [1, 1] and [2, 2]: squares 10. Whole: 3, squared 9. The copy: 100, which does not count.
        ((&all["split.weight"] * (rank + 1.0)).sum(Kind::Float)
            + (&all["whole"] * 3.0).sum(Kind::Float)
            + (&all["copy"] * 100.0).sum(Kind::Float))
        .backward();
        let norm = clip_grad_norm(&vs, &layout, 1e9, &group).unwrap();
        assert!((norm - 19_f64.sqrt()).abs() < 1e-6, "{norm}");
        assert_eq!(grad(&all["whole"]), [3.0], "a norm below the limit changes nothing");
        let norm = clip_grad_norm(&vs, &layout, 19_f64.sqrt() / 2.0, &group).unwrap();
        assert!((norm - 19_f64.sqrt()).abs() < 1e-6, "{norm}");
        assert!((grad(&all["whole"])[0] - 1.5).abs() < 1e-4 && (grad(&all["copy"])[0] - 50.0).abs() < 1e-2);
        for wrong in [0.0, -1.0, f64::NAN] {
            let error = clip_grad_norm(&vs, &layout, wrong, &group).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { argument: "max_norm", .. }), "{error}");
        }
        if group.rank() == 1 {
            (&all["split.weight"] * f64::INFINITY).sum(Kind::Float).backward();
        }
        let before = grad(&all["whole"]);
        assert!(!clip_grad_norm(&vs, &layout, 1.0, &group).unwrap().is_finite());
        assert_eq!(grad(&all["whole"]), before, "a norm that is no number scales nothing");
    });
}

#[test]
fn gradients_are_averaged_also_where_a_rank_has_none() {
    run_threads(3, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let (a, b) = (vs.root().ones("a", &[2]), vs.root().ones("b", &[1]));
        let nobodys = vs.root().ones("c", &[1]);
        let rank = group.rank() as f64;
        let mut loss = (&a * rank).sum(Kind::Float);
        if group.rank() == 2 {
            loss += (&b * 6.0).sum(Kind::Float);
        }
        loss.backward();
        sync_gradients(&vs, &group).unwrap();
        assert_eq!((grad(&a), grad(&b)), (vec![1.0, 1.0], vec![2.0]));
        assert!(!nobodys.grad().defined());
        // Every rank has the same: a sum over ranks is three times one's own.
        let sum = functional::all_reduce(&a.grad(), tch_distributed::ReduceOp::Sum, &group).unwrap();
        assert_eq!(sum, a.grad() * 3.0);
    });
}

#[test]
fn gradients_in_one_memory_and_tensors_of_two_names_are_scaled_and_averaged_once() {
    // What autograd leaves where two parameters are added through views; and one tensor under two names.
    let gradients = |slope: f64| {
        let vs = nn::VarStore::new(Device::Cpu);
        let (a, b) = (vs.root().ones("a", &[2]), vs.root().ones("b", &[2]));
        let c = vs.root().ones("c", &[1]);
        let _ = vs.root().add("d", c.shallow_clone(), true);
        let sum = (a.unsqueeze(0) + b.unsqueeze(0)) * slope;
        (sum.sum(Kind::Float) + (&c * 2.0 * slope).sum(Kind::Float)).backward();
        assert_eq!(a.grad().data_ptr(), b.grad().data_ptr(), "autograd shares no memory any more");
        (vs, [a, b, c])
    };
    let values = |parameters: &[Tensor; 3]| parameters.each_ref().map(|p| grad(p)[0]);
    run_threads(2, |group| {
        let (vs, parameters) = gradients(1.0 + 2.0 * group.rank() as f64);
        sync_gradients(&vs, &group).unwrap();
        assert_eq!(values(&parameters), [2.0, 2.0, 4.0]);

        let (vs, parameters) = gradients(8.0);
        assert!(LossScaler::new(8.0).unscale(&vs, &group).unwrap());
        assert_eq!(values(&parameters), [1.0, 1.0, 2.0]);

        // The squares are four of one and one of four.
        let (vs, parameters) = gradients(1.0);
        let (_, layout) = Layout::record(&group, || ());
        let norm = clip_grad_norm(&vs, &layout, 8_f64.sqrt() / 2.0, &group).unwrap();
        assert!((norm - 8_f64.sqrt()).abs() < 1e-6, "{norm}");
        for (got, expected) in values(&parameters).iter().zip([0.5, 0.5, 1.0]) {
            assert!((got - expected).abs() < 1e-5, "{got}, expected {expected}");
        }
    });
}
