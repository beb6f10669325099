//! Collectives of several hosts: on each host through its shared memory, between hosts over sockets,
//! with every rank of a host carrying a share.
//!
//! A schedule is data, like a plan: stages, of which each is a collective among the ranks of one host or
//! a plan between hosts. Data is cut into as many pieces as the largest host has ranks; a host of fewer
//! gives some of its ranks more than one. Operands combine in rank order on each host and then in the
//! order of hosts: the same on every rank.

use smallvec::SmallVec;

use super::{Action, Cuts, Place, Plan, Range, Shape, StepId, Tuning, plan, share};
use crate::ReduceOp;
use crate::backend::Op;

/// Which ranks are on which host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The ranks of each host, ascending; hosts in the order of their first ranks.
    pub(crate) hosts: Vec<Vec<usize>>,
    /// Of each rank: its host, and its number there.
    place: Vec<(usize, usize)>,
}

impl Layout {
    /// From what each rank says is its host.
    pub(crate) fn new<T: PartialEq>(names: &[T]) -> Self {
        let mut hosts: Vec<Vec<usize>> = Vec::new();
        let mut place = Vec::with_capacity(names.len());
        for (rank, name) in names.iter().enumerate() {
            let host = hosts.iter().position(|h| names[h[0]] == *name).unwrap_or_else(|| {
                hosts.push(Vec::new());
                hosts.len() - 1
            });
            place.push((host, hosts[host].len()));
            hosts[host].push(rank);
        }
        Self { hosts, place }
    }

    pub(crate) fn world(&self) -> usize {
        self.place.len()
    }

    /// A rank's host and its number there.
    pub(crate) fn place(&self, rank: usize) -> (usize, usize) {
        self.place[rank]
    }

    /// The ranks of a rank's host.
    pub(crate) fn neighbours(&self, rank: usize) -> &[usize] {
        &self.hosts[self.place[rank].0]
    }

    /// Whether there is anything to do in two stages: several hosts, of which one has several ranks.
    pub(crate) fn is_deep(&self) -> bool {
        self.hosts.len() > 1 && self.hosts.iter().any(|h| h.len() > 1)
    }

    fn pieces(&self) -> usize {
        self.hosts.iter().map(Vec::len).max().unwrap_or(1)
    }

    /// The rank of a host that carries piece `p`.
    fn carrier(&self, host: usize, p: usize) -> usize {
        self.hosts[host][p % self.hosts[host].len()]
    }

    /// The ranks whose data a rank carries between hosts: itself, and on each other host those with its
    /// number there.
    fn carries(&self, rank: usize) -> Vec<usize> {
        let (host, number) = self.place[rank];
        let size = self.hosts[host].len();
        let carried = |&r: &usize| r == rank || self.place[r].0 != host && self.place[r].1 % size == number;
        (0..self.place.len()).filter(carried).collect()
    }
}

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

/// What the ranks of a host do with their operands before others see them: averages are taken at the end.
fn on_host(op: ReduceOp) -> ReduceOp {
    if op == ReduceOp::Avg { ReduceOp::Sum } else { op }
}

/// A whole segment of a stage.
fn whole(place: Place, len: usize) -> Range {
    Range::new(place, 0, len)
}

impl View<'_> {
    fn alone(&self) -> bool {
        self.size == 1
    }

    /// What hosts do with what each of them has combined: a factor has been applied, except by a rank that
    /// is alone on its host.
    fn between(&self, op: ReduceOp) -> ReduceOp {
        match op {
            ReduceOp::PremulSum(_) if !self.alone() => ReduceOp::PremulSum(1.0),
            other => other,
        }
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

    fn all_reduce(&self, op: ReduceOp) -> Schedule {
        let mut schedule = Schedule::default();
        let data = self.shape.output(0);
        if !self.alone() {
            let mine = vec![self.parts(data, self.number)];
            schedule.on_host(Op::ReduceScatter(on_host(op)), self.all_parts(data), mine);
        }
        let op = Op::AllReduce(self.between(op));
        let mut plan = Plan::default();
        for (p, part) in self.carried(data, self.number) {
            self.piece(&mut plan, p, op, None, Some(part));
        }
        schedule.between(op, vec![], vec![vec![data]], plan);
        self.gather_parts(&mut schedule, data);
        schedule
    }

    /// The ranks of this host give each other the pieces that they carry.
    fn gather_parts(&self, schedule: &mut Schedule, data: Range) {
        if !self.alone() {
            let mine = vec![self.parts(data, self.number)];
            schedule.on_host(Op::AllGather, mine, self.all_parts(data));
        }
    }

    fn reduce(&self, op: ReduceOp, dst: usize) -> Schedule {
        let mut schedule = Schedule::default();
        let data = self.shape.input(0);
        let (root, number) = self.layout.place(dst);
        let here = root == self.host;
        // Combined beside: inputs stay as they are.
        let mine = match self.alone() {
            true => data,
            false => {
                let len = self.parts(data, self.number).iter().map(|r| r.len).sum();
                let mine = schedule.slot(len);
                schedule.on_host(Op::ReduceScatter(on_host(op)), self.all_parts(data), vec![vec![mine]]);
                mine
            }
        };
        let result = match (here, self.alone()) {
            (false, _) => vec![],
            (true, true) => vec![vec![self.shape.output(0)]],
            (true, false) => vec![vec![mine]],
        };
        let op = self.between(op);
        let mut plan = Plan::default();
        let mut at = 0;
        for (p, part) in self.carried(data, self.number) {
            let input = whole(Place::Input(0), mine.len).part(at, part.len);
            let output = here.then(|| whole(Place::Output(0), mine.len).part(at, part.len));
            self.piece(&mut plan, p, Op::Reduce { op, dst: root }, Some(input), output);
            at += part.len;
        }
        schedule.between(Op::Reduce { op, dst }, vec![vec![mine]], result, plan);
        if here && !self.alone() {
            let outputs = if dst == self.shape.rank { self.all_parts(self.shape.output(0)) } else { vec![] };
            schedule.on_host(Op::Gather { dst: number }, vec![vec![mine]], outputs);
        }
        schedule
    }

    fn broadcast(&self, src: usize) -> Schedule {
        let mut schedule = Schedule::default();
        let data = self.shape.output(0);
        let (root, number) = self.layout.place(src);
        let here = root == self.host;
        let between = Op::Broadcast { src: root };
        let mut plan = Plan::default();
        if data.len.saturating_mul(self.shape.size) <= self.tuning.tree {
            // One rank of each host has it, and passes it on.
            let hosts = &self.layout.hosts;
            let members: Vec<usize> =
                hosts.iter().map(|h| if h.contains(&src) { src } else { h[0] }).collect();
            if members[self.host] == self.shape.rank {
                self.embed(&mut plan, between, &members, None, Some(data));
                schedule.between(self.shape.op, vec![], vec![vec![data]], plan);
            }
            if !self.alone() {
                let src = if here { number } else { 0 };
                schedule.on_host(Op::Broadcast { src }, vec![], vec![vec![data]]);
            }
            return schedule;
        }
        if here && !self.alone() {
            schedule.on_host(Op::Broadcast { src: number }, vec![], vec![vec![data]]);
        }
        for (p, part) in self.carried(data, self.number) {
            self.piece(&mut plan, p, between, None, Some(part));
        }
        schedule.between(self.shape.op, vec![], vec![vec![data]], plan);
        if !here {
            self.gather_parts(&mut schedule, data);
        }
        schedule
    }

    fn all_gather(&self) -> Schedule {
        let mut schedule = Schedule::default();
        let rank = self.shape.rank;
        let outputs: Vec<Range> = (0..self.shape.world).map(|r| self.shape.output(r)).collect();
        let mut plan = Plan::default();
        for distance in 1..self.layout.hosts.len() {
            let to = (self.host + distance) % self.layout.hosts.len();
            plan.send(self.layout.carrier(to, self.number), self.shape.input(0), &[]);
        }
        plan.copy(self.shape.input(0), outputs[rank], &[]);
        for r in self.layout.carries(rank).into_iter().filter(|&r| r != rank) {
            plan.recv_to_keep(r, outputs[r], &[]);
        }
        let segments = outputs.iter().map(|&o| vec![o]).collect();
        schedule.between(Op::AllGather, vec![vec![self.shape.input(0)]], segments, plan);
        if !self.alone() {
            let carried =
                |&r: &usize| -> Parts { self.layout.carries(r).into_iter().map(|r| outputs[r]).collect() };
            let all = self.layout.neighbours(rank).iter().map(carried).collect();
            schedule.on_host(Op::AllGather, vec![carried(&rank)], all);
        }
        schedule
    }

    fn reduce_scatter(&self, op: ReduceOp) -> Schedule {
        let mut schedule = Schedule::default();
        let rank = self.shape.rank;
        let inputs =
            |r: usize| -> Parts { self.layout.carries(r).into_iter().map(|r| self.shape.input(r)).collect() };
        // What this host has combined for this rank and for those that it carries, one after another.
        let mine: Vec<Parts> = match self.alone() {
            true => inputs(rank).into_iter().map(|part| vec![part]).collect(),
            false => {
                let lens: Vec<usize> = inputs(rank).iter().map(|part| part.len).collect();
                let all = schedule.slot(lens.iter().sum());
                let operands = self.layout.neighbours(rank).iter().map(|&r| inputs(r)).collect();
                schedule.on_host(Op::ReduceScatter(on_host(op)), operands, vec![vec![all]]);
                let mut at = 0;
                let part = |len| {
                    at += len;
                    vec![all.part(at - len, len)]
                };
                lens.into_iter().map(part).collect()
            }
        };
        let plan = self.exchange(&mine);
        let op = Op::ReduceScatter(self.between(op));
        schedule.between(op, mine, vec![vec![self.shape.output(0)]], plan);
        schedule
    }

    /// Sends what is for ranks of other hosts, and combines what comes from them, in the order of hosts.
    fn exchange(&self, mine: &[Parts]) -> Plan {
        /// How many chunks may be on their way before the first has been combined.
        const DEPTH: usize = 4;
        let mut plan = Plan::default();
        let rank = self.shape.rank;
        let chunk = (self.tuning.chunk / self.shape.size.max(1)).max(1);
        let carries = self.layout.carries(rank);
        let segment = |n: usize| whole(Place::Input(n), mine[n].iter().map(|r| r.len).sum());
        let own = segment(carries.iter().position(|&r| r == rank).unwrap_or_default());
        let cuts = Cuts::new(own.len, chunk);
        let depth = DEPTH.min(cuts.count);
        let hosts = self.layout.hosts.len();
        let slots: Vec<Vec<Range>> = (0..hosts)
            .map(|h| (0..depth).filter(|_| h != self.host).map(|_| plan.slot(cuts.widest())).collect())
            .collect();
        let longest = (0..carries.len()).map(|n| Cuts::new(segment(n).len, chunk).count).max().unwrap_or(0);
        let mut combined: Vec<StepId> = Vec::new();
        for round in 0..longest {
            for (n, &r) in carries.iter().enumerate().filter(|&(_, &r)| r != rank) {
                if let Some((start, len)) = Cuts::new(segment(n).len, chunk).get(round) {
                    plan.send(r, segment(n).part(start, len), &[]);
                }
            }
            let Some((start, len)) = cuts.get(round) else { continue };
            let free: SmallVec<[StepId; 1]> =
                round.checked_sub(depth).map(|r| combined[r]).into_iter().collect();
            let mut operands = SmallVec::<[Range; 4]>::new();
            let mut after = SmallVec::<[StepId; 8]>::new();
            for (h, slots) in slots.iter().enumerate() {
                if h == self.host {
                    operands.push(own.part(start, len));
                    continue;
                }
                let slot = slots[round % depth].part(0, len);
                after.push(plan.recv(self.layout.carrier(h, self.number), slot, &free));
                operands.push(slot);
            }
            combined.push(plan.reduce(whole(Place::Output(0), own.len).part(start, len), operands, &after));
        }
        plan
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

    fn gather(&self, dst: usize) -> Schedule {
        let mut schedule = Schedule::default();
        let rank = self.shape.rank;
        let (root, number) = self.layout.place(dst);
        let mut plan = Plan::default();
        if root == self.host && !self.alone() {
            let outputs = if rank == dst { self.local(|r| self.shape.output(r)) } else { vec![] };
            schedule.on_host(Op::Gather { dst: number }, vec![vec![self.shape.input(0)]], outputs);
        } else if rank == dst {
            plan.copy(self.shape.input(0), self.shape.output(rank), &[]);
        } else {
            plan.send(dst, self.shape.input(0), &[]);
        }
        if rank == dst {
            for r in self.others() {
                plan.recv_to_keep(r, self.shape.output(r), &[]);
            }
        }
        let (inputs, outputs) = self.segments();
        schedule.between(self.shape.op, inputs, outputs, plan);
        schedule
    }

    fn scatter(&self, src: usize) -> Schedule {
        let mut schedule = Schedule::default();
        let rank = self.shape.rank;
        let (root, number) = self.layout.place(src);
        let mut plan = Plan::default();
        if rank == src {
            for r in self.others() {
                plan.send(r, self.shape.input(r), &[]);
            }
            if self.alone() {
                plan.copy(self.shape.input(rank), self.shape.output(0), &[]);
            }
        } else if root != self.host {
            plan.recv_to_keep(src, self.shape.output(0), &[]);
        }
        let (inputs, outputs) = self.segments();
        schedule.between(self.shape.op, inputs, outputs, plan);
        if root == self.host && !self.alone() {
            let inputs = if rank == src { self.local(|r| self.shape.input(r)) } else { vec![] };
            schedule.on_host(Op::Scatter { src: number }, inputs, vec![vec![self.shape.output(0)]]);
        }
        schedule
    }

    fn all_to_all(&self) -> Schedule {
        let mut schedule = Schedule::default();
        let (rank, world) = (self.shape.rank, self.shape.world);
        let mut plan = Plan::default();
        let away = |r: &usize| self.layout.place(*r).0 != self.host;
        for distance in 1..world {
            let (to, from) = ((rank + distance) % world, (rank + world - distance) % world);
            if away(&to) {
                plan.send(to, self.shape.input(to), &[]);
            }
            if away(&from) {
                plan.recv_to_keep(from, self.shape.output(from), &[]);
            }
        }
        if self.alone() {
            plan.copy(self.shape.input(rank), self.shape.output(rank), &[]);
        } else {
            let (inputs, outputs) =
                (self.local(|r| self.shape.input(r)), self.local(|r| self.shape.output(r)));
            schedule.on_host(Op::AllToAll, inputs, outputs);
        }
        let (inputs, outputs) = self.segments();
        schedule.between(Op::AllToAll, inputs, outputs, plan);
        schedule
    }

    fn barrier(&self) -> Schedule {
        let mut schedule = Schedule::default();
        let local = |schedule: &mut Schedule| {
            if !self.alone() {
                schedule.on_host(Op::Barrier, vec![], vec![]);
            }
        };
        local(&mut schedule);
        if self.number == 0 {
            let mut plan = Plan::default();
            let members: Vec<usize> = self.layout.hosts.iter().map(|h| h[0]).collect();
            self.embed(&mut plan, Op::Barrier, &members, None, None);
            schedule.between(Op::Barrier, vec![], vec![], plan);
        }
        local(&mut schedule);
        schedule
    }
}
