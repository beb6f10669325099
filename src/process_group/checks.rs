//! Every check of arguments, for all backends, before a byte moves.

use std::collections::HashSet;

use smallvec::SmallVec;
use tch::{Kind, Tensor};

use super::ReduceOp;
use crate::libtorch::{Facts, NoFacts, facts, overlaps_itself};
use crate::{Error, Result};

/// A tensor of a call, looked at once.
#[derive(Clone, Copy)]
pub(super) struct Seen<'a> {
    pub(super) tensor: &'a Tensor,
    pub(super) facts: Facts,
    pub(super) argument: &'static str,
}

/// The tensors of a list argument.
pub(super) type SeenList<'a> = SmallVec<[Seen<'a>; 4]>;

/// Looks at a tensor.
#[inline(always)]
pub(super) fn see<'a>(tensor: &'a Tensor, argument: &'static str) -> Result<Seen<'a>> {
    match facts(tensor) {
        Ok(facts) => Ok(Seen { tensor, facts, argument }),
        Err(why) => Err(refuse(why, argument)),
    }
}

#[cold]
fn refuse(why: NoFacts, argument: &'static str) -> Error {
    match why {
        NoFacts::Undefined => Error::invalid(argument, "the tensor is undefined"),
        NoFacts::NotStrided => {
            Error::invalid(argument, "a dense tensor is expected, not a sparse or opaque one")
        }
        NoFacts::Kind(number) => Error::KindMismatch {
            argument,
            expected: "a kind that tch has a name for".to_owned(),
            got: format!("ScalarType {number}"),
        },
        NoFacts::Device(number) => Error::DeviceMismatch {
            argument,
            expected: "a CPU or CUDA tensor".to_owned(),
            got: format!("device type {number}"),
        },
    }
}

/// Looks at each tensor of a list; all must be of one kind and on one device.
pub(super) fn see_list<'a>(tensors: &'a [Tensor], argument: &'static str) -> Result<SeenList<'a>> {
    let mut seen = SeenList::with_capacity(tensors.len());
    for tensor in tensors {
        let one = see(tensor, argument)?;
        if let Some(first) = seen.first() {
            alike(first, &one)?;
        }
        seen.push(one);
    }
    Ok(seen)
}

/// The second must have the kind and the device of the first.
pub(super) fn alike(first: &Seen<'_>, second: &Seen<'_>) -> Result<()> {
    if first.facts.kind != second.facts.kind {
        return Err(Error::KindMismatch {
            argument: second.argument,
            expected: format!("{:?}, as {} has", first.facts.kind, first.argument),
            got: format!("{:?}", second.facts.kind),
        });
    }
    if first.facts.device != second.facts.device {
        return Err(Error::DeviceMismatch {
            argument: second.argument,
            expected: format!("{:?}, as {} is on", first.facts.device, first.argument),
            got: format!("{:?}", second.facts.device),
        });
    }
    Ok(())
}

/// A list argument must hold one tensor for each rank.
pub(super) fn one_per_rank(argument: &'static str, given: usize, size: usize) -> Result<()> {
    if given == size {
        return Ok(());
    }
    Err(Error::invalid(argument, format!("one tensor for each of the {size} ranks is expected, got {given}")))
}

/// `seen` must have the shape of `like`.
pub(super) fn same_shape(seen: &Seen<'_>, like: &Seen<'_>) -> Result<()> {
    let (got, expected) = (seen.tensor.size(), like.tensor.size());
    if got == expected {
        return Ok(());
    }
    Err(Error::ShapeMismatch {
        argument: seen.argument,
        expected: format!("{expected:?}, as {} has", like.argument),
        got: format!("{got:?}"),
    })
}

/// `whole` must be `part` of every rank, concatenated along dimension 0 or stacked.
pub(super) fn concat_or_stack(whole: &Seen<'_>, part: &Seen<'_>, size: usize) -> Result<()> {
    let (got, part_shape) = (whole.tensor.size(), part.tensor.size());
    let stacked: Vec<i64> = std::iter::once(size as i64).chain(part_shape.iter().copied()).collect();
    let mut concatenated = part_shape.clone();
    if let Some(first) = concatenated.first_mut() {
        // Only what has no elements is that long.
        *first = first.saturating_mul(size as i64);
    }
    if got == stacked || (!part_shape.is_empty() && got == concatenated) {
        return Ok(());
    }
    if let Some(&dim) = got.first()
        && dim % size as i64 != 0
    {
        return Err(Error::ShapeMismatch {
            argument: whole.argument,
            expected: format!("dimension 0 divisible by the {size} ranks"),
            got: format!("{got:?}"),
        });
    }
    let forms = if part_shape.is_empty() || stacked == concatenated {
        format!("{stacked:?}")
    } else {
        format!("{concatenated:?} (concatenated) or {stacked:?} (stacked)")
    };
    Err(Error::ShapeMismatch {
        argument: whole.argument,
        expected: format!("{forms} for {} {part_shape:?} on {size} ranks", part.argument),
        got: format!("{got:?}"),
    })
}

/// How many rows of dimension 0 belong to each rank.
pub(super) fn splits(
    seen: &Seen<'_>,
    splits: Option<&[i64]>,
    argument: &'static str,
    size: usize,
) -> Result<SmallVec<[i64; 8]>> {
    let shape = seen.tensor.size();
    let rows = *shape.first().ok_or_else(|| Error::ShapeMismatch {
        argument: seen.argument,
        expected: "at least one dimension".to_owned(),
        got: "[]".to_owned(),
    })?;
    let Some(splits) = splits else {
        if rows % size as i64 != 0 {
            return Err(Error::ShapeMismatch {
                argument: seen.argument,
                expected: format!("dimension 0 divisible by the {size} ranks, or {argument}"),
                got: format!("{shape:?}"),
            });
        }
        return Ok(SmallVec::from_elem(rows / size as i64, size));
    };
    if splits.len() != size {
        let given = splits.len();
        return Err(Error::invalid(
            argument,
            format!("one split for each of the {size} ranks is expected, got {given}"),
        ));
    }
    if let Some(negative) = splits.iter().find(|&&s| s < 0) {
        return Err(Error::invalid(argument, format!("a split cannot be negative, got {negative}")));
    }
    // Splits that sum to more than can be counted must not wrap round to what is there.
    let sum = splits.iter().try_fold(0i64, |sum, &split| sum.checked_add(split));
    if sum != Some(rows) {
        let sum = sum.map_or_else(|| "more than an i64 holds".to_owned(), |sum| sum.to_string());
        return Err(Error::invalid(
            argument,
            format!("the splits {splits:?} sum to {sum}, but dimension 0 of {} is {rows}", seen.argument),
        ));
    }
    Ok(splits.into())
}

/// Outputs must share no element, each with itself or with one another.
pub(super) fn disjoint(outputs: &[Seen<'_>]) -> Result<()> {
    let argument = match outputs {
        [] => return Ok(()),
        [one] if one.facts.plain => return Ok(()),
        [first, ..] => first.argument,
    };
    let mut extents = SmallVec::<[(usize, usize, usize); 8]>::new();
    for (i, seen) in outputs.iter().enumerate() {
        if seen.facts.numel > 0 {
            let begin = seen.facts.data as usize;
            extents.push((begin, begin + extent(seen), i));
        }
        if !seen.facts.plain && overlaps_itself(seen.tensor)? {
            return Err(Error::invalid(
                seen.argument,
                "elements of the output share memory with one another",
            ));
        }
    }
    extents.sort_unstable();
    let crossing = |a: &(usize, usize, usize), b: &(usize, usize, usize)| {
        b.0 < a.1 && outputs[a.2].facts.device == outputs[b.2].facts.device
    };
    let Some(&(mut widest)) = extents.first() else { return Ok(()) };
    let mut certain = false;
    let mut possible = false;
    for next in &extents[1..] {
        if crossing(&widest, next) {
            possible = true;
            certain |= outputs[widest.2].facts.plain && outputs[next.2].facts.plain;
        }
        if next.1 > widest.1 {
            widest = *next;
        }
    }
    if certain || (possible && share_elements(outputs)) {
        return Err(Error::invalid(argument, "the outputs share memory with one another"));
    }
    Ok(())
}

/// How many bytes lie between the first element's begin and the last one's end.
pub(super) fn extent(seen: &Seen<'_>) -> usize {
    let Facts { numel, element, plain, .. } = seen.facts;
    if plain || numel == 0 {
        return numel * element;
    }
    let (shape, strides) = (seen.tensor.size(), seen.tensor.stride());
    let last: i64 = shape.iter().zip(&strides).map(|(n, s)| (n - 1) * s).sum();
    (last as usize + 1) * element
}

/// Whether any two elements of these tensors lie at one address: all are looked at.
fn share_elements(tensors: &[Seen<'_>]) -> bool {
    let mut addresses = HashSet::new();
    tensors.iter().any(|seen| {
        let (shape, strides) = (seen.tensor.size(), seen.tensor.stride());
        let mut index = vec![0i64; shape.len()];
        (0..seen.facts.numel).any(|_| {
            let offset: i64 = index.iter().zip(&strides).map(|(i, s)| i * s).sum();
            for (i, n) in index.iter_mut().zip(&shape).rev() {
                *i += 1;
                if *i < *n {
                    break;
                }
                *i = 0;
            }
            !addresses.insert(seen.facts.data as usize + offset as usize * seen.facts.element)
        })
    })
}

impl ReduceOp {
    /// Whether the operation means something for a kind.
    pub(crate) fn supports(self, kind: Kind) -> bool {
        use Kind::{
            BFloat16, Bool, ComplexDouble, ComplexFloat, Double, Float, Half, Int, Int8, Int16, Int64, Uint8,
        };
        let integer = matches!(kind, Uint8 | Int8 | Int16 | Int | Int64);
        let float = matches!(kind, Half | BFloat16 | Float | Double);
        let complex = matches!(kind, ComplexFloat | ComplexDouble);
        let bool = kind == Bool;
        match self {
            Self::Sum | Self::Product => integer || float || complex || bool,
            Self::Avg => integer || float || complex,
            Self::Min | Self::Max => integer || float || bool,
            Self::BitAnd | Self::BitOr | Self::BitXor => integer || bool,
            Self::PremulSum(_) => float || complex,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn zeros(shape: &[i64]) -> Tensor {
        Tensor::zeros(shape, (Kind::Float, Device::Cpu))
    }

    fn refused(tensors: &[Tensor]) -> bool {
        disjoint(&see_list(tensors, "outputs").unwrap()).is_err()
    }

    #[test]
    fn views_that_interleave_are_disjoint_and_views_that_meet_are_not() {
        let t = zeros(&[4, 6]);
        assert!(!refused(&[t.select(1, 0), t.select(1, 1)]), "two columns");
        assert!(refused(&[t.select(1, 0), t.select(0, 2)]), "a column and a row");
        assert!(refused(&[t.narrow(0, 0, 2), t.narrow(0, 1, 2)]), "rows 0-1 and rows 1-2");
        assert!(!refused(&[t.narrow(0, 0, 2), t.narrow(0, 2, 2)]), "rows 0-1 and rows 2-3");
        assert!(refused(&[t.shallow_clone(), t.narrow(0, 3, 1), zeros(&[2])]), "a whole and its part");
    }

    #[test]
    fn a_tensor_that_repeats_elements_is_refused_and_a_transposed_one_is_not() {
        let t = zeros(&[6]);
        assert!(refused(&[t.expand([2, 6], false)]));
        assert!(refused(&[t.as_strided([3, 2], [1, 1], None)]), "sliding windows");
        assert!(!refused(&[t.as_strided([2, 2], [3, 2], None)]), "strides that cross without meeting");
        assert!(!refused(&[zeros(&[3, 4]).transpose(0, 1)]));
        assert!(!refused(&[t.expand([0, 6], false)]), "no elements");
    }
}
