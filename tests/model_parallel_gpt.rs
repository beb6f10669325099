//! A whole GPT on every mesh shape against the same model on one rank: losses, every gradient, the gradient norm over
//! all axes, and twenty steps of training.
//!
//! The whole product is every way to write 1, 2, 4 and 8 ranks as data x pipeline x tensor, with every schedule, with
//! whole and with split sequences: `cargo xtask model-parallel` runs it. Without that, as many cases as show that
//! every pair of two axes' sizes, or of a size and a schedule, works.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Tensor};
use tch_distributed::data_parallel::DdpOptions;
use tch_distributed::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use tch_distributed::model_parallel::tensor::Layout;
use tch_distributed::model_parallel::{DeviceMesh, clip_grad_norm, sync_gradients};
use tch_distributed::testing::{run_processes, run_threads};
use tch_distributed::{self as dist, ProcessGroup};

#[path = "../examples/common/gpt.rs"]
mod gpt;

const ROWS: i64 = 32;
const CONTEXT: i64 = 8;

fn config(sequence_parallel: bool) -> gpt::Config {
    gpt::Config {
        vocabulary: 32,
        context: CONTEXT,
        width: 16,
        layers: 8,
        heads: 8,
        sequence_parallel,
        ..Default::default()
    }
}

fn batch(step: i64) -> (Tensor, Tensor) {
    let all = (Tensor::arange(ROWS * (CONTEXT + 1), (Kind::Int64, Device::Cpu)) * 7 + step * 5).remainder(31);
    let all = all.reshape([ROWS, CONTEXT + 1]);
    (all.narrow(1, 0, CONTEXT), all.narrow(1, 1, CONTEXT))
}

/// The full weight of this name: the same however the model is cut.
fn full_weight(name: &str) -> Option<Tensor> {
    let c = config(false);
    let size = match name.rsplit('.').take(2).collect::<Vec<_>>()[..] {
        ["weight", "wte"] => vec![c.vocabulary, c.width],
        ["weight", "wpe"] => vec![c.context, c.width],
        ["weight", "qkv"] => vec![3 * c.width, c.width],
        ["weight", "up"] => vec![4 * c.width, c.width],
        ["weight", "down"] => vec![c.width, 4 * c.width],
        ["weight", "out"] => vec![c.width, c.width],
        ["bias", "qkv"] => vec![3 * c.width],
        ["bias", "up"] => vec![4 * c.width],
        _ => vec![c.width],
    };
    let n: i64 = size.iter().product();
    let phase = name.bytes().map(f64::from).sum::<f64>();
    let wave = (Tensor::arange(n, (Kind::Double, Device::Cpu)) * 0.71 + phase).sin().reshape(&size);
    Some(if name.contains("ln") && name.ends_with("weight") { wave * 0.1 + 1.0 } else { wave * 0.2 })
}

type Numbers = BTreeMap<String, Vec<f64>>;

fn flat(t: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(t.detach().to_kind(Kind::Double).reshape([-1])).unwrap()
}

struct Trained {
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// Of the first step, before clipping.
    grads: Numbers,
    weights: Numbers,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Case {
    dp: usize,
    pp: usize,
    tp: usize,
    sp: bool,
    schedule: Schedule,
}

impl Case {
    const ALONE: Self = Self { dp: 1, pp: 1, tp: 1, sp: false, schedule: Schedule::GPipe };

    fn ranks(self) -> usize {
        self.dp * self.pp * self.tp
    }

    /// Gradients are averaged over the copies while backward runs, or after the step.
    fn overlaps(self) -> bool {
        self.dp > 1 && self.schedule != Schedule::GPipe
    }

    /// Every pair of two factors, each with its name.
    fn pairs(self) -> BTreeSet<[String; 2]> {
        let Self { dp, pp, tp, sp, schedule } = self;
        let factors = [
            format!("dp {dp}"),
            format!("pp {pp}"),
            format!("tp {tp}"),
            format!("sp {sp}"),
            schedule.to_string(),
        ];
        let pair = |i: usize, j: usize| [factors[i].clone(), factors[j].clone()];
        (0..factors.len()).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| pair(i, j)).collect()
    }
}

/// Trains as the example does. Gives this rank's part of what there is to compare.
fn train(world: &ProcessGroup, case: Case, kind: Kind, steps: i64) -> Trained {
    let mesh = DeviceMesh::new(world, &[("dp", case.dp), ("pp", case.pp), ("tp", case.tp)]).unwrap();
    let [dp, pp, tp] = ["dp", "pp", "tp"].map(|axis| mesh.group(axis).unwrap());
    let model_ranks = mesh.flatten(&["pp", "tp"]).unwrap();
    let chunks = if case.schedule == Schedule::Interleaved && case.pp > 1 { 2 } else { 1 };
    let stages = case.pp * chunks;
    let mut vs = nn::VarStore::new(Device::Cpu);
    let (parts, mut layout) = Layout::record(&tp, || {
        let mine = (0..chunks).map(|chunk| chunk * case.pp + pp.rank());
        mine.map(|s| gpt::Part::new(&vs.root(), config(case.sp), s, stages, &tp).unwrap()).collect::<Vec<_>>()
    });
    vs.set_kind(kind);
    layout.fill(&vs, |name| full_weight(name).map(|t| t.to_kind(kind))).unwrap();
    if pp.rank() > 0 {
        layout.mark_copy("wte.weight");
    }
    let tied = parts.iter().find_map(gpt::Part::tied);
    let parts = parts.into_iter().map(Stage::new_t).collect();
    let mut pipeline = Pipeline::new(parts, case.pp.max(4), case.schedule, &pp).unwrap();
    if case.overlaps() {
        // Small buckets, so that there are several.
        let options = DdpOptions::new().bucket_cap_mb(0.004).first_bucket_mb(0.001);
        pipeline = pipeline.data_parallel(&vs, &dp, options).unwrap();
    }
    pipeline.tie(&[0, stages - 1], tied.as_ref()).unwrap();

    let mut optimizer = nn::Sgd { momentum: 0.9, ..Default::default() }.build(&vs, 0.02).unwrap();
    let mut trained =
        Trained { losses: vec![], norms: vec![], grads: Numbers::new(), weights: Numbers::new() };
    for step in 0..steps {
        let (xs, targets) = batch(step);
        let rows = ROWS / case.dp as i64;
        let own = |t: &Tensor| t.narrow(0, dp.rank() as i64 * rows, rows);
        optimizer.zero_grad();
        let loss =
            pipeline.step(Some(&own(&xs)), Some(&own(&targets)), |ys, ts| gpt::loss(ys, ts, &tp)).unwrap();
        if !case.overlaps() {
            sync_gradients(&vs, &dp).unwrap();
        }
        if step == 0 {
            let grads = layout.full_gradients(&vs).unwrap();
            assert_eq!(grads.len(), vs.variables().len(), "every parameter has a gradient");
            trained.grads = grads.iter().map(|(name, g)| (name.clone(), flat(g))).collect();
        }
        trained.norms.push(clip_grad_norm(&vs, &layout, 1.0, &model_ranks).unwrap());
        optimizer.step();
        if let Some(mut loss) = loss {
            dp.all_reduce(&mut loss, dist::ReduceOp::Avg).unwrap();
            trained.losses.push(loss.double_value(&[]));
        }
    }
    let mut names: Vec<_> = vs.variables().into_iter().collect();
    names.sort_by(|a, b| a.0.cmp(&b.0));
    trained.weights = names.iter().map(|(n, t)| (n.clone(), flat(&layout.full(n, t).unwrap()))).collect();
    trained
}

fn alone(kind: Kind, steps: i64) -> Trained {
    run_threads(1, |world| train(&world, Case::ALONE, kind, steps)).remove(0)
}

fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let most = expected.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    for (a, b) in got.iter().zip(expected) {
        assert!((a - b).abs() <= tolerance * most, "{what}: {a}, expected {b}");
    }
}

fn compare(got: &Trained, expected: &Trained, case: Case, tolerance: f64) {
    if !got.losses.is_empty() {
        assert_close(&format!("{case:?}: losses"), &got.losses, &expected.losses, tolerance);
    }
    assert_close(&format!("{case:?}: norms"), &got.norms, &expected.norms, tolerance);
    for (name, grad) in &got.grads {
        assert_close(&format!("{case:?}: gradient of {name}"), grad, &expected.grads[name], tolerance);
    }
    for (name, weight) in &got.weights {
        assert_close(&format!("{case:?}: {name}"), weight, &expected.weights[name], tolerance);
    }
}

/// Every way to write 1, 2, 4 and 8 as data x pipeline x tensor, with every schedule, and where layers are split also
/// with split sequences.
fn whole() -> Vec<Case> {
    let sizes = || [1, 2, 4, 8].into_iter();
    let shapes = sizes().flat_map(|dp| sizes().flat_map(move |pp| sizes().map(move |tp| (dp, pp, tp))));
    let mut cases = Vec::new();
    for (dp, pp, tp) in shapes.filter(|(dp, pp, tp)| dp * pp * tp <= 8) {
        for schedule in [Schedule::GPipe, Schedule::OneFOneB, Schedule::Interleaved] {
            let sequences: &[bool] = if tp > 1 { &[false, true] } else { &[false] };
            cases.extend(sequences.iter().map(|&sp| Case { dp, pp, tp, sp, schedule }));
        }
    }
    cases
}

/// The whole product if it is asked for, else cases that together have every pair of factors, always the one with most
/// new pairs first.
fn cases() -> Vec<Case> {
    let mut whole = whole();
    if std::env::var_os("TCHD_MODEL_PARALLEL_WHOLE").is_some() {
        return whole;
    }
    let mut left: BTreeSet<_> = whole.iter().flat_map(|case| case.pairs()).collect();
    let mut chosen = Vec::new();
    while !left.is_empty() {
        let new = |case: &Case| case.pairs().intersection(&left).count();
        let best = whole.iter().enumerate().max_by_key(|(i, case)| (new(case), std::cmp::Reverse(*i)));
        let case = whole.remove(best.unwrap().0);
        left = left.difference(&case.pairs()).cloned().collect();
        chosen.push(case);
    }
    chosen
}

/// Trains each case and compares it with the model on one rank.
fn train_and_compare(kind: Kind, steps: i64, tolerance: f64) {
    let expected = alone(kind, steps);
    if steps > 1 {
        assert!(expected.losses[19] < expected.losses[0] - 0.1, "it learns: {:?}", expected.losses);
    }
    for case in cases() {
        let start = Instant::now();
        for got in run_threads(case.ranks(), |world| train(&world, case, kind, steps)) {
            compare(&got, &expected, case, tolerance);
        }
        println!("{:6.2} s  {kind:?}, {steps} steps, {case:?}", start.elapsed().as_secs_f64());
    }
}

#[test]
fn twenty_steps_on_meshes_of_every_shape_equal_one_rank_in_f64() {
    train_and_compare(Kind::Double, 20, 1e-10);
}

#[test]
fn losses_and_gradients_on_meshes_of_every_shape_equal_one_rank_in_f32() {
    train_and_compare(Kind::Float, 1, 1e-5);
}

#[test]
fn a_split_model_is_saved_to_one_file_and_loaded_from_it_however_it_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    run_threads(4, |world| {
        let mesh = DeviceMesh::new(&world, &[("pp", 2), ("tp", 2)]).unwrap();
        let [pp, tp] = ["pp", "tp"].map(|axis| mesh.group(axis).unwrap());
        let build = |part, parts, tp: &ProcessGroup| {
            let vs = nn::VarStore::new(Device::Cpu);
            let (part, mut layout) =
                Layout::record(tp, || gpt::Part::new(&vs.root(), config(false), part, parts, tp).unwrap());
            drop(part);
            if parts > 1 && pp.rank() > 0 {
                layout.mark_copy("wte.weight");
            }
            (vs, layout)
        };
        let (vs, layout) = build(pp.rank(), 2, &tp);
        layout.fill(&vs, |name| full_weight(name).map(|t| t.to_kind(Kind::Float))).unwrap();
        layout.save(&vs, &file, &world).unwrap();
        // What was written is the whole model, as plain tch reads it.
        let written: BTreeMap<_, _> = Tensor::read_safetensors(&file).unwrap().into_iter().collect();
        assert_eq!(written.len(), 1 + 1 + 8 * 12 + 2);
        for (name, tensor) in &written {
            assert_eq!(*tensor, full_weight(name).unwrap().to_kind(Kind::Float), "{name}");
        }
        // Cut otherwise: four ways by tensor, one stage.
        let (other, layout) = build(0, 1, &world);
        layout.load(&other, &file).unwrap();
        // In one order on every rank: putting shards together is a collective.
        let loaded = other.variables();
        for (name, tensor) in &written {
            assert_eq!(layout.full(name, &loaded[name]).unwrap(), *tensor, "{name}");
        }
        let _ = other.root().zeros("extra", &[1]);
        let error = layout.load(&other, &file).unwrap_err().to_string();
        assert!(error.contains("no tensor extra"), "{error}");
        world.barrier().unwrap();
        if world.rank() == 0 {
            std::fs::write(&file, b"not such a file at all").unwrap();
            let error = layout.load(&other, &file).unwrap_err().to_string();
            assert!(error.contains("is no safetensors file"), "{error}");
        }
    });
}

#[test]
fn ranks_as_processes_train_the_same() {
    let name = "ranks_as_processes_train_the_same";
    run_processes(4, name, || {
        let world = dist::init_process_group("native", dist::InitOptions::new()).unwrap();
        let case = Case { dp: 1, pp: 2, tp: 2, sp: true, schedule: Schedule::Interleaved };
        let got = train(&world, case, Kind::Double, 5);
        let own = world.new_group(&[0]).unwrap();
        if let Some(own) = own {
            let expected = train(&own, Case::ALONE, Kind::Double, 5);
            compare(&got, &expected, case, 1e-10);
        }
        dist::destroy_process_group().unwrap();
    });
}
