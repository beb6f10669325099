//! Pipelines against the same model on one rank: losses, every gradient, and twenty steps of training.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Reduction, Tensor};
use tch_distributed::model_parallel::DeviceMesh;
use tch_distributed::model_parallel::pipeline::{Pass, Pipeline, Plan, Schedule, Stage};
use tch_distributed::testing::{run_threads, run_threads_on};
use tch_distributed::{Error, InitOptions, ProcessGroup, functional};

const WIDTH: i64 = 6;

/// One block of the model: its weights depend on its number only.
#[derive(Debug)]
struct Block {
    ws: Tensor,
    bs: Tensor,
}

impl Block {
    fn new(vs: &nn::VarStore, number: usize, kind: Kind) -> Self {
        let path = vs.root() / format!("block{number}");
        let t = Tensor::arange(WIDTH * WIDTH, (Kind::Double, Device::Cpu)) * 0.37 + number as f64;
        let ws = path.add("ws", (t.sin() * 0.15).reshape([WIDTH, WIDTH]).to_kind(kind), true);
        let bs = path.add("bs", (t.narrow(0, 0, WIDTH).cos() * 0.1).to_kind(kind), true);
        Self { ws, bs }
    }
}

impl Module for Block {
    fn forward(&self, xs: &Tensor) -> Tensor {
        xs + xs.linear(&self.ws, Some(&self.bs)).tanh()
    }
}

fn data(kind: Kind, step: i64) -> (Tensor, Tensor) {
    let n = 16 * WIDTH;
    let t = Tensor::arange(n, (Kind::Double, Device::Cpu)) * 0.11 + step as f64 * 0.7;
    (t.sin().reshape([16, WIDTH]).to_kind(kind), t.cos().reshape([16, WIDTH]).to_kind(kind))
}

fn mse(ys: &Tensor, ts: &Tensor) -> Tensor {
    ys.mse_loss(ts, Reduction::Mean)
}

/// Parameters or gradients by name, as numbers that can leave the thread.
type Numbers = BTreeMap<String, Vec<f64>>;

fn numbers(vs: &nn::VarStore, grads: bool) -> Numbers {
    let of = |t: &Tensor| if grads { t.grad() } else { t.detach() };
    let flat = |t: Tensor| Vec::<f64>::try_from(t.to_kind(Kind::Double).reshape([-1])).unwrap();
    vs.variables().into_iter().map(|(name, t)| (name, flat(of(&t)))).collect()
}

fn assert_close(got: &Numbers, expected: &Numbers, tolerance: f64) {
    for (name, got) in got {
        let expected = &expected[name];
        let most = expected.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
        for (a, b) in got.iter().zip(expected) {
            assert!((a - b).abs() <= tolerance * most, "{name}: {a}, expected {b}");
        }
    }
}

/// The whole model on one rank: losses of `steps` steps, gradients of the first, parameters after the last.
fn alone(blocks: usize, kind: Kind, steps: i64) -> (Vec<f64>, Numbers, Numbers) {
    let vs = nn::VarStore::new(Device::Cpu);
    let model: Vec<_> = (0..blocks).map(|b| Block::new(&vs, b, kind)).collect();
    let mut optimizer = nn::Sgd { momentum: 0.9, ..Default::default() }.build(&vs, 0.02).unwrap();
    let (mut losses, mut grads) = (Vec::new(), Numbers::new());
    for step in 0..steps {
        let (xs, ts) = data(kind, step);
        let ys = model.iter().fold(xs, |xs, block| block.forward(&xs));
        let loss = mse(&ys, &ts);
        optimizer.zero_grad();
        loss.backward();
        if step == 0 {
            grads = numbers(&vs, true);
        }
        optimizer.step();
        losses.push(loss.double_value(&[]));
    }
    (losses, grads, numbers(&vs, false))
}

/// This rank's stages of a model of `blocks` blocks, which are dealt out evenly to the stages.
fn stages(vs: &nn::VarStore, group: &ProcessGroup, chunks: usize, blocks: usize, kind: Kind) -> Vec<Stage> {
    let count = group.size() * chunks;
    let each = blocks / count;
    (0..chunks)
        .map(|chunk| {
            let stage = chunk * group.size() + group.rank();
            let blocks = stage * each..(stage + 1) * each;
            let module = blocks.fold(nn::seq(), |seq, b| seq.add(Block::new(vs, b, kind)));
            Stage::new(module)
        })
        .collect()
}

const CASES: [(Schedule, usize); 5] = [
    (Schedule::GPipe, 1),
    (Schedule::GPipe, 2),
    (Schedule::OneFOneB, 1),
    (Schedule::Interleaved, 1),
    (Schedule::Interleaved, 2),
];

fn train(
    n: usize,
    (schedule, chunks): (Schedule, usize),
    kind: Kind,
    recompute: bool,
    fixed: bool,
    tolerance: f64,
) {
    const BLOCKS: usize = 16;
    let steps = if kind == Kind::Double { 20 } else { 1 };
    let (losses, grads, parameters) = alone(BLOCKS, kind, steps);
    run_threads(n, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let stages =
            stages(&vs, &group, chunks, BLOCKS, kind).into_iter().map(|s| s.recompute(recompute)).collect();
        let pipeline = Pipeline::new(stages, 8, schedule, &group).unwrap().fixed_shapes(fixed);
        let mut optimizer = nn::Sgd { momentum: 0.9, ..Default::default() }.build(&vs, 0.02).unwrap();
        let (first, last) = pipeline.ends();
        for step in 0..steps {
            let (xs, ts) = data(kind, step);
            optimizer.zero_grad();
            let loss = pipeline.step(first.then_some(&xs), last.then_some(&ts), mse).unwrap();
            assert_eq!(loss.is_some(), last);
            if let Some(loss) = loss {
                let (got, expected) = (loss.double_value(&[]), losses[step as usize]);
                assert!(
                    (got - expected).abs() <= tolerance * expected,
                    "step {step}: {got}, expected {expected}"
                );
            }
            if step == 0 {
                assert_close(&numbers(&vs, true), &grads, tolerance);
            }
            optimizer.step();
        }
        assert_close(&numbers(&vs, false), &parameters, tolerance);
    });
}

#[test]
fn twenty_steps_of_every_schedule_equal_one_rank_in_f64() {
    for n in [1, 2, 4, 8] {
        for case in CASES {
            train(n, case, Kind::Double, false, n == 4, 1e-10);
        }
    }
}

#[test]
fn losses_and_gradients_of_every_schedule_equal_one_rank_in_f32() {
    for n in [1, 2, 4, 8] {
        for case in CASES {
            train(n, case, Kind::Float, false, false, 1e-5);
        }
    }
}

#[test]
fn recomputing_forwards_changes_nothing() {
    for case in CASES {
        train(2, case, Kind::Double, true, false, 1e-10);
    }
}

/// Between the stages: a value, a mask that has no gradient, and a second value that the loss does not use.
#[test]
fn stages_may_pass_several_tensors_of_any_shape_and_kind() {
    let model = |ws: &[Tensor], x: &Tensor, scale: &Tensor| {
        let hidden = x.matmul(&ws[0]);
        let mask = hidden.gt(0.0);
        let y = (&hidden * mask.to_kind(Kind::Double) * scale.sum(Kind::Double)).matmul(&ws[1]);
        y.square().sum(Kind::Double)
    };
    let weights = || {
        let t = Tensor::arange(12, (Kind::Double, Device::Cpu)).sin();
        [t.reshape([3, 4]).set_requires_grad(true), t.cos().reshape([4, 3]).set_requires_grad(true)]
    };
    let batch = || {
        let x = (Tensor::arange(12, (Kind::Double, Device::Cpu)) * 0.5).sin().reshape([4, 3]);
        (x, Tensor::from_slice(&[0.5, 1.5, 2.0, 1.0]).reshape([4, 1]))
    };
    let (x, scale) = batch();
    let expected = weights();
    let loss = model(&expected, &x.narrow(0, 0, 2), &scale.narrow(0, 0, 2)) * 0.5
        + model(&expected, &x.narrow(0, 2, 2), &scale.narrow(0, 2, 2)) * 0.5;
    loss.backward();
    let expected = expected.map(|w| Vec::<f64>::try_from(w.grad().reshape([-1])).unwrap());
    let loss = loss.double_value(&[]);

    run_threads(2, |group| {
        let rank = group.rank();
        let w = weights()[rank].shallow_clone();
        let kept = w.shallow_clone();
        let stage = if rank == 0 {
            Stage::from_fn(move |inputs, train| {
                assert!(train);
                let hidden = inputs[0].f_matmul(&w)?;
                let mask = hidden.f_gt(0.0)?;
                let unused = hidden.f_sum(Kind::Double)?;
                Ok(vec![hidden, mask, inputs[1].f_sum(Kind::Double)?, unused])
            })
        } else {
            Stage::from_fn(move |inputs, _| {
                assert_eq!(inputs[1].kind(), Kind::Bool);
                assert!(!inputs[1].requires_grad() && inputs[0].requires_grad());
                let y = (&inputs[0] * inputs[1].to_kind(Kind::Double) * &inputs[2]).f_matmul(&w)?;
                Ok(vec![y])
            })
        };
        let pipeline = Pipeline::new(vec![stage], 2, Schedule::OneFOneB, &group).unwrap();
        let (x, scale) = batch();
        let targets = [x.shallow_clone()];
        let inputs = [x, scale];
        let got = pipeline.step_with(&inputs, &targets, |ys, _| ys[0].square().sum(Kind::Double)).unwrap();
        if let Some(got) = got {
            assert!((got.double_value(&[]) - loss).abs() < 1e-10 * loss);
        }
        let got = Vec::<f64>::try_from(kept.grad().reshape([-1])).unwrap();
        for (a, b) in got.iter().zip(&expected[rank]) {
            assert!((a - b).abs() < 1e-10, "{a}, expected {b}");
        }
    });
}

#[test]
fn gradients_add_up_over_steps_and_a_tied_weight_gets_those_of_all_its_stages() {
    let tied =
        || (Tensor::arange(WIDTH * WIDTH, (Kind::Double, Device::Cpu)) * 0.3).sin().reshape([WIDTH, WIDTH]);
    // x -> x w, then blocks 0 and 1, then back through w.
    let expected = {
        let vs = nn::VarStore::new(Device::Cpu);
        let blocks = [Block::new(&vs, 0, Kind::Double), Block::new(&vs, 1, Kind::Double)];
        let w = vs.root().add("tied", tied(), true);
        for step in 0..3 {
            let (xs, ts) = data(Kind::Double, step);
            let hidden = blocks.iter().fold(xs.matmul(&w), |h, b| b.forward(&h));
            mse(&hidden.matmul(&w.tr()), &ts).backward();
        }
        numbers(&vs, true)
    };
    for schedule in [Schedule::GPipe, Schedule::OneFOneB] {
        run_threads(3, |group| {
            let rank = group.rank();
            let vs = nn::VarStore::new(Device::Cpu);
            let (stage, w) = if rank == 1 {
                let seq =
                    nn::seq().add(Block::new(&vs, 0, Kind::Double)).add(Block::new(&vs, 1, Kind::Double));
                (Stage::new(seq), None)
            } else {
                // The last stage's copy begins wrong: tying sets it right.
                let w = vs.root().add("tied", tied() + rank as f64, true);
                let used = w.shallow_clone();
                let back = rank == 2;
                let module =
                    nn::func(move |xs| xs.matmul(&if back { used.tr() } else { used.shallow_clone() }));
                (Stage::new(module), Some(w))
            };
            let pipeline = Pipeline::new(vec![stage], 4, schedule, &group).unwrap();
            pipeline.tie(&[0, 2], w.as_ref()).unwrap();
            for step in 0..3 {
                let (xs, ts) = data(Kind::Double, step);
                pipeline.step(Some(&xs), Some(&ts), mse).unwrap();
            }
            assert_close(&numbers(&vs, true), &expected, 1e-10);
        });
    }
}

#[test]
fn evaluation_needs_no_gradient_and_takes_batches_of_another_size() {
    run_threads(4, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let pipeline =
            Pipeline::new(stages(&vs, &group, 2, 8, Kind::Double), 4, Schedule::Interleaved, &group).unwrap();
        let one = nn::VarStore::new(Device::Cpu);
        let model: Vec<_> = (0..8).map(|b| Block::new(&one, b, Kind::Double)).collect();
        for batch in [16, 4, 12] {
            let (xs, ts) = data(Kind::Double, 0);
            let (xs, ts) = (xs.narrow(0, 0, batch), ts.narrow(0, 0, batch));
            let loss = pipeline.eval(Some(&xs), Some(&ts), mse).unwrap();
            let outputs = pipeline.forward(Some(&xs)).unwrap();
            let expected = model.iter().fold(xs, |xs, block| block.forward(&xs));
            if pipeline.ends().1 {
                let (loss, outputs) = (loss.unwrap(), outputs.unwrap());
                assert!(outputs[0].allclose(&expected, 1e-12, 1e-12, false));
                assert!((loss - mse(&expected, &ts)).abs().double_value(&[]) < 1e-12);
            } else {
                assert!(loss.is_none() && outputs.is_none());
            }
            assert!(vs.trainable_variables().iter().all(|w| !w.grad().defined()));
        }
    });
}

#[test]
fn an_error_or_a_panic_in_one_stage_ends_all_and_names_rank_and_stage() {
    for panics in [false, true] {
        let options = InitOptions::new().timeout(Duration::from_secs(20));
        let errors = run_threads_on("native", options, 4, |group| {
            let rank = group.rank();
            let stage = Stage::from_fn(move |inputs, _| match (rank, panics) {
                (2, true) => panic!("out of luck"),
                (2, false) => Err(Error::Callback { reason: "out of luck".to_owned() }),
                _ => Ok(vec![inputs[0].f_mul_scalar(2.0)?]),
            });
            let pipeline = Pipeline::new(vec![stage], 4, Schedule::OneFOneB, &group).unwrap();
            let x = Tensor::ones([8, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            pipeline.step(Some(&x), Some(&x), mse).unwrap_err().to_string()
        });
        for (rank, error) in errors.iter().enumerate() {
            assert!(error.contains("rank 2") && error.contains("stage 2"), "rank {rank}: {error}");
            assert!(error.contains("out of luck"), "rank {rank}: {error}");
        }
    }
}

#[test]
fn a_wrong_call_is_refused_with_the_reason() {
    run_threads(2, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let build = |micro_batches, schedule| {
            Pipeline::new(stages(&vs, &group, 1, 2, Kind::Double), micro_batches, schedule, &group)
        };
        let error = build(4, Schedule::ZeroBubble).unwrap_err();
        assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains("zero-bubble")), "{error}");
        let error = build(0, Schedule::GPipe).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { argument: "micro_batches", .. }), "{error}");
        let error = build(2 + group.rank(), Schedule::GPipe).unwrap_err();
        assert!(error.to_string().contains("must be the same on all ranks"), "{error}");
        // What only one rank's schedule could not take is refused on both.
        for (own, others) in [(2, 1), (0, 1)] {
            let count = if group.rank() == 1 { own } else { others };
            let stages = (0..count).map(|_| Stage::new(nn::func(Tensor::shallow_clone))).collect();
            let error = Pipeline::new(stages, 4, Schedule::OneFOneB, &group).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { argument: "stages", .. }), "{error}");
            assert!(error.to_string().contains("must be the same on all ranks"), "{error}");
        }

        let pipeline = build(4, Schedule::GPipe).unwrap();
        let (xs, ts) = data(Kind::Double, 0);
        if group.rank() == 0 {
            let error = pipeline.step(None, None, mse).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { argument: "inputs", .. }), "{error}");
            let error = pipeline.step(Some(&xs.narrow(0, 0, 7)), None, mse).unwrap_err();
            assert!(error.to_string().contains("must divide by the 4 micro-batches"), "{error}");
        }
        // A refusal sent nothing: the pipeline works.
        pipeline.step(Some(&xs), Some(&ts), mse).unwrap();
        let error = pipeline.tie(&[0, 5], None).unwrap_err();
        assert!(error.to_string().contains("no stage 5"), "{error}");
        let error = pipeline.tie(&[0, 1], (group.rank() == 0).then_some(&xs)).unwrap_err();
        assert!(error.to_string().contains("rank 1 has a stage that shares it"), "{error}");
    });
}

#[test]
fn shapes_that_are_fixed_are_exchanged_once_and_another_batch_is_then_refused_on_all_ranks() {
    let options = InitOptions::new().timeout(Duration::from_secs(20));
    let said = run_threads_on("native", options, 3, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let pipeline =
            Pipeline::new(stages(&vs, &group, 1, 3, Kind::Double), 4, Schedule::OneFOneB, &group).unwrap();
        let pipeline = pipeline.fixed_shapes(true);
        let (xs, ts) = data(Kind::Double, 0);
        let mut bytes = Vec::new();
        for _ in 0..3 {
            pipeline.step(Some(&xs), Some(&ts), mse).unwrap();
            bytes.push(pipeline.last_step().bytes_sent);
        }
        assert!(bytes.windows(2).all(|b| b[0] == b[1]));
        let (xs, ts) = (xs.narrow(0, 0, 8), ts.narrow(0, 0, 8));
        pipeline.step(Some(&xs), Some(&ts), mse).unwrap_err().to_string()
    });
    assert!(said[0].contains("because shapes are fixed"), "{}", said[0]);
    assert!(said.iter().all(|error| error.contains("stage 0")), "{said:?}");
}

#[test]
fn a_measured_step_did_what_the_plan_says_and_held_what_it_predicts() {
    for (schedule, chunks) in CASES {
        run_threads(4, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let stages = stages(&vs, &group, chunks, 8, Kind::Double);
            let pipeline = Pipeline::new(stages, 8, schedule, &group).unwrap();
            let (xs, ts) = data(Kind::Double, 0);
            pipeline.step(Some(&xs), Some(&ts), mse).unwrap();
            let stats = pipeline.last_step();
            let done: Vec<_> = stats.slots.iter().map(|s| s.action).collect();
            assert_eq!(done, pipeline.plan().actions(group.rank()));
            assert_eq!(stats.peak_in_flight, pipeline.plan().peak_in_flight(group.rank()));
            // Inputs and outputs of two rows each, f64; the last stage's output is the loss alone.
            assert!(stats.peak_held_bytes <= stats.peak_in_flight * 2 * 2 * WIDTH as usize * 8);
            let sends = done.iter().filter(|a| match a.pass {
                Pass::Forward => a.stage + 1 < pipeline.plan().stages(),
                _ => a.stage > 0,
            });
            assert_eq!(stats.bytes_sent, sends.count() * 2 * WIDTH as usize * 8);
            let measured = pipeline.measured().unwrap();
            assert_eq!(measured.ranks().len(), 4);
            assert!(measured.to_string().contains("measured"));
        });
    }
    // The memory of 1F1B does not grow with the micro-batches, that of GPipe does.
    let peak = |schedule, m| Plan::new(schedule, 4, 1, m).unwrap().peak_in_flight(0);
    assert_eq!((peak(Schedule::OneFOneB, 8), peak(Schedule::OneFOneB, 64)), (4, 4));
    assert_eq!((peak(Schedule::GPipe, 8), peak(Schedule::GPipe, 64)), (8, 64));
}

#[test]
fn a_frozen_tied_weight_gets_no_gradient_and_weight_decay_leaves_it_alone() {
    run_threads(2, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let tied = vs.root().ones("tied", &[2, 2]);
        let own = vs.root().ones("own", &[2]);
        let mut optimizer = nn::AdamW { wd: 0.5, ..Default::default() }.build(&vs, 0.1).unwrap();
        let _ = tied.set_requires_grad(false);
        let (used, bias) = (tied.shallow_clone(), own.shallow_clone());
        let stage = Stage::new(nn::func(move |xs| xs.matmul(&used) + &bias));
        let pipeline = Pipeline::new(vec![stage], 2, Schedule::OneFOneB, &group).unwrap();
        pipeline.tie(&[0, 1], Some(&tied)).unwrap();
        let xs = Tensor::ones([4, 2], (Kind::Float, Device::Cpu));
        for _ in 0..2 {
            let square = |ys: &Tensor, _: &Tensor| ys.square().mean(Kind::Float);
            pipeline.step(Some(&xs), Some(&xs), square).unwrap();
            assert!(!tied.grad().defined());
            optimizer.step();
        }
        assert_eq!(tied, Tensor::ones([2, 2], (Kind::Float, Device::Cpu)));
        assert_ne!(own, Tensor::ones([2], (Kind::Float, Device::Cpu)));
    });
}

/// Lets no rank drop what it has before all ranks are here.
fn meet(here: &AtomicUsize, ranks: usize) {
    here.fetch_add(1, Ordering::SeqCst);
    let deadline = Instant::now() + Duration::from_secs(60);
    while here.load(Ordering::SeqCst) < ranks {
        assert!(Instant::now() < deadline, "not all ranks have ended");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_stage_that_fails_in_its_last_backward_ends_who_shares_its_weight_and_has_only_its_sum_to_do() {
    for schedule in [Schedule::GPipe, Schedule::OneFOneB] {
        let here = AtomicUsize::new(0);
        let options = InitOptions::new().timeout(Duration::from_secs(20));
        let errors = run_threads_on("native", options, 3, |group| {
            let rank = group.rank();
            let vs = nn::VarStore::new(Device::Cpu);
            let tied = vs.root().ones("tied", &[2, 2]);
            let used = tied.shallow_clone();
            let stage = Stage::new(nn::func(move |xs| xs.matmul(&used)));
            let pipeline = Pipeline::new(vec![stage], 2, schedule, &group).unwrap();
            pipeline.tie(&[0, 2], (rank != 1).then_some(&tied)).unwrap();
            let mut backwards = 0;
            let _hook = (rank == 0).then(|| {
                tch_distributed::autograd::on_grad_accumulated(&tied, move |_| {
                    backwards += 1;
                    match backwards {
                        2 => Err(Error::Callback { reason: "out of luck".to_owned() }),
                        _ => Ok(()),
                    }
                })
            });
            let xs = Tensor::ones([4, 2], (Kind::Float, Device::Cpu));
            // Stage 1 shares nothing, and may be done with the step before the failure: it hears of it in the next.
            let steps = [(); 2].map(|()| pipeline.step(Some(&xs), Some(&xs), mse).map_err(|e| e.to_string()));
            meet(&here, 3);
            let first = if rank == 1 { 1 } else { 0 };
            steps.into_iter().nth(first).unwrap().unwrap_err()
        });
        for (rank, error) in errors.iter().enumerate() {
            for words in ["rank 0", "stage 0", "out of luck"] {
                assert!(error.contains(words), "rank {rank}: {error}");
            }
        }
    }
}

#[test]
fn a_stage_that_fails_on_one_of_the_ranks_that_share_it_ends_the_others_and_both_pipelines() {
    let here = AtomicUsize::new(0);
    let options = InitOptions::new().timeout(Duration::from_secs(20));
    let errors = run_threads_on("native", options, 4, |world| {
        let mesh = DeviceMesh::new(&world, &[("pp", 2), ("tp", 2)]).unwrap();
        let [pp, tp] = ["pp", "tp"].map(|axis| mesh.group(axis).unwrap());
        let unlucky = mesh.coordinates() == [1, 0];
        let stage = Stage::from_fn(move |xs, _| match unlucky {
            true => Err(Error::Callback { reason: "out of luck".to_owned() }),
            false => Ok(vec![functional::reduce_from_group(&xs[0], &tp)?]),
        });
        let pipeline = Pipeline::new(vec![stage], 2, Schedule::OneFOneB, &pp).unwrap();
        let xs = Tensor::ones([4, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let step = pipeline.step(Some(&xs), Some(&xs), mse).map_err(|e| e.to_string());
        meet(&here, 4);
        step.unwrap_err()
    });
    for (rank, error) in errors.iter().enumerate() {
        assert!(error.contains("stage 1") && error.contains("out of luck"), "rank {rank}: {error}");
    }
}
