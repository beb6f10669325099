//! One exchanged backward, from its first gradient to its end.

use tch::Tensor;

use super::buckets::Plan;
use super::hooks::Exchange;
use super::unused::Flags;

/// What has happened so far in this backward.
pub(super) struct Step {
    /// How often each parameter's gradient has arrived.
    pub(super) fired: Vec<u32>,
    /// Parameters in the order in which their gradients became ready.
    pub(super) arrival: Vec<usize>,
    /// How many gradients each bucket still waits for.
    pub(super) pending: Vec<usize>,
    /// The bucket to go next: buckets go in their order on every rank, whatever order they fill in.
    pub(super) next: usize,
    /// What is under way, in order.
    pub(super) exchanges: Vec<Exchange>,
    /// This rank's flags, and as they rode in the last bucket: the average of all ranks when that has ended.
    pub(super) flags: Option<(Flags, Tensor)>,
    /// What was sent in place of gradients that this rank does not have.
    pub(super) substitutes: Vec<Substitute>,
}

/// Sent for a parameter that this rank did not use.
pub(super) struct Substitute {
    pub(super) index: usize,
    /// What was sent: a copy of an older gradient, or zeros; the average when the exchange has ended.
    pub(super) sent: Tensor,
    /// The gradient as it was, when `sent` shares its memory.
    pub(super) original: Option<Tensor>,
}

impl Step {
    /// A backward that is about to begin. `expected` says how often each gradient will arrive.
    pub(super) fn new(plan: &Plan, expected: &[u32]) -> Self {
        let awaited = |members: &Vec<usize>| members.iter().filter(|&&index| expected[index] > 0).count();
        Self {
            fired: vec![0; expected.len()],
            arrival: Vec::with_capacity(expected.len()),
            pending: plan.buckets.iter().map(awaited).collect(),
            next: 0,
            exchanges: Vec::with_capacity(plan.buckets.len()),
            flags: None,
            substitutes: Vec::new(),
        }
    }
}
