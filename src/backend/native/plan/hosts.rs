//! Collectives of several hosts: on each host through its shared memory, between hosts over sockets,
//! with every rank of a host carrying a share.
//!
//! A schedule is data, like a plan: stages, of which each is a collective among the ranks of one host or
//! a plan between hosts. Data is cut into as many pieces as the largest host has ranks; a host of fewer
//! gives some of its ranks more than one. Operands combine in rank order on each host and then in the
//! order of hosts: the same on every rank.

mod layout;
mod moves;
mod reductions;

use super::{Action, Place, Plan, Range, Shape, Tuning, plan, share};
use crate::backend::Op;

pub(crate) use self::layout::Layout;

/// Parts of the call's memory, and of the schedule's scratch, that stand for their concatenation.
pub(crate) type Parts = Vec<Range>;

/// One stage of a call: an operation on segments made of parts of the call's memory.
#[derive(Clone, Debug)]
pub(crate) struct Stage {
    pub(crate) op: Op,
    pub(crate) inputs: Vec<Parts>,
    pub(crate) outputs: Vec<Parts>,
    pub(crate) way: Way,
}

/// Among whom a stage is.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// The ranks of this host, numbered from 0.
    Host,
    /// Ranks of several hosts, by a plan on the segments of the stage.
    Between(Plan),
}

/// What one rank does in a call.
#[derive(Clone, Debug, Default)]
pub(crate) struct Schedule {
    pub(crate) stages: Vec<Stage>,
    /// The length of each scratch slot, in elements.
    pub(crate) slots: Vec<usize>,
}

impl Schedule {
    fn on_host(&mut self, op: Op, inputs: Vec<Parts>, outputs: Vec<Parts>) {
        self.stages.push(Stage { op, inputs, outputs, way: Way::Host });
    }

    fn between(&mut self, op: Op, inputs: Vec<Parts>, outputs: Vec<Parts>, plan: Plan) {
        self.stages.push(Stage { op, inputs, outputs, way: Way::Between(plan) });
    }

    fn slot(&mut self, len: usize) -> Range {
        self.slots.push(len);
        Range::new(Place::Slot(self.slots.len() - 1), 0, len)
    }
}

/// One rank's view of the layout and the call.
struct View<'a> {
    shape: &'a Shape,
    layout: &'a Layout,
    tuning: &'a Tuning,
    host: usize,
    /// This rank's number on its host.
    number: usize,
    /// How many ranks its host has.
    size: usize,
}

/// This rank's part of a call.
pub(crate) fn schedule(shape: &Shape, layout: &Layout, tuning: &Tuning) -> Schedule {
    let (host, number) = layout.place(shape.rank);
    let size = layout.hosts[host].len();
    let view = View { shape, layout, tuning, host, number, size };
    match shape.op {
        Op::AllReduce(op) => view.all_reduce(op),
        Op::Reduce { op, dst } => view.reduce(op, dst),
        Op::Broadcast { src } => view.broadcast(src),
        Op::AllGather => view.all_gather(),
        Op::ReduceScatter(op) => view.reduce_scatter(op),
        Op::Gather { dst } => view.gather(dst),
        Op::Scatter { src } => view.scatter(src),
        Op::AllToAll => view.all_to_all(),
        Op::Barrier => view.barrier(),
    }
}

impl View<'_> {
    fn alone(&self) -> bool {
        self.size == 1
    }

    /// The pieces of `data` that this host's rank of number `n` carries: number and part.
    fn carried(&self, data: Range, n: usize) -> Vec<(usize, Range)> {
        let pieces = self.layout.pieces();
        (0..pieces)
            .filter(|p| p % self.size == n)
            .map(|p| {
                let (start, len) = share(data.len, pieces, p);
                (p, data.part(start, len))
            })
            .collect()
    }

    fn parts(&self, data: Range, n: usize) -> Parts {
        self.carried(data, n).into_iter().map(|(_, part)| part).collect()
    }

    /// The pieces of all ranks of this host.
    fn all_parts(&self, data: Range) -> Vec<Parts> {
        (0..self.size).map(|n| self.parts(data, n)).collect()
    }

    /// Adds to `whole` the plan of an operation between the carriers of a piece. Empty pieces stay at home,
    /// but for the first: so that hosts notice when they do not agree.
    fn piece(&self, whole: &mut Plan, p: usize, op: Op, input: Option<Range>, output: Option<Range>) {
        let len = input.or(output).map_or(0, |r| r.len);
        if len == 0 && p > 0 {
            return;
        }
        let members: Vec<usize> = (0..self.layout.hosts.len()).map(|h| self.layout.carrier(h, p)).collect();
        self.embed(whole, op, &members, input, output);
    }

    /// Adds the plan of an operation among one rank of each host.
    fn embed(
        &self,
        whole: &mut Plan,
        op: Op,
        members: &[usize],
        input: Option<Range>,
        output: Option<Range>,
    ) {
        let shape = Shape {
            op,
            rank: self.host,
            world: members.len(),
            inputs: input.iter().map(|r| r.len).collect(),
            outputs: output.iter().map(|r| r.len).collect(),
            size: self.shape.size,
            wide: self.shape.wide,
        };
        let part = plan(&shape, self.tuning);
        let (first, slots) = (whole.steps.len(), whole.slots.len());
        whole.slots.extend(part.slots);
        let place = |r: Range| match (r.place, input, output) {
            (Place::Input(_), Some(base), _) | (Place::Output(_), _, Some(base)) => {
                Range { partial: r.partial, ..base.part(r.start, r.len) }
            }
            (Place::Slot(n), ..) => Range { place: Place::Slot(slots + n), ..r },
            _ => r,
        };
        for mut step in part.steps {
            step.after.iter_mut().for_each(|s| *s += first);
            step.action = match step.action {
                Action::Send { to, what } => Action::Send { to: members[to], what: place(what) },
                Action::Recv { from, into, lend } => {
                    Action::Recv { from: members[from], into: place(into), lend }
                }
                Action::Reduce { into, operands } => {
                    Action::Reduce { into: place(into), operands: operands.into_iter().map(place).collect() }
                }
                Action::Copy { from, into } => Action::Copy { from: place(from), into: place(into) },
            };
            whole.steps.push(step);
        }
    }

    /// The ranks of this host give each other the pieces that they carry.
    fn gather_parts(&self, schedule: &mut Schedule, data: Range) {
        if !self.alone() {
            let mine = vec![self.parts(data, self.number)];
            schedule.on_host(Op::AllGather, mine, self.all_parts(data));
        }
    }

    /// The segment of each rank of this host: those of this host's own collective.
    fn local(&self, segment: impl Fn(usize) -> Range) -> Vec<Parts> {
        self.layout.neighbours(self.shape.rank).iter().map(|&r| vec![segment(r)]).collect()
    }

    /// The ranks of other hosts, each starting after itself.
    fn others(&self) -> impl Iterator<Item = usize> {
        self.shape.peers().filter(|&r| self.layout.place(r).0 != self.host)
    }

    /// Every segment of the call as it is.
    fn segments(&self) -> (Vec<Parts>, Vec<Parts>) {
        let inputs = (0..self.shape.inputs.len()).map(|n| vec![self.shape.input(n)]).collect();
        let outputs = (0..self.shape.outputs.len()).map(|n| vec![self.shape.output(n)]).collect();
        (inputs, outputs)
    }
}
