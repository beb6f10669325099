//! The ways that messages take from stage to stage.
//!
//! Where they are matched by tags it is the pipeline's group. NCCL has no tags: it does a group's messages in the order in
//! which each side gives them, and each waits there for its other side. So a group on NCCL gets a lane for each pair of
//! neighbours and each direction, outputs onward and gradients back: on one lane both sides give messages in one order, that
//! of the plan, and no message waits behind one of another lane.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tch::{Device, Tensor};

use super::Plan;
use crate::process_group::Work;
use crate::{Error, GroupOptions, ProcessGroup, Result};

/// From a rank to a rank, and whether it is for gradients.
pub(super) type Lane = (usize, usize, bool);

/// The ways of one rank's messages.
pub(super) struct Lanes {
    group: ProcessGroup,
    /// Groups of two, where there are lanes: those that this rank is in.
    own: Option<BTreeMap<Lane, ProcessGroup>>,
}

/// All lanes of a plan, in one order on every rank.
pub(super) fn lanes_of(plan: &Plan) -> BTreeSet<Lane> {
    (1..plan.stages())
        .map(|stage| ((stage - 1) % plan.ranks(), stage % plan.ranks()))
        .filter(|(before, after)| before != after)
        .flat_map(|(before, after)| [(before, after, false), (after, before, true)])
        .collect()
}

impl Lanes {
    /// Makes what a plan needs on a device. Every rank of the group calls it.
    pub(super) fn open(group: &ProcessGroup, plan: &Plan, device: Device) -> Result<Self> {
        if !group.orders_messages(device) {
            return Ok(Self { group: group.clone(), own: None });
        }
        let mut own = BTreeMap::new();
        for (src, dst, backward) in lanes_of(plan) {
            let options = GroupOptions::new().backend("nccl");
            if let Some(pair) = group.new_group_with(&[src, dst], options)? {
                // Connects the two. Each rank comes to its lanes in one order.
                pair.barrier()?;
                own.insert((src, dst, backward), pair);
            }
        }
        Ok(Self { group: group.clone(), own: Some(own) })
    }

    /// Starts sending to a rank of the pipeline.
    pub(super) fn isend(&self, tensor: &Tensor, dst: usize, backward: bool, tag: u32) -> Result<Work> {
        let (way, dst) = self.way((self.group.rank(), dst, backward), dst)?;
        way.isend(tensor, dst, tag).map_err(|error| self.in_pipeline(way, error))
    }

    /// Starts receiving from a rank of the pipeline.
    pub(super) fn irecv(&self, tensor: &Tensor, src: usize, backward: bool, tag: u32) -> Result<Work> {
        let (way, src) = self.way((src, self.group.rank(), backward), src)?;
        way.irecv(tensor, src, tag).map_err(|error| self.in_pipeline(way, error))
    }

    /// Waits for a message that came this way, until it can be read on the host.
    pub(super) fn wait(&self, work: &Work, src: usize, backward: bool) -> Result<()> {
        let (way, _) = self.way((src, self.group.rank(), backward), src)?;
        let ended = match self.own {
            // Only from that wait does a failure of the device come out.
            Some(_) => work.wait_timeout(Duration::MAX).map(|_| ()),
            None => work.wait(),
        };
        ended.map_err(|error| self.in_pipeline(way, error))
    }

    /// The pipeline failed on this rank: nobody shall wait for it on a lane. `words` tell the others of it.
    pub(super) fn give_up(&self, words: &str) {
        self.own.iter().flat_map(BTreeMap::values).for_each(|lane| lane.abort_after(words));
    }

    /// The group that a message goes through, and what its other side is called there.
    fn way(&self, lane: Lane, peer: usize) -> Result<(&ProcessGroup, usize)> {
        let Some(own) = &self.own else { return Ok((&self.group, peer)) };
        let (from, to, _) = lane;
        let none =
            || Error::Callback { reason: format!("the plan has no messages from rank {from} to rank {to}") };
        Ok((own.get(&lane).ok_or_else(none)?, usize::from(peer > self.group.rank())))
    }

    /// The rank that was lost on a lane, as the pipeline counts. It is lost to all of the pipeline.
    fn in_pipeline(&self, way: &ProcessGroup, error: Error) -> Error {
        let Error::PeerLost { rank, op, source } = error else { return error };
        if self.own.is_none() {
            return Error::PeerLost { rank, op, source };
        }
        let global = way.ranks()[rank.min(1)];
        let rank = self.group.ranks().iter().position(|of| *of == global).unwrap_or(rank);
        let error = Error::PeerLost { rank, op, source };
        self.group.abort_because(error.duplicate());
        error
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Action, Pass, Schedule};
    use super::*;

    /// Stage and micro-batch of the messages on a lane, as one side gives them.
    type Messages = Vec<(usize, usize)>;

    /// What a rank gives to a lane, and what it takes from one, in the order of its plan.
    fn sides(plan: &Plan, lane: Lane) -> (Messages, Messages) {
        let (src, dst, backward) = lane;
        let on = |stage: Option<usize>, rank: usize| {
            stage.filter(|s| *s < plan.stages() && s % plan.ranks() == rank)
        };
        let next = |stage: usize| if backward { stage.checked_sub(1) } else { Some(stage + 1) };
        let before = |stage: usize| if backward { Some(stage + 1) } else { stage.checked_sub(1) };
        let passes = |rank: usize| -> Vec<Action> {
            plan.actions(rank).iter().copied().filter(|a| (a.pass != Pass::Forward) == backward).collect()
        };
        let given =
            passes(src).iter().filter_map(|a| Some((on(next(a.stage), dst)?, a.micro_batch))).collect();
        let taken = passes(dst).into_iter().filter(|a| on(before(a.stage), src).is_some());
        (given, taken.map(|a| (a.stage, a.micro_batch)).collect())
    }

    #[test]
    fn both_sides_of_a_lane_have_its_messages_in_one_order() {
        let mut seen = 0;
        for ranks in 2..=5 {
            for micro_batches in 1..=4 {
                let mut plans = vec![Plan::forward_only(ranks, 3, micro_batches).unwrap()];
                plans.push(Plan::new(Schedule::OneFOneB, ranks, 1, micro_batches).unwrap());
                for chunks in 1..=3 {
                    plans.push(Plan::new(Schedule::GPipe, ranks, chunks, micro_batches).unwrap());
                    let interleaved = Plan::new(Schedule::Interleaved, ranks, chunks, ranks * micro_batches);
                    plans.extend(interleaved.ok());
                }
                for plan in plans {
                    for lane in lanes_of(&plan) {
                        let (given, taken) = sides(&plan, lane);
                        assert_eq!(given, taken, "{lane:?} of {plan:?}");
                        seen += given.len();
                    }
                }
            }
        }
        assert!(seen > 5000, "{seen} messages");
    }
}
