//! Random programs of collectives: every rank runs the same one, on several groups, blocking and
//! asynchronous mixed, and must end with what a sequential interpreter of all ranks ends with.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use tch::{Device, Kind, Tensor};
use tch_distributed::{P2pOp, ProcessGroup, ReduceOp, Work};

use super::model::{reduce, same, values};
use super::suite::world;

/// The tensors that every rank has: whole numbers that wrap, so that nothing is ever rounded.
const KINDS: [Kind; 3] = [Kind::Int64, Kind::Int, Kind::Uint8];

#[derive(Clone, Debug)]
enum Step {
    AllReduce {
        t: usize,
        op: ReduceOp,
    },
    Reduce {
        t: usize,
        root: usize,
        op: ReduceOp,
    },
    Broadcast {
        t: usize,
        root: usize,
    },
    /// Reduce-scatter, then all-gather of the parts.
    ScatterGather {
        t: usize,
        op: ReduceOp,
    },
    AllToAll {
        t: usize,
    },
    /// Each rank's tensor goes to the next rank.
    Ring {
        t: usize,
        tag: u32,
    },
    /// A number from everybody, as objects, is added to a tensor.
    Objects {
        t: usize,
    },
    Barrier,
}

#[derive(Clone, Debug)]
struct Line {
    step: Step,
    group: usize,
    asynchronous: bool,
}

fn lines(backend: &str) -> impl Strategy<Value = Vec<Line>> {
    let t = 0..KINDS.len();
    let mut ops = vec![ReduceOp::Sum, ReduceOp::Product, ReduceOp::Min, ReduceOp::Max, ReduceOp::Avg];
    if backend != "nccl" {
        ops.extend([ReduceOp::BitXor, ReduceOp::BitAnd, ReduceOp::BitOr]);
    }
    let op = prop::sample::select(ops);
    let root = 0..8usize;
    let step = prop_oneof![
        (t.clone(), op.clone()).prop_map(|(t, op)| Step::AllReduce { t, op }),
        (t.clone(), root.clone(), op.clone()).prop_map(|(t, root, op)| Step::Reduce { t, root, op }),
        (t.clone(), root).prop_map(|(t, root)| Step::Broadcast { t, root }),
        (t.clone(), op).prop_map(|(t, op)| Step::ScatterGather { t, op }),
        t.clone().prop_map(|t| Step::AllToAll { t }),
        (t.clone(), 0..3u32).prop_map(|(t, tag)| Step::Ring { t, tag }),
        t.prop_map(|t| Step::Objects { t }),
        Just(Step::Barrier),
    ];
    let line = (step, 0..3usize, any::<bool>());
    prop::collection::vec(
        line.prop_map(|(step, group, asynchronous)| Line { step, group, asynchronous }),
        1..24,
    )
}

/// The ranks of each group that a program may use.
fn memberships(size: usize) -> [Vec<usize>; 3] {
    [(0..size).collect(), (0..size).step_by(2).collect(), (0..size.min(2)).collect()]
}

/// So many rows that every group divides them.
fn rows(size: usize) -> i64 {
    memberships(size).iter().map(|m| m.len() as i64).product()
}

fn start(size: usize, rank: usize) -> Vec<Tensor> {
    KINDS.iter().enumerate().map(|(i, &kind)| values(&[rows(size), 3], kind, (rank * 3 + i) as i64)).collect()
}

/// What the program means.
fn interpret(size: usize, program: &[Line]) -> Vec<Vec<Tensor>> {
    let mut state: Vec<Vec<Tensor>> = (0..size).map(|rank| start(size, rank)).collect();
    for Line { step, group, .. } in program {
        let members = &memberships(size)[*group];
        let n = members.len();
        let of =
            |state: &[Vec<Tensor>], t: usize| members.iter().map(|&r| state[r][t].copy()).collect::<Vec<_>>();
        match *step {
            Step::AllReduce { t, op } | Step::ScatterGather { t, op } => {
                let result = reduce(op, &of(&state, t));
                members.iter().for_each(|&r| state[r][t] = result.copy());
            }
            Step::Reduce { t, root, op } => state[members[root % n]][t] = reduce(op, &of(&state, t)),
            Step::Broadcast { t, root } => {
                let source = state[members[root % n]][t].copy();
                members.iter().for_each(|&r| state[r][t] = source.copy());
            }
            Step::AllToAll { t } => {
                let before: Vec<Vec<Tensor>> = of(&state, t).iter().map(|x| x.chunk(n as i64, 0)).collect();
                for (to, &r) in members.iter().enumerate() {
                    state[r][t] = Tensor::cat(&before.iter().map(|parts| &parts[to]).collect::<Vec<_>>(), 0);
                }
            }
            Step::Ring { t, .. } => {
                let before = of(&state, t);
                for (i, &r) in members.iter().enumerate() {
                    state[r][t] = before[(i + n - 1) % n].copy();
                }
            }
            Step::Objects { t } => {
                let sum: usize = members.iter().sum();
                members.iter().for_each(|&r| state[r][t] = &state[r][t] + sum as i64);
            }
            Step::Barrier => {}
        }
    }
    state
}

/// What this rank makes of it.
fn execute(groups: &[Option<ProcessGroup>], size: usize, rank: usize, program: &[Line]) -> Vec<Tensor> {
    let mut state = start(size, rank);
    let mut pending: Vec<(usize, Work)> = Vec::new();
    for Line { step, group, asynchronous } in program {
        let Some(group) = &groups[*group] else { continue };
        let (me, n) = (group.rank(), group.size());
        let mut settle = |t: usize| {
            pending.retain(|(of, work)| {
                if *of == t {
                    work.wait().unwrap();
                }
                *of != t
            });
        };
        match *step {
            Step::AllReduce { t, .. }
            | Step::Reduce { t, .. }
            | Step::Broadcast { t, .. }
            | Step::ScatterGather { t, .. }
            | Step::AllToAll { t }
            | Step::Ring { t, .. }
            | Step::Objects { t } => settle(t),
            Step::Barrier => {}
        }
        match *step {
            Step::AllReduce { t, op } if *asynchronous => {
                pending.push((t, group.all_reduce_async(&state[t], op).unwrap()));
            }
            Step::AllReduce { t, op } => group.all_reduce(&mut state[t], op).unwrap(),
            Step::Reduce { t, root, op } if *asynchronous => {
                pending.push((t, group.reduce_async(&state[t], root % n, op).unwrap()));
            }
            Step::Reduce { t, root, op } => group.reduce(&mut state[t], root % n, op).unwrap(),
            Step::Broadcast { t, root } if *asynchronous => {
                pending.push((t, group.broadcast_async(&state[t], root % n).unwrap()));
            }
            Step::Broadcast { t, root } => group.broadcast(&mut state[t], root % n).unwrap(),
            Step::ScatterGather { t, op } => {
                let mut part = state[t].narrow(0, 0, rows(size) / n as i64).copy();
                group.reduce_scatter_tensor(&mut part, &state[t], op).unwrap();
                if *asynchronous {
                    pending.push((t, group.all_gather_into_tensor_async(&state[t], &part).unwrap()));
                } else {
                    group.all_gather_into_tensor(&mut state[t], &part).unwrap();
                }
            }
            Step::AllToAll { t } => {
                let input =
                    std::mem::replace(&mut state[t], Tensor::zeros([rows(size), 3], (KINDS[t], Device::Cpu)));
                if *asynchronous {
                    pending.push((t, group.all_to_all_single_async(&state[t], &input, None, None).unwrap()));
                } else {
                    group.all_to_all_single(&mut state[t], &input, None, None).unwrap();
                }
            }
            Step::Ring { t, tag } => {
                let received = state[t].zeros_like();
                let ops = vec![
                    P2pOp::recv(&received, (me + n - 1) % n, tag),
                    P2pOp::send(&state[t], (me + 1) % n, tag),
                ];
                let works = group.batch_isend_irecv(ops).unwrap();
                state[t] = received;
                if *asynchronous {
                    pending.extend(works.into_iter().map(|work| (t, work)));
                } else {
                    works.iter().for_each(|work| work.wait().unwrap());
                }
            }
            Step::Objects { t } => {
                let sum: usize = group.all_gather_object(&rank).unwrap().into_iter().sum();
                state[t] = &state[t] + sum as i64;
            }
            Step::Barrier if *asynchronous => pending.push((usize::MAX, group.barrier_async().unwrap())),
            Step::Barrier => group.barrier().unwrap(),
        }
    }
    pending.iter().for_each(|(_, work)| work.wait().unwrap());
    state
}

/// Whether this rank ends a program with what it should.
fn right(group: &ProcessGroup, program: &[Line]) -> bool {
    let (rank, size) = (group.rank(), group.size());
    let groups = memberships(size).map(|members| group.new_group(&members).unwrap());
    let expected = &interpret(size, program)[rank];
    let state = execute(&groups, size, rank, program);
    state.iter().zip(expected).all(|(a, b)| same(a, b))
}

/// The same programs in every process.
fn runner(programs: u32, shrink: bool) -> TestRunner {
    let config = Config {
        cases: programs,
        failure_persistence: None,
        max_shrink_iters: if shrink { 200 } else { 0 },
        ..Config::default()
    };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

/// Runs so many random programs, each in a world of this size.
pub fn run(backend: &str, size: usize, programs: u32) {
    let outcome = runner(programs, true).run(&lines(backend), |program| {
        let right = world(backend, size, |group| right(&group, &program));
        prop_assert!(right.iter().all(|&r| r), "right on ranks: {:?}", right);
        Ok(())
    });
    outcome.unwrap();
}

/// Runs so many random programs on a group; every rank sees every rank's verdict, so that all go on with
/// the same program.
pub fn run_on(group: &ProcessGroup, programs: u32) {
    let outcome = runner(programs, false).run(&lines(&group.backend_name()), |program| {
        let right = group.all_gather_object(&right(group, &program)).unwrap();
        prop_assert!(right.iter().all(|&r| r), "right on ranks: {:?}", right);
        Ok(())
    });
    outcome.unwrap();
}
