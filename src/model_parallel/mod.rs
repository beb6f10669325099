//! Models split over ranks: a mesh of named axes, tensor and sequence parallel layers, pipelines.
//!
//! A [`DeviceMesh`] says which rank plays which part. [`tensor`] splits single layers, [`pipeline`] cuts a model into
//! stages that work on micro-batches at the same time.

mod escape;
mod gradients;
mod mesh;
pub mod pipeline;
pub mod tensor;

pub use gradients::{LossScaler, clip_grad_norm, sync_gradients};
pub use mesh::DeviceMesh;
