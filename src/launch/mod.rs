//! Ranks as processes: [`local`] for a program that starts its own, `tchrun` for any program.
//!
//! Both set the variables that torchrun sets, serve the store themselves, share the cores out among
//! the ranks (`OMP_NUM_THREADS`, unless it is set), put its rank before each line of output, and end
//! all ranks when one fails, when they are interrupted, and when they die themselves.

mod environment;
mod local;
mod output;
mod signals;
pub(crate) mod supervise;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod tchrun;

pub(crate) use environment::{PARENT, Seat, die_with_parent, free_port, is_child_of, nonce, number};
pub use local::local;
