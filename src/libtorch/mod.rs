//! The one room of unsafe FFI: a Rust face and C++ side by side, one pair of files a subject.

mod c10d;
mod ending;
mod facts;
mod function;
mod generator;
mod hooks;
mod list;
mod raised;
mod store;
mod streams;
mod tensor;

pub(crate) use c10d::{C10dBackend, C10dMember, C10dReduce, C10dWork, NcclPlan, Told, why_no_nccl};
pub(crate) use ending::unless_ending;
pub(crate) use facts::{Facts, NoFacts, facts};
pub(crate) use function::{Forward, RawFunction, apply_function, grad_enabled};
pub(crate) use generator::RawGenerator;
pub(crate) use hooks::{
    Registration, after_backward, backward, grad_state, hook_accumulated, hook_grad, in_backward, set_grad,
};
pub(crate) use store::{C10dStore, TcpStoreOptions, panic_text};
pub(crate) use streams::{Mark, SideStream, use_device};
pub(crate) use tensor::{
    empty_pinned_like, overlaps_itself, same, shares_memory, storage_offset, tensor_over,
};
