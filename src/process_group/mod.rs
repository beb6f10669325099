//! Process groups and their collectives.
//!
//! [`init_process_group`] makes the default group; [`ProcessGroup`] is the handle, and every collective
//! a method on it. The functions of the same names in this module (and at the crate root) run on the
//! default group.

mod allocate;
mod checks;
mod coalesce;
mod collectives;
mod debug;
mod draft;
mod formation;
mod free;
mod group;
mod groups;
mod init;
mod objects;
mod p2p;
mod parting;
mod reduce_op;
mod spec;
mod state;
mod work;

pub use coalesce::Coalescing;
pub use free::*;
pub use group::ProcessGroup;
pub use groups::GroupOptions;
pub(crate) use init::enter_rank_thread;
pub use init::{
    InitOptions, backend_name, destroy_process_group, init_process_group, is_initialized, local_rank, rank,
    world, world_size,
};
pub use p2p::P2pOp;
pub use reduce_op::ReduceOp;
pub use spec::{Backend, BackendSpec};
pub use work::Work;
