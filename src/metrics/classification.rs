//! Counts of right and wrong answers.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Metric, elements};
use crate::{Error, Result};

/// The share of right answers.
///
/// ```
/// use tch::Tensor;
/// use tch_distributed::metrics::Accuracy;
/// let mut accuracy = Accuracy::new();
/// let logits = Tensor::from_slice2(&[[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]);
/// accuracy.update(&logits, &Tensor::from_slice(&[1i64, 0, 0]))?;
/// assert_eq!((accuracy.correct(), accuracy.total()), (2, 3));
/// # Ok::<(), tch_distributed::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accuracy {
    correct: u64,
    total: u64,
}

impl Accuracy {
    /// Nothing answered yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in a batch: `predictions` are class numbers `[n]` or scores `[n, classes]`, `targets` class
    /// numbers `[n]`.
    pub fn update(&mut self, predictions: &Tensor, targets: &Tensor) -> Result<()> {
        let (predicted, targets) = classes(predictions, targets)?;
        self.total += targets.len() as u64;
        self.correct += predicted.iter().zip(&targets).filter(|(p, t)| p == t).count() as u64;
        Ok(())
    }

    /// Takes in counts made elsewhere.
    pub fn add(&mut self, correct: u64, total: u64) {
        self.correct += correct;
        self.total += total;
    }

    /// How many answers were right.
    pub fn correct(&self) -> u64 {
        self.correct
    }

    /// How many answers there were.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Right answers over all answers, 0 to 1; `None` before the first.
    pub fn value(&self) -> Option<f64> {
        (self.total > 0).then(|| self.correct as f64 / self.total as f64)
    }
}

impl Metric for Accuracy {
    fn merge(&mut self, other: &Self) -> Result<()> {
        self.add(other.correct, other.total);
        Ok(())
    }
}

/// How often each class was taken for each other.
///
/// ```
/// use tch::Tensor;
/// use tch_distributed::metrics::ConfusionMatrix;
/// let mut matrix = ConfusionMatrix::new(2);
/// matrix.update(&Tensor::from_slice(&[0i64, 1, 1]), &Tensor::from_slice(&[0i64, 0, 1]))?;
/// assert_eq!(matrix.count(0, 1), 1); // one of class 0 was taken for class 1
/// assert_eq!(matrix.recall(0), Some(0.5));
/// assert_eq!(matrix.precision(1), Some(0.5));
/// # Ok::<(), tch_distributed::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfusionMatrix {
    classes: usize,
    counts: Vec<u64>,
}

impl ConfusionMatrix {
    /// An empty matrix of so many classes.
    pub fn new(classes: usize) -> Self {
        Self { classes, counts: vec![0; classes * classes] }
    }

    /// Takes in a batch: `predictions` are class numbers `[n]` or scores `[n, classes]`, `targets` class
    /// numbers `[n]`. `InvalidArgument` for a class out of range; nothing is counted then.
    pub fn update(&mut self, predictions: &Tensor, targets: &Tensor) -> Result<()> {
        let (predicted, targets) = classes(predictions, targets)?;
        let cells = targets
            .iter()
            .zip(&predicted)
            .map(|(&t, &p)| Ok(self.class("targets", t)? * self.classes + self.class("predictions", p)?))
            .collect::<Result<Vec<_>>>()?;
        cells.into_iter().for_each(|cell| self.counts[cell] += 1);
        Ok(())
    }

    fn class(&self, argument: &'static str, class: i64) -> Result<usize> {
        usize::try_from(class).ok().filter(|c| *c < self.classes).ok_or_else(|| {
            Error::invalid(argument, format!("class {class} is not among the {} classes", self.classes))
        })
    }

    /// How many of class `actual` were taken for class `predicted` (0 where out of range).
    pub fn count(&self, actual: usize, predicted: usize) -> u64 {
        if actual < self.classes && predicted < self.classes {
            self.counts[actual * self.classes + predicted]
        } else {
            0
        }
    }

    /// The number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// How many answers there were.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The share of right answers; `None` before the first.
    pub fn accuracy(&self) -> Option<f64> {
        ratio((0..self.classes).map(|c| self.count(c, c)).sum(), self.total())
    }

    /// Of what was taken for this class, the share that was; `None` where nothing was.
    pub fn precision(&self, class: usize) -> Option<f64> {
        ratio(self.count(class, class), (0..self.classes).map(|a| self.count(a, class)).sum())
    }

    /// Of what was of this class, the share that was taken for it; `None` where nothing was.
    pub fn recall(&self, class: usize) -> Option<f64> {
        ratio(self.count(class, class), (0..self.classes).map(|p| self.count(class, p)).sum())
    }
}

impl Metric for ConfusionMatrix {
    fn merge(&mut self, other: &Self) -> Result<()> {
        if self.classes != other.classes {
            let reason = format!("one matrix has {} classes, another {}", self.classes, other.classes);
            return Err(Error::invalid("other", reason));
        }
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        Ok(())
    }
}

fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// Class numbers of predictions (arg max of scores where they are scores) and of targets.
fn classes(predictions: &Tensor, targets: &Tensor) -> Result<(Vec<i64>, Vec<i64>)> {
    let (shape, expected) = (predictions.size(), targets.size());
    let predicted = match shape.len() {
        1 => elements::<i64>(predictions)?,
        2 if shape[1] > 0 || shape[0] == 0 => {
            if shape[0] == 0 {
                Vec::new()
            } else {
                elements::<i64>(&predictions.f_argmax(1, false)?)?
            }
        }
        _ => {
            return Err(Error::ShapeMismatch {
                argument: "predictions",
                expected: format!("[n] or [n, classes] for targets {expected:?}"),
                got: format!("{shape:?}"),
            });
        }
    };
    if expected.len() != 1 || predicted.len() != expected[0] as usize {
        return Err(Error::ShapeMismatch {
            argument: "targets",
            expected: format!("[{}]", predicted.len()),
            got: format!("{expected:?}"),
        });
    }
    Ok((predicted, elements::<i64>(targets)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_out_of_range_is_refused_and_counts_nothing() {
        let mut matrix = ConfusionMatrix::new(2);
        let error =
            matrix.update(&Tensor::from_slice(&[0i64, 2]), &Tensor::from_slice(&[0i64, 1])).unwrap_err();
        assert!(error.to_string().contains("class 2"), "{error}");
        assert_eq!(matrix.total(), 0);
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let error = Accuracy::new().update(&Tensor::from_slice(&[0i64; 3]), &Tensor::from_slice(&[0i64; 2]));
        assert!(matches!(error, Err(Error::ShapeMismatch { argument: "targets", .. })));
    }

    #[test]
    fn an_empty_batch_is_a_batch() {
        let mut accuracy = Accuracy::new();
        let none = Tensor::from_slice(&[0i64; 0]);
        accuracy.update(&Tensor::zeros([0, 4], (tch::Kind::Float, tch::Device::Cpu)), &none).unwrap();
        assert_eq!(accuracy.value(), None);
    }

    #[test]
    fn matrices_merge_cell_by_cell() {
        let (mut a, mut b) = (ConfusionMatrix::new(3), ConfusionMatrix::new(3));
        a.update(&Tensor::from_slice(&[0i64, 1]), &Tensor::from_slice(&[0i64, 2])).unwrap();
        b.update(&Tensor::from_slice(&[1i64]), &Tensor::from_slice(&[2i64])).unwrap();
        a.merge(&b).unwrap();
        assert_eq!((a.count(0, 0), a.count(2, 1), a.total()), (1, 2, 3));
        assert!(a.merge(&ConfusionMatrix::new(2)).is_err());
    }
}
