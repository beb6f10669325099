//! Cases by name. Each is a sentence, and a body that every rank runs.

mod arguments;
mod asynchronous;
mod failures;
mod groups;
mod messages;
mod objects;
mod tensors;
mod values;

use tch_distributed::ProcessGroup;

/// What must hold on every backend.
pub struct NamedCase {
    pub name: &'static str,
    /// The smallest world in which it says something.
    pub ranks: usize,
    /// Whether it is about what happens when ranks disagree or do not come.
    pub failure: bool,
    pub body: fn(&ProcessGroup),
}

/// `name (ranks): body` for each function.
macro_rules! list {
    ($($ranks:literal $name:ident;)*) => {
        pub(super) const CASES: &[super::NamedCase] =
            &[$(super::NamedCase { name:
                name: stringify!($name),
                ranks: $ranks,
                failure: module_path!().len() > 8 && matches!(module_path!().as_bytes().split_last_chunk::<8>(), Some((_, b"failures"))),
                body: $name,
             }),*];
    };
}
use list;

/// All of them.
pub fn all() -> Vec<&'static NamedCase> {
    [
        arguments::CASES,
        asynchronous::CASES,
        failures::CASES,
        groups::CASES,
        messages::CASES,
        objects::CASES,
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
