//! Parameters that got no gradient: how all ranks learn of it in the same step.
//!
//! Every rank sends every bucket in every step, with zeros where it has no gradient, so that no rank
//! waits for one that has nothing to say. In the last bucket ride the *flags*, averaged with the
//! gradients: one number that says whether something is missing on this rank, or, where unused parameters
//! are allowed, one number a parameter that says whether it was used here. A rank sends the last bucket
//! at the end of its backward; so it knows what to say. A step in
//! which nothing is missing pays one element; only when something is do the ranks exchange names.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::process_group::ProcessGroup;
use crate::{Error, Result};

/// What a rank says about its step, or what all of them have said.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Flags {
    /// Whether something is wrong: a parameter has no gradient that needs one, or backward failed.
    pub(super) trouble: bool,
    /// Which parameters were used; empty when that is not asked for.
    pub(super) used: Vec<bool>,
}

impl Flags {
    /// The numbers to be averaged, of the kind of the gradients they travel with. The trouble is not the
    /// absence of a mark but a mark, so that an average of any number of ranks shows it in any kind.
    pub(super) fn to_tensor(&self, kind: Kind, device: Device) -> Result<Tensor> {
        if self.used.is_empty() {
            // No copy from the host, which would wait for the device.
            return Ok(Tensor::f_full([1], f64::from(u8::from(self.trouble)), (kind, device))?);
        }
        let numbers: Vec<f32> = std::iter::once(self.trouble)
            .chain(self.used.iter().copied())
            .map(|flag| f32::from(u8::from(flag)))
            .collect();
        Ok(Tensor::from_slice(&numbers).f_to_device(device)?.f_to_kind(kind)?)
    }

    /// What the ranks have said together.
    pub(super) fn from_tensor(average: &Tensor) -> Result<Self> {
        let complex = matches!(average.kind(), Kind::ComplexHalf | Kind::ComplexFloat | Kind::ComplexDouble);
        let real = if complex { average.f_real()? } else { average.shallow_clone() };
        let numbers = Vec::<f64>::try_from(real.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)?;
        // A number that is not one is trouble too.
        let mut flags = numbers.iter().map(|&n| n != 0.0);
        Ok(Self { trouble: flags.next().unwrap_or(false), used: flags.collect() })
    }
}

/// What a rank has to tell when there is trouble.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Report {
    /// The names of the parameters without a gradient.
    pub(super) missing: Vec<String>,
    /// Why backward failed, where it did.
    pub(super) failure: Option<String>,
}

/// The error of a step with trouble: every rank calls this in that step and gets the same.
pub(super) fn explain(report: &Report, group: &ProcessGroup) -> Result<Error> {
    let reports = group.all_gather_object(report)?;
    for (rank, report) in reports.iter().enumerate() {
        if let Some(failure) = &report.failure {
            return Ok(Error::Callback { reason: format!("backward failed on rank {rank}: {failure}") });
        }
    }
    let missing = reports
        .into_iter()
        .enumerate()
        .filter(|(_, report)| !report.missing.is_empty())
        .map(|(rank, report)| (rank, report.missing))
        .collect();
    Ok(Error::UnusedParameters { missing })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_of_many_with_trouble_shows_in_the_average_in_every_kind() {
        for kind in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double, Kind::ComplexFloat] {
            let says =
                |trouble| Flags { trouble, used: vec![false, trouble] }.to_tensor(kind, Device::Cpu).unwrap();
            let average = (0..4000).fold(says(true), |sum, _| sum + says(false)) / 4001.0;
            assert_eq!(
                Flags::from_tensor(&average).unwrap(),
                Flags { trouble: true, used: vec![false, true] },
                "{kind:?}"
            );
            let quiet = Flags::from_tensor(&(says(false) / 2.0)).unwrap();
            assert_eq!(quiet, Flags { trouble: false, used: vec![false, false] });
        }
    }
}
