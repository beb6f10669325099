//! The one room of unsafe FFI: a Rust face and C++ side by side, one pair of files a subject.

mod facts;
mod store;
mod tensor;

pub(crate) use facts::{Facts, NoFacts, facts};
pub(crate) use store::{C10dStore, TcpStoreOptions, panic_text};
pub(crate) use tensor::overlaps_itself;
