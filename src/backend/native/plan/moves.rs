//! What moves data without combining it: every piece goes straight from its owner to who needs it.

use super::{Plan, Shape};

/// Everybody sends its input to everybody.
pub(super) fn all_gather(shape: &Shape) -> Plan {
    let mut plan = Plan::default();
    for peer in shape.peers() {
        plan.send(peer, shape.input(0), &[]);
    }
    plan.copy(shape.input(0), shape.output(shape.rank), &[]);
    for peer in shape.peers() {
        plan.recv(peer, shape.output(peer), &[]);
    }
    plan
}

/// Everybody sends its input to the root.
pub(super) fn gather(shape: &Shape, dst: usize) -> Plan {
    let mut plan = Plan::default();
    if shape.rank == dst {
        plan.copy(shape.input(0), shape.output(dst), &[]);
        for peer in shape.peers() {
            plan.recv(peer, shape.output(peer), &[]);
        }
    } else {
        plan.send(dst, shape.input(0), &[]);
    }
    plan
}

/// The root sends each its own.
pub(super) fn scatter(shape: &Shape, src: usize) -> Plan {
    let mut plan = Plan::default();
    if shape.rank == src {
        for peer in shape.peers() {
            plan.send(peer, shape.input(peer), &[]);
        }
        plan.copy(shape.input(src), shape.output(0), &[]);
    } else {
        plan.recv(src, shape.output(0), &[]);
    }
    plan
}

/// Everybody sends everybody its own; rank r starts with the rank after it, so that each link is used
/// by one pair at a time.
pub(super) fn all_to_all(shape: &Shape) -> Plan {
    let mut plan = Plan::default();
    let (rank, world) = (shape.rank, shape.world);
    for distance in 1..world {
        let (to, from) = ((rank + distance) % world, (rank + world - distance) % world);
        plan.send(to, shape.input(to), &[]);
        plan.recv(from, shape.output(from), &[]);
    }
    plan.copy(shape.input(rank), shape.output(rank), &[]);
    plan
}
