//! A list of tensors that both languages can fill and read.

use std::pin::Pin;

use cxx::UniquePtr;
use tch::Tensor;

use super::tensor::{at, own};

#[allow(unreachable_pub, clippy::undocumented_unsafe_blocks)]
#[cxx::bridge(namespace = "tchd")]
pub(super) mod ffi {
    #[namespace = "at"]
    unsafe extern "C++" {
        include!("tch-distributed/src/libtorch/catch.h");
        include!("tch-distributed/src/libtorch/list.h");
        type Tensor = crate::libtorch::tensor::AtTensor;
    }
    unsafe extern "C++" {
        type Tensors;
        fn new_tensors() -> UniquePtr<Tensors>;
        fn size(self: &Tensors) -> usize;
        fn push(self: Pin<&mut Tensors>, tensor: &Tensor);
        fn push_undefined(self: Pin<&mut Tensors>);
        fn get(self: &Tensors, index: usize) -> Result<*mut Tensor>;
    }
    impl UniquePtr<Tensors> {}
}

/// A C++ list of these tensors.
pub(super) fn to_cpp<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> UniquePtr<ffi::Tensors> {
    let mut list = ffi::new_tensors();
    for tensor in tensors {
        list.pin_mut().push(at(tensor));
    }
    list
}

/// Appends tensors to a C++ list; `None` becomes an undefined tensor.
pub(super) fn append<'a>(
    mut list: Pin<&mut ffi::Tensors>,
    tensors: impl IntoIterator<Item = Option<&'a Tensor>>,
) {
    for tensor in tensors {
        match tensor {
            Some(tensor) => list.as_mut().push(at(tensor)),
            None => list.as_mut().push_undefined(),
        }
    }
}

/// The tensors of a C++ list; `None` where one is undefined.
pub(super) fn to_rust(list: &ffi::Tensors) -> Vec<Option<Tensor>> {
    // SAFETY: `get` gives a new tensor that is ours, or null.
    (0..list.size()).map(|i| unsafe { own(list.get(i).unwrap_or(std::ptr::null_mut())) }).collect()
}
