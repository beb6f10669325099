//! Data parallelism: every rank holds the whole model and sees its share of the data.
//!
//! * [`DistributedDataParallel`] averages gradients over the ranks of a group while backward runs.
//! * [`DistributedSampler`] says which samples a rank sees.
//! * [`hooks`] change how gradients travel, to halve their bytes for instance.
//!
//! ```
//! use tch::{Device, Kind, Tensor, nn, nn::OptimizerConfig};
//! use tch_distributed as dist;
//! use dist::data_parallel::{DdpOptions, DistributedDataParallel};
//!
//! let weights = dist::testing::run_threads(2, |group| -> dist::Result<Vec<f32>> {
//!     let vs = nn::VarStore::new(Device::Cpu);
//!     let model = nn::linear(vs.root() / "fc", 3, 1, Default::default());
//!     let ddp = DistributedDataParallel::new(model, &vs, &group, DdpOptions::new())?;
//!     let mut optimizer = nn::Sgd::default().build(&vs, 0.1)?;
//!     let inputs = Tensor::ones([4, 3], (Kind::Float, Device::Cpu)) * (group.rank() as f64 + 1.0);
//!     let loss = ddp.forward(&inputs)?.square().mean(Kind::Float);
//!     optimizer.zero_grad();
//!     ddp.backward(&loss)?; // every rank's gradients are now the average
//!     optimizer.step();
//!     Ok(Vec::try_from(vs.variables()["fc.weight"].flatten(0, -1))?)
//! });
//! assert_eq!(weights[0].as_ref().unwrap(), weights[1].as_ref().unwrap());
//! ```

mod apart;
mod buckets;
mod buffers;
mod ddp;
mod exchange;
pub mod hooks;
mod layout;
mod options;
mod partwise;
mod reducer;
mod sampler;
mod state;
mod step;
mod unused;
mod verify;

pub use ddp::DistributedDataParallel;
pub use options::DdpOptions;
pub(crate) use partwise::PartwiseAverage;
pub use sampler::DistributedSampler;
