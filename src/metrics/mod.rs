//! Running metrics that reduce exactly across ranks, uneven counts included.
//!
//! Each rank feeds its own share; [`Metric::reduce`] gives every rank the metric of all shares, as if one
//! process had seen every value: counts are integers, and sums of floats are kept without rounding (see
//! [`ExactSum`]), so the result does not depend on how the data was split.
//!
//! ```
//! use tch_distributed as dist;
//! use dist::metrics::{Mean, Metric};
//!
//! let means = dist::testing::run_threads(3, |group| {
//!     let mut loss = Mean::new();
//!     for step in 0..=group.rank() {
//!         loss.update(0.1 * (step + 1) as f64); // rank r has seen r + 1 values
//!     }
//!     loss.reduce(&group).unwrap().value()
//! });
//! assert!(means.iter().all(|m| *m == means[0]));
//! assert!((means[0].unwrap() - (0.1 + 0.3 + 0.6) / 6.0).abs() < 1e-15);
//! ```

mod classification;
mod distribution;
mod exact_sum;

pub use classification::{Accuracy, ConfusionMatrix};
pub use distribution::{Histogram, Quantile};
pub use exact_sum::{ExactSum, Mean};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, ProcessGroup, Result};

/// A running quantity that can be merged with another rank's.
///
/// A type of the user's own needs [`merge`](Self::merge) alone.
pub trait Metric: Clone + Serialize + DeserializeOwned {
    /// Takes in what another has seen. `InvalidArgument` where the two do not fit (other classes, other
    /// edges).
    fn merge(&mut self, other: &Self) -> Result<()>;

    /// The metric over all ranks of the group, the same on each. A collective: every rank calls it.
    ///
    /// The metric itself is left alone, so it may run on.
    fn reduce(&self, group: &ProcessGroup) -> Result<Self> {
        let all = group.all_gather_object(self)?;
        let mut all = all.into_iter();
        let mut merged =
            all.next().ok_or_else(|| Error::Object { reason: "no rank gave a metric".to_owned() })?;
        for other in all {
            merged.merge(&other)?;
        }
        Ok(merged)
    }
}

/// The elements of a tensor, as `T`, whatever its shape and device.
fn elements<T: tch::kind::Element>(tensor: &tch::Tensor) -> Result<Vec<T>>
where
    Vec<T>: TryFrom<tch::Tensor, Error = tch::TchError>,
{
    let flat = tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_to_kind(T::KIND)?.f_flatten(0, -1)?;
    Ok(Vec::try_from(flat)?)
}
