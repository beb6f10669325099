//! A short calibration on the actual group.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::fit::least_relative_squares;
use super::{Algorithm, Collective, Link};
use crate::{ProcessGroup, ReduceOp, Result};

/// One measured collective: the slowest rank's median.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// What ran.
    pub collective: Collective,
    /// On how many bytes (see [`Collective`]).
    pub bytes: usize,
    /// Seconds.
    pub seconds: f64,
}

/// What the calibration saw, and the link fitted to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Latency and bandwidths that explain the samples best, in relative terms.
    pub link: Link,
    /// How many ranks took part.
    pub ranks: usize,
    /// The measurements.
    pub samples: Vec<Sample>,
}

impl Calibration {
    /// The algorithm that the model takes a collective to run: least latency while small, else least bytes.
    pub fn predict(&self, collective: Collective, bytes: usize, ranks: usize) -> f64 {
        Algorithm::best(collective, bytes, ranks, &self.link).1
    }

    /// The median of |predicted − measured| / measured over the samples.
    pub fn median_error(&self) -> f64 {
        let mut errors: Vec<f64> = self
            .samples
            .iter()
            .map(|s| (self.predict(s.collective, s.bytes, self.ranks) - s.seconds).abs() / s.seconds)
            .collect();
        errors.sort_by(f64::total_cmp);
        errors.get(errors.len() / 2).copied().unwrap_or(0.0)
    }

    /// Takes further measurements in and fits anew: calibration rounds may be interleaved with work.
    pub fn extend(&mut self, samples: impl IntoIterator<Item = Sample>) -> Result<()> {
        self.samples.extend(samples);
        self.link = fit(&self.samples, self.ranks)?;
        Ok(())
    }
}

/// Bytes at which each collective is measured.
const SIZES: [usize; 4] = [256, 64 << 10, 1 << 20, 8 << 20];
const ROUNDS: usize = 7;

/// Measures the group's collectives for a moment (about 100 operations, some 100 MB moved) and fits the
/// link. A collective: every rank calls it, and all get the same calibration. With one rank there is
/// nothing to measure: the link is then infinitely fast.
///
/// ```
/// use tch_distributed as dist;
/// let fits = dist::testing::run_threads(2, |group| dist::cost::calibrate(&group).unwrap());
/// assert_eq!(fits[0], fits[1]);
/// assert!(fits[0].link.bandwidth > 0.0);
/// ```
pub fn calibrate(group: &ProcessGroup) -> Result<Calibration> {
    let ranks = group.size();
    if ranks == 1 {
        let link = Link { latency: 0.0, bandwidth: f64::INFINITY, combine: f64::INFINITY };
        return Ok(Calibration { link, ranks, samples: Vec::new() });
    }
    let mut samples = Vec::new();
    for bytes in SIZES {
        for collective in
            [Collective::AllReduce, Collective::AllGather, Collective::Broadcast, Collective::ReduceScatter]
        {
            samples.push(Sample { collective, bytes, seconds: measure(group, collective, bytes)? });
        }
    }
    samples.push(Sample {
        collective: Collective::Barrier,
        bytes: 0,
        seconds: measure(group, Collective::Barrier, 0)?,
    });
    let link = fit(&samples, ranks)?;
    Ok(Calibration { link, ranks, samples })
}

/// The median over rounds of the slowest rank's time.
fn measure(group: &ProcessGroup, collective: Collective, bytes: usize) -> Result<f64> {
    let ranks = group.size() as i64;
    let share = (bytes as i64 / 4 / ranks).max(1);
    let device = group.object_device();
    let options = (Kind::Float, device);
    let mut whole = Tensor::f_zeros([share * ranks], options)?;
    let mut part = Tensor::f_zeros([share], options)?;
    let mut times = Vec::with_capacity(ROUNDS);
    for round in 0..=ROUNDS {
        group.barrier()?;
        let start = Instant::now();
        match collective {
            Collective::AllReduce => group.all_reduce(&mut whole, ReduceOp::Sum)?,
            Collective::AllGather => group.all_gather_into_tensor(&mut whole, &part)?,
            Collective::ReduceScatter => group.reduce_scatter_tensor(&mut part, &whole, ReduceOp::Sum)?,
            Collective::Broadcast => group.broadcast(&mut whole, 0)?,
            _ => group.barrier()?,
        }
        if let Device::Cuda(index) = device {
            // A call has only been given to the device.
            tch::Cuda::synchronize(index as i64);
        }
        if round > 0 {
            times.push(start.elapsed().as_secs_f64()); // the first round warms up
        }
    }
    times.sort_by(f64::total_cmp);
    let mut slowest = Tensor::from_slice(&[times[ROUNDS / 2]]).f_to_device(device)?;
    group.all_reduce(&mut slowest, ReduceOp::Max)?;
    Ok(slowest.f_double_value(&[0])?.max(1e-9))
}

/// Latency, seconds a byte sent and seconds a byte combined. The algorithms that explain the samples
/// depend on the link, so the fit is repeated with the algorithms that the last one chose.
fn fit(samples: &[Sample], ranks: usize) -> Result<Link> {
    let mut link = Link { latency: 1e-5, bandwidth: 5e9, combine: 1e10 };
    for _ in 0..8 {
        let rows: Vec<_> = samples
            .iter()
            .filter_map(|s| {
                let (algorithm, _) = Algorithm::best(s.collective, s.bytes, ranks, &link);
                let terms = algorithm.terms(s.collective, s.bytes, ranks)?;
                Some(([terms.messages, terms.bytes, terms.combined], s.seconds))
            })
            .collect();
        let [latency, byte, combined] = least_relative_squares(&rows)?;
        let fitted = Link { latency, bandwidth: 1.0 / byte, combine: 1.0 / combined };
        if fitted == link {
            break;
        }
        link = fitted;
    }
    Ok(link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_found_again_from_the_times_it_gives() {
        let truth = Link { latency: 20e-6, bandwidth: 2e9, combine: 8e9 };
        for ranks in [2, 4] {
            let samples: Vec<_> = [
                Collective::AllReduce,
                Collective::AllGather,
                Collective::Broadcast,
                Collective::ReduceScatter,
            ]
            .into_iter()
            .flat_map(|c| SIZES.map(|bytes| (c, bytes)))
            .map(|(collective, bytes)| Sample {
                collective,
                bytes,
                seconds: Algorithm::best(collective, bytes, ranks, &truth).1,
            })
            .collect();
            let link = fit(&samples, ranks).unwrap();
            let calibration = Calibration { link, ranks, samples };
            assert!(calibration.median_error() < 0.02, "{ranks} ranks: {link:?}");
        }
    }
}
