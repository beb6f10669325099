//! Every plan, simulated: it ends, whatever the order of events, and gives what the operation means.

use proptest::prelude::*;
use smallvec::SmallVec;

use super::simulate::{Element, Links, Memory, State, combine, run};
use super::{Action, Cuts, Plan, Shape, Tuning, plan, share};
use crate::ReduceOp;
use crate::backend::Op;

/// Element `i` that rank `r` contributes for `to`.
fn element(r: usize, to: usize, i: usize) -> Element {
    Element::raw((r * 1_000_000 + to * 10_000 + i + 1) as u64)
}

fn data(r: usize, to: usize, len: usize) -> Vec<Element> {
    (0..len).map(|i| element(r, to, i)).collect()
}

fn blank(len: usize) -> Vec<Element> {
    vec![Element::raw(u64::MAX); len]
}

/// What each rank starts with, and what its outputs are to hold after.
pub(super) fn case(
    op: Op,
    world: usize,
    lens: &[Vec<usize>],
    in_place: bool,
) -> (Vec<Memory>, Vec<Vec<Vec<Element>>>) {
    let all = 0..world;
    let len = lens[0][0];
    let sum = |to: usize, len: usize| {
        combine(&(0..world).map(|r| data(r, to, len)).collect::<Vec<_>>(), State::Finished)
    };
    let mut memory = vec![Memory::default(); world];
    let mut expected = vec![Vec::new(); world];
    for r in 0..world {
        let (inputs, outputs, after) = match op {
            Op::AllReduce(_) => (vec![], vec![data(r, 0, len)], vec![sum(0, len)]),
            Op::Reduce { dst, .. } if r == dst && in_place => {
                memory[r].in_place = true;
                (vec![blank(len)], vec![data(r, 0, len)], vec![sum(0, len)])
            }
            Op::Reduce { dst, .. } if r == dst => {
                (vec![data(r, 0, len)], vec![blank(len)], vec![sum(0, len)])
            }
            Op::Reduce { .. } => (vec![data(r, 0, len)], vec![], vec![]),
            Op::Broadcast { src } => {
                let mine = if r == src { data(src, 0, len) } else { blank(len) };
                (vec![], vec![mine], vec![data(src, 0, len)])
            }
            Op::AllGather => (
                vec![data(r, 0, lens[r][0])],
                all.clone().map(|p| blank(lens[p][0])).collect(),
                all.clone().map(|p| data(p, 0, lens[p][0])).collect(),
            ),
            Op::Gather { dst } if r == dst => (
                vec![data(r, 0, lens[r][0])],
                all.clone().map(|p| blank(lens[p][0])).collect(),
                all.clone().map(|p| data(p, 0, lens[p][0])).collect(),
            ),
            Op::Gather { .. } => (vec![data(r, 0, lens[r][0])], vec![], vec![]),
            Op::Scatter { src } => {
                let inputs =
                    if r == src { all.clone().map(|p| data(r, p, lens[0][p])).collect() } else { vec![] };
                (inputs, vec![blank(lens[0][r])], vec![data(src, r, lens[0][r])])
            }
            Op::ReduceScatter(_) => (
                all.clone().map(|p| data(r, p, lens[0][p])).collect(),
                vec![blank(lens[0][r])],
                vec![sum(r, lens[0][r])],
            ),
            Op::AllToAll => (
                all.clone().map(|p| data(r, p, lens[r][p])).collect(),
                all.clone().map(|p| blank(lens[p][r])).collect(),
                all.clone().map(|p| data(p, r, lens[p][r])).collect(),
            ),
            Op::Barrier => (vec![], vec![], vec![]),
        };
        memory[r].inputs = inputs;
        memory[r].outputs = outputs;
        expected[r] = after;
    }
    (memory, expected)
}

pub(super) fn op(number: usize, root: usize) -> Op {
    match number {
        0 => Op::AllReduce(ReduceOp::Sum),
        1 => Op::Reduce { op: ReduceOp::Sum, dst: root },
        2 => Op::Broadcast { src: root },
        3 => Op::AllGather,
        4 => Op::Gather { dst: root },
        5 => Op::Scatter { src: root },
        6 => Op::ReduceScatter(ReduceOp::Sum),
        7 => Op::AllToAll,
        _ => Op::Barrier,
    }
}

/// Every rank's plan of a call on these memories.
fn plans(op: Op, memory: &[Memory], wide: bool, tuning: &Tuning) -> Vec<Plan> {
    let lens = |s: &[Vec<Element>]| s.iter().map(Vec::len).collect::<SmallVec<[usize; 4]>>();
    memory
        .iter()
        .enumerate()
        .map(|(rank, m)| {
            let (inputs, outputs) = (lens(&m.inputs), lens(&m.outputs));
            plan(&Shape { op, rank, world: memory.len(), size: 1, wide, inputs, outputs }, tuning)
        })
        .collect()
}

/// Runs a call and compares every rank's outputs with what the operation means. Sums may have been taken
/// in another order than that of ranks only among many ranks and where partial results may travel;
/// all-reduces in the same on every rank.
fn check(op: Op, lens: &[Vec<usize>], in_place: bool, wide: bool, tuning: &Tuning, links: Links, seed: u64) {
    let world = lens.len();
    let (memory, expected) = case(op, world, lens, in_place);
    let any_order = world > tuning.direct && !wide;
    let after = run(plans(op, &memory, wide, tuning), memory, links, seed);
    for (rank, memory) in after.iter().enumerate() {
        let plain = |outputs: &[Vec<Element>]| -> Vec<Vec<(u64, State)>> {
            outputs.iter().map(|o| o.iter().map(|e| (e.sum, e.state)).collect()).collect()
        };
        assert_eq!(plain(&memory.outputs), plain(&expected[rank]), "rank {rank} of {world}");
        if !any_order {
            assert_eq!(memory.outputs, expected[rank], "rank {rank} of {world}, in rank order");
        }
        if matches!(op, Op::AllReduce(_)) {
            assert_eq!(memory.outputs, after[0].outputs, "rank {rank} has other bits than rank 0");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 3 } else { 1500 }, // Miri is slow.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_plan_ends_in_any_order_of_events_and_gives_what_the_operation_means(
        number in 0usize..9,
        root in 0usize..9,
        lens in (1usize..=9)
            .prop_flat_map(|n| prop::collection::vec(prop::collection::vec(0usize..40, n), n)),
        (direct, one_shot, doubling) in (0usize..9, 0usize..30, 0usize..40),
        (bruck, tree, chunk) in (0usize..300, 0usize..30, 1usize..9),
        capacity in 0usize..4,
        (in_place, wide) in any::<(bool, bool)>(),
        seed: u64,
    ) {
        let tuning = Tuning { direct, one_shot, doubling, bruck, tree, chunk };
        let links = if capacity == 0 { Links::Lend } else { Links::Copy(capacity) };
        check(op(number, root % lens.len()), &lens, in_place, wide, &tuning, links, seed);
    }

    #[test]
    fn shares_and_chunks_cover_every_element_once(len in 0usize..10_000, world in 1usize..64, chunk in 1usize..500) {
        let mut next = 0;
        for p in 0..world {
            let (start, n) = share(len, world, p);
            prop_assert_eq!(start, next);
            next += n;
        }
        prop_assert_eq!(next, len);
        let cuts = Cuts::new(len, chunk);
        let mut next = 0;
        for c in 0..cuts.count {
            let (start, n) = cuts.get(c).unwrap();
            prop_assert_eq!(start, next);
            prop_assert!(n <= chunk && n <= cuts.widest());
            next += n;
        }
        prop_assert_eq!(next, len);
        prop_assert_eq!(cuts.get(cuts.count), None);
    }
}

#[test]
fn every_algorithm_works_in_every_world_up_to_17_with_every_odd_length() {
    // All few, all many; all small, all large, one element a message and many.
    let tunings = [(64, 0), (64, 1 << 20), (0, 0), (0, 1 << 20)].map(|(direct, small)| Tuning {
        direct,
        one_shot: small,
        doubling: small,
        bruck: small,
        tree: small,
        chunk: 3,
    });
    // Miri is slow.
    for world in 1..=if cfg!(miri) { 3 } else { 17 } {
        for len in [0, 1, 2, 7, 16, 33].into_iter().filter(|&len| len == 2 || !cfg!(miri)) {
            // Lengths differ by pair where they may.
            let lens: Vec<Vec<usize>> =
                (0..world).map(|r| (0..world).map(|p| (len + r * 5 + p * 3) % (len + 1)).collect()).collect();
            for (n, tuning) in tunings.iter().enumerate() {
                for number in 0..9 {
                    let links = if (world + n).is_multiple_of(2) { Links::Lend } else { Links::Copy(2) };
                    check(
                        op(number, (world * 7 + n) % world),
                        &lens,
                        n.is_multiple_of(2),
                        false,
                        tuning,
                        links,
                        5,
                    );
                }
            }
        }
    }
}

#[test]
fn many_ranks_exchange_few_small_messages() {
    let tuning = Tuning::SOCKETS;
    let sends = |number: usize, world: usize| {
        let lens = vec![vec![4; world]; world];
        let (memory, _) = case(op(number, 0), world, &lens, false);
        let count =
            |plan: &Plan| plan.steps.iter().filter(|s| matches!(s.action, Action::Send { .. })).count();
        plans(op(number, 0), &memory, false, &tuning).iter().map(count).max().unwrap()
    };
    // All-reduce, reduce, broadcast, all-gather, barrier among 64 and 48 ranks.
    assert_eq!([0, 1, 2, 3, 8].map(|number| sends(number, 64)), [6, 1, 6, 6, 6]);
    assert_eq!([0, 1, 2, 3, 8].map(|number| sends(number, 48)), [6, 1, 6, 6, 6]);
    // Few ranks need one round.
    assert_eq!(sends(0, 4), 3);
}

#[test]
fn tunings_that_differ_have_different_digests() {
    let digests = [Tuning::THREADS.digest(), Tuning::SOCKETS.digest()];
    assert_ne!(digests[0], digests[1]);
}
