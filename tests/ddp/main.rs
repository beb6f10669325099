//! `DistributedDataParallel` and `DistributedSampler`, seen from outside.

mod agreement;
mod equivalence;
mod features;
mod overlap;
mod sampler;
mod support;
mod unused;
