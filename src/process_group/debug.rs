//! Full checking: before a collective runs, all ranks tell one another what they are about to call.
//!
//! The engine compares operation, kind, count, root and reduce operation in any case, as the data
//! arrives. This adds shapes and the lines of the calls, and every rank gets the same error at once.
//! What is each rank's own, the factor of `PremulSum`, is shown and not compared.

use std::fmt::Write;
use std::panic::Location;
use std::sync::atomic::Ordering;

use smallvec::{SmallVec, smallvec};
use tch::{Kind, Tensor};

use super::draft::Draft;
use crate::backend::{Buffer, Call, Op};
use crate::{Error, ReduceOp, Result};

/// Bytes that each rank gives: enough for an operation, a shape and a line.
const LENGTH: usize = 512;
/// Between what must agree and what is only shown.
const SEPARATOR: &str = "\u{1f}";

pub(super) fn compare(draft: &Draft<'_>, site: &Location<'_>) -> Result<()> {
    let inner = &draft.group.inner;
    // The first has number 1, as the engine counts.
    let seq = inner.compared.fetch_add(1, Ordering::Relaxed) + 1;
    let mine = describe(draft, site);
    let mut bytes = mine.as_bytes().to_vec();
    bytes.resize(LENGTH, 0);
    let all = Tensor::f_zeros([(LENGTH * draft.group.size()) as i64], (Kind::Uint8, tch::Device::Cpu))?;
    let parts = all.f_chunk(draft.group.size() as i64, 0)?;
    let call = Call {
        op: Op::AllGather,
        kind: Kind::Uint8,
        inputs: smallvec![smallvec![Buffer::new(Tensor::from_slice(&bytes))?]],
        outputs: parts
            .into_iter()
            .map(|part| Buffer::new(part).map(|b| smallvec![b]))
            .collect::<Result<_>>()?,
        timeout: draft.call.timeout,
    };
    // A group of CUDA tensors alone has no backend that reaches this: its engine compares.
    let Some(backend) = inner.backends.cpu.as_ref() else { return Ok(()) };
    backend.run(call).map_err(|error| inner.fail(error))?;
    let all = Vec::<u8>::try_from(all)?;
    let calls: Vec<String> = all
        .chunks(LENGTH)
        .map(|text| String::from_utf8_lossy(text).trim_end_matches(['\0', '\u{fffd}']).to_owned())
        .collect();
    let key = |call: &str| call.split(SEPARATOR).next().unwrap_or_default().to_owned();
    let keys: Vec<String> = calls.iter().map(|call| key(call)).collect();
    let Some(odd) = odd_one(&keys, draft.group.rank()) else { return Ok(()) };
    // The first rank that fails ends what the others are in: not before all have seen what it has. Should
    // one be lost now, the disagreement still came first.
    let all_have_seen = Call {
        op: Op::Barrier,
        kind: Kind::Uint8,
        inputs: SmallVec::new(),
        outputs: SmallVec::new(),
        timeout: draft.call.timeout,
    };
    if let Err(error) = backend.run(all_have_seen) {
        tracing::debug!(%error, "a rank may be told of the disagreement by another");
    }
    let shown = |call: &str| call.replace(SEPARATOR, "");
    Err(inner.fail(Error::Desync {
        op: draft.call.op.name().to_owned(),
        seq,
        rank: odd,
        theirs: shown(&calls[odd]),
        ours: shown(&calls[draft.group.rank()]),
    }))
}

/// What must agree, then what is shown.
fn describe(draft: &Draft<'_>, site: &Location<'_>) -> String {
    let op = draft.call.op;
    let mut text = op.alike();
    let mut own = String::new();
    if let Some(ReduceOp::PremulSum(factor)) = op.reduce_op() {
        own = format!(", its factor {factor:?},");
    }
    if op != Op::Barrier {
        let _ = write!(text, " of {:?}", draft.call.kind);
    }
    if let Some(tensor) = draft.shape {
        let _ = write!(text, " {:?}", tensor.size());
    }
    let _ = write!(text, "{SEPARATOR}{own} at {}:{}", site.file(), site.line());
    let mut end = text.len().min(LENGTH);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// The rank to blame: the odd one where the others agree; for this rank, where it is the odd one
/// itself or there is no majority, the first that differs from it.
fn odd_one(keys: &[String], me: usize) -> Option<usize> {
    let common = keys.iter().max_by_key(|key| keys.iter().filter(|other| other == key).count())?;
    match keys.iter().position(|key| key != common)? {
        odd if odd != me => Some(odd),
        _ => keys.iter().position(|key| *key != keys[me]),
    }
}

#[cfg(test)]
mod tests {
    use super::odd_one;

    #[test]
    fn the_ranks_that_agree_name_the_odd_one_and_the_odd_one_names_another() {
        let keys = ["a", "b", "a", "a"].map(String::from);
        assert_eq!([0, 1, 2, 3].map(|me| odd_one(&keys, me)), [Some(1), Some(0), Some(1), Some(1)]);
        assert_eq!(odd_one(&["a", "a"].map(String::from), 0), None);
        assert_eq!(odd_one(&["a", "b"].map(String::from), 0), Some(1));
        assert_eq!(odd_one(&["a", "b"].map(String::from), 1), Some(0));
    }
}
