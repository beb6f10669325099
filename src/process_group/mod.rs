//! Process groups and their collectives.

mod reduce_op;

pub use reduce_op::ReduceOp;
