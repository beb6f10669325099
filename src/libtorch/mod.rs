//! The one room of unsafe FFI: a Rust face and C++ side by side, one pair of files a subject.

mod tensor;

pub(crate) use tensor::overlaps_itself;
