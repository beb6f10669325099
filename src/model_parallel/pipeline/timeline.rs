//! When each action of a plan happens, computed or measured.

use std::collections::HashMap;

use super::{Action, Pass, Plan};
use crate::{Error, Result};

/// What the actions of one stage cost, in any unit of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Costs {
    /// A forward.
    pub forward: f64,
    /// A whole backward.
    pub backward: f64,
    /// The share of the backward that computes the gradients of weights.
    pub weight_share: f64,
    /// From the end of an action to its result being on the next rank.
    pub transfer: f64,
}

impl Default for Costs {
    /// A backward of two forwards, half of it for the weights, and transfers that take no time.
    fn default() -> Self {
        Self { forward: 1.0, backward: 2.0, weight_share: 0.5, transfer: 0.0 }
    }
}

impl Costs {
    fn of(&self, pass: Pass) -> f64 {
        match pass {
            Pass::Forward => self.forward,
            Pass::Backward => self.backward,
            Pass::BackwardInput => self.backward * (1.0 - self.weight_share),
            Pass::BackwardWeight => self.backward * self.weight_share,
        }
    }
}

/// One action with its time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    /// What was done.
    pub action: Action,
    /// When it began.
    pub start: f64,
    /// When it ended.
    pub end: f64,
}

/// What every rank does when. `Display` draws it as text, [`svg`](Self::svg) as a picture.
///
/// ```
/// use tch_distributed::model_parallel::pipeline::{Costs, Plan, Schedule};
/// let timeline = Plan::new(Schedule::GPipe, 2, 1, 2).unwrap().timeline(&Costs::default());
/// assert_eq!(timeline.span(), 9.0);
/// assert_eq!(timeline.to_string().lines().next().unwrap(), "rank 0 |F0|F1|  |  |  |B0|--|B1|--|");
/// assert!(timeline.svg().starts_with("<svg"));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    pub(super) name: String,
    pub(super) stages: usize,
    /// In seconds, not in units of the costs.
    pub(super) measured: bool,
    pub(super) ranks: Vec<Vec<Slot>>,
}

impl Timeline {
    pub(super) fn empty(plan: &Plan) -> Self {
        let ranks = vec![Vec::new(); plan.ranks()];
        Self { name: name(plan), stages: plan.stages(), measured: false, ranks }
    }

    /// A timeline from slots that were measured, in seconds: those of rank `r` at place `r`, on one clock.
    pub fn measured(plan: &Plan, slots: Vec<Vec<Slot>>) -> Self {
        Self {
            name: format!("{}, measured", name(plan)),
            stages: plan.stages(),
            measured: true,
            ranks: slots,
        }
    }

    /// Lets every rank work off its list; each action starts when its rank is free and what it needs is there.
    pub(super) fn simulate(plan: &Plan, costs: &Costs) -> Result<Self> {
        let mut timeline = Self::empty(plan);
        let mut ends: HashMap<Action, f64> = HashMap::new();
        let mut next = vec![0; plan.ranks()];
        loop {
            let mut moved = false;
            for (rank, next) in next.iter_mut().enumerate() {
                while let Some(&action) = plan.actions(rank).get(*next) {
                    let needed = match plan.needs(action) {
                        None => Some(0.0),
                        Some(n) if n.stage % plan.ranks() == rank => ends.get(&n).copied(),
                        Some(n) => ends.get(&n).map(|end| end + costs.transfer),
                    };
                    // The backward needs its own forward too, which is earlier in the same list or never.
                    let own = action.pass == Pass::Forward
                        || ends.contains_key(&Action { pass: Pass::Forward, ..action });
                    let (Some(needed), true) = (needed, own) else { break };
                    let free = timeline.ranks[rank].last().map_or(0.0, |s| s.end);
                    let start = needed.max(free);
                    let end = start + costs.of(action.pass);
                    timeline.ranks[rank].push(Slot { action, start, end });
                    ends.insert(action, end);
                    *next += 1;
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        for (rank, &done) in next.iter().enumerate() {
            if let Some(action) = plan.actions(rank).get(done) {
                return Err(Error::invalid("plan", format!("rank {rank} waits for ever to do the {action}")));
            }
        }
        Ok(timeline)
    }

    /// What each rank did, in order.
    pub fn ranks(&self) -> &[Vec<Slot>] {
        &self.ranks
    }

    /// From the first start to the last end.
    pub fn span(&self) -> f64 {
        let slots = || self.ranks.iter().flatten();
        let start = slots().map(|s| s.start).fold(f64::INFINITY, f64::min);
        let end = slots().map(|s| s.end).fold(f64::NEG_INFINITY, f64::max);
        if end > start { end - start } else { 0.0 }
    }

    /// The share of all ranks' time in which nothing was computed.
    #[doc(alias = "bubble")]
    pub fn bubble_share(&self) -> f64 {
        let busy: f64 = self.ranks.iter().flatten().map(|s| s.end - s.start).sum();
        let whole = self.span() * self.ranks.len() as f64;
        if whole > 0.0 { (1.0 - busy / whole).max(0.0) } else { 0.0 }
    }
}

fn name(plan: &Plan) -> String {
    let many = |n: usize, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
    let ranks = many(plan.ranks(), "rank", "ranks");
    let batches = many(plan.micro_batches(), "micro-batch", "micro-batches");
    match plan.chunks() {
        1 => format!("{}, {ranks}, {batches}", plan.schedule()),
        v => format!("{}, {ranks} with {v} stages each, {batches}", plan.schedule()),
    }
}
