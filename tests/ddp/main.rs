//! `DistributedDataParallel` and `DistributedSampler`, seen from outside.

mod agreement;
mod buffers;
mod equivalence;
mod failures;
mod features;
mod hooks;
mod memory;
mod overlap;
mod parity;
mod processes;
mod sampler;
mod static_graph;
mod support;
mod unused;
