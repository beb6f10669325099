//! Schedules of several hosts, simulated: stages on a host take place at once, plans between hosts in any
//! order of events.

use proptest::prelude::*;
use smallvec::SmallVec;

use super::hosts::{Layout, Parts, Schedule, Stage, Way, schedule};
use super::simulate::{Element, Links, Memory, State, combine, run};
use super::tests::{case, op};
use super::{Plan, Shape, Tuning};
use crate::ReduceOp;
use crate::backend::Op;

/// A stage's segments, read from a rank's memory.
fn read(memory: &mut Memory, of: &[Parts]) -> Vec<Vec<Element>> {
    of.iter().map(|parts| parts.iter().flat_map(|&part| memory.read(part)).collect()).collect()
}

fn write(memory: &mut Memory, of: &[Parts], data: &[Vec<Element>]) {
    for (parts, data) in of.iter().zip(data) {
        let mut at = 0;
        for &part in parts {
            memory.write(part, &data[at..at + part.len]);
            at += part.len;
        }
        assert_eq!(at, data.len(), "a segment of another length than expected");
    }
}

/// What the collective of a host does, as plainly as it can be said. What has been combined is an operand
/// for others.
fn on_host(ranks: &[usize], stages: &[Stage], memory: &mut [Memory]) {
    let inputs: Vec<_> = ranks.iter().zip(stages).map(|(&r, s)| read(&mut memory[r], &s.inputs)).collect();
    let before: Vec<_> = ranks.iter().zip(stages).map(|(&r, s)| read(&mut memory[r], &s.outputs)).collect();
    for (n, (&rank, stage)) in ranks.iter().zip(stages).enumerate() {
        assert_eq!(stage.op, stages[0].op, "the ranks of a host do the same");
        let of_all = |to: usize| inputs.iter().map(|i| i[to].clone()).collect::<Vec<_>>();
        let outputs = match stage.op {
            Op::ReduceScatter(_) => {
                assert!(of_all(n).iter().all(|o| o.len() == of_all(n)[0].len()));
                vec![combine(&of_all(n), State::Raw)]
            }
            Op::AllGather => of_all(0),
            Op::Broadcast { src } => vec![before[src][0].clone()],
            Op::Gather { dst } if dst == n => of_all(0),
            Op::Gather { .. } | Op::Barrier => vec![],
            Op::Scatter { src } => vec![inputs[src][n].clone()],
            Op::AllToAll => of_all(n),
            other => panic!("no host does {other}"),
        };
        assert_eq!(outputs.len(), stage.outputs.len());
        write(&mut memory[rank], &stage.outputs, &outputs);
    }
}

/// Runs all stages on hosts until every rank is at one between hosts, or at its end.
fn at_home(layout: &Layout, schedules: &mut [Vec<Stage>], memory: &mut [Memory]) {
    for host in &layout.hosts {
        let ready = |schedules: &[Vec<Stage>], r: usize| {
            schedules[r].first().is_some_and(|s| matches!(s.way, Way::Host))
        };
        while host.iter().all(|&r| ready(schedules, r)) {
            let stages: Vec<Stage> = host.iter().map(|&r| schedules[r].remove(0)).collect();
            on_host(host, &stages, memory);
        }
    }
}

/// The stage between hosts of each rank that has one.
fn between(schedules: &mut [Vec<Stage>], memory: Vec<Memory>, links: Links, seed: u64) -> Vec<Memory> {
    let mut outer = memory;
    let mut plans = Vec::new();
    let mut inner = Vec::new();
    let mut stages = Vec::new();
    for (schedule, memory) in schedules.iter_mut().zip(&mut outer) {
        let here = schedule.first().is_some_and(|s| matches!(s.way, Way::Between(_)));
        let stage = here.then(|| schedule.remove(0));
        let mut part = Memory::default();
        let mut plan = Plan::default();
        if let Some(Stage { way: Way::Between(p), inputs, outputs, .. }) = &stage {
            plan = p.clone();
            part.inputs = read(memory, inputs);
            part.outputs = read(memory, outputs);
            part.in_place = !inputs.is_empty() && inputs == outputs;
        }
        plans.push(plan);
        inner.push(part);
        stages.push(stage);
    }
    let after = run(plans, inner, links, seed);
    for ((memory, stage), part) in outer.iter_mut().zip(stages).zip(after) {
        if let Some(stage) = stage {
            write(memory, &stage.outputs, &part.outputs);
        }
    }
    outer
}

/// Runs a call on a layout and compares every rank's outputs with what the operation means.
fn check(op: Op, hosts: &[usize], lens: &[Vec<usize>], tuning: &Tuning, links: Links, seed: u64) {
    let layout = Layout::new(hosts);
    let world = hosts.len();
    let (mut memory, expected) = case(op, world, lens, false);
    let mut schedules: Vec<Vec<Stage>> = Vec::new();
    for (rank, memory) in memory.iter_mut().enumerate() {
        let lens = |s: &[Vec<Element>]| s.iter().map(Vec::len).collect::<SmallVec<[usize; 4]>>();
        let (inputs, outputs) = (lens(&memory.inputs), lens(&memory.outputs));
        let shape = Shape { op, rank, world, size: 1, wide: false, inputs, outputs };
        let Schedule { stages, slots } = schedule(&shape, &layout, tuning);
        memory.slots = slots.iter().map(|&len| vec![Element::raw(u64::MAX); len]).collect();
        assert!(stages.iter().filter(|s| matches!(s.way, Way::Between(_))).count() <= 1);
        schedules.push(stages);
    }
    at_home(&layout, &mut schedules, &mut memory);
    let mut memory = between(&mut schedules, memory, links, seed);
    at_home(&layout, &mut schedules, &mut memory);
    assert!(schedules.iter().all(Vec::is_empty), "stages are left");
    let plain = |outputs: &[Vec<Element>]| -> Vec<Vec<u64>> {
        outputs.iter().map(|o| o.iter().map(|e| e.sum).collect()).collect()
    };
    for (rank, memory) in memory.iter().enumerate() {
        assert_eq!(plain(&memory.outputs), plain(&expected[rank]), "rank {rank} on hosts {hosts:?}");
    }
    if matches!(op, Op::AllReduce(ReduceOp::Sum)) {
        let orders = |m: &Memory| m.outputs[0].iter().map(|e| e.order).collect::<Vec<_>>();
        assert!(memory.iter().all(|m| orders(m) == orders(&memory[0])), "ranks have other bits");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 3 } else { 1000 }, // Miri is slow.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_schedule_ends_on_any_layout_of_hosts_and_gives_what_the_operation_means(
        number in 0usize..9,
        root in 0usize..9,
        (hosts, lens) in (2usize..=9).prop_flat_map(|n| (
            prop::collection::vec(0usize..4, n),
            prop::collection::vec(prop::collection::vec(0usize..40, n), n),
        )),
        (direct, small, chunk) in (0usize..9, 0usize..40, 1usize..9),
        capacity in 1usize..4,
        seed: u64,
    ) {
        let mut hosts = hosts;
        // At least two hosts.
        hosts[0] = 4;
        if hosts.iter().all(|&h| h == 4) { hosts[1] = 0; }
        let tuning =
            Tuning { direct, one_shot: small, doubling: small, bruck: small, tree: small, chunk };
        check(op(number, root % hosts.len()), &hosts, &lens, &tuning, Links::Copy(capacity), seed);
    }
}

#[test]
fn ranks_are_grouped_by_host_whatever_their_order() {
    let layout = Layout::new(&["b", "a", "b", "c", "a"]);
    assert_eq!(layout.hosts, [vec![0, 2], vec![1, 4], vec![3]]);
    assert_eq!((layout.place(4), layout.neighbours(2)), ((1, 1), &[0, 2][..]));
    assert!(layout.is_deep());
    // One rank a host, or one host: nothing to do in stages.
    assert!(!Layout::new(&["a", "b"]).is_deep());
    assert!(!Layout::new(&["a", "a"]).is_deep());
}

#[test]
fn every_rank_of_two_hosts_carries_a_share_between_them() {
    let layout = Layout::new(&[0, 0, 1, 1]);
    let op = Op::AllReduce(ReduceOp::Sum);
    for rank in 0..4 {
        let outputs = SmallVec::from_slice(&[1000]);
        let shape = Shape { op, rank, world: 4, size: 4, wide: false, inputs: SmallVec::new(), outputs };
        let stages = schedule(&shape, &layout, &Tuning::SOCKETS).stages;
        let bytes: usize = stages
            .iter()
            .filter_map(|s| if let Way::Between(plan) = &s.way { Some(plan) } else { None })
            .flat_map(|plan| &plan.steps)
            .map(|step| if let super::Action::Send { what, .. } = &step.action { what.len } else { 0 })
            .sum();
        assert_eq!(bytes, 500, "rank {rank} sends its half to its fellow on the other host");
    }
}
