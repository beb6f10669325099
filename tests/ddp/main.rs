//! `DistributedDataParallel` and `DistributedSampler`, seen from outside.

mod agreement;
mod equivalence;
mod features;
mod overlap;
mod parity;
mod processes;
mod sampler;
mod support;
mod unused;
