//! Executes the plans of all ranks in virtual time, in an order drawn at random.
//!
//! Elements remember what was done to them: their sum, the order in which operands were combined, and
//! whether that has been finished. A message is either copied when it is sent, as long as the link has
//! room (sockets), or lent, and read as late as possible (threads).

use std::collections::VecDeque;

use super::{Action, Place, Plan, Range, StepId};

/// What was done to an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// A rank's own.
    Raw,
    /// Combined, not finished.
    Partial,
    /// A result.
    Finished,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Element {
    pub(super) sum: u64,
    /// Combining a and b gives 31 a + b, which tells the order.
    pub(super) order: u64,
    pub(super) state: State,
}

impl Element {
    pub(super) fn raw(value: u64) -> Self {
        Self { sum: value, order: value, state: State::Raw }
    }

    fn blank() -> Self {
        Self::raw(u64::MAX)
    }
}

/// One rank's memory: inputs, outputs and slots.
#[derive(Clone, Debug, Default)]
pub(super) struct Memory {
    pub(super) inputs: Vec<Vec<Element>>,
    pub(super) outputs: Vec<Vec<Element>>,
    pub(super) slots: Vec<Vec<Element>>,
    /// Whether input 0 is output 0.
    pub(super) in_place: bool,
}

impl Memory {
    fn segment(&mut self, place: Place) -> &mut Vec<Element> {
        match place {
            Place::Input(0) if self.in_place => &mut self.outputs[0],
            Place::Input(n) => &mut self.inputs[n],
            Place::Output(n) => &mut self.outputs[n],
            Place::Slot(n) => &mut self.slots[n],
        }
    }

    pub(super) fn read(&mut self, range: Range) -> Vec<Element> {
        self.segment(range.place)[range.start..range.start + range.len].to_vec()
    }

    pub(super) fn write(&mut self, range: Range, data: &[Element]) {
        assert_eq!(data.len(), range.len, "a message of another length than expected");
        self.segment(range.place)[range.start..range.start + range.len].copy_from_slice(data);
    }
}

/// Combines operands in the order given, and finishes or not.
pub(super) fn combine(operands: &[Vec<Element>], state: State) -> Vec<Element> {
    let mut operands = operands.iter();
    let mut total = operands.next().cloned().unwrap_or_default();
    for operand in operands {
        for (t, o) in total.iter_mut().zip(operand) {
            t.sum = t.sum.wrapping_add(o.sum);
            t.order = t.order.wrapping_mul(31).wrapping_add(o.order);
        }
    }
    total.iter_mut().for_each(|t| t.state = state);
    total
}

struct Message {
    /// The step that sent it.
    step: StepId,
    what: Range,
    /// Its data, where it was copied.
    copied: Option<Vec<Element>>,
}

struct Rank {
    plan: Plan,
    memory: Memory,
    done: Vec<bool>,
    /// The messages to and from each rank that have not started, in order, and the other steps.
    sends: Vec<VecDeque<StepId>>,
    recvs: Vec<VecDeque<StepId>>,
    local: Vec<StepId>,
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
            memory.slots = plan.slots.iter().map(|&len| vec![Element::blank(); len]).collect();
            let steps = plan.steps.len();
            let lent = vec![None; plan.slots.len()];
            let (mut sends, mut recvs) = (vec![VecDeque::new(); world], vec![VecDeque::new(); world]);
            let mut local = Vec::new();
            for (id, step) in plan.steps.iter().enumerate() {
                match step.action {
                    Action::Send { to, .. } => sends[to].push_back(id),
                    Action::Recv { from, .. } => recvs[from].push_back(id),
                    Action::Reduce { .. } | Action::Copy { .. } => local.push(id),
                }
            }
            Rank { plan, memory, done: vec![false; steps], sends, recvs, local, lent }
        })
        .collect();
    let mut lanes: Vec<VecDeque<Message>> = (0..world * world).map(|_| VecDeque::new()).collect();
    let mut draw = |n: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % n
    };
    loop {
        let enabled: Vec<(usize, StepId)> = (0..world)
            .flat_map(|r| enabled(&ranks[r], r, &lanes, links).into_iter().map(move |s| (r, s)))
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

/// The steps of a rank that may start: messages of a pair start in order.
fn enabled(rank: &Rank, r: usize, lanes: &[VecDeque<Message>], links: Links) -> Vec<StepId> {
    let world = rank.sends.len();
    let ready = |s: &StepId| rank.plan.steps[*s].after.iter().all(|&a| rank.done[a]);
    let room = |to: usize| match links {
        Links::Copy(capacity) => lanes[to * world + r].len() < capacity,
        Links::Lend => true,
    };
    let sends = (0..world).filter(|&to| room(to)).filter_map(|to| rank.sends[to].front());
    let recvs = (0..world)
        .filter(|from| !lanes[r * world + from].is_empty())
        .filter_map(|from| rank.recvs[from].front());
    sends.chain(recvs).chain(&rank.local).filter(|s| ready(s)).copied().collect()
}

fn execute(ranks: &mut [Rank], r: usize, s: StepId, lanes: &mut [VecDeque<Message>], links: Links) {
    let world = ranks.len();
    let action = ranks[r].plan.steps[s].action.clone();
    match action {
        Action::Send { to, .. } => drop(ranks[r].sends[to].pop_front()),
        Action::Recv { from, .. } => drop(ranks[r].recvs[from].pop_front()),
        Action::Reduce { .. } | Action::Copy { .. } => ranks[r].local.retain(|&other| other != s),
    }
    match action {
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
        Action::Recv { from, into, lend } => {
            let Some(message) = lanes[r * world + from].pop_front() else { unreachable!() };
            match (message.copied, into.place) {
                (Some(data), _) => ranks[r].memory.write(into, &data),
                (None, Place::Slot(n)) if lend => {
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
                let elements = match lent {
                    Some((from, step, what)) => {
                        read.push((from, step));
                        ranks[from].memory.read(what)
                    }
                    None => ranks[r].memory.read(operand),
                };
                let state = if operand.partial { State::Partial } else { State::Raw };
                assert!(elements.iter().all(|e| e.state == state), "an operand that is not {state:?}");
                data.push(elements);
            }
            let state = if into.partial { State::Partial } else { State::Finished };
            ranks[r].memory.write(into, &combine(&data, state));
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
