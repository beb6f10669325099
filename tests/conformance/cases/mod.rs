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
    /// Whether operations come in different orders on different ranks: messages matched by tag or with anybody, groups that
    /// overlap.
    pub free_order: bool,
    pub body: fn(&ProcessGroup),
}

/// The smallest world and the name of each; then of those in which the order is free.
macro_rules! list {
    ($($ranks:literal $name:ident;)* $(free order: $($least:literal $free:ident;)*)?) => {
        pub(super) const CASES: &[super::NamedCase] = &[
            $(super::NamedCase { name: stringify!($name), ranks: $ranks, free_order: false, body: $name },)*
            $($(super::NamedCase { name: stringify!($free), ranks: $least, free_order: true, body: $free },)*)?
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
    // What NCCL does, messages too, it does in the order in which a rank asked for it, and waits there for the others.
    .filter(|case| case.ranks <= size && !(case.free_order && backend == "nccl"))
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
