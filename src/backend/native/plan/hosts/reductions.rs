//! Collectives that combine operands: first on each host, then between hosts.

use smallvec::SmallVec;

use super::{Parts, Schedule, View};
use crate::ReduceOp;
use crate::backend::Op;
use crate::backend::native::plan::{Cuts, Place, Plan, Range, StepId};

/// What the ranks of a host do with their operands before others see them: averages are taken at the end.
fn on_host(op: ReduceOp) -> ReduceOp {
    if op == ReduceOp::Avg { ReduceOp::Sum } else { op }
}

/// A whole segment of a stage.
fn whole(place: Place, len: usize) -> Range {
    Range::new(place, 0, len)
}

impl View<'_> {
    /// What hosts do with what each of them has combined: a factor has been applied, except by a rank that
    /// is alone on its host.
    fn between(&self, op: ReduceOp) -> ReduceOp {
        match op {
            ReduceOp::PremulSum(_) if !self.alone() => ReduceOp::PremulSum(1.0),
            other => other,
        }
    }

    pub(super) fn all_reduce(&self, op: ReduceOp) -> Schedule {
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

    pub(super) fn reduce(&self, op: ReduceOp, dst: usize) -> Schedule {
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

    pub(super) fn reduce_scatter(&self, op: ReduceOp) -> Schedule {
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
}
