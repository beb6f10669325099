//! Facts about tensors that tch does not give.

#[allow(unreachable_pub, clippy::undocumented_unsafe_blocks)]
#[cxx::bridge(namespace = "tchd")]
mod ffi {
    #[namespace = "at"]
    unsafe extern "C++" {
        include!("tch-distributed/src/libtorch/catch.h");
        include!("tch-distributed/src/libtorch/tensor.h");
        type Tensor;
    }
    unsafe extern "C++" {
        /// Whether elements of the tensor share memory with one another.
        fn overlaps_itself(tensor: &Tensor) -> Result<bool>;
        fn same(left: &Tensor, right: &Tensor) -> bool;
    }
}

pub(crate) use ffi::Tensor as AtTensor;

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
    ffi::overlaps_itself(at(tensor)).map_err(|e| tch::TchError::Torch(e.what().to_owned()).into())
}

/// Whether two handles are of one tensor.
pub(crate) fn same(left: &tch::Tensor, right: &tch::Tensor) -> bool {
    ffi::same(at(left), at(right))
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_expanded_tensor_overlaps_itself() {
        let t = tch::Tensor::zeros([3], (tch::Kind::Float, tch::Device::Cpu));
        assert!(!super::overlaps_itself(&t).unwrap());
        assert!(super::overlaps_itself(&t.expand([2, 3], false)).unwrap());
    }
}
