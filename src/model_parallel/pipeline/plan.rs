//! A schedule worked out for a number of ranks, stages and micro-batches.

use std::collections::HashMap;
use std::fmt;

use super::{Costs, Schedule, Timeline};
use crate::{Error, Result};

/// One kind of work on one micro-batch in one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pass {
    /// Outputs from inputs.
    Forward,
    /// The gradients of inputs and of weights.
    Backward,
    /// The gradients of inputs only.
    BackwardInput,
    /// The gradients of weights, after those of inputs.
    BackwardWeight,
}

/// One step of a rank's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Action {
    /// What is done.
    pub pass: Pass,
    /// In which stage of the whole model.
    pub stage: usize,
    /// On which micro-batch.
    pub micro_batch: usize,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.pass {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
            Pass::BackwardInput => "input gradients",
            Pass::BackwardWeight => "weight gradients",
        };
        write!(f, "{name} of micro-batch {} in stage {}", self.micro_batch, self.stage)
    }
}

/// What every rank does, in order: a pure value.
///
/// Stage `s` lives on rank `s % ranks`. An action that needs another stage's result waits for it.
///
/// ```
/// use tch_distributed::model_parallel::pipeline::{Pass, Plan, Schedule};
/// let plan = Plan::new(Schedule::GPipe, 2, 1, 3).unwrap();
/// let passes: Vec<_> = plan.actions(0).iter().map(|a| (a.pass, a.micro_batch)).collect();
/// assert_eq!(passes[..3], [(Pass::Forward, 0), (Pass::Forward, 1), (Pass::Forward, 2)]);
/// plan.verify().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    schedule: Schedule,
    ranks: usize,
    chunks: usize,
    micro_batches: usize,
    actions: Vec<Vec<Action>>,
}

impl Plan {
    /// The plan for `ranks` ranks with `chunks` stages each.
    ///
    /// # Errors
    /// `InvalidArgument` for no ranks, stages or micro-batches; several stages on a rank where the schedule
    /// takes one; micro-batches that are no multiple of the ranks where an interleaved schedule needs it.
    pub fn new(schedule: Schedule, ranks: usize, chunks: usize, micro_batches: usize) -> Result<Self> {
        schedule.check(ranks, chunks, micro_batches)?;
        let actions = schedule.actions(ranks, chunks, micro_batches);
        Ok(Self { schedule, ranks, chunks, micro_batches, actions })
    }

    /// The forwards only, for evaluation: stage by stage as micro-batches arrive.
    pub fn forward_only(ranks: usize, chunks: usize, micro_batches: usize) -> Result<Self> {
        let mut plan = Self::new(Schedule::GPipe, ranks, chunks, micro_batches)?;
        for actions in &mut plan.actions {
            actions.retain(|a| a.pass == Pass::Forward);
        }
        Ok(plan)
    }

    /// The schedule it follows.
    pub fn schedule(&self) -> Schedule {
        self.schedule
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// The number of stages on each rank.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// The number of stages of the whole model.
    pub fn stages(&self) -> usize {
        self.ranks * self.chunks
    }

    /// The number of micro-batches.
    pub fn micro_batches(&self) -> usize {
        self.micro_batches
    }

    /// What one rank does, in order; empty for a rank that is not there.
    pub fn actions(&self, rank: usize) -> &[Action] {
        self.actions.get(rank).map_or(&[], Vec::as_slice)
    }

    /// What must be done before this action.
    pub fn needs(&self, action: Action) -> Option<Action> {
        let Action { pass, stage, micro_batch } = action;
        let at = |pass, stage| Some(Action { pass, stage, micro_batch });
        let last = stage + 1 == self.stages();
        match pass {
            Pass::Forward if stage == 0 => None,
            Pass::Forward => at(Pass::Forward, stage - 1),
            Pass::Backward | Pass::BackwardInput if last => at(Pass::Forward, stage),
            Pass::Backward | Pass::BackwardInput => at(pass, stage + 1),
            Pass::BackwardWeight => at(Pass::BackwardInput, stage),
        }
    }

    /// Checks that every micro-batch passes every stage once, forwards and backwards, on the right rank, and
    /// that the ranks never wait for one another in a circle.
    ///
    /// # Errors
    /// `InvalidArgument` that names the first action that is missing, done twice, or never possible.
    pub fn verify(&self) -> Result<()> {
        let mut done = HashMap::new();
        for (rank, actions) in self.actions.iter().enumerate() {
            for action in actions {
                if action.stage % self.ranks != rank || action.stage >= self.stages() {
                    return Err(Error::invalid("plan", format!("{action} does not belong on rank {rank}")));
                }
                if done.insert(*action, ()).is_some() {
                    return Err(Error::invalid("plan", format!("{action} is done twice")));
                }
            }
        }
        let passes: &[Pass] = match self.schedule {
            Schedule::ZeroBubble => &[Pass::Forward, Pass::BackwardInput, Pass::BackwardWeight],
            _ => &[Pass::Forward, Pass::Backward],
        };
        for stage in 0..self.stages() {
            for micro_batch in 0..self.micro_batches {
                for &pass in passes {
                    let action = Action { pass, stage, micro_batch };
                    if done.remove(&action).is_none() {
                        return Err(Error::invalid("plan", format!("{action} is missing")));
                    }
                }
            }
        }
        if let Some(action) = done.keys().next() {
            return Err(Error::invalid("plan", format!("{action} is not part of it")));
        }
        Timeline::simulate(self, &Costs::default()).map(|_| ())
    }

    /// When each action happens, if each takes what `costs` says. A plan that deadlocks ends where it stops.
    pub fn timeline(&self, costs: &Costs) -> Timeline {
        Timeline::simulate(self, costs).unwrap_or_else(|_| Timeline::empty(self))
    }

    /// The largest number of micro-batches, summed over a rank's stages, that the rank holds between their
    /// forward and the end of their backward: what its activations need memory for.
    pub fn peak_in_flight(&self, rank: usize) -> usize {
        let mut held = 0_usize;
        let mut peak = 0;
        for action in self.actions(rank) {
            match action.pass {
                Pass::Forward => held += 1,
                Pass::Backward | Pass::BackwardWeight => held -= 1,
                Pass::BackwardInput => {}
            }
            peak = peak.max(held);
        }
        peak
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_plan_is_complete_and_free_of_deadlock(
            schedule in prop::sample::select(Schedule::ALL.to_vec()),
            ranks in 1_usize..9,
            chunks in 1_usize..5,
            micro_batches in 1_usize..25,
        ) {
            match Plan::new(schedule, ranks, chunks, micro_batches) {
                Ok(plan) => plan.verify().unwrap(),
                Err(e) => prop_assert!(chunks > 1, "{e}"),
            }
        }

        #[test]
        fn the_drawn_bubble_is_the_predicted_one(
            schedule in prop::sample::select(Schedule::ALL.to_vec()),
            ranks in 1_usize..7,
            chunks in 1_usize..4,
            rounds in 2_usize..5,
        ) {
            let micro_batches = ranks * rounds;
            let costs = Costs::default();
            if let Ok(plan) = Plan::new(schedule, ranks, chunks, micro_batches) {
                let drawn = plan.timeline(&costs).bubble_share();
                let predicted = schedule.predicted_bubble(ranks, chunks, micro_batches, &costs);
                prop_assert!((drawn - predicted).abs() < 1e-9, "{drawn} {predicted}\n{}", plan.timeline(&costs));
            }
        }

        #[test]
        fn a_rank_holds_no_more_micro_batches_than_documented(
            ranks in 1_usize..9, chunks in 2_usize..4, rounds in 1_usize..5,
        ) {
            let m = ranks * rounds;
            for rank in 0..ranks {
                let peak = |schedule, chunks| Plan::new(schedule, ranks, chunks, m).unwrap().peak_in_flight(rank);
                prop_assert_eq!(peak(Schedule::GPipe, chunks), m * chunks);
                prop_assert_eq!(peak(Schedule::OneFOneB, 1), m.min(ranks - rank));
                prop_assert!(peak(Schedule::ZeroBubble, 1) <= ranks);
                let most = (chunks - 1) * ranks + 2 * (ranks - rank) - 1;
                prop_assert_eq!(peak(Schedule::Interleaved, chunks), most.min(m * chunks));
            }
        }
    }

    #[test]
    fn a_plan_that_waits_in_a_circle_is_found_out() {
        let mut plan = Plan::new(Schedule::OneFOneB, 2, 1, 2).unwrap();
        plan.actions[0].reverse();
        let error = plan.verify().unwrap_err().to_string();
        assert!(error.contains("waits"), "{error}");
    }

    #[test]
    fn a_plan_with_a_hole_is_found_out() {
        let mut plan = Plan::new(Schedule::GPipe, 2, 1, 2).unwrap();
        let _ = plan.actions[1].pop();
        let error = plan.verify().unwrap_err().to_string();
        assert!(error.contains("backward of micro-batch 1 in stage 1 is missing"), "{error}");
    }

    #[test]
    fn arguments_that_a_schedule_cannot_take_are_named() {
        for (schedule, ranks, chunks, micro, argument) in [
            (Schedule::GPipe, 0, 1, 1, "stages"),
            (Schedule::GPipe, 2, 1, 0, "micro_batches"),
            (Schedule::OneFOneB, 2, 2, 4, "stages"),
            (Schedule::Interleaved, 2, 2, 3, "micro_batches"),
        ] {
            let error = Plan::new(schedule, ranks, chunks, micro).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { argument: a, .. } if a == argument), "{error}");
        }
    }
}
