//! What a step took.

use std::time::{SystemTime, UNIX_EPOCH};

use tch::Tensor;

use super::{Action, Pass, Plan, Slot, Timeline};
use crate::{ProcessGroup, Result};

/// What one rank did in its last step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepStats {
    /// When each action computed, without waiting for its inputs: seconds of the system's clock.
    pub slots: Vec<Slot>,
    /// When the step ended, on the same clock.
    pub end: f64,
    /// When it began.
    pub start: f64,
    /// The bytes of tensors sent to other stages.
    pub bytes_sent: usize,
    /// The most micro-batches held between forward and backward, summed over this rank's stages.
    pub peak_in_flight: usize,
    /// The most bytes of inputs and outputs of stages held for them. What autograd keeps inside a stage comes on
    /// top, in proportion.
    pub peak_held_bytes: usize,
}

impl StepStats {
    /// The seconds in which this rank computed.
    pub fn busy(&self) -> f64 {
        self.slots.iter().map(|s| s.end - s.start).sum()
    }

    /// The share of the step in which it did not.
    pub fn idle_share(&self) -> f64 {
        let whole = self.end - self.start;
        if whole > 0.0 { (1.0 - self.busy() / whole).max(0.0) } else { 0.0 }
    }
}

/// Seconds since 1970.
pub(super) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

const PASSES: [Pass; 4] = [Pass::Forward, Pass::Backward, Pass::BackwardInput, Pass::BackwardWeight];

/// All ranks' slots as one timeline that begins at zero; every rank calls it.
pub(super) fn gather(plan: &Plan, slots: &[Slot], group: &ProcessGroup) -> Result<Timeline> {
    let mut numbers = Vec::new();
    for slot in slots {
        let Action { pass, stage, micro_batch } = slot.action;
        let pass = PASSES.iter().position(|&p| p == pass).unwrap_or(0);
        numbers.extend([pass as f64, stage as f64, micro_batch as f64, slot.start, slot.end]);
    }
    let all = group.all_gather_uneven(&Tensor::f_from_slice(&numbers)?)?;
    let mut ranks = Vec::new();
    for numbers in &all {
        let numbers = Vec::<f64>::try_from(numbers)?;
        let slot = |n: &[f64]| Slot {
            action: Action {
                pass: PASSES.get(n[0] as usize).copied().unwrap_or(Pass::Forward),
                stage: n[1] as usize,
                micro_batch: n[2] as usize,
            },
            start: n[3],
            end: n[4],
        };
        ranks.push(numbers.chunks_exact(5).map(slot).collect::<Vec<_>>());
    }
    let zero = ranks.iter().flatten().map(|s| s.start).fold(f64::INFINITY, f64::min);
    for slot in ranks.iter_mut().flatten() {
        slot.start -= zero;
        slot.end -= zero;
    }
    Ok(Timeline::measured(plan, ranks))
}
