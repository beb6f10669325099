//! Collectives that autograd can follow: new tensors out, any dimension, the group last.
//!
//! Each function has a backward that communicates too, so **every rank must run it**: the result must go into the
//! loss that is differentiated on all ranks or on none, and the input must require gradients on all ranks or on
//! none (but that of [`send`], which gets one in any case).
//!
//! # Whose gradient
//!
//! [`all_reduce`], [`all_gather`], [`reduce_scatter`], [`all_to_all`], [`broadcast`], [`send`] and [`recv`] give
//! the gradients of the **sum of all ranks' losses**. A loss that is the same on every rank then counts once for
//! each.
//!
//! The four region functions are made for tensor parallelism, where every rank of the group computes the *same*
//! loss from replicated values, and it counts **once**:
//!
//! | function | forward | backward |
//! |---|---|---|
//! | [`copy_to_group`] | identity | all-reduce |
//! | [`reduce_from_group`] | all-reduce | identity |
//! | [`scatter_to_group`] | own part | all-gather |
//! | [`gather_from_group`] | all-gather | own part |
//!
//! # Gradients of gradients
//!
//! [`all_reduce`] with `Sum`, `Avg` and `PremulSum`, [`copy_to_group`] and [`reduce_from_group`] can be differentiated
//! again. The others refuse a backward with
//! [`create_graph`](crate::autograd::BackwardOptions::create_graph): `InvalidArgument`.
//!
//! # Sizes that do not divide
//!
//! A dimension that is split is split as evenly as can be: with `n = q * size + r`, the first `r` ranks get `q + 1`
//! and the others `q` ([`shard_range`]; `torch.tensor_split`). What is gathered may differ in size along the
//! gathered dimension from rank to rank; all other dimensions must agree.
//!
//! ```
//! use tch::{Device, Kind, Tensor};
//! use tch_distributed::{ReduceOp, functional, testing};
//!
//! let gradients = testing::run_threads(2, |group| {
//!     let x = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
//!     let y = functional::all_reduce(&x, ReduceOp::Sum, &group).unwrap();
//!     // Rank 0's loss is the sum of y, rank 1's twice that: together three times each element.
//!     let loss = y.sum(Kind::Float) * (group.rank() as f64 + 1.0);
//!     loss.backward();
//!     Vec::<f32>::try_from(x.grad()).unwrap()
//! });
//! assert_eq!(gradients, [[3.0; 3]; 2]);
//! ```

mod exchange;
mod gather;
mod parts;
mod point_to_point;
mod reduce;
mod region;

pub use exchange::{all_to_all, broadcast};
pub use gather::{all_gather, reduce_scatter};
pub(crate) use gather::{all_gather_even, check_divides, reduce_scatter_even};
pub use parts::shard_range;
pub(crate) use parts::{gather_parts, refuse_create_graph};
pub use point_to_point::{recv, send};
pub use reduce::all_reduce;
pub(crate) use region::{copy_all_to_group, gather_sized};
pub use region::{copy_to_group, gather_from_group, reduce_from_group, scatter_to_group};
