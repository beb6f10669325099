//! Dropout in split layers: which rank drops what, and that a forward computed again drops the same.

use tch::nn::{self, Module};
use tch::{Device, Kind, Reduction, Tensor};
use tch_distributed::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use tch_distributed::model_parallel::tensor::{
    Activation, AttentionConfig, Layout, ParallelDropout, ParallelLinearConfig, ParallelMlp,
    ParallelSelfAttention,
};
use tch_distributed::testing::run_threads;
use tch_distributed::{Error, ProcessGroup, functional};

const D: (Kind, Device) = (Kind::Double, Device::Cpu);

fn wave(shape: &[i64], phase: f64) -> Tensor {
    let n: i64 = shape.iter().product();
    ((Tensor::arange(n, D) * 0.37 + phase).sin() * 0.5).reshape(shape)
}

/// max|a - b| <= 1e-10 max|b|
fn assert_close(what: &str, a: &Tensor, b: &Tensor) {
    let (off, most) = ((a - b).abs().max().double_value(&[]), b.abs().max().double_value(&[]));
    assert!(off <= 1e-10 * most.max(1e-3), "{what}: off by {off}, largest {most}");
}

fn loss(ys: &Tensor) -> Tensor {
    (ys * wave(&ys.size(), 0.2)).sum(Kind::Double)
}

/// What all ranks keep and by how much they scale it, put together along `dim`: from streams like the layer's own.
fn keeps(p: f64, seed: u64, part: &[i64], dim: i64, group: &ProcessGroup) -> Tensor {
    let like = ParallelDropout::split(p, seed, Device::Cpu, group).unwrap();
    let mine = like.forward(&Tensor::ones(part, D), true).unwrap();
    functional::all_gather(&mine, dim, group).unwrap()
}

/// Fills the layer with known weights, and gives the whole ones, which require gradients.
fn whole(vs: &mut nn::VarStore, layout: &Layout) -> impl Fn(&str) -> Tensor + use<> {
    vs.double();
    let all: std::collections::BTreeMap<_, _> = vs.variables().into_iter().collect();
    for (i, (name, mut own)) in all.into_iter().enumerate() {
        let mut size = own.size();
        if let Some(shard) = layout.shard(&name) {
            size[shard.dim()] = shard.full_len();
        }
        let part = layout.take(&name, &wave(&size, i as f64)).unwrap();
        tch::no_grad(|| own.copy_(&part));
    }
    let full: std::collections::BTreeMap<_, _> = vs
        .variables()
        .into_iter()
        .collect::<std::collections::BTreeMap<_, _>>()
        .into_iter()
        .map(|(name, own)| (name.clone(), layout.full(&name, &own).unwrap().copy().set_requires_grad(true)))
        .collect();
    move |name| full[name].shallow_clone()
}

#[test]
fn each_rank_drops_attention_weights_of_its_own_heads_as_the_whole_layer_with_these_masks() {
    let (heads, width, sequence, p) = (8, 16, 5, 0.4);
    for n in [1, 2, 4, 8] {
        run_threads(n, |group| {
            let mut vs = nn::VarStore::new(Device::Cpu);
            let config = AttentionConfig { heads, ..Default::default() };
            let (layer, layout) = Layout::record(&group, || {
                ParallelSelfAttention::new(vs.root(), width, config, &group)
                    .unwrap()
                    .with_dropout(p, 7)
                    .unwrap()
            });
            let full = whole(&mut vs, &layout);
            let x = wave(&[2, sequence, width], 0.4).set_requires_grad(true);
            let ys = layer.f_forward_t(&x, true).unwrap();
            loss(&ys).backward();

            // By the book, on one rank.
            let x0 = wave(&[2, sequence, width], 0.4).set_requires_grad(true);
            let [wq, bq, wo, bo] = ["qkv.weight", "qkv.bias", "out.weight", "out.bias"].map(&full);
            let parts = x0.linear(&wq, Some(&bq)).chunk(3, -1);
            let by_head = |t: &Tensor| t.reshape([2, sequence, heads, width / heads]).transpose(1, 2);
            let [q, k, v] = [by_head(&parts[0]), by_head(&parts[1]), by_head(&parts[2])];
            let later = Tensor::ones([sequence, sequence], (Kind::Bool, Device::Cpu)).triu(1);
            let scores = q.matmul(&k.transpose(-2, -1)) / ((width / heads) as f64).sqrt();
            let weights = scores.masked_fill(&later, f64::NEG_INFINITY).softmax(-1, Kind::Double);
            let masks = keeps(p, 7, &[2, heads / n as i64, sequence, sequence], 1, &group);
            let expected = (weights * &masks).matmul(&v).transpose(1, 2).reshape([2, sequence, width]);
            let expected = expected.linear(&wo, Some(&bo));
            loss(&expected).backward();
            assert_close("ys", &ys, &expected);
            assert_close("dx", &x.grad(), &x0.grad());
            for (name, grad) in layout.full_gradients(&vs).unwrap() {
                assert_close(&name, &grad, &full(&name).grad());
            }
            // Ranks drop different things, and about as much as they should.
            if n > 1 {
                assert_ne!(
                    masks.narrow(1, 0, heads / n as i64),
                    masks.narrow(1, heads / n as i64, heads / n as i64)
                );
            }
            let dropped = masks.eq(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
            assert!((dropped - p).abs() < 0.12, "{dropped}");
            // Not in training nothing is dropped.
            assert_eq!(layer.f_forward(&x).unwrap(), layer.f_forward_t(&x, false).unwrap());
            assert_eq!(layer.forward(&x), layer.f_forward(&x).unwrap());
            assert_ne!(layer.f_forward(&x).unwrap(), ys);
        });
    }
}

#[test]
fn keys_that_several_heads_share_are_dropped_for_each_head_by_itself() {
    run_threads(2, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let config = AttentionConfig { heads: 8, kv_heads: Some(2), ..Default::default() };
        let plain = ParallelSelfAttention::new(vs.root(), 16, config, &group).unwrap();
        let x = wave(&[2, 5, 16], 0.1).to_kind(Kind::Float);
        let expected = plain.f_forward(&x).unwrap();
        // A probability of zero takes the same way as any other, and drops nothing.
        let layer = plain.with_dropout(0.0, 1).unwrap();
        let ys = layer.f_forward_t(&x, true).unwrap();
        assert!(ys.allclose(&expected, 1e-5, 1e-6, false));
    });
}

#[test]
fn each_rank_drops_hidden_features_of_its_own_share() {
    let p = 0.3;
    for n in [1, 2, 4] {
        for activation in [Activation::Relu, Activation::SwiGlu] {
            run_threads(n, |group| {
                let mut vs = nn::VarStore::new(Device::Cpu);
                let config = ParallelLinearConfig::default();
                let (layer, layout) = Layout::record(&group, || {
                    let mlp = ParallelMlp::new(vs.root(), 6, 12, activation, config, &group);
                    mlp.unwrap().with_dropout(p, 3).unwrap()
                });
                let full = whole(&mut vs, &layout);
                let x = wave(&[5, 6], 0.4).set_requires_grad(true);
                let ys = layer.f_forward_t(&x, true).unwrap();
                loss(&ys).backward();

                let x0 = wave(&[5, 6], 0.4).set_requires_grad(true);
                let [wu, bu, wd, bd] = ["up.weight", "up.bias", "down.weight", "down.bias"].map(&full);
                let up = x0.linear(&wu, Some(&bu));
                let hidden = match activation {
                    Activation::SwiGlu => up.narrow(-1, 0, 12).silu() * up.narrow(-1, 12, 12),
                    _ => up.relu(),
                };
                let masks = keeps(p, 3, &[5, 12 / n as i64], 1, &group);
                let expected = (hidden * masks).linear(&wd, Some(&bd));
                loss(&expected).backward();
                assert_close("ys", &ys, &expected);
                assert_close("dx", &x.grad(), &x0.grad());
                for (name, grad) in layout.full_gradients(&vs).unwrap() {
                    assert_close(&name, &grad, &full(&name).grad());
                }
            });
        }
    }
}

#[test]
fn replicated_streams_are_one_split_ones_are_independent_and_both_can_be_set_back() {
    let masks = run_threads(4, |group| {
        let ones = Tensor::ones([4096], D);
        let numbers = |t: Tensor| Vec::<f64>::try_from(t).unwrap();
        let same = ParallelDropout::replicated(0.5, 7, Device::Cpu).unwrap();
        let own = ParallelDropout::split(0.5, 7, Device::Cpu, &group).unwrap();
        let state = own.generator().get_state().unwrap();
        let first = own.forward(&ones, true).unwrap();
        own.generator().set_state(&state).unwrap();
        assert_eq!(own.forward(&ones, true).unwrap(), first, "set back, it drops the same");
        assert_ne!(own.forward(&ones, true).unwrap(), first, "gone on, it does not");
        assert_eq!(own.forward(&ones, false).unwrap(), ones);
        (numbers(same.forward(&ones, true).unwrap()), numbers(first))
    });
    for (rank, (same, own)) in masks.iter().enumerate() {
        assert_eq!(*same, masks[0].0);
        for (_, other) in &masks[..rank] {
            // Two fair coins agree half the time: 4096 throws leave 0.5 by less than six standard deviations.
            let agree = own.iter().zip(other).filter(|(a, b)| a == b).count() as f64 / 4096.0;
            assert!((agree - 0.5).abs() < 6.0 * 0.5 / 64.0, "{agree}");
        }
    }
    let error = ParallelDropout::replicated(1.5, 0, Device::Cpu).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { argument: "p", .. }), "{error}");
}

#[test]
fn a_stage_that_is_computed_again_drops_what_it_dropped_before() {
    let train = |recompute: bool, schedule| {
        run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let t = wave(&[6, 6], group.rank() as f64);
            let w = vs.root().add("w", t, true);
            let dropout = ParallelDropout::replicated(0.5, group.rank() as u64, Device::Cpu).unwrap();
            let stage = Stage::from_fn(move |xs, train| {
                // Twice, so that the order of draws matters too.
                let hidden = dropout.forward(&xs[0].f_matmul(&w)?, train)?;
                Ok(vec![dropout.forward(&hidden.f_tanh()?, train)?])
            });
            let pipeline = Pipeline::new(vec![stage.recompute(recompute)], 4, schedule, &group).unwrap();
            let mut losses = Vec::new();
            for step in 0..3 {
                let xs = wave(&[8, 6], step as f64);
                let mse = |ys: &Tensor, ts: &Tensor| ys.mse_loss(ts, Reduction::Mean);
                let loss = pipeline.step(Some(&xs), Some(&xs), mse).unwrap();
                losses.extend(loss.map(|l| l.double_value(&[])));
            }
            let grad = Vec::<f64>::try_from(vs.variables()["w"].grad().reshape([-1])).unwrap();
            (losses, grad)
        })
    };
    for schedule in [Schedule::GPipe, Schedule::OneFOneB] {
        // To the bit: with micro-batches in flight, each has its own draws.
        assert_eq!(train(true, schedule), train(false, schedule));
    }
}
