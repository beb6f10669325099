//! Latency and bandwidth from measurements.

use serde::{Deserialize, Serialize};

use super::collective::Terms;
use crate::{Error, Result};

/// What connects two ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// Seconds before the first byte of a message arrives.
    pub latency: f64,
    /// Bytes a second.
    pub bandwidth: f64,
    /// Bytes a second combined with what is there (read, added, written).
    pub combine: f64,
}

impl Link {
    pub(crate) fn time(&self, terms: Terms) -> f64 {
        terms.messages * self.latency + terms.bytes / self.bandwidth + terms.combined / self.combine
    }
}

/// Finds `x >= 0` so that the sum of `((row · x − time) / time)²` is least: small times count as much as
/// large ones. Coordinate descent on the normal equations, which converges for such small systems.
pub(crate) fn least_relative_squares<const N: usize>(rows: &[([f64; N], f64)]) -> Result<[f64; N]> {
    if rows.len() < N || rows.iter().any(|(_, t)| !(t.is_finite() && *t > 0.0)) {
        return Err(Error::invalid(
            "samples",
            format!("{} samples with positive times do not fit {N} unknowns", rows.len()),
        ));
    }
    // Columns are scaled to a like size first: latencies and seconds a byte are nine orders apart.
    let mut scale = [0.0; N];
    for (row, time) in rows {
        for i in 0..N {
            scale[i] += (row[i] / time).powi(2);
        }
    }
    let scale = scale.map(f64::sqrt);
    let (mut gram, mut right) = ([[0.0; N]; N], [0.0; N]);
    for (row, time) in rows {
        let v: [f64; N] =
            std::array::from_fn(|i| if scale[i] > 0.0 { row[i] / time / scale[i] } else { 0.0 });
        for i in 0..N {
            right[i] += v[i];
            for j in 0..N {
                gram[i][j] += v[i] * v[j];
            }
        }
    }
    let mut x = [0.0; N];
    for _ in 0..20_000 {
        let mut moved = 0.0f64;
        for i in 0..N {
            if gram[i][i] > 0.0 {
                let rest: f64 = (0..N).filter(|j| *j != i).map(|j| gram[i][j] * x[j]).sum();
                let new = ((right[i] - rest) / gram[i][i]).max(0.0);
                moved = moved.max((new - x[i]).abs());
                x[i] = new;
            }
        }
        if moved < 1e-14 {
            break;
        }
    }
    Ok(std::array::from_fn(|i| if scale[i] > 0.0 { x[i] / scale[i] } else { 0.0 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_law_is_found_again() {
        let rows: Vec<_> = [1.0, 1e3, 1e5, 1e7].map(|b| ([1.0, b], 5e-6 + b * 2e-10)).to_vec();
        let [latency, per_byte] = least_relative_squares(&rows).unwrap();
        assert!((latency / 5e-6 - 1.0).abs() < 1e-6, "{latency}");
        assert!((per_byte / 2e-10 - 1.0).abs() < 1e-6, "{per_byte}");
    }

    #[test]
    fn what_would_be_negative_is_nought() {
        let rows = [([1.0, 1.0], 1.0), ([1.0, 10.0], 9.0), ([1.0, 100.0], 100.0)];
        let x = least_relative_squares(&rows).unwrap();
        assert!(x.iter().all(|v| *v >= 0.0), "{x:?}");
    }

    #[test]
    fn too_few_samples_are_refused() {
        assert!(least_relative_squares(&[([1.0, 2.0], 1.0)]).is_err());
        assert!(least_relative_squares(&[([1.0], 0.0)]).is_err());
    }
}
