//! The fingerprint of a call: what ranks have to agree on, in 128 bits, and back in words.

use tch::Kind;

use super::transport::Stamp;
use crate::ReduceOp;
use crate::backend::{Call, Op, segment_numel};

/// Every kind; the position is the code.
const KINDS: [Kind; 20] = [
    Kind::Uint8,
    Kind::Int8,
    Kind::Int16,
    Kind::Int,
    Kind::Int64,
    Kind::Half,
    Kind::Float,
    Kind::Double,
    Kind::ComplexHalf,
    Kind::ComplexFloat,
    Kind::ComplexDouble,
    Kind::Bool,
    Kind::QInt8,
    Kind::QUInt8,
    Kind::QInt32,
    Kind::BFloat16,
    Kind::Float8e5m2,
    Kind::Float8e4m3fn,
    Kind::Float8e5m2fnuz,
    Kind::Float8e4m3fnuz,
];

const OPS: [&str; 9] = [
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "gather",
    "scatter",
    "reduce_scatter",
    "all_to_all",
    "barrier",
];

const REDUCE_OPS: [&str; 9] =
    ["Sum", "Avg", "Product", "Min", "Max", "BitAnd", "BitOr", "BitXor", "PremulSum"];

/// A fingerprint of nothing that can be called.
pub(crate) const UNKNOWN: u128 = 0xf;

/// The code of a kind on the wire.
pub(crate) fn kind_code(kind: Kind) -> u8 {
    KINDS.iter().position(|&k| k == kind).map_or(u8::MAX, |n| n as u8)
}

/// The bytes of an element of a kind's code.
pub(crate) fn kind_size(code: u8) -> Option<usize> {
    KINDS.get(usize::from(code)).map(|kind| kind.elt_size_in_bytes())
}

/// The name of a kind's code.
pub(crate) fn kind_name(code: u8) -> String {
    KINDS.get(usize::from(code)).map_or_else(|| format!("unknown kind {code}"), |k| format!("{k:?}"))
}

fn op_code(op: &Op) -> u8 {
    match op {
        Op::AllReduce(_) => 0,
        Op::Reduce { .. } => 1,
        Op::Broadcast { .. } => 2,
        Op::AllGather => 3,
        Op::Gather { .. } => 4,
        Op::Scatter { .. } => 5,
        Op::ReduceScatter(_) => 6,
        Op::AllToAll => 7,
        Op::Barrier => 8,
    }
}

fn reduce_code(op: ReduceOp) -> u8 {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Avg => 1,
        ReduceOp::Product => 2,
        ReduceOp::Min => 3,
        ReduceOp::Max => 4,
        ReduceOp::BitAnd => 5,
        ReduceOp::BitOr => 6,
        ReduceOp::BitXor => 7,
        // Each rank may give a factor of its own: it is no part of the agreement.
        ReduceOp::PremulSum(_) => 8,
    }
}

/// How many elements the ranks have to agree on: all of them where every rank knows them, 0 where
/// only a root or a pair of ranks does (the length of each message is compared then).
fn agreed_count(call: &Call<'_>) -> usize {
    match call.op {
        Op::AllReduce(_) | Op::Broadcast { .. } => total(&call.outputs),
        Op::Reduce { .. } => total(&call.inputs),
        Op::AllGather => total(&call.outputs),
        Op::ReduceScatter(_) => total(&call.inputs),
        Op::Gather { .. } | Op::Scatter { .. } | Op::AllToAll | Op::Barrier => 0,
    }
}

fn total(segments: &[crate::backend::Segment<'_>]) -> usize {
    segments.iter().map(|s| segment_numel(s)).sum()
}

/// Operation (bits 0-3), kind (4-11), reduce op + 1 (12-19), root + 1 (20-43), count (44-107).
pub(crate) fn fingerprint(call: &Call<'_>) -> u128 {
    let kind = if call.op == Op::Barrier { 0 } else { kind_code(call.kind) };
    let reduce = call.op.reduce_op().map_or(0, |op| reduce_code(op) + 1);
    let root = call.op.root().map_or(0, |root| root as u32 + 1);
    u128::from(op_code(&call.op))
        | u128::from(kind) << 4
        | u128::from(reduce) << 12
        | u128::from(root & 0xff_ffff) << 20
        | (agreed_count(call) as u128) << 44
}

/// The operation's name, e.g. `all_reduce`.
pub(crate) fn op_name(fingerprint: u128) -> &'static str {
    OPS.get((fingerprint & 0xf) as usize).copied().unwrap_or("no operation")
}

/// The whole call in words, e.g. `all_reduce(Sum) of 4 Float elements`.
pub(crate) fn words(fingerprint: u128) -> String {
    let name = op_name(fingerprint);
    let code = (fingerprint & 0xf) as usize;
    let kind = kind_name((fingerprint >> 4) as u8);
    let reduce = (fingerprint >> 12) as u8;
    let reduce = (reduce != 0).then(|| REDUCE_OPS.get(usize::from(reduce) - 1).copied().unwrap_or("?"));
    let root = (fingerprint >> 20) as u32 & 0xff_ffff;
    let root = (root != 0).then(|| root - 1);
    let count = (fingerprint >> 44) as u64;
    let arguments = match (reduce, root) {
        (Some(op), Some(root)) => format!("({op}, root {root})"),
        (Some(op), None) => format!("({op})"),
        (None, Some(root)) => format!("(root {root})"),
        (None, None) => String::new(),
    };
    let elements = if count == 1 { "element" } else { "elements" };
    match code {
        8 => name.to_owned(),
        4 | 5 | 7 => format!("{name}{arguments} of {kind} elements"),
        _ => format!("{name}{arguments} of {count} {kind} {elements}"),
    }
}

impl Stamp {
    /// e.g. `all_reduce (sequence number 7)`.
    pub(crate) fn label(&self) -> String {
        format!("{} (sequence number {})", op_name(self.fingerprint), self.seq)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use smallvec::smallvec;
    use tch::{Device, Tensor};

    use super::*;
    use crate::backend::Buffer;

    #[test]
    fn a_fingerprint_tells_every_difference_in_words() {
        let call = |op, numel: i64, kind| {
            let tensor = Tensor::zeros([numel], (kind, Device::Cpu));
            let buffer = Buffer::new(tensor).unwrap();
            fingerprint(&Call {
                op,
                kind,
                inputs: smallvec![],
                outputs: smallvec![smallvec![buffer]],
                timeout: Duration::ZERO,
            })
        };
        let print = call(Op::AllReduce(ReduceOp::Max), 5, Kind::BFloat16);
        assert_eq!(words(print), "all_reduce(Max) of 5 BFloat16 elements");
        let print = call(Op::Broadcast { src: 3 }, 1, Kind::Int64);
        assert_eq!(words(print), "broadcast(root 3) of 1 Int64 element");
        assert_eq!(words(call(Op::Barrier, 1, Kind::Float)), "barrier");
        let a = call(Op::AllReduce(ReduceOp::PremulSum(2.0)), 4, Kind::Float);
        assert_eq!(a, call(Op::AllReduce(ReduceOp::PremulSum(3.0)), 4, Kind::Float));
        assert_ne!(a, call(Op::AllReduce(ReduceOp::Sum), 4, Kind::Float));
    }
}
