//! Which algorithm for which call: a pure function, the same on every rank.
//!
//! | call | few ranks | many ranks (more than `direct`) |
//! |---|---|---|
//! | all_reduce, small | everybody sends all to all (`one_shot`) | recursive doubling (`doubling`) |
//! | all_reduce, large | direct exchange | halving and doubling (Rabenseifner) |
//! | reduce, small | everybody sends to the root | binomial tree |
//! | reduce, large | direct exchange | direct exchange |
//! | broadcast, small | binomial tree (`tree`) | binomial tree |
//! | broadcast, large | scatter and all-gather | scatter and all-gather |
//! | all_gather, small | everybody sends to all | Bruck (`bruck`) |
//! | all_gather, large | everybody sends to all | ring |
//! | reduce_scatter, all_to_all | pairwise | pairwise |
//! | gather, scatter | straight to or from the root | the same: only the root knows every length |
//! | barrier | dissemination | dissemination |
//!
//! Operands combine in rank order. In a direct exchange and in `one_shot` they combine in one pass from
//! the first rank to the last; so among few ranks a sum has the same bits whatever its size and however
//! it is cut. Where partial results travel, neighbours combine first. Sums of halves are rounded once, at
//! the end: their partial results would have to travel as f32, so they are reduced as among few ranks.

use super::{Plan, Shape, barrier, broadcast, doubling, exchange, gather, halving, moves, one_shot};
use crate::backend::Op;

/// What the choice depends on besides the call. Every rank has the same: its hash is compared when a
/// group is made.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Tuning {
    /// Up to how many ranks each may talk to every other.
    pub(crate) direct: usize,
    /// Up to how many bytes every rank sends everything to everyone, or to the root.
    pub(crate) one_shot: usize,
    /// Up to how many bytes many ranks all-reduce by recursive doubling.
    pub(crate) doubling: usize,
    /// Up to how many bytes, of all ranks together, many ranks gather by Bruck's algorithm.
    pub(crate) bruck: usize,
    /// Up to how many bytes a broadcast goes down a tree in one piece.
    pub(crate) tree: usize,
    /// How many bytes travel as one message where a call is cut, so that combining overlaps with
    /// receiving.
    pub(crate) chunk: usize,
}

impl Tuning {
    /// For ranks that read one another's memory.
    pub(crate) const THREADS: Self = Self {
        direct: 64,
        one_shot: 16 << 10,
        doubling: 64 << 10,
        bruck: 64 << 10,
        tree: 256 << 10,
        chunk: 1 << 20,
    };
    /// For sockets.
    pub(crate) const SOCKETS: Self = Self {
        direct: 8,
        one_shot: 8 << 10,
        doubling: 16 << 10,
        bruck: 64 << 10,
        tree: 64 << 10,
        chunk: 256 << 10,
    };

    /// The fields by name, for the environment and for options.
    pub(crate) fn fields(&mut self) -> [(&'static str, &mut usize); 6] {
        [
            ("direct", &mut self.direct),
            ("one_shot", &mut self.one_shot),
            ("doubling", &mut self.doubling),
            ("bruck", &mut self.bruck),
            ("tree", &mut self.tree),
            ("chunk", &mut self.chunk),
        ]
    }

    /// A number that differs where the tuning or the algorithms do.
    pub(crate) fn digest(mut self) -> u64 {
        // FNV-1a over the fields and the version of the algorithms.
        const ALGORITHMS: usize = 2;
        [ALGORITHMS]
            .into_iter()
            .chain(self.fields().map(|(_, value)| *value))
            .flat_map(|n| (n as u64).to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    }
}

/// This rank's plan of a call.
pub(crate) fn plan(shape: &Shape, tuning: &Tuning) -> Plan {
    let chunk = (tuning.chunk / shape.size.max(1)).max(1);
    let bytes = |segments: &[usize]| segments.iter().sum::<usize>().saturating_mul(shape.size);
    let many = shape.world > tuning.direct.max(1);
    let partials = many && !shape.wide;
    match shape.op {
        Op::AllReduce(_) if partials && bytes(&shape.outputs) <= tuning.doubling => {
            doubling::all_reduce(shape)
        }
        Op::AllReduce(_) if partials => halving::all_reduce(shape, chunk),
        Op::AllReduce(_) if bytes(&shape.outputs) <= tuning.one_shot => one_shot::all_reduce(shape),
        Op::AllReduce(_) => exchange::all_reduce(shape, chunk),
        Op::Reduce { dst, .. } if bytes(&shape.inputs) <= tuning.one_shot => match partials {
            true => doubling::reduce(shape, dst),
            false => one_shot::reduce(shape, dst),
        },
        Op::Reduce { dst, .. } => exchange::reduce(shape, dst, chunk),
        Op::ReduceScatter(_) => exchange::reduce_scatter(shape, chunk),
        Op::Broadcast { src } if bytes(&shape.outputs) <= tuning.tree || shape.world <= 2 => {
            broadcast::tree(shape, src)
        }
        Op::Broadcast { src } => broadcast::spread(shape, src, chunk),
        Op::AllGather if many && bytes(&shape.outputs) <= tuning.bruck => gather::bruck(shape),
        Op::AllGather if many => gather::ring(shape, chunk),
        Op::AllGather => moves::all_gather(shape),
        Op::Gather { dst } => moves::gather(shape, dst),
        Op::Scatter { src } => moves::scatter(shape, src),
        Op::AllToAll => moves::all_to_all(shape),
        Op::Barrier => barrier::dissemination(shape),
    }
}
