//! `torch.distributed` for Rust, on [`tch`] (libtorch), with no Python at run time.
//!
//! # The model in one screen
//!
//! **Ranks.** A job is a number of *ranks*, each running the same program: processes on one host or on many, or
//! threads of a test. Each knows its `rank`, from 0, and the `world_size`. Who starts them is up to you: `launch`,
//! the `tchrun` program, torchrun, Slurm, MPI or Kubernetes; [`testing`] has them as threads.
//!
//! **Meeting.** [`init_process_group`] finds the others through a [`store`], a small key-value service that the
//! environment, an address or a file leads to, and gives a [`ProcessGroup`]. It is also the default group, which
//! functions such as [`rank`] and [`all_reduce`] at this crate's root use. [`new_group`] makes smaller ones.
//!
//! **Collectives.** A method of [`ProcessGroup`] that every rank of the group calls, in the same order, with
//! tensors that fit: [`all_reduce`](ProcessGroup::all_reduce), [`broadcast`](ProcessGroup::broadcast),
//! [`send`](ProcessGroup::send) and the rest. It returns when this rank's part is done; the `_async` form
//! returns a [`Work`] to wait for or `.await`. Rank arguments are ranks within the group.
//!
//! **Backends** move the bytes, behind one trait in [`backend`]: `native` is this crate's own engine for CPU
//! tensors (threads, shared memory, TCP); `gloo` and `nccl` are libtorch's. All give the same results and the
//! same errors, and one suite of tests holds them to it. One error `native` alone finds always: sizes that differ by
//! rank where they must not. Libtorch's engines do not compare them, here as in PyTorch: with Gloo a message longer than
//! its place may end the process, and a shorter one passes. `TORCH_DISTRIBUTED_DEBUG=DETAIL` compares the shapes of
//! collectives before each, on every group that has a CPU backend.
//!
//! **Training.** [`data_parallel`] averages gradients while backward still runs; [`model_parallel`] splits layers
//! and pipelines; [`functional`] has collectives that autograd follows; [`autograd`] has what these are made of,
//! useful alone. Models stay plain [`tch::nn`].
//!
//! **Errors.** Nothing panics on what a user or a peer does: every failure is an [`Error`]. A mistake in arguments
//! is found before a byte is sent, and the call may be repeated. A failure (a lost peer, a timeout, ranks that
//! called different things) *poisons* the group: all its ranks get the first cause, from this call and every later.
//!
//! # First program
//!
//! ```
//! use tch_distributed as dist;
//! use tch::Tensor;
//!
//! let sums = dist::testing::run_threads(4, |group| -> dist::Result<f64> {
//!     let mut tensor = Tensor::from_slice(&[group.rank() as f64]);
//!     group.all_reduce(&mut tensor, dist::ReduceOp::Sum)?;
//!     Ok(tensor.double_value(&[0]))
//! });
//! assert!(sums.into_iter().all(|sum| sum.unwrap() == 6.0)); // 0 + 1 + 2 + 3
//! ```
//!
//! As processes the body is the same, inside `launch::local(4, || { … })` with
//! `init_process_group("native", InitOptions::new())` for the group; `examples/` has whole training programs.
//!
//! # The floors of the house
//!
//! | floor | modules |
//! |---|---|
//! | how ranks come to be | `launch`, [`testing`], `bin/tchrun` |
//! | what users train with | [`data_parallel`], [`model_parallel`] |
//! | gradients through it | [`functional`] |
//! | the API: arguments are checked here, once for all backends | [`process_group`] |
//! | the seam: what an engine must provide | [`backend`] |
//! | the engines | [`backend::native`], libtorch's Gloo and NCCL |
//! | the meeting place | [`store`], `rendezvous` |
//! | libtorch: the only foreign code | `libtorch`, with [`autograd`] on top |
//!
//! # Coming from PyTorch
//!
//! Names are PyTorch's, and the search box finds its other names too (`get_rank`, `all_gather_single`). What differs:
//! ranks given to a method of a group are ranks *within that group*; asynchronous forms are functions of their own
//! (`all_reduce_async`) in place of `async_op=True`; errors are returned; `native` results are bit-identical on all
//! ranks and from run to run. [`migration`] goes through it function by function.

#![deny(missing_docs)]
#![warn(unreachable_pub)]

pub mod autograd;
pub mod backend;
pub mod cost;
pub mod data_parallel;
mod error;
pub mod functional;
pub mod launch;
mod libtorch;
pub mod metrics;
pub mod migration;
pub mod model_parallel;
mod notice;
pub mod process_group;
pub mod profile;
pub mod random;
mod rendezvous;
pub mod store;
pub mod testing;

pub use backend::{is_backend_available, register_backend};
pub use error::{Error, Result};
pub use process_group::*;

/// The README's programs are compiled, and where they can be, run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
