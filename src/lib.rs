//! torch.distributed for Rust, on [`tch`] (libtorch).

#![deny(missing_docs)]

pub mod autograd;
pub mod backend;
pub mod cost;
pub mod data_parallel;
mod error;
pub mod functional;
pub mod launch;
mod libtorch;
pub mod metrics;
pub mod model_parallel;
mod notice;
pub mod process_group;
pub mod profile;
pub mod random;
pub mod store;
pub mod testing;

pub use backend::{is_backend_available, register_backend};
pub use error::{Error, Result};
pub use process_group::*;
