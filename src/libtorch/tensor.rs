//! Facts about tensors that tch does not give, and tensors over memory of our own.

use std::any::Any;
use std::fmt;

#[allow(unreachable_pub, clippy::undocumented_unsafe_blocks)]
#[cxx::bridge(namespace = "tchd")]
mod ffi {
    /// What libtorch says about a tensor's overlap with itself.
    #[repr(u8)]
    enum MemOverlap {
        No,
        Yes,
        TooHard,
    }
    #[namespace = "at"]
    unsafe extern "C++" {
        include!("tch-distributed/src/libtorch/catch.h");
        include!("tch-distributed/src/libtorch/tensor.h");
        type Tensor;
    }
    extern "Rust" {
        type Keeper;
    }
    unsafe extern "C++" {
        fn overlap_at_a_glance(tensor: &Tensor) -> Result<MemOverlap>;
        fn empty_pinned_like(like: &Tensor) -> Result<*mut Tensor>;
        fn storage_offset(tensor: &Tensor) -> i64;
        fn same(left: &Tensor, right: &Tensor) -> bool;
        fn tensor_over(data: usize, size: &[i64], kind: i8, keeper: Box<Keeper>) -> Result<*mut Tensor>;
        fn shares_memory(tensor: &Tensor) -> Result<bool>;
    }
}

pub(crate) use ffi::Tensor as AtTensor;

/// Memory that a tensor lies in: dropped when the last tensor over it has gone.
pub(super) struct Keeper {
    _memory: Box<dyn Any + Send + Sync>,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keeper")
    }
}

/// A dense CPU tensor over memory that `keeper` keeps mapped.
///
/// # Safety
/// `data` is aligned for the kind and valid, for reading and writing, for as many elements as the
/// size says, until the keeper is dropped; nothing else in this process uses that memory.
pub(crate) unsafe fn tensor_over(
    data: *mut u8,
    size: &[i64],
    kind: tch::Kind,
    keeper: impl Any + Send + Sync,
) -> crate::Result<tch::Tensor> {
    let keeper = Box::new(Keeper { _memory: Box::new(keeper) });
    let number = super::facts::number(kind)
        .ok_or_else(|| crate::Error::invalid("kind", format!("{kind:?}: not a kind of plain tensors")))?;
    let tensor = ffi::tensor_over(data as usize, size, number, keeper).map_err(super::raised::caught)?;
    // SAFETY: just made with `new`; nobody else has it.
    unsafe { own(tensor) }.ok_or_else(|| crate::Error::invalid("size", "libtorch made no tensor of it"))
}

/// The C++ tensor behind a tch tensor.
pub(crate) fn at(tensor: &tch::Tensor) -> &ffi::Tensor {
    // SAFETY: a tch tensor holds a non-null `at::Tensor*` that lives as long as it does.
    unsafe { &*tensor.as_ptr().cast::<ffi::Tensor>() }
}

/// Gives a tensor away to C++, which deletes it.
pub(super) fn disown(tensor: tch::Tensor) -> *mut AtTensor {
    let pointer = tensor.as_ptr().cast_mut().cast();
    std::mem::forget(tensor);
    pointer
}

/// Takes over a tensor that C++ made with `new`; `None` for null.
///
/// # Safety
/// The pointer is null, or nobody else owns what it points to.
pub(super) unsafe fn own(pointer: *mut AtTensor) -> Option<tch::Tensor> {
    // SAFETY: as the caller promises; tch deletes it as it deletes its own, which come from `new` too.
    (!pointer.is_null()).then(|| unsafe { tch::Tensor::from_ptr(pointer.cast()) })
}

/// Whether elements of the tensor share memory with one another (an expanded tensor's do).
pub(crate) fn overlaps_itself(tensor: &tch::Tensor) -> crate::Result<bool> {
    let glance = ffi::overlap_at_a_glance(at(tensor)).map_err(super::raised::caught)?;
    Ok(match glance {
        ffi::MemOverlap::No => false,
        ffi::MemOverlap::Yes => true,
        _ => strides_overlap(&tensor.size(), &tensor.stride()),
    })
}

/// Whether two different indices have the same offset. Exact for any strides.
fn strides_overlap(size: &[i64], stride: &[i64]) -> bool {
    if size.contains(&0) {
        return false;
    }
    let mut dims: Vec<(i64, i64)> =
        size.iter().zip(stride).filter(|(n, _)| **n > 1).map(|(&n, &s)| (s.abs(), n)).collect();
    dims.sort_unstable();
    if dims.first().is_some_and(|(s, _)| *s == 0) {
        return true;
    }
    // Where each stride steps over all that the smaller ones reach, every index has its own offset:
    // so it is for slices and permutations of a plain tensor.
    let (mut reach, mut nested) = (0i64, true);
    for (s, n) in &dims {
        nested &= *s > reach;
        reach = reach.saturating_add(s.saturating_mul(n - 1));
    }
    if nested {
        return false;
    }
    // Odd strides (as_strided, unfold): write down every offset.
    let numel = dims.iter().map(|(_, n)| *n as usize).product();
    if numel > reach as usize + 1 {
        return true; // more elements than places
    }
    let mut offsets: Vec<i64> = Vec::with_capacity(numel);
    offsets.push(0);
    for (s, n) in dims {
        let known = offsets.len();
        for i in 1..n {
            offsets.extend_from_within(..known);
            let from = offsets.len() - known;
            offsets[from..].iter_mut().for_each(|o| *o += i * s);
        }
    }
    offsets.sort_unstable();
    offsets.windows(2).any(|pair| pair[0] == pair[1])
}

/// An empty tensor of the CPU, of the shape and kind of a CUDA tensor, in pinned memory.
pub(crate) fn empty_pinned_like(like: &tch::Tensor) -> crate::Result<tch::Tensor> {
    let made = ffi::empty_pinned_like(at(like)).map_err(super::raised::caught)?;
    // SAFETY: the pointer comes from `new`, and nobody else has it.
    let made = unsafe { own(made) };
    made.ok_or_else(|| crate::Error::Torch(tch::TchError::Torch("no pinned tensor was made".to_owned())))
}

/// Where a dense tensor's first element is in its memory, in elements. (tch 0.24 has no name for it.)
pub(crate) fn storage_offset(tensor: &tch::Tensor) -> i64 {
    ffi::storage_offset(at(tensor))
}

/// Whether two handles are of one tensor.
pub(crate) fn same(left: &tch::Tensor, right: &tch::Tensor) -> bool {
    ffi::same(at(left), at(right))
}

/// Whether another tensor, which somebody may still use, lies in the same memory as this one.
pub(crate) fn shares_memory(tensor: &tch::Tensor) -> crate::Result<bool> {
    ffi::shares_memory(at(tensor)).map_err(super::raised::caught)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tch::{Device, Kind, Tensor};

    use super::{overlaps_itself, shares_memory, strides_overlap};

    #[test]
    fn views_of_a_plain_tensor_do_not_overlap_themselves_and_expanded_ones_do() {
        let t = Tensor::zeros([4, 6], (Kind::Float, Device::Cpu));
        let no = |t: &Tensor| assert!(!overlaps_itself(t).unwrap(), "{:?} {:?}", t.size(), t.stride());
        no(&t);
        no(&t.transpose(0, 1));
        no(&t.slice(1, 0, 6, 4));
        no(&t.slice(0, 0, 4, 3).transpose(0, 1));
        no(&t.narrow(1, 2, 0));
        no(&t.as_strided([3, 2], [2, 3], 0));
        let yes = |t: &Tensor| assert!(overlaps_itself(t).unwrap(), "{:?} {:?}", t.size(), t.stride());
        yes(&t.narrow(0, 0, 1).expand([2, 6], false));
        yes(&t.view([24]).unfold(0, 3, 1));
        yes(&t.as_strided([4, 2], [2, 3], 0).as_strided([4, 3], [2, 3], 0));
    }

    #[test]
    fn memory_is_shared_while_another_tensor_is_in_it() {
        let shared = |t: &Tensor| shares_memory(t).unwrap();
        let base = Tensor::zeros([6], (Kind::Float, Device::Cpu));
        assert!(!shared(&base) && !shared(&base.shallow_clone()));
        let view = tch::no_grad(|| base.view([2, 3]));
        assert!(shared(&base) && shared(&view));
        drop(base);
        assert!(!shared(&view), "what it was taken from is held by the view alone");
        let other = view.narrow(0, 1, 1);
        assert!(shared(&view) && shared(&other));
        drop(view);
        assert!(!shared(&other));
        let plain = other.copy();
        let detached = plain.detach();
        assert!(shared(&plain));
        drop(detached);
        assert!(!shared(&plain) && !shared(&plain.to_sparse(None::<tch::Layout>, None::<i64>, None)));
    }

    proptest::proptest! {
        #[test]
        fn overlap_is_what_writing_down_all_offsets_says(
            dims in proptest::collection::vec((0i64..5, 0i64..12), 0..4)
        ) {
            let (size, stride): (Vec<_>, Vec<_>) = dims.iter().copied().unzip();
            let mut offsets = vec![0];
            for (n, s) in dims {
                offsets = offsets.iter().flat_map(|o| (0..n).map(move |i| o + i * s)).collect();
            }
            let different: HashSet<_> = offsets.iter().collect();
            assert_eq!(strides_overlap(&size, &stride), different.len() < offsets.len());
        }
    }
}
