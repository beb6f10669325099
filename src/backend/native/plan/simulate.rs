//! Executes the plans of all ranks in virtual time, in an order drawn at random.
//!
//! Elements are numbers that remember what was done to them: combining a and b gives 31 a + b, which
//! tells the order of operands. A message is either copied when it is sent, as long as the link has
//! room (sockets), or lent, and read as late as possible (threads).

use std::collections::VecDeque;

use super::{Action, Place, Plan, Range, StepId};

/// One rank's memory: inputs, outputs and slots.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    pub(super) inputs: Vec<Vec<u64>>,
    pub(super) outputs: Vec<Vec<u64>>,
    slots: Vec<Vec<u64>>,
    /// Whether input 0 is output 0.
    pub(super) in_place: bool,
}

impl Memory {
    fn segment(&mut self, place: Place) -> &mut Vec<u64> {
        match place {
            Place::Input(0) if self.in_place => &mut self.outputs[0],
            Place::Input(n) => &mut self.inputs[n],
            Place::Output(n) => &mut self.outputs[n],
            Place::Slot(n) => &mut self.slots[n],
        }
    }

    fn read(&mut self, range: Range) -> Vec<u64> {
        self.segment(range.place)[range.start..range.start + range.len].to_vec()
    }

    fn write(&mut self, range: Range, data: &[u64]) {
        assert_eq!(data.len(), range.len, "a message of another length than expected");
        self.segment(range.place)[range.start..range.start + range.len].copy_from_slice(data);
    }
}

/// Combines operands in the order given.
pub(super) fn combine(operands: &[Vec<u64>]) -> Vec<u64> {
    let mut operands = operands.iter();
    let mut total = operands.next().cloned().unwrap_or_default();
    for operand in operands {
        for (t, o) in total.iter_mut().zip(operand) {
            *t = t.wrapping_mul(31).wrapping_add(*o);
        }
    }
    total
}

struct Message {
    /// The step that sent it.
    step: StepId,
    what: Range,
    /// Its data, where it was copied.
    copied: Option<Vec<u64>>,
}

struct Rank {
    plan: Plan,
    memory: Memory,
    done: Vec<bool>,
    started: Vec<bool>,
    /// What is lent to each slot: the sender and its step.
    lent: Vec<Option<(usize, StepId, Range)>>,
}

/// How messages travel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Links {
    /// Copied, at most this many on their way between two ranks.
    Copy(usize),
    /// Lent.
    Lend,
}

/// Runs the plans to their end; the ranks' memory after it. Panics where they deadlock, send what
/// nobody receives, or disagree about a length.
pub(super) fn run(plans: Vec<Plan>, memory: Vec<Memory>, links: Links, mut seed: u64) -> Vec<Memory> {
    let world = plans.len();
    let mut ranks: Vec<Rank> = plans
        .into_iter()
        .zip(memory)
        .map(|(plan, mut memory)| {
            memory.slots = plan.slots.iter().map(|&len| vec![u64::MAX; len]).collect();
            let steps = plan.steps.len();
            let lent = vec![None; plan.slots.len()];
            Rank { plan, memory, done: vec![false; steps], started: vec![false; steps], lent }
        })
        .collect();
    let mut lanes: Vec<VecDeque<Message>> = (0..world * world).map(|_| VecDeque::new()).collect();
    let mut draw = |n: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % n
    };
    loop {
        let enabled: Vec<(usize, StepId)> = (0..world)
            .flat_map(|r| (0..ranks[r].plan.steps.len()).map(move |s| (r, s)))
            .filter(|&(r, s)| enabled(&ranks[r], r, s, &lanes, world, links))
            .collect();
        if enabled.is_empty() {
            break;
        }
        let (r, s) = enabled[draw(enabled.len())];
        execute(&mut ranks, r, s, &mut lanes, links);
    }
    for (r, rank) in ranks.iter().enumerate() {
        let left: Vec<_> =
            (0..rank.done.len()).filter(|&s| !rank.done[s]).map(|s| &rank.plan.steps[s]).collect();
        assert!(left.is_empty(), "deadlock: rank {r} has {left:?} left");
    }
    assert!(lanes.iter().all(VecDeque::is_empty), "a message that nobody receives");
    ranks.into_iter().map(|r| r.memory).collect()
}

fn enabled(
    rank: &Rank,
    r: usize,
    s: StepId,
    lanes: &[VecDeque<Message>],
    world: usize,
    links: Links,
) -> bool {
    let step = &rank.plan.steps[s];
    if rank.started[s] || step.after.iter().any(|&a| !rank.done[a]) {
        return false;
    }
    // Messages of a pair start in order.
    let first = |same: &dyn Fn(&Action) -> bool| {
        rank.plan.steps[..s]
            .iter()
            .zip(&rank.started)
            .all(|(other, started)| *started || !same(&other.action))
    };
    match step.action {
        Action::Send { to, .. } => {
            let room = match links {
                Links::Copy(capacity) => lanes[to * world + r].len() < capacity,
                Links::Lend => true,
            };
            room && first(&|a| matches!(a, Action::Send { to: t, .. } if *t == to))
        }
        Action::Recv { from, .. } => {
            !lanes[r * world + from].is_empty()
                && first(&|a| matches!(a, Action::Recv { from: f, .. } if *f == from))
        }
        Action::Reduce { .. } | Action::Copy { .. } => true,
    }
}

fn execute(ranks: &mut [Rank], r: usize, s: StepId, lanes: &mut [VecDeque<Message>], links: Links) {
    let world = ranks.len();
    ranks[r].started[s] = true;
    match ranks[r].plan.steps[s].action.clone() {
        Action::Send { to, what } => {
            let copied = match links {
                Links::Copy(_) => {
                    ranks[r].done[s] = true;
                    Some(ranks[r].memory.read(what))
                }
                Links::Lend => None,
            };
            lanes[to * world + r].push_back(Message { step: s, what, copied });
        }
        Action::Recv { from, into } => {
            let Some(message) = lanes[r * world + from].pop_front() else { unreachable!() };
            match (message.copied, into.place) {
                (Some(data), _) => ranks[r].memory.write(into, &data),
                (None, Place::Slot(n)) if into.len > 0 => {
                    assert_eq!(message.what.len, into.len);
                    assert!(ranks[r].lent[n].is_none(), "a slot is lent twice");
                    ranks[r].lent[n] = Some((from, message.step, message.what));
                }
                (None, _) => {
                    let data = ranks[from].memory.read(message.what);
                    ranks[r].memory.write(into, &data);
                    ranks[from].done[message.step] = true;
                }
            }
            ranks[r].done[s] = true;
        }
        Action::Reduce { into, operands } => {
            let mut data = Vec::new();
            let mut read = Vec::new();
            for operand in operands {
                let lent = match operand.place {
                    Place::Slot(n) => ranks[r].lent[n].take(),
                    _ => None,
                };
                data.push(match lent {
                    Some((from, step, what)) => {
                        read.push((from, step));
                        ranks[from].memory.read(what)
                    }
                    None => ranks[r].memory.read(operand),
                });
            }
            ranks[r].memory.write(into, &combine(&data));
            for (from, step) in read {
                ranks[from].done[step] = true;
            }
            ranks[r].done[s] = true;
        }
        Action::Copy { from, into } => {
            let data = ranks[r].memory.read(from);
            ranks[r].memory.write(into, &data);
            ranks[r].done[s] = true;
        }
    }
}
