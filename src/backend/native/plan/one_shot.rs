//! Small reductions: everybody sends everything, who needs the result combines it in rank order.

use smallvec::SmallVec;

use super::{Plan, Range, Shape, StepId};

/// One message each way between any two ranks; every rank combines the same operands in the same order.
pub(super) fn all_reduce(shape: &Shape) -> Plan {
    let mut plan = Plan::default();
    let data = shape.output(0);
    let mut sent = SmallVec::<[StepId; 4]>::new();
    for peer in shape.peers() {
        sent.push(plan.send(peer, data, &[]));
    }
    // Combined beside, then put in place: peers may still be reading this rank's operand, and wait
    // for nothing but to have read it.
    let total = plan.slot(data.len);
    let combined = combine(&mut plan, shape, data, total);
    sent.push(combined);
    plan.copy(total, data, &sent);
    plan
}

/// Everybody sends to the root.
pub(super) fn reduce(shape: &Shape, dst: usize) -> Plan {
    let mut plan = Plan::default();
    let data = shape.input(0);
    if shape.rank == dst {
        combine(&mut plan, shape, data, shape.output(0));
    } else {
        plan.send(dst, data, &[]);
    }
    plan
}

/// Receives everyone's operand and combines them with `own` in rank order.
fn combine(plan: &mut Plan, shape: &Shape, own: Range, into: Range) -> StepId {
    let mut operands: SmallVec<[Range; 4]> = SmallVec::from_elem(own, shape.world);
    let mut came = SmallVec::<[StepId; 4]>::new();
    for peer in shape.peers() {
        operands[peer] = plan.slot(own.len);
        came.push(plan.recv(peer, operands[peer], &[]));
    }
    plan.reduce(into, operands, &came)
}
