//! Broadcast: down a binomial tree where latency counts, scattered and gathered where bandwidth does.

use smallvec::SmallVec;

use super::{Cuts, Plan, Shape, StepId, share};

/// Each rank that has the data passes it to the next that has not; ceil(log2 n) messages deep.
pub(super) fn tree(shape: &Shape, src: usize) -> Plan {
    let mut plan = Plan::default();
    let (rank, world) = (shape.rank, shape.world);
    let data = shape.output(0);
    // Numbered from the root: the parent is the number without its lowest bit.
    let number = (rank + world - src) % world;
    let reach = if number == 0 { world.next_power_of_two() } else { 1 << number.trailing_zeros() };
    let mut came = SmallVec::<[StepId; 1]>::new();
    if number != 0 {
        came.push(plan.recv((number - reach + src) % world, data, &[]));
    }
    let mut distance = reach / 2;
    while distance > 0 {
        if number + distance < world {
            plan.send((number + distance + src) % world, data, &came);
        }
        distance /= 2;
    }
    plan
}

/// The root sends each rank a share, which passes it on to all others: the root sends the data once,
/// whatever the number of ranks (van de Geijn).
pub(super) fn spread(shape: &Shape, src: usize, chunk: usize) -> Plan {
    let mut plan = Plan::default();
    let (rank, world) = (shape.rank, shape.world);
    let data = shape.output(0);
    // The shares are those of the ranks other than the root, in rank order.
    let part = |p: usize| {
        let (start, len) = share(data.len, world - 1, if p > src { p - 1 } else { p });
        data.part(start, len)
    };
    let cuts = |p: usize| Cuts::new(part(p).len, chunk);
    let rounds = (0..world).filter(|&p| p != src).map(|p| cuts(p).count).max().unwrap_or(0);
    for round in 0..rounds {
        if rank == src {
            for peer in shape.peers() {
                if let Some((start, len)) = cuts(peer).get(round) {
                    plan.send(peer, part(peer).part(start, len), &[]);
                }
            }
            continue;
        }
        if let Some((start, len)) = cuts(rank).get(round) {
            let mine = part(rank).part(start, len);
            let came = plan.recv(src, mine, &[]);
            for peer in shape.peers().filter(|&p| p != src) {
                plan.send(peer, mine, &[came]);
            }
        }
        for peer in shape.peers().filter(|&p| p != src) {
            if let Some((start, len)) = cuts(peer).get(round) {
                plan.recv(peer, part(peer).part(start, len), &[]);
            }
        }
    }
    plan
}
