//! Before anything is exchanged: is it the same model on every rank?

use std::hash::{DefaultHasher, Hash, Hasher};

use serde::{Deserialize, Serialize};
use tch::Device;

use super::DdpOptions;
use super::layout::{Member, Role};
use crate::process_group::ProcessGroup;
use crate::{Error, Result};

/// What a rank says of one tensor of its model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    name: String,
    role: Role,
    shape: Vec<i64>,
    kind: String,
    device: String,
}

/// What a rank says of its model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Manifest {
    entries: Vec<Entry>,
    options: String,
    /// What this rank found wrong by itself, so that all ranks leave together.
    trouble: Option<String>,
    /// The same of its options.
    bad_options: Option<String>,
}

/// The first thing in which a rank's model differs from rank 0's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Difference {
    Model(String),
    Shape { expected: String, got: String },
    Kind { expected: String, got: String },
    Device { expected: String, got: String },
    BadOptions(String),
    Options { expected: String, got: String },
}

/// Compares this rank's model with rank 0's. A rank that differs, or that cannot take part for a reason of
/// its own (`layout` is an error), is an error on every rank, the same one, which names the first
/// difference.
pub(super) fn verify(layout: &Result<Vec<Member>>, options: &DdpOptions, group: &ProcessGroup) -> Result<()> {
    let (members, mut trouble) = match layout {
        Ok(members) => (members.as_slice(), None),
        Err(error) => (&[][..], Some(error.to_string())),
    };
    if trouble.is_none() && !members.iter().any(|member| member.role == Role::Trained) {
        trouble =
            Some("it has no parameter that requires a gradient, so there is nothing to average".to_owned());
    }
    let devices = devices(members.iter().map(|member| member.tensor.device()));
    let entry = |(member, device): (&Member, String)| Entry {
        name: member.name.clone(),
        role: member.role,
        shape: member.tensor.size(),
        kind: format!("{:?}", member.tensor.kind()),
        device,
    };
    let manifest = Manifest {
        entries: members.iter().zip(devices).map(entry).collect(),
        options: format!("{options:?}"),
        trouble,
        bad_options: options.what_is_wrong(),
    };
    let sound = manifest.trouble.is_none() && manifest.bad_options.is_none();
    let mut hasher = DefaultHasher::new();
    format!("{manifest:?}").hash(&mut hasher);
    let seen = group.all_gather_object(&(sound, hasher.finish()))?;
    if sound && seen.iter().all(|theirs| *theirs == seen[0]) {
        return Ok(());
    }
    // Something differs: find out what, all together.
    let own = (group.rank() == 0).then(|| manifest.clone());
    let reference = group.broadcast_object(own, 0)?;
    let differences = group.all_gather_object(&difference(&reference, &manifest, group.rank()))?;
    match differences.into_iter().flatten().next() {
        None => Ok(()),
        Some(Difference::Model(reason)) => Err(Error::invalid("vs", reason)),
        Some(Difference::Shape { expected, got }) => {
            Err(Error::ShapeMismatch { argument: "vs", expected, got })
        }
        Some(Difference::Kind { expected, got }) => {
            Err(Error::KindMismatch { argument: "vs", expected, got })
        }
        Some(Difference::Device { expected, got }) => {
            Err(Error::DeviceMismatch { argument: "vs", expected, got })
        }
        Some(Difference::BadOptions(reason)) => Err(Error::invalid("options", reason)),
        Some(Difference::Options { expected, got }) => Err(Error::invalid(
            "options",
            format!("ranks were given different options: {expected} on rank 0, {got}"),
        )),
    }
}

/// Each tensor's device in words that are the same on every rank: its type, and which of the model's own
/// devices it is, not its number.
fn devices(all: impl Iterator<Item = Device>) -> Vec<String> {
    let mut seen = Vec::new();
    all.map(|device| {
        let number = seen.iter().position(|&known| known == device).unwrap_or_else(|| {
            seen.push(device);
            seen.len() - 1
        });
        let name = match device {
            Device::Cuda(_) => "Cuda".to_owned(),
            other => format!("{other:?}"),
        };
        if number == 0 { name } else { format!("{name} (device {number} of the model, from 0)") }
    })
    .collect()
}

fn difference(reference: &Manifest, mine: &Manifest, rank: usize) -> Option<Difference> {
    if let Some(wrong) = &mine.bad_options {
        return Some(Difference::BadOptions(format!("on rank {rank}: {wrong}")));
    }
    if let Some(trouble) = &mine.trouble {
        return Some(Difference::Model(format!("on rank {rank}: {trouble}")));
    }
    let at_most = reference.entries.len().max(mine.entries.len());
    for index in 0..at_most {
        let (expected, got) = match (reference.entries.get(index), mine.entries.get(index)) {
            (Some(expected), Some(got)) => (expected, got),
            (expected, got) => {
                return Some(Difference::Model(format!(
                    "rank {rank}'s model differs from rank 0's: it has {} tensors, rank 0's has {}; rank 0 has {} \
                     where rank {rank} has {}",
                    mine.entries.len(),
                    reference.entries.len(),
                    expected.map_or("nothing".to_owned(), describe),
                    got.map_or("nothing".to_owned(), describe),
                )));
            }
        };
        if (&expected.name, expected.role) != (&got.name, got.role) {
            return Some(Difference::Model(format!(
                "rank {rank}'s model differs from rank 0's: rank 0 has {} where rank {rank} has {}",
                describe(expected),
                describe(got),
            )));
        }
        if expected.shape != got.shape {
            return Some(Difference::Shape {
                expected: format!("{} {:?} as on rank 0", expected.name, expected.shape),
                got: format!("{:?} on rank {rank}", got.shape),
            });
        }
        if expected.kind != got.kind {
            return Some(Difference::Kind {
                expected: format!("{} of kind {} as on rank 0", expected.name, expected.kind),
                got: format!("{} on rank {rank}", got.kind),
            });
        }
        if expected.device != got.device {
            return Some(Difference::Device {
                expected: format!("{} on {} as on rank 0", expected.name, expected.device),
                got: format!("{} on rank {rank}", got.device),
            });
        }
    }
    (reference.options != mine.options).then(|| Difference::Options {
        expected: reference.options.clone(),
        got: format!("{} on rank {rank}", mine.options),
    })
}

fn describe(entry: &Entry) -> String {
    format!("{} {} {:?} of kind {}", entry.role.name(), entry.name, entry.shape, entry.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(entries: &[(&str, &[i64], &str)]) -> Manifest {
        let entries = entries
            .iter()
            .map(|&(name, shape, kind)| Entry {
                name: name.to_owned(),
                role: Role::Trained,
                shape: shape.to_vec(),
                kind: kind.to_owned(),
                device: "Cpu".to_owned(),
            })
            .collect();
        Manifest { entries, options: String::new(), trouble: None, bad_options: None }
    }

    #[test]
    fn devices_are_compared_by_type_and_place_in_the_model_and_not_by_number() {
        let said = |all: &[Device]| devices(all.iter().copied());
        let (a, b) = (Device::Cuda(0), Device::Cuda(1));
        assert_eq!(said(&[a, a]), said(&[b, b]));
        assert_eq!(said(&[a, b, a]), said(&[b, a, b]));
        assert_ne!(said(&[a, a]), said(&[a, b]));
        assert_ne!(said(&[Device::Cpu]), said(&[a]));
        let reference = manifest(&[("a", &[2], "Float"), ("b", &[2], "Float")]);
        let mut other = reference.clone();
        other.entries[1].device = said(&[a])[0].clone();
        let expected =
            Difference::Device { expected: "b on Cpu as on rank 0".into(), got: "Cuda on rank 1".into() };
        assert_eq!(difference(&reference, &other, 1), Some(expected));
    }

    #[test]
    fn equal_models_do_not_differ() {
        let model = manifest(&[("a", &[2, 3], "Float")]);
        assert_eq!(difference(&model, &model.clone(), 1), None);
    }

    #[test]
    fn the_first_difference_is_named_with_its_ranks() {
        let reference = manifest(&[("a", &[2], "Float"), ("b", &[3], "Float")]);
        let shape = difference(&reference, &manifest(&[("a", &[2], "Float"), ("b", &[4], "Float")]), 2);
        assert_eq!(
            shape,
            Some(Difference::Shape { expected: "b [3] as on rank 0".into(), got: "[4] on rank 2".into() })
        );
        let kind = difference(&reference, &manifest(&[("a", &[2], "Double"), ("b", &[4], "Float")]), 2);
        assert!(matches!(kind, Some(Difference::Kind { expected, .. }) if expected.starts_with("a ")));
        let name = difference(&reference, &manifest(&[("a", &[2], "Float"), ("c", &[3], "Float")]), 3);
        let Some(Difference::Model(reason)) = name else { panic!("{name:?}") };
        assert!(
            reason.contains("parameter b") && reason.contains("parameter c") && reason.contains("rank 3")
        );
        let count = difference(&reference, &manifest(&[("a", &[2], "Float")]), 1);
        let Some(Difference::Model(reason)) = count else { panic!("{count:?}") };
        assert!(reason.contains("has 1 tensors") && reason.contains("parameter b"), "{reason}");
    }
}
