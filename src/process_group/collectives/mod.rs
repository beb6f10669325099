//! The collectives, one file a family. Each has one `…_draft` that checks and prepares; the blocking
//! form runs it, the `_async` form launches it.

mod all_gather;
mod all_reduce;
mod all_to_all;
mod barrier;
mod broadcast;
mod gather;
mod reduce;
mod reduce_scatter;
mod scatter;
