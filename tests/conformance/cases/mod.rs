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
    /// Whether its messages are matched by source and tag, or with anybody, outside the order of other operations.
    pub free_messages: bool,
    pub body: fn(&ProcessGroup),
}

/// The smallest world and the name of each; then of those with free messages.
macro_rules! list {
    ($($ranks:literal $name:ident;)* $(free messages: $($least:literal $free:ident;)*)?) => {
        pub(super) const CASES: &[super::NamedCase] = &[
            $(super::NamedCase { name: stringify!($name), ranks: $ranks, free_messages: false, body: $name },)*
            $($(super::NamedCase { name: stringify!($free), ranks: $least, free_messages: true, body: $free },)*)?
        ];
    };
}
use list;

/// Those for a backend and a world of this size; those about failures only if asked for.
pub fn of(backend: &str, size: usize, failures: bool) -> Vec<&'static NamedCase> {
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
    // NCCL matches messages by their order, which is one with that of collectives.
    .filter(|case| case.ranks <= size && !(case.free_messages && backend == "nccl"))
    .collect()
}

/// Whether libtorch's engine does what this suite sees, and how it rounds and orders is its own affair.
pub fn is_libtorchs(group: &ProcessGroup) -> bool {
    ["gloo", "nccl"].contains(&group.backend_name().as_str())
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
