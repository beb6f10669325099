//! Which algorithm for which call: a pure function, the same on every rank.

use super::{Plan, Shape, barrier, broadcast, exchange, moves, one_shot};
use crate::backend::Op;

/// What the choice depends on besides the call. Every rank has the same: its hash is compared when a
/// group is made.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Tuning {
    /// Up to how many bytes every rank sends everything to everyone.
    pub(crate) one_shot: usize,
    /// Up to how many bytes a broadcast goes down a tree in one piece.
    pub(crate) tree: usize,
    /// How many bytes travel as one message where a call is cut, so that combining overlaps with
    /// receiving.
    pub(crate) chunk: usize,
}

impl Tuning {
    /// For ranks that read one another's memory.
    pub(crate) const THREADS: Self = Self { one_shot: 16 << 10, tree: 256 << 10, chunk: 1 << 20 };
    /// For sockets.
    pub(crate) const SOCKETS: Self = Self { one_shot: 8 << 10, tree: 64 << 10, chunk: 256 << 10 };

    /// A number that differs where the tuning or the algorithms do.
    pub(crate) fn digest(&self) -> u64 {
        // FNV-1a over the fields and the version of the algorithms.
        const ALGORITHMS: usize = 1;
        [ALGORITHMS, self.one_shot, self.tree, self.chunk]
            .iter()
            .flat_map(|n| (*n as u64).to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    }
}

/// This rank's plan of a call.
pub(crate) fn plan(shape: &Shape, tuning: &Tuning) -> Plan {
    let chunk = (tuning.chunk / shape.size.max(1)).max(1);
    let bytes = |segments: &[usize]| segments.iter().sum::<usize>().saturating_mul(shape.size);
    match shape.op {
        Op::AllReduce(_) if bytes(&shape.outputs) <= tuning.one_shot => one_shot::all_reduce(shape),
        Op::AllReduce(_) => exchange::all_reduce(shape, chunk),
        Op::Reduce { dst, .. } if bytes(&shape.inputs) <= tuning.one_shot => one_shot::reduce(shape, dst),
        Op::Reduce { dst, .. } => exchange::reduce(shape, dst, chunk),
        Op::ReduceScatter(_) => exchange::reduce_scatter(shape, chunk),
        Op::Broadcast { src } if bytes(&shape.outputs) <= tuning.tree || shape.world <= 2 => {
            broadcast::tree(shape, src)
        }
        Op::Broadcast { src } => broadcast::spread(shape, src, chunk),
        Op::AllGather => moves::all_gather(shape),
        Op::Gather { dst } => moves::gather(shape, dst),
        Op::Scatter { src } => moves::scatter(shape, src),
        Op::AllToAll => moves::all_to_all(shape),
        Op::Barrier => barrier::dissemination(shape),
    }
}
