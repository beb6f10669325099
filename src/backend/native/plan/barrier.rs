//! Barrier by dissemination: in round k each rank signals the one 2^k after it.

use super::{Place, Plan, Range, Shape, StepId};

/// After ceil(log2 n) rounds every rank has heard of every other (Hensgen, Finkel and Manber, 1988).
pub(super) fn dissemination(shape: &Shape) -> Plan {
    let mut plan = Plan::default();
    let nothing = Range::new(Place::Slot(0), 0, 0);
    plan.slot(0);
    let (rank, world) = (shape.rank, shape.world);
    let mut heard: Option<StepId> = None;
    let mut distance = 1;
    while distance < world {
        let after: &[StepId] = match &heard {
            Some(step) => std::slice::from_ref(step),
            None => &[],
        };
        plan.send((rank + distance) % world, nothing, after);
        let came = plan.recv_to_keep((rank + world - distance) % world, nothing, after);
        heard = Some(came);
        distance *= 2;
    }
    plan
}
