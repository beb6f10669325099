//! What a collective needs to know of a tensor, in one FFI call.

use tch::{Device, Kind, Tensor};

#[allow(unreachable_pub, unused_qualifications, clippy::undocumented_unsafe_blocks)]
#[cxx::bridge(namespace = "tchd")]
mod ffi {
    #[derive(Clone, Copy, Debug)]
    struct RawFacts {
        data: usize,
        numel: i64,
        kind: i8,
        device_type: i8,
        device_index: i8,
        defined: bool,
        strided: bool,
        contiguous: bool,
        lazy: bool,
    }
    #[namespace = "at"]
    unsafe extern "C++" {
        include!("tch-distributed/src/libtorch/catch.h");
        include!("tch-distributed/src/libtorch/facts.h");
        type Tensor = crate::libtorch::tensor::AtTensor;
    }
    unsafe extern "C++" {
        fn facts(tensor: &Tensor) -> RawFacts;
    }
}

/// What a collective needs to know of a tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    /// The first element; null when there is none.
    pub(crate) data: *mut u8,
    /// How many elements.
    pub(crate) numel: usize,
    /// How many bytes one element takes.
    pub(crate) element: usize,
    /// The kind.
    pub(crate) kind: Kind,
    /// The device.
    pub(crate) device: Device,
    /// Whether memory holds exactly the elements, in order (no strides, no pending conjugation).
    pub(crate) plain: bool,
}

/// Why there are no facts about a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoFacts {
    /// The tensor is undefined.
    Undefined,
    /// It is sparse, or has no memory of its own.
    NotStrided,
    /// tch has no name for its kind.
    Kind(i8),
    /// It is on a device that no backend reaches.
    Device(i8),
}

/// Looks at a tensor once.
#[inline(always)]
pub(crate) fn facts(tensor: &Tensor) -> Result<Facts, NoFacts> {
    let raw = ffi::facts(crate::libtorch::tensor::at(tensor));
    if !raw.defined {
        return Err(NoFacts::Undefined);
    }
    if !raw.strided {
        return Err(NoFacts::NotStrided);
    }
    let (kind, element) = kind(raw.kind).ok_or(NoFacts::Kind(raw.kind))?;
    let device = match raw.device_type {
        0 => Device::Cpu,
        1 => Device::Cuda(usize::try_from(raw.device_index).unwrap_or(0)),
        other => return Err(NoFacts::Device(other)),
    };
    Ok(Facts {
        data: raw.data as *mut u8,
        numel: raw.numel as usize,
        element,
        kind,
        device,
        plain: raw.contiguous && !raw.lazy,
    })
}

/// The kind behind c10's number, and its size in bytes.
fn kind(number: i8) -> Option<(Kind, usize)> {
    Some(match number {
        0 => (Kind::Uint8, 1),
        1 => (Kind::Int8, 1),
        2 => (Kind::Int16, 2),
        3 => (Kind::Int, 4),
        4 => (Kind::Int64, 8),
        5 => (Kind::Half, 2),
        6 => (Kind::Float, 4),
        7 => (Kind::Double, 8),
        8 => (Kind::ComplexHalf, 4),
        9 => (Kind::ComplexFloat, 8),
        10 => (Kind::ComplexDouble, 16),
        11 => (Kind::Bool, 1),
        12 => (Kind::QInt8, 1),
        13 => (Kind::QUInt8, 1),
        14 => (Kind::QInt32, 4),
        15 => (Kind::BFloat16, 2),
        23 => (Kind::Float8e5m2, 1),
        24 => (Kind::Float8e4m3fn, 1),
        25 => (Kind::Float8e5m2fnuz, 1),
        26 => (Kind::Float8e4m3fnuz, 1),
        _ => return None,
    })
}

/// c10's number of a kind.
pub(super) fn number(wanted: Kind) -> Option<i8> {
    (0..i8::MAX).find(|&n| kind(n).is_some_and(|(kind, _)| kind == wanted))
}

#[cfg(test)]
mod tests {
    use super::{NoFacts, facts};
    use tch::{Device, Kind, Tensor};

    #[test]
    fn facts_tell_a_plain_tensor_from_a_strided_and_a_conjugated_one() {
        let t = Tensor::zeros([2, 3], (Kind::ComplexFloat, Device::Cpu));
        let f = facts(&t).unwrap();
        assert!(f.plain);
        assert_eq!((f.numel, f.element, f.kind, f.device), (6, 8, Kind::ComplexFloat, Device::Cpu));
        assert_eq!(f.data, t.data_ptr().cast());
        assert!(!facts(&t.transpose(0, 1)).unwrap().plain);
        assert!(!facts(&t.conj()).unwrap().plain);
        assert_eq!(facts(&t.narrow(0, 1, 1)).unwrap().data, t.get(1).data_ptr().cast());
    }

    #[test]
    fn a_tensor_without_memory_has_no_facts() {
        assert_eq!(facts(&Tensor::new()).unwrap_err(), NoFacts::Undefined);
        let sparse = Tensor::zeros([2, 2], (Kind::Float, Device::Cpu)).to_sparse(
            None::<tch::Layout>,
            None::<i64>,
            None,
        );
        assert_eq!(facts(&sparse).unwrap_err(), NoFacts::NotStrided);
    }

    #[test]
    fn every_kind_has_the_size_that_tch_gives_it() {
        for number in 0..40 {
            if let Some((kind, size)) = super::kind(number) {
                assert_eq!(kind.elt_size_in_bytes(), size, "{kind:?}");
            }
        }
    }
}
