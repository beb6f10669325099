//! How values are spread.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Metric, elements};
use crate::{Error, Result};

/// Counts of values between edges.
///
/// Bin `i` counts `edges[i] <= x < edges[i + 1]`, the last one its upper edge too (as `torch.histogram`).
/// What lies outside, and NaN, is counted apart: no value is lost.
///
/// ```
/// use tch_distributed::metrics::Histogram;
/// let mut h = Histogram::new(vec![0.0, 1.0, 2.0])?;
/// [0.0, 0.5, 1.0, 2.0, -1.0, f64::NAN].into_iter().for_each(|x| h.update(x));
/// assert_eq!(h.counts(), [2, 2]);
/// assert_eq!((h.below(), h.above(), h.nan()), (1, 0, 1));
/// # Ok::<(), tch_distributed::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    edges: Vec<f64>,
    counts: Vec<u64>,
    below: u64,
    above: u64,
    nan: u64,
}

impl Histogram {
    /// An empty histogram with these edges: at least two, growing, finite.
    pub fn new(edges: Vec<f64>) -> Result<Self> {
        if edges.len() < 2 || edges.windows(2).any(|w| w[0] >= w[1]) || edges.iter().any(|e| !e.is_finite()) {
            return Err(Error::invalid(
                "edges",
                format!("{edges:?} are not two or more growing finite numbers"),
            ));
        }
        let counts = vec![0; edges.len() - 1];
        Ok(Self { edges, counts, below: 0, above: 0, nan: 0 })
    }

    /// An empty histogram of so many equal bins from `low` to `high`.
    pub fn uniform(low: f64, high: f64, bins: usize) -> Result<Self> {
        if bins == 0 {
            return Err(Error::invalid("bins", "0 bins count nothing"));
        }
        let step = (high - low) / bins as f64;
        let mut edges: Vec<f64> = (0..bins).map(|i| low + step * i as f64).collect();
        edges.push(high);
        Self::new(edges)
    }

    /// Takes in a value.
    pub fn update(&mut self, value: f64) {
        let (first, last) = (self.edges[0], self.edges[self.edges.len() - 1]);
        if value.is_nan() {
            self.nan += 1;
        } else if value < first {
            self.below += 1;
        } else if value > last {
            self.above += 1;
        } else {
            let bin =
                self.edges.partition_point(|e| *e <= value).saturating_sub(1).min(self.counts.len() - 1);
            self.counts[bin] += 1;
        }
    }

    /// Takes in every element of a tensor.
    pub fn update_tensor(&mut self, values: &Tensor) -> Result<()> {
        elements::<f64>(values)?.into_iter().for_each(|x| self.update(x));
        Ok(())
    }

    /// The edges.
    pub fn edges(&self) -> &[f64] {
        &self.edges
    }

    /// The count of each bin.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// How many values lie below the first edge.
    pub fn below(&self) -> u64 {
        self.below
    }

    /// How many values lie above the last edge.
    pub fn above(&self) -> u64 {
        self.above
    }

    /// How many values were NaN.
    pub fn nan(&self) -> u64 {
        self.nan
    }
}

impl Metric for Histogram {
    fn merge(&mut self, other: &Self) -> Result<()> {
        if self.edges != other.edges {
            return Err(Error::invalid("other", "the two histograms have different edges"));
        }
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        self.below += other.below;
        self.above += other.above;
        self.nan += other.nan;
        Ok(())
    }
}

/// Exact quantiles: keeps every value (8 bytes each), so that any quantile can be asked for at the end.
/// For more values than memory holds, use a [`Histogram`].
///
/// ```
/// use tch_distributed::metrics::Quantile;
/// let mut times = Quantile::new();
/// (1..=5).for_each(|ms| times.update(f64::from(ms)));
/// assert_eq!(times.value(0.5)?, Some(3.0));
/// assert_eq!(times.value(0.9)?, Some(4.6));
/// # Ok::<(), tch_distributed::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantile {
    values: Vec<f64>,
}

impl Quantile {
    /// No values yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in a value.
    pub fn update(&mut self, value: f64) {
        self.values.push(value);
    }

    /// Takes in every element of a tensor.
    pub fn update_tensor(&mut self, values: &Tensor) -> Result<()> {
        self.values.extend(elements::<f64>(values)?);
        Ok(())
    }

    /// How many values there are.
    pub fn count(&self) -> usize {
        self.values.len()
    }

    /// The q-quantile, `q` from 0 to 1, between neighbours by linear interpolation (as `torch.quantile`);
    /// NaN where a value is NaN, `None` where there is none.
    pub fn value(&self, q: f64) -> Result<Option<f64>> {
        if !(0.0..=1.0).contains(&q) {
            return Err(Error::invalid("q", format!("{q} is not between 0 and 1")));
        }
        if self.values.iter().any(|x| x.is_nan()) {
            return Ok(Some(f64::NAN));
        }
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return Ok(None) };
        let position = q * last as f64;
        let below = position.floor() as usize;
        let (a, b) = (sorted[below], sorted[(below + 1).min(last)]);
        let share = position - below as f64;
        Ok(Some(if share == 0.0 { a } else { a + (b - a) * share }))
    }
}

impl Metric for Quantile {
    fn merge(&mut self, other: &Self) -> Result<()> {
        self.values.extend_from_slice(&other.values);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_that_do_not_grow_are_refused() {
        for edges in [vec![], vec![1.0], vec![1.0, 1.0], vec![0.0, f64::NAN], vec![0.0, f64::INFINITY]] {
            assert!(matches!(Histogram::new(edges), Err(Error::InvalidArgument { argument: "edges", .. })));
        }
        assert!(matches!(
            Histogram::uniform(0.0, 1.0, 0),
            Err(Error::InvalidArgument { argument: "bins", .. })
        ));
    }

    #[test]
    fn a_histogram_of_two_halves_is_that_of_the_whole() {
        let values: Vec<f64> = (0..100).map(|i| f64::from(i) / 10.0 - 2.0).collect();
        let make = |v: &[f64]| {
            let mut h = Histogram::uniform(0.0, 6.0, 7).unwrap();
            v.iter().for_each(|&x| h.update(x));
            h
        };
        let mut left = make(&values[..37]);
        left.merge(&make(&values[37..])).unwrap();
        assert_eq!(left, make(&values));
        assert_eq!(left.counts().iter().sum::<u64>() + left.below() + left.above(), 100);
    }

    #[test]
    fn quantiles_of_infinities_and_of_one_value_are_themselves() {
        let mut q = Quantile::new();
        assert_eq!(q.value(0.5).unwrap(), None);
        q.update(f64::INFINITY);
        assert_eq!(q.value(1.0).unwrap(), Some(f64::INFINITY));
        assert!(q.value(1.5).is_err());
        q.update(f64::NAN);
        assert!(q.value(0.0).unwrap().unwrap().is_nan());
    }
}
