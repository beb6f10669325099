//! What communication and training steps should cost: fitted on the actual group, predicted for any size.
//!
//! The model is Hockney's: a message of `b` bytes takes `latency + b / bandwidth`, and combining it with
//! what is there takes `b / combine`. Collectives are sums of such terms by algorithm (R. Thakur,
//! R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH", 2005), and
//! [`Workload`] turns them into the time of a training step under data, tensor and pipeline parallelism.
//!
//! ```
//! use tch_distributed::cost::{Algorithm, Collective, Link};
//! // 10 µs and 10 GB/s a message, 20 GB/s to add.
//! let link = Link { latency: 10e-6, bandwidth: 10e9, combine: 20e9 };
//! let ring = Algorithm::Ring.time(Collective::AllReduce, 100 << 20, 4, &link).unwrap();
//! let doubling = Algorithm::RecursiveDoubling.time(Collective::AllReduce, 100 << 20, 4, &link).unwrap();
//! assert!(ring < doubling); // bandwidth wins on large messages
//! let ring = Algorithm::Ring.time(Collective::AllReduce, 8, 4, &link).unwrap();
//! let doubling = Algorithm::RecursiveDoubling.time(Collective::AllReduce, 8, 4, &link).unwrap();
//! assert!(doubling < ring); // latency wins on small ones
//! ```

mod calibrate;
mod collective;
mod fit;
mod step;

pub use calibrate::{Calibration, Sample, calibrate};
pub use collective::{Algorithm, Collective};
pub use fit::Link;
pub use step::{Parallelism, StepTime, Workload};
