//! Collectives that only move data.

use super::{Parts, Schedule, View};
use crate::backend::Op;
use crate::backend::native::plan::{Plan, Range};

impl View<'_> {
    pub(super) fn broadcast(&self, src: usize) -> Schedule {
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

    pub(super) fn all_gather(&self) -> Schedule {
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

    pub(super) fn gather(&self, dst: usize) -> Schedule {
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

    pub(super) fn scatter(&self, src: usize) -> Schedule {
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

    pub(super) fn all_to_all(&self) -> Schedule {
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

    pub(super) fn barrier(&self) -> Schedule {
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
