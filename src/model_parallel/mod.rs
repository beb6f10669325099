//! Models split over ranks: a mesh of named axes, tensor and sequence parallel layers, pipelines.
//!
//! [`pipeline`] cuts a model into stages that work on micro-batches at the same time.

pub mod pipeline;
