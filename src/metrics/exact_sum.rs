//! Sums and means of floats that do not depend on the order of their terms.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Metric, elements};
use crate::Result;

/// A sum of f64 values without rounding: the result is the true sum, rounded once, so it is the same
/// however the values were ordered or split among ranks.
///
/// Kept as non-overlapping partial sums (J. R. Shewchuk, "Adaptive Precision Floating-Point Arithmetic",
/// 1997; Python's `math.fsum`). Infinities and NaN are kept beside them.
///
/// ```
/// use tch_distributed::metrics::ExactSum;
/// let mut sum = ExactSum::new();
/// for x in [1e100, 1.0, -1e100] {
///     sum.add(x);
/// }
/// assert_eq!(sum.value(), 1.0);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExactSum {
    /// In growing magnitude, no two overlap.
    partials: Vec<f64>,
    /// The plain sum of what is not finite.
    special: Option<f64>,
}

impl ExactSum {
    /// The empty sum, 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        if !value.is_finite() {
            self.special = Some(self.special.unwrap_or(0.0) + value);
            return;
        }
        let mut x = value;
        let mut kept = 0;
        for i in 0..self.partials.len() {
            let mut y = self.partials[i];
            if x.abs() < y.abs() {
                std::mem::swap(&mut x, &mut y);
            }
            let high = x + y;
            if !high.is_finite() {
                // Beyond the range of f64: from here on it is an infinity, as the plain sum would be.
                self.special = Some(self.special.unwrap_or(0.0) + high);
                self.partials.clear();
                return;
            }
            let low = y - (high - x);
            if low != 0.0 {
                self.partials[kept] = low;
                kept += 1;
            }
            x = high;
        }
        self.partials.truncate(kept);
        self.partials.push(x);
    }

    /// Adds every element of a tensor.
    pub fn add_tensor(&mut self, values: &Tensor) -> Result<()> {
        elements::<f64>(values)?.into_iter().for_each(|x| self.add(x));
        Ok(())
    }

    /// The sum, rounded once (to nearest, ties to even).
    pub fn value(&self) -> f64 {
        if let Some(special) = self.special {
            return special;
        }
        let mut partials = self.partials.iter().rev().copied();
        let Some(mut high) = partials.next() else { return 0.0 };
        let mut low = 0.0;
        for y in partials.by_ref() {
            let x = high;
            high = x + y;
            low = y - (high - x);
            if low != 0.0 {
                break;
            }
        }
        // A tie is broken by what lies below it.
        if let Some(next) = partials.next()
            && ((low < 0.0 && next < 0.0) || (low > 0.0 && next > 0.0))
        {
            let y = low * 2.0;
            let x = high + y;
            if y == x - high {
                high = x;
            }
        }
        high
    }
}

impl Metric for ExactSum {
    fn merge(&mut self, other: &Self) -> Result<()> {
        other.partials.iter().for_each(|&p| self.add(p));
        if let Some(special) = other.special {
            self.add(special);
        }
        Ok(())
    }
}

/// A running mean, weighted where wanted. The weight sum is exact too, so uneven counts are exact.
///
/// ```
/// use tch_distributed::metrics::Mean;
/// let mut loss = Mean::new();
/// loss.update_weighted(2.0, 32.0); // the mean loss of a batch of 32
/// loss.update_weighted(5.0, 16.0);
/// assert_eq!(loss.value(), Some(3.0));
/// assert_eq!(Mean::new().value(), None);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    sum: ExactSum,
    weight: ExactSum,
    count: u64,
}

impl Mean {
    /// The mean of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in a value.
    pub fn update(&mut self, value: f64) {
        self.update_weighted(value, 1.0);
    }

    /// Takes in a value that counts `weight` times: a batch's mean with the batch's size.
    ///
    /// The product is kept exactly (as the rounded product and its error).
    pub fn update_weighted(&mut self, value: f64, weight: f64) {
        let product = value * weight;
        self.sum.add(product);
        let error = value.mul_add(weight, -product);
        if error.is_finite() {
            self.sum.add(error);
        }
        self.weight.add(weight);
        self.count += 1;
    }

    /// Takes in every element of a tensor.
    pub fn update_tensor(&mut self, values: &Tensor) -> Result<()> {
        elements::<f64>(values)?.into_iter().for_each(|x| self.update(x));
        Ok(())
    }

    /// The mean; `None` before the first value or where the weights add to 0.
    pub fn value(&self) -> Option<f64> {
        let weight = self.weight.value();
        (weight != 0.0).then(|| self.sum.value() / weight)
    }

    /// How many updates there were.
    pub fn count(&self) -> u64 {
        self.count
    }
}

impl Metric for Mean {
    fn merge(&mut self, other: &Self) -> Result<()> {
        self.sum.merge(&other.sum)?;
        self.weight.merge(&other.weight)?;
        self.count += other.count;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(values: &[f64]) -> f64 {
        let mut s = ExactSum::new();
        values.iter().for_each(|&x| s.add(x));
        s.value()
    }

    #[test]
    fn the_sum_does_not_depend_on_order_or_split() {
        let values: Vec<f64> =
            (0..1000).map(|i| (f64::from(i) * 0.7).sin() * 10f64.powi(i % 40 - 20)).collect();
        let whole = sum(&values);
        let mut reversed = values.clone();
        reversed.reverse();
        assert_eq!(whole, sum(&reversed));
        for cut in [0, 1, 333, 999, 1000] {
            let (mut a, mut b) = (ExactSum::new(), ExactSum::new());
            values[..cut].iter().for_each(|&x| a.add(x));
            values[cut..].iter().for_each(|&x| b.add(x));
            a.merge(&b).unwrap();
            assert_eq!(whole, a.value(), "cut at {cut}");
        }
    }

    #[test]
    fn it_rounds_once_and_to_even() {
        assert_eq!(sum(&[0.1; 10]), 1.0);
        assert_eq!(sum(&[1.0, 2f64.powi(-53)]), 1.0);
        assert_eq!(sum(&[1.0, 2f64.powi(-53), 2f64.powi(-100)]), 1.0 + f64::EPSILON);
    }

    #[test]
    fn infinities_and_nan_come_through() {
        assert_eq!(sum(&[1.0, f64::INFINITY]), f64::INFINITY);
        assert!(sum(&[f64::INFINITY, f64::NEG_INFINITY]).is_nan());
        assert!(sum(&[f64::NAN, 1.0]).is_nan());
        assert_eq!(sum(&[f64::MAX, f64::MAX]), f64::INFINITY);
        assert_eq!(sum(&[]), 0.0);
    }

    #[test]
    fn a_tensor_of_any_kind_and_shape_is_taken_in() {
        let mut mean = Mean::new();
        mean.update_tensor(&Tensor::from_slice(&[1i64, 2, 3, 4]).view([2, 2]).tr()).unwrap();
        mean.update_tensor(&Tensor::from_slice(&[1.5f32; 0])).unwrap();
        assert_eq!((mean.value(), mean.count()), (Some(2.5), 4));
    }
}
