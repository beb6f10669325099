//! Every plan, simulated: it ends, whatever the order of events, and gives what the operation means.

use proptest::prelude::*;
use smallvec::SmallVec;

use super::simulate::{Links, Memory, combine, run};
use super::{Cuts, Shape, Tuning, plan, share};
use crate::ReduceOp;
use crate::backend::Op;

/// Element `i` that rank `r` contributes for `to`.
fn element(r: usize, to: usize, i: usize) -> u64 {
    (r * 1_000_000 + to * 10_000 + i + 1) as u64
}

fn data(r: usize, to: usize, len: usize) -> Vec<u64> {
    (0..len).map(|i| element(r, to, i)).collect()
}

fn blank(len: usize) -> Vec<u64> {
    vec![u64::MAX; len]
}

/// What each rank starts with, and what its outputs are to hold after.
fn case(op: Op, world: usize, lens: &[Vec<usize>], in_place: bool) -> (Vec<Memory>, Vec<Vec<Vec<u64>>>) {
    let all = 0..world;
    let len = lens[0][0];
    let sum = |to: usize, len: usize| combine(&(0..world).map(|r| data(r, to, len)).collect::<Vec<_>>());
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

fn op(number: usize, root: usize) -> Op {
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

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_plan_ends_in_any_order_of_events_with_operands_in_rank_order(
        number in 0usize..9,
        world in 1usize..=9,
        root in 0usize..9,
        lens in prop::collection::vec(prop::collection::vec(0usize..40, 9), 9),
        one_shot in 0usize..30,
        tree in 0usize..30,
        chunk in 1usize..9,
        capacity in 0usize..4,
        in_place: bool,
        seed: u64,
    ) {
        let op = op(number, root % world);
        let tuning = Tuning { one_shot, tree, chunk };
        let links = if capacity == 0 { Links::Lend } else { Links::Copy(capacity) };
        let (memory, expected) = case(op, world, &lens, in_place);
        let plans = (0..world)
            .map(|rank| {
                let lens = |s: &[Vec<u64>]| s.iter().map(Vec::len).collect::<SmallVec<[usize; 4]>>();
                let (inputs, outputs) = (lens(&memory[rank].inputs), lens(&memory[rank].outputs));
                plan(&Shape { op, rank, world, size: 1, inputs, outputs }, &tuning)
            })
            .collect();
        let after = run(plans, memory, links, seed);
        for (rank, memory) in after.into_iter().enumerate() {
            prop_assert_eq!(&memory.outputs, &expected[rank], "rank {}", rank);
        }
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
fn tunings_that_differ_have_different_digests() {
    let digests = [Tuning::THREADS.digest(), Tuning::SOCKETS.digest()];
    assert_ne!(digests[0], digests[1]);
}
