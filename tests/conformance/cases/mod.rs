//! Cases by name. Each is a sentence, and a body that every rank runs.

mod arguments;
mod asynchronous;
mod failures;
mod groups;
mod messages;
mod objects;
mod ported;
mod tensors;
mod values;

use tch_distributed::ProcessGroup;

/// What must hold on every backend.
pub struct NamedCase {
    pub name: &'static str,
    /// The smallest world in which it says something.
    pub ranks: usize,
    pub body: fn(&ProcessGroup),
}

/// `name (ranks): body` for each function.
macro_rules! list {
    ($($ranks:literal $name:ident;)*) => {
        pub(super) const CASES: &[super::NamedCase] =
            &[$(super::NamedCase { name: stringify!($name), ranks: $ranks, body: $name }),*];
    };
}
use list;

/// All of them; those about failures only if asked for.
pub fn all(failures: bool) -> Vec<&'static NamedCase> {
    let about_failures = if failures { failures::CASES } else { &[] };
    [
        arguments::CASES,
        asynchronous::CASES,
        about_failures,
        groups::CASES,
        messages::CASES,
        objects::CASES,
        ported::CASES,
        tensors::CASES,
        values::CASES,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A tensor of whole numbers.
pub fn numbers(values: &[i64]) -> tch::Tensor {
    tch::Tensor::from_slice(values)
}

/// Its elements again.
pub fn read(tensor: &tch::Tensor) -> Vec<i64> {
    Vec::try_from(tensor.contiguous().to_kind(tch::Kind::Int64).view([-1])).expect("whole numbers")
}

/// Room for n whole numbers.
pub fn room(n: i64) -> tch::Tensor {
    tch::Tensor::zeros([n], (tch::Kind::Int64, tch::Device::Cpu))
}
