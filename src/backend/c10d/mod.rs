//! libtorch's own engines, Gloo and NCCL, behind one adapter.
//!
//! Both are `c10d::Backend`s. [`engine`] turns calls into operations on flat tensors ([`flat`], [`ops`],
//! [`combine`]), [`messages`] those from rank to rank ([`own`] to oneself, [`listeners`] and [`peers`] from any rank), and
//! their ends into completions; on devices [`lookout`] waits for the ends. [`sentry`] notices ranks that called different things,
//! and [`inquest`] finds out, through the store, what a failure was, for these engines know addresses, not ranks. Worlds
//! can be shared with Python: the keys on the wire, the order of construction and the operations are PyTorch's, but for a few
//! that PyTorch does another way: over Gloo `reduce_scatter` of lists (`reduce_scatter_tensor` is shared), over NCCL
//! gathers to all and reduce-scatters of uneven parts.
//!
//! Gloo is part of every build. NCCL is there with the feature `nccl`: it compiles and links, and has never yet been
//! run on a GPU by us (see [`nccl`]).

mod combine;
mod engine;
mod flat;
mod gloo;
mod inquest;
mod listeners;
mod lookout;
mod messages;
mod nccl;
mod ops;
mod own;
mod peers;
mod sentry;
mod waiters;

#[cfg(test)]
mod tests;

pub(super) use crate::libtorch::why_no_nccl;
pub(super) use gloo::create as create_gloo;
pub(super) use nccl::create as create_nccl;
pub(crate) use nccl::{has_communicator, leave_split, split as split_nccl};
