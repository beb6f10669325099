//! Ranks as processes of this machine.

mod environment;
mod output;
mod signals;
pub(crate) mod supervise;

pub(crate) use environment::{Seat, die_with_parent, free_port, nonce};
