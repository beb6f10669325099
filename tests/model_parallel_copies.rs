//! Copies of a pipeline whose gradients are averaged while backward still runs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tch::nn::{self, Module};
use tch::{Device, Kind, Reduction, Tensor};
use tch_distributed as dist;
use tch_distributed::backend::{BackendContext, Call, CollectiveBackend, Completion, Op, Transfer};
use tch_distributed::data_parallel::DdpOptions;
use tch_distributed::model_parallel::DeviceMesh;
use tch_distributed::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use tch_distributed::testing::{run_threads, run_threads_on};
use tch_distributed::{Error, InitOptions};

const D: (Kind, Device) = (Kind::Double, Device::Cpu);

/// How many averages each group has executed, over its ranks.
static AVERAGED: Mutex<Option<HashMap<Vec<usize>, usize>>> = Mutex::new(None);

fn averaged(ranks: &[usize]) -> usize {
    AVERAGED.lock().unwrap().as_ref().and_then(|m| m.get(ranks)).copied().unwrap_or(0)
}

/// The native engine, counted.
struct Watched {
    engine: Arc<dyn CollectiveBackend>,
    ranks: Vec<usize>,
}

impl CollectiveBackend for Watched {
    fn name(&self) -> &str {
        "watched"
    }
    fn submit(&self, call: Call<'static>, done: Completion) {
        let average = matches!(call.op, Op::AllReduce(dist::ReduceOp::Avg));
        let ranks = self.ranks.clone();
        let then = Completion::from_fn(move |result| {
            if average && result.is_ok() {
                *AVERAGED.lock().unwrap().get_or_insert_default().entry(ranks).or_insert(0) += 1;
            }
            done.complete(result);
        });
        self.engine.submit(call, then);
    }
    fn transfer(&self, transfers: Vec<Transfer>) {
        self.engine.transfer(transfers);
    }
    fn failure(&self) -> Option<Arc<Error>> {
        self.engine.failure()
    }
    fn abort(&self, cause: &Arc<Error>) {
        self.engine.abort(cause);
    }
    fn shutdown(&self, timeout: Duration) -> dist::Result<()> {
        self.engine.shutdown(timeout)
    }
}

fn mse(ys: &Tensor, ts: &Tensor) -> Tensor {
    ys.mse_loss(ts, Reduction::Mean)
}

#[test]
fn a_bucket_is_averaged_during_the_backward_of_the_last_micro_batch_and_not_before() {
    dist::register_backend("watched", |context: BackendContext| {
        let ranks = context.ranks.clone();
        let engine = dist::backend::native::create(context)?;
        Ok(Arc::new(Watched { engine, ranks }) as Arc<dyn CollectiveBackend>)
    })
    .unwrap();
    const MICRO_BATCHES: usize = 3;
    for schedule in [Schedule::GPipe, Schedule::OneFOneB] {
        *AVERAGED.lock().unwrap() = None;
        run_threads_on("watched", InitOptions::new(), 4, |world| {
            let mesh = DeviceMesh::new(&world, &[("dp", 2), ("pp", 2)]).unwrap();
            let [dp, pp] = ["dp", "pp"].map(|axis| mesh.group(axis).unwrap());
            let vs = nn::VarStore::new(Device::Cpu);
            let layer = |name: &str| nn::linear(vs.root() / name, 4, 4, Default::default());
            let (first, second) = (layer("first"), layer("second"));
            let early = [first.ws.shallow_clone(), first.bs.as_ref().unwrap().shallow_clone()];
            let stage = Stage::new(nn::seq().add(first).add(second));
            // Every parameter has a bucket of its own.
            let options = DdpOptions::new().bucket_cap_mb(0.00001);
            let pipeline = Pipeline::new(vec![stage], MICRO_BATCHES, schedule, &pp).unwrap();
            let pipeline = pipeline.data_parallel(&vs, &dp, options).unwrap();
            // The gradients of the first layer come last. In the last micro-batch their hook does not return, and so
            // backward does not end, until a bucket of the second layer has been averaged.
            let _hooks = early.map(|parameter| {
                let ranks = dp.ranks().to_vec();
                let deadline = Instant::now() + Duration::from_secs(60);
                let mut calls = 0;
                dist::autograd::on_grad_accumulated(&parameter, move |_| {
                    calls += 1;
                    if calls < MICRO_BATCHES {
                        assert_eq!(averaged(&ranks), 0, "gradients went before they were complete");
                        return Ok(());
                    }
                    while averaged(&ranks) == 0 {
                        assert!(Instant::now() < deadline, "no bucket was averaged while backward ran");
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Ok(())
                })
                .unwrap()
            });
            let xs = Tensor::ones([6, 4], (Kind::Float, Device::Cpu));
            pipeline.step(Some(&xs), Some(&xs), mse).unwrap();
            dp.barrier().unwrap();
            assert_eq!(averaged(dp.ranks()), 4 * 2, "four buckets, each seen by two ranks");
        });
    }
}

#[test]
fn averaged_gradients_are_those_of_the_whole_batch_also_added_up_over_steps_and_for_frozen_and_tied_weights()
{
    let wave = |phase: f64| (Tensor::arange(16, D) * 0.3 + phase).sin().reshape([4, 4]);
    let batch = |step: i64| (Tensor::arange(32, D) * 0.21 + step as f64).cos().reshape([8, 4]);
    // Embedding, a frozen middle, and the embedding's transpose as the head.
    let (first, middle) = (wave(0.0), wave(1.0));
    let expected = {
        let w = first.copy().set_requires_grad(true);
        for step in 0..3 {
            mse(&batch(step).matmul(&w).matmul(&middle).tanh().matmul(&w.tr()), &batch(step)).backward();
        }
        Vec::<f64>::try_from(w.grad().reshape([-1])).unwrap()
    };
    for (schedule, bucket_view) in
        [Schedule::GPipe, Schedule::OneFOneB].into_iter().flat_map(|s| [(s, false), (s, true)])
    {
        run_threads(6, |world| {
            let mesh = DeviceMesh::new(&world, &[("dp", 2), ("pp", 3)]).unwrap();
            let [dp, pp] = ["dp", "pp"].map(|axis| mesh.group(axis).unwrap());
            let vs = nn::VarStore::new(Device::Cpu);
            let rank = pp.rank();
            let start = if rank == 1 { wave(1.0) } else { wave(0.0) };
            // The second copy of the model begins wrong: it gets the first one's weights.
            let w = vs.root().add("w", start + dp.rank() as f64, true);
            let _other = (rank == 1).then(|| vs.root().add("trained", Tensor::zeros([1], D), true));
            let extra = _other.as_ref().map(Tensor::shallow_clone);
            if rank == 1 {
                let _ = w.set_requires_grad(false);
            }
            let used = w.shallow_clone();
            let stage = Stage::from_fn(move |xs, _| {
                Ok(vec![match rank {
                    0 => xs[0].f_matmul(&used)?,
                    1 => (xs[0].f_matmul(&used)?
                        + extra.as_ref().map_or(Tensor::from(0.0), |e| e.sum(Kind::Double)))
                    .f_tanh()?,
                    _ => xs[0].f_matmul(&used.f_tr()?)?,
                }])
            });
            let pipeline = Pipeline::new(vec![stage], 2, schedule, &pp).unwrap();
            let options = DdpOptions::new().gradient_as_bucket_view(bucket_view);
            let pipeline = pipeline.data_parallel(&vs, &dp, options).unwrap();
            pipeline.tie(&[0, 2], (rank != 1).then_some(&w)).unwrap();
            for step in 0..3 {
                let own = batch(step).narrow(0, 4 * dp.rank() as i64, 4);
                pipeline.step(Some(&own), Some(&own), mse).unwrap();
            }
            if rank != 1 {
                let got = Vec::<f64>::try_from(w.grad().reshape([-1])).unwrap();
                for (a, b) in got.iter().zip(&expected) {
                    assert!((a - b).abs() < 1e-12, "{a}, expected {b}");
                }
                // What one copy differentiates between steps is its own business: nobody waits for the other.
                if dp.rank() == 1 {
                    w.sum(Kind::Double).backward();
                }
            }
        });
    }
}

#[test]
fn a_stage_that_fails_in_one_copy_ends_all_copies_and_is_named() {
    let options = InitOptions::new().timeout(Duration::from_secs(30));
    let errors = run_threads_on("native", options, 4, |world| {
        let mesh = DeviceMesh::new(&world, &[("dp", 2), ("pp", 2)]).unwrap();
        let [dp, pp] = ["dp", "pp"].map(|axis| mesh.group(axis).unwrap());
        let vs = nn::VarStore::new(Device::Cpu);
        let layer = nn::linear(vs.root(), 2, 2, Default::default());
        let unlucky = mesh.coordinates() == [1, 1];
        let stage = Stage::from_fn(move |xs, _| match unlucky {
            true => Err(Error::Callback { reason: "out of luck".to_owned() }),
            false => Ok(vec![layer.forward(&xs[0])]),
        });
        let pipeline = Pipeline::new(vec![stage], 2, Schedule::OneFOneB, &pp).unwrap();
        let pipeline = pipeline.data_parallel(&vs, &dp, DdpOptions::new()).unwrap();
        let xs = Tensor::ones([4, 2], (Kind::Float, Device::Cpu));
        pipeline.step(Some(&xs), Some(&xs), mse).unwrap_err().to_string()
    });
    for (rank, error) in errors.iter().enumerate() {
        assert!(error.contains("stage 1") && error.contains("out of luck"), "rank {rank}: {error}");
    }
}

#[test]
fn a_parameter_without_a_gradient_is_named_on_every_copy() {
    run_threads(2, |dp| {
        let vs = nn::VarStore::new(Device::Cpu);
        let layer = nn::linear(vs.root() / "used", 2, 2, Default::default());
        let _ = vs.root().zeros("unused", &[1]);
        let alone = dp.split(Some(dp.rank() as i64), 0).unwrap().unwrap();
        let pipeline = Pipeline::new(vec![Stage::new(layer)], 2, Schedule::GPipe, &alone).unwrap();
        let pipeline = pipeline.data_parallel(&vs, &dp, DdpOptions::new()).unwrap();
        let xs = Tensor::ones([4, 2], (Kind::Float, Device::Cpu));
        let error = pipeline.step(Some(&xs), Some(&xs), mse).unwrap_err().to_string();
        assert!(error.contains("unused"), "{error}");
    });
}
