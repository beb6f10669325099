//! Tensor-parallel layers against the unsplit layer: values and every gradient.

use tch::nn::{self, Module};
use tch::{Device, Kind, Reduction, Tensor};
use tch_distributed::model_parallel::DeviceMesh;
use tch_distributed::model_parallel::tensor::{
    Activation, AttentionConfig, ColumnParallelLinear, IGNORED_TARGET, Layout, ParallelLayerNorm,
    ParallelLinearConfig, ParallelMlp, ParallelSelfAttention, RowParallelLinear, VocabParallelEmbedding,
    join_sequence, split_sequence, vocab_parallel_cross_entropy,
};
use tch_distributed::testing::{run_processes, run_threads};
use tch_distributed::{self as dist, Error, ProcessGroup, functional};

const D: (Kind, Device) = (Kind::Double, Device::Cpu);
const KINDS: [(Kind, f64); 2] = [(Kind::Double, 1e-10), (Kind::Float, 1e-5)];

fn wave(shape: &[i64], phase: f64, kind: Kind) -> Tensor {
    let n: i64 = shape.iter().product();
    ((Tensor::arange(n, D) * 0.37 + phase).sin() * 0.5).reshape(shape).to_kind(kind)
}

/// max|a - b| <= tolerance * max|b|
fn assert_close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.size(), b.size(), "{what}");
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let (off, most) = ((&a - &b).abs().max().double_value(&[]), b.abs().max().double_value(&[]));
    assert!(off <= tolerance * most.max(1e-3), "{what}: off by {off}, largest {most}");
}

fn loss(ys: &Tensor) -> Tensor {
    (ys * wave(&ys.size(), 0.2, ys.kind())).sum(ys.kind()) + ys.square().mean(ys.kind())
}

/// A linear layer of 6 inputs and 7 outputs, which no number of ranks but one divides.
fn unsplit(kind: Kind) -> (Tensor, Tensor, Tensor) {
    let leaf = |t: Tensor| t.set_requires_grad(true);
    (leaf(wave(&[5, 6], 0.0, kind)), leaf(wave(&[7, 6], 1.0, kind)), leaf(wave(&[7], 2.0, kind)))
}

#[test]
fn a_column_parallel_layer_is_the_linear_layer_gathered_or_kept() {
    for n in [1, 2, 4, 8] {
        for (kind, tolerance) in KINDS {
            run_threads(n, |group| {
                let (x0, w0, b0) = unsplit(kind);
                let expected = x0.linear(&w0, Some(&b0));
                loss(&expected).backward();
                for gather_output in [true, false] {
                    let (x, w, b) = unsplit(kind);
                    let vs = nn::VarStore::new(Device::Cpu);
                    let config = ParallelLinearConfig { gather_output, ..Default::default() };
                    let (layer, layout) = Layout::record(&group, || {
                        ColumnParallelLinear::from_full(
                            vs.root(),
                            &w.detach(),
                            Some(&b.detach()),
                            config,
                            &group,
                        )
                    });
                    let ys = layer.unwrap().forward(&x);
                    let ys = if gather_output {
                        ys
                    } else {
                        functional::gather_from_group(&ys, -1, &group).unwrap()
                    };
                    assert_close("ys", &ys, &expected, tolerance);
                    loss(&ys).backward();
                    assert_close("dx", &x.grad(), &x0.grad(), tolerance);
                    let grads = layout.full_gradients(&vs).unwrap();
                    assert_close("dw", &grads["weight"], &w0.grad(), tolerance);
                    assert_close("db", &grads["bias"], &b0.grad(), tolerance);
                }
            });
        }
    }
}

#[test]
fn a_row_parallel_layer_is_the_linear_layer_with_its_bias_added_once() {
    for n in [1, 2, 4, 8] {
        for (kind, tolerance) in KINDS {
            run_threads(n, |group| {
                let (x0, w0, b0) = unsplit(kind);
                let expected = x0.linear(&w0, Some(&b0));
                loss(&expected).backward();
                for input_is_parallel in [true, false] {
                    let (x, w, b) = unsplit(kind);
                    let vs = nn::VarStore::new(Device::Cpu);
                    let config = ParallelLinearConfig { input_is_parallel, ..Default::default() };
                    let (layer, layout) = Layout::record(&group, || {
                        RowParallelLinear::from_full(
                            vs.root(),
                            &w.detach(),
                            Some(&b.detach()),
                            config,
                            &group,
                        )
                    });
                    let part = match input_is_parallel {
                        true => functional::scatter_to_group(&x, 1, &group).unwrap(),
                        false => x.shallow_clone(),
                    };
                    let ys = layer.unwrap().forward(&part);
                    assert_close("ys", &ys, &expected, tolerance);
                    loss(&ys).backward();
                    assert_close("dx", &x.grad(), &x0.grad(), tolerance);
                    let grads = layout.full_gradients(&vs).unwrap();
                    assert_close("dw", &grads["weight"], &w0.grad(), tolerance);
                    assert_close("db", &grads["bias"], &b0.grad(), tolerance);
                }
            });
        }
    }
}

/// Every layer with the group of one rank is the unsplit model; this runs `build` on one rank and on `n`, with the same
/// full weights, and compares the output and all gradients.
fn compare(
    n: usize,
    kind: Kind,
    tolerance: f64,
    model: impl Fn(&nn::Path, &ProcessGroup) -> Box<dyn Fn(&Tensor) -> Tensor> + Sync,
    input: impl Fn() -> Tensor + Sync,
) {
    run_threads(n, |group| compare_on(&group, kind, tolerance, &model, &input));
}

fn compare_on(
    group: &ProcessGroup,
    kind: Kind,
    tolerance: f64,
    model: impl Fn(&nn::Path, &ProcessGroup) -> Box<dyn Fn(&Tensor) -> Tensor>,
    input: impl Fn() -> Tensor,
) {
    let own = group.new_group(&[0]).unwrap();
    let own = own.unwrap_or_else(|| group.clone());
    let fill = |vs: &nn::VarStore, layout: &Layout, shapes: &dyn Fn(&str) -> Vec<i64>| {
        let phase = |name: &str| name.bytes().map(f64::from).sum::<f64>();
        layout.fill(vs, |name| Some(wave(&shapes(name), phase(name), kind))).unwrap();
    };
    // The shapes of the full weights, from the split ones.
    let mut vs = nn::VarStore::new(Device::Cpu);
    let (forward, layout) = Layout::record(group, || model(&vs.root(), group));
    if kind == Kind::Double {
        vs.double();
    }
    let sizes: std::collections::HashMap<String, Vec<i64>> = vs
        .variables()
        .into_iter()
        .map(|(name, t)| {
            let mut size = t.size();
            if let Some(shard) = layout.shard(&name) {
                size[shard.dim()] = shard.full_len();
            }
            (name, size)
        })
        .collect();
    let shapes = |name: &str| sizes[name].clone();
    fill(&vs, &layout, &shapes);
    let x = input();
    let differentiable = x.is_floating_point();
    let x = x.set_requires_grad(differentiable);
    let ys = forward(&x);
    loss(&ys).backward();
    let grads = layout.full_gradients(&vs).unwrap();
    assert_eq!(grads.len(), vs.variables().len(), "every parameter has a gradient");
    if group.rank() != 0 {
        return;
    }
    let mut one = nn::VarStore::new(Device::Cpu);
    let (forward, layout) = Layout::record(&own, || model(&one.root(), &own));
    if kind == Kind::Double {
        one.double();
    }
    fill(&one, &layout, &shapes);
    let x1 = input().set_requires_grad(differentiable);
    let expected = forward(&x1);
    loss(&expected).backward();
    assert_close("ys", &ys, &expected, tolerance);
    if differentiable {
        assert_close("dx", &x.grad(), &x1.grad(), tolerance);
    }
    for (name, t) in one.variables() {
        assert_close(&name, &grads[&name], &t.grad(), tolerance);
    }
}

/// Into a region whose sequence is split and out of it again, where asked for.
fn around(
    sequence_parallel: bool,
    group: &ProcessGroup,
    layer: impl Fn(&Tensor) -> Tensor + 'static,
) -> Box<dyn Fn(&Tensor) -> Tensor> {
    let group = group.clone();
    Box::new(move |x| match sequence_parallel {
        false => layer(x),
        true => join_sequence(&layer(&split_sequence(x, &group).unwrap()), &group).unwrap(),
    })
}

#[test]
fn feed_forward_layers_with_every_activation_equal_the_unsplit_ones_also_with_split_sequences() {
    for n in [1, 2, 4, 8] {
        for (kind, tolerance) in KINDS {
            for activation in [Activation::Gelu, Activation::SwiGlu] {
                for sequence_parallel in [false, true] {
                    let model = |path: &nn::Path, group: &ProcessGroup| {
                        let config = ParallelLinearConfig { sequence_parallel, ..Default::default() };
                        let mlp = ParallelMlp::new(path, 6, 12, activation, config, group).unwrap();
                        around(sequence_parallel, group, move |x| mlp.forward(x))
                    };
                    compare(n, kind, tolerance, model, || wave(&[2, 8, 6], 0.4, kind));
                }
            }
        }
    }
}

#[test]
fn attention_split_by_heads_equals_the_unsplit_one_also_with_shared_keys_and_split_sequences() {
    for n in [1, 2, 4, 8] {
        for (kind, tolerance) in KINDS {
            // As many heads for keys as for queries, or half as many where that divides by the ranks.
            for kv_heads in [None, Some(8.min(4.max(n as i64)))] {
                for sequence_parallel in [false, true] {
                    let model = |path: &nn::Path, group: &ProcessGroup| {
                        let config =
                            AttentionConfig { heads: 8, kv_heads, sequence_parallel, ..Default::default() };
                        let attention = ParallelSelfAttention::new(path, 16, config, group).unwrap();
                        around(sequence_parallel, group, move |x| attention.forward(x))
                    };
                    compare(n, kind, tolerance, model, || wave(&[2, 8, 16], 0.4, kind));
                }
            }
        }
    }
}

#[test]
fn a_norm_on_a_split_sequence_has_the_gradients_of_the_whole() {
    for n in [1, 2, 4, 8] {
        for (kind, tolerance) in KINDS {
            for sequence_parallel in [false, true] {
                let model = |path: &nn::Path, group: &ProcessGroup| {
                    let norm = ParallelLayerNorm::new(path, 6, Default::default(), sequence_parallel, group);
                    around(sequence_parallel, group, move |x| norm.forward(x))
                };
                compare(n, kind, tolerance, model, || wave(&[2, 8, 6], 0.4, kind));
            }
        }
    }
}

#[test]
fn a_vocabulary_split_over_ranks_embeds_as_a_whole_one_and_its_tied_head_never_gathers_logits() {
    for n in [1, 2, 4, 8] {
        for (kind, tolerance) in KINDS {
            for sequence_parallel in [false, true] {
                // 11 tokens: no number of ranks divides them.
                let model = |path: &nn::Path, group: &ProcessGroup| -> Box<dyn Fn(&Tensor) -> Tensor> {
                    let config = ParallelLinearConfig { sequence_parallel, ..Default::default() };
                    let table = VocabParallelEmbedding::new(path, 11, 6, config, group).unwrap();
                    let group = group.clone();
                    Box::new(move |ids| {
                        let logits = table.logits(&table.forward(ids)).unwrap();
                        let targets = (ids * 3 + 1).remainder(11);
                        vocab_parallel_cross_entropy(&logits, &targets, &group).unwrap()
                    })
                };
                let ids = || Tensor::arange(16, (Kind::Int64, Device::Cpu)).remainder(11).reshape([2, 8]);
                compare(n, kind, tolerance, model, ids);
            }
        }
    }
}

#[test]
fn split_cross_entropy_is_torch_s_own_with_ignored_targets_and_large_logits() {
    for n in [1, 2, 3, 4, 8] {
        for (kind, tolerance) in KINDS {
            run_threads(n, |group| {
                let full = (wave(&[6, 9], 0.1, kind) * 200.0).set_requires_grad(true);
                let targets = Tensor::from_slice(&[0_i64, 8, IGNORED_TARGET, 4, 3, 8]);
                let expected =
                    full.cross_entropy_loss::<Tensor>(&targets, None, Reduction::None, IGNORED_TARGET, 0.0);
                let shares = wave(&[6], 3.0, kind);
                (&expected * &shares).sum(kind).backward();

                let range = functional::shard_range(9, group.rank(), n);
                let len = range.end - range.start;
                let local = full.detach().narrow(1, range.start, len).set_requires_grad(true);
                let losses = vocab_parallel_cross_entropy(&local, &targets, &group).unwrap();
                assert_close("losses", &losses, &expected, tolerance);
                (&losses * &shares).sum(kind).backward();
                assert_close("dlogits", &local.grad(), &full.grad().narrow(1, range.start, len), tolerance);
            });
        }
    }
}

#[test]
fn split_cross_entropy_is_torch_s_own_where_columns_are_masked_and_where_ranks_have_none_or_there_are_no_tokens()
 {
    // Ten columns on four ranks are 3, 3, 2 and 2: the masked ones are all that the last rank has.
    for (n, columns, masked) in [(4, 10, 2), (1, 10, 2), (4, 3, 0), (8, 5, 1)] {
        for (kind, tolerance) in KINDS {
            run_threads(n, |group| {
                let full = wave(&[5, columns], 0.1, kind);
                let _ = full.narrow(1, columns - masked, masked).fill_(f64::NEG_INFINITY);
                let full = full.set_requires_grad(true);
                let targets = Tensor::from_slice(&[0_i64, 1, IGNORED_TARGET, 2, 0]);
                let expected =
                    full.cross_entropy_loss::<Tensor>(&targets, None, Reduction::None, IGNORED_TARGET, 0.0);
                expected.sum(kind).backward();
                let range = functional::shard_range(columns, group.rank(), n);
                let len = range.end - range.start;
                let local = full.detach().narrow(1, range.start, len).set_requires_grad(true);
                let losses = vocab_parallel_cross_entropy(&local, &targets, &group).unwrap();
                assert_close("losses", &losses, &expected, tolerance);
                losses.sum(kind).backward();
                let expected = full.grad().narrow(1, range.start, len);
                assert!(local.grad().allclose(&expected, 0.0, tolerance, false), "{}", local.grad());

                let none = Tensor::zeros([2, 0], (Kind::Int64, Device::Cpu));
                let empty = Tensor::zeros([2, 0, len], (kind, Device::Cpu)).set_requires_grad(true);
                let losses = vocab_parallel_cross_entropy(&empty, &none, &group).unwrap();
                assert_eq!(losses.size(), [2, 0]);
            });
        }
    }
}

#[test]
fn an_ignored_token_counts_nothing_even_where_its_logits_are_no_numbers() {
    run_threads(2, |group| {
        let logits = Tensor::from_slice(&[0.0, 0.0, f64::NAN, f64::INFINITY]).reshape([2, 2]);
        let logits = logits.set_requires_grad(true);
        let targets = Tensor::from_slice(&[1_i64, IGNORED_TARGET]);
        let losses = vocab_parallel_cross_entropy(&logits, &targets, &group).unwrap();
        assert_eq!(losses.double_value(&[1]), 0.0);
        assert!((losses.double_value(&[0]) - 4_f64.ln()).abs() < 1e-12);
        losses.sum(Kind::Double).backward();
        let at_target = if group.rank() == 0 { -0.75 } else { 0.25 };
        assert_eq!(Vec::<f64>::try_from(logits.grad().reshape([-1])).unwrap(), [0.25, at_target, 0.0, 0.0]);
    });
}

#[test]
fn targets_that_are_no_integers_are_refused_before_anything_is_sent() {
    run_threads(2, |group| {
        for kind in [Kind::Float, Kind::Double, Kind::Bool] {
            let targets = Tensor::zeros([3], (kind, Device::Cpu));
            let error =
                vocab_parallel_cross_entropy(&Tensor::zeros([3, 2], D), &targets, &group).unwrap_err();
            assert!(matches!(error, Error::KindMismatch { argument: "targets", .. }), "{error}");
        }
        let targets = Tensor::zeros([3], (Kind::Uint8, Device::Cpu));
        let losses = vocab_parallel_cross_entropy(&Tensor::zeros([3, 2], D), &targets, &group).unwrap();
        assert!((losses.double_value(&[0]) - 4_f64.ln()).abs() < 1e-12);
    });
}

#[test]
fn ranks_as_processes_compute_every_layer_alike() {
    run_processes(2, "ranks_as_processes_compute_every_layer_alike", || {
        let group = dist::init_process_group("native", dist::InitOptions::new()).unwrap();
        let config = ParallelLinearConfig { sequence_parallel: true, ..Default::default() };
        let (kind, tolerance) = KINDS[0];
        let sequence = || wave(&[2, 8, 16], 0.4, kind);
        let around = |group: &ProcessGroup, layer: Box<dyn Fn(&Tensor) -> Tensor>| around(true, group, layer);
        let mlp = |path: &nn::Path, group: &ProcessGroup| {
            let mlp = ParallelMlp::new(path, 16, 12, Activation::SwiGlu, config, group).unwrap();
            around(group, Box::new(move |x| mlp.forward(x)))
        };
        compare_on(&group, kind, tolerance, mlp, sequence);
        let attention = |path: &nn::Path, group: &ProcessGroup| {
            let config = AttentionConfig { heads: 4, sequence_parallel: true, ..Default::default() };
            let attention = ParallelSelfAttention::new(path, 16, config, group).unwrap();
            around(group, Box::new(move |x| attention.forward(x)))
        };
        compare_on(&group, kind, tolerance, attention, sequence);
        let norm = |path: &nn::Path, group: &ProcessGroup| {
            let norm = ParallelLayerNorm::new(path, 16, Default::default(), true, group);
            around(group, Box::new(move |x| norm.forward(x)))
        };
        compare_on(&group, kind, tolerance, norm, sequence);
        let head = |path: &nn::Path, group: &ProcessGroup| -> Box<dyn Fn(&Tensor) -> Tensor> {
            let table = VocabParallelEmbedding::new(path, 11, 6, config, group).unwrap();
            let group = group.clone();
            Box::new(move |ids| {
                let logits = table.logits(&table.forward(ids)).unwrap();
                vocab_parallel_cross_entropy(&logits, &(ids * 3 + 1).remainder(11), &group).unwrap()
            })
        };
        let ids = || Tensor::arange(16, (Kind::Int64, Device::Cpu)).remainder(11).reshape([2, 8]);
        compare_on(&group, kind, tolerance, head, ids);
        dist::destroy_process_group().unwrap();
    });
}

#[test]
fn sizes_that_do_not_fit_are_refused_with_what_was_expected() {
    run_threads(2, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let config = AttentionConfig { heads: 3, ..Default::default() };
        let error = ParallelSelfAttention::new(vs.root(), 12, config, &group).unwrap_err().to_string();
        assert!(error.contains("heads") && error.contains("3 / 2"), "{error}");
        let linear = ParallelLinearConfig::default();
        let error = ColumnParallelLinear::new(vs.root(), 4, 0, linear, &group).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { argument: "out_dim", .. }), "{error}");

        let layer = ColumnParallelLinear::new(vs.root(), 4, 4, linear, &group).unwrap();
        let error = layer.f_forward(&wave(&[2, 5], 0.0, Kind::Float)).unwrap_err();
        assert!(
            matches!(&error, Error::ShapeMismatch { .. }) && error.to_string().contains("4 in the last"),
            "{error}"
        );
        let error = split_sequence(&wave(&[1, 3, 4], 0.0, Kind::Float), &group).unwrap_err().to_string();
        assert!(error.contains("a multiple of the 2 ranks"), "{error}");

        let (weight, bias) = (wave(&[4, 4], 0.0, Kind::Float), wave(&[3], 0.0, Kind::Float));
        let columns =
            ColumnParallelLinear::from_full(vs.root(), &weight, Some(&bias), linear, &group).unwrap_err();
        let rows = RowParallelLinear::from_full(vs.root(), &weight, Some(&bias), linear, &group).unwrap_err();
        for error in [columns, rows] {
            assert!(matches!(error, Error::ShapeMismatch { argument: "bias", .. }), "{error}");
        }

        let table = VocabParallelEmbedding::new(vs.root(), 5, 4, linear, &group).unwrap();
        let error = table.f_forward(&Tensor::from_slice(&[1_i64, 5])).unwrap_err().to_string();
        assert!(error.contains("5 is outside the vocabulary of 5"), "{error}");
        let logits = wave(&[2, 3], 0.0, Kind::Float);
        let error = vocab_parallel_cross_entropy(&logits, &Tensor::from_slice(&[0_i64]), &group).unwrap_err();
        assert!(matches!(error, Error::ShapeMismatch { argument: "targets", .. }), "{error}");
        let error =
            vocab_parallel_cross_entropy(&logits, &Tensor::from_slice(&[0_i64, 6]), &group).unwrap_err();
        assert!(error.to_string().contains("6 is outside the vocabulary of 6"), "{error}");
        group.barrier().unwrap();
    });
}

#[test]
fn a_mesh_gives_groups_by_axis_sub_meshes_and_flat_groups() {
    run_threads(8, |world| {
        let mesh = DeviceMesh::new(&world, &[("dp", 2), ("pp", 2), ("tp", 2)]).unwrap();
        let rank = world.rank();
        let [dp, pp, tp] = [rank / 4, rank / 2 % 2, rank % 2];
        assert_eq!(mesh.coordinates(), [dp, pp, tp]);
        assert_eq!(mesh.axes(), [("dp", 2), ("pp", 2), ("tp", 2)]);
        assert_eq!(mesh.rank_at(&[dp, pp, tp]).unwrap(), rank);
        // Who is in a group is said by a sum of powers of two.
        let members = |group: &ProcessGroup| {
            let mut sum = Tensor::from(1_i64 << rank);
            group.all_reduce(&mut sum, tch_distributed::ReduceOp::Sum).unwrap();
            sum.int64_value(&[])
        };
        let bits = |ranks: &[usize]| {
            ranks.iter().map(|&r| 1_i64 << mesh.rank_at(&[r / 4, r / 2 % 2, r % 2]).unwrap()).sum::<i64>()
        };
        assert_eq!(members(&mesh.group("tp").unwrap()), bits(&[rank - tp, rank - tp + 1]));
        assert_eq!(members(&mesh.group("pp").unwrap()), bits(&[rank - 2 * pp, rank - 2 * pp + 2]));
        assert_eq!(members(&mesh.group("dp").unwrap()), bits(&[rank % 4, rank % 4 + 4]));
        assert_eq!(
            [mesh.rank("dp").unwrap(), mesh.rank("tp").unwrap(), mesh.size("pp").unwrap()],
            [dp, tp, 2]
        );

        let model = mesh.flatten(&["pp", "tp"]).unwrap();
        assert_eq!((model.rank(), model.size()), (rank % 4, 4));
        assert_eq!(members(&model), bits(&[4 * dp, 4 * dp + 1, 4 * dp + 2, 4 * dp + 3]));
        assert_eq!(
            mesh.flatten(&["pp", "tp"]).unwrap().name(),
            model.name(),
            "the second time it is the same"
        );
        assert_eq!(mesh.flatten(&["tp", "pp"]).unwrap().rank(), 2 * tp + pp);
        let sub = mesh.submesh(&["dp", "tp"]).unwrap();
        assert_eq!(sub.coordinates(), [dp, tp]);
        assert_eq!(members(sub.world()), bits(&[2 * pp, 2 * pp + 1, 2 * pp + 4, 2 * pp + 5]));

        let error = mesh.group("cp").unwrap_err().to_string();
        assert!(error.contains("no axis \"cp\": it has dp, pp, tp"), "{error}");
        let error = DeviceMesh::new(&world, &[("dp", 3), ("tp", 2)]).unwrap_err().to_string();
        assert!(error.contains("make 6 ranks, but the group has 8"), "{error}");
        assert!(mesh.flatten(&["dp", "dp"]).is_err() && mesh.flatten(&[]).is_err());
        assert!(mesh.rank_at(&[0, 0, 2]).is_err());
    });
}
