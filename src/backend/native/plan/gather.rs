//! All-gathers among many ranks: few messages where latency counts, one neighbour each where bandwidth
//! does.

use smallvec::SmallVec;

use super::{Cuts, Plan, Shape, StepId};

/// In round k each rank passes on up to 2^k blocks that it has: ceil(log2 n) messages (Bruck).
///
/// The blocks lie in a slot, this rank's first and then those after it: so each message is one run.
pub(super) fn bruck(shape: &Shape) -> Plan {
    let mut plan = Plan::default();
    let (rank, world) = (shape.rank, shape.world);
    let owner = |n: usize| (rank + n) % world;
    // Where each block begins in the slot.
    let starts: Vec<usize> = (0..=world)
        .scan(0, |at, n| {
            let here = *at;
            *at += if n < world { shape.outputs[owner(n)] } else { 0 };
            Some(here)
        })
        .collect();
    let all = plan.slot(starts[world]);
    let mut made: SmallVec<[StepId; 8]> =
        SmallVec::from_slice(&[plan.copy(shape.input(0), all.part(0, starts[1]), &[])]);
    let mut have = 1;
    while have < world {
        let more = have.min(world - have);
        plan.send((rank + world - have) % world, all.part(0, starts[more]), &made);
        let into = all.part(starts[have], starts[have + more] - starts[have]);
        made.push(plan.recv_to_keep((rank + have) % world, into, &[]));
        have += more;
    }
    for n in 0..world {
        plan.copy(all.part(starts[n], starts[n + 1] - starts[n]), shape.output(owner(n)), &made);
    }
    plan
}

/// Each rank passes on to the next what the one before it sends, in chunks: every rank has two
/// neighbours, however many there are.
pub(super) fn ring(shape: &Shape, chunk: usize) -> Plan {
    let mut plan = Plan::default();
    let (rank, world) = (shape.rank, shape.world);
    let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
    plan.copy(shape.input(0), shape.output(rank), &[]);
    let mut came: Vec<StepId> = Vec::new();
    for round in 0..world - 1 {
        // What this rank sends now has come in the round before.
        let out = (rank + world - round) % world;
        let from = if round == 0 { shape.input(0) } else { shape.output(out) };
        let cuts = Cuts::new(from.len, chunk);
        for c in 0..cuts.count {
            if let Some((start, len)) = cuts.get(c) {
                plan.send(next, from.part(start, len), came.get(c..=c).unwrap_or_default());
            }
        }
        let into = shape.output((out + world - 1) % world);
        let cuts = Cuts::new(into.len, chunk);
        came = (0..cuts.count)
            .filter_map(|c| cuts.get(c))
            .map(|(start, len)| plan.recv_to_keep(before, into.part(start, len), &[]))
            .collect();
    }
    plan
}
