//! Small reductions among many ranks in a logarithmic number of messages.
//!
//! Partial results pass between ranks unfinished, and always cover neighbouring ranks:
//! the lower ones come first wherever two are combined. So the order is fixed, and every rank that
//! combines the same two gets the same bits.

use smallvec::{SmallVec, smallvec};

use super::{Plan, Range, Shape, StepId};

/// Recursive doubling: in round k each rank exchanges what it has with the one 2^k away. Of a number of
/// ranks that is no power of two, the first few go in pairs, of which one member waits for the result.
pub(super) fn all_reduce(shape: &Shape) -> Plan {
    let mut plan = Plan::default();
    let (rank, data) = (shape.rank, shape.output(0));
    let pairs = Pairs::of(shape.world);
    let Some(number) = pairs.number(rank) else {
        let sent = plan.send(rank - 1, data, &[]);
        plan.recv(rank - 1, data, &[sent]);
        return plan;
    };
    let paired = rank < 2 * pairs.extra;
    // What this rank has combined so far, the step that made it, and the sends of its own operand.
    let mut have = data;
    let mut made = SmallVec::<[StepId; 1]>::new();
    let mut lent = SmallVec::<[StepId; 4]>::new();
    if paired {
        let other = plan.slot(data.len);
        let came = plan.recv(rank + 1, other, &[]);
        have = plan.partial_slot(data.len);
        made.push(plan.reduce(have, smallvec![data, other], &[came]));
    }
    let mut distance = 1;
    while distance < pairs.power {
        let peer = pairs.rank(number ^ distance);
        let sent = plan.send(peer, have, &made);
        if !have.partial {
            lent.push(sent);
        }
        // A peer that has combined nothing yet sends its operand as it is.
        let theirs = match distance == 1 && peer >= 2 * pairs.extra {
            true => plan.slot(data.len),
            false => plan.partial_slot(data.len),
        };
        let came = plan.recv(peer, theirs, &[]);
        let last = 2 * distance == pairs.power;
        // Where both still read each other's operand the result is made beside it.
        let into = match (last, lent.is_empty()) {
            (true, true) => data,
            (true, false) => plan.slot(data.len),
            (false, _) => plan.partial_slot(data.len),
        };
        let operands: SmallVec<[Range; 4]> =
            if number & distance == 0 { smallvec![have, theirs] } else { smallvec![theirs, have] };
        let mut after: SmallVec<[StepId; 4]> = smallvec![came];
        after.extend(made.iter().copied());
        made = smallvec![plan.reduce(into, operands, &after)];
        have = into;
        distance *= 2;
    }
    if have != data {
        lent.extend(made);
        made = smallvec![plan.copy(have, data, &lent)];
    }
    if paired {
        plan.send(rank + 1, data, &made);
    }
    plan
}

/// Up a binomial tree: each rank combines what its children have and passes it on. Numbers count from
/// the root.
pub(super) fn reduce(shape: &Shape, dst: usize) -> Plan {
    let mut plan = Plan::default();
    let (rank, world) = (shape.rank, shape.world);
    let data = shape.input(0);
    let number = (rank + world - dst) % world;
    let reach = if number == 0 { world.next_power_of_two() } else { 1 << number.trailing_zeros() };
    let mut operands: SmallVec<[Range; 4]> = smallvec![data];
    let mut after = SmallVec::<[StepId; 4]>::new();
    let mut distance = 1;
    while distance < reach && number + distance < world {
        // A child without children of its own sends its operand.
        let leaf = distance == 1 || number + distance + 1 >= world;
        let theirs = if leaf { plan.slot(data.len) } else { plan.partial_slot(data.len) };
        after.push(plan.recv((number + distance + dst) % world, theirs, &[]));
        operands.push(theirs);
        distance *= 2;
    }
    if number == 0 {
        plan.reduce(shape.output(0), operands, &after);
        return plan;
    }
    let parent = (number - reach + dst) % world;
    if operands.len() == 1 {
        plan.send(parent, data, &[]);
    } else {
        let total = plan.partial_slot(data.len);
        let made = plan.reduce(total, operands, &after);
        plan.send(parent, total, &[made]);
    }
    plan
}

/// Ranks numbered anew, so that their number is a power of two: each pair at the beginning is one.
pub(super) struct Pairs {
    /// How many pairs.
    pub(super) extra: usize,
    /// The largest power of two that is not above the number of ranks.
    pub(super) power: usize,
}

impl Pairs {
    pub(super) fn of(world: usize) -> Self {
        let power = 1 << world.ilog2();
        Self { extra: world - power, power }
    }

    /// The new number of a rank; `None` for the second of a pair.
    pub(super) fn number(&self, rank: usize) -> Option<usize> {
        match rank < 2 * self.extra {
            true => rank.is_multiple_of(2).then_some(rank / 2),
            false => Some(rank - self.extra),
        }
    }

    /// The rank of a new number.
    pub(super) fn rank(&self, number: usize) -> usize {
        if number < self.extra { 2 * number } else { number + self.extra }
    }
}
