//! What each operation means, as plainly as it can be said: the tests' only notion of right.

use tch::{Kind, Tensor};
use tch_distributed::ReduceOp;

/// The kinds that operations are tested on.
pub const KINDS: [Kind; 12] = [
    Kind::Uint8,
    Kind::Int8,
    Kind::Int16,
    Kind::Int,
    Kind::Int64,
    Kind::Half,
    Kind::BFloat16,
    Kind::Float,
    Kind::Double,
    Kind::Bool,
    Kind::ComplexFloat,
    Kind::ComplexDouble,
];

/// All ways to combine.
pub const OPS: [ReduceOp; 9] = [
    ReduceOp::Sum,
    ReduceOp::Avg,
    ReduceOp::Product,
    ReduceOp::Min,
    ReduceOp::Max,
    ReduceOp::BitAnd,
    ReduceOp::BitOr,
    ReduceOp::BitXor,
    ReduceOp::PremulSum(0.5),
];

pub fn is_complex(kind: Kind) -> bool {
    matches!(kind, Kind::ComplexFloat | Kind::ComplexDouble)
}

pub fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
}

/// Whether an operation means something for a kind.
pub fn means_something(op: ReduceOp, kind: Kind) -> bool {
    let bool = kind == Kind::Bool;
    match op {
        ReduceOp::Avg => !bool,
        ReduceOp::Min | ReduceOp::Max => !is_complex(kind),
        ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor => !is_float(kind) && !is_complex(kind),
        ReduceOp::PremulSum(_) => is_float(kind) || is_complex(kind),
        _ => true,
    }
}

/// The widest kind of the same sort: what is exact there is rounded once on the way back.
fn wide(kind: Kind) -> Kind {
    if is_complex(kind) {
        Kind::ComplexDouble
    } else if is_float(kind) {
        Kind::Double
    } else {
        Kind::Int64
    }
}

/// The ranks' tensors combined.
pub fn reduce(op: ReduceOp, tensors: &[Tensor]) -> Tensor {
    let kind = tensors[0].kind();
    let mut wide = tensors.iter().map(|t| t.to_kind(wide(kind)));
    let first = wide.next().expect("a group has a rank");
    let combined = match op {
        ReduceOp::Sum | ReduceOp::Avg => wide.fold(first, |a, b| a + b),
        ReduceOp::Product => wide.fold(first, |a, b| a * b),
        ReduceOp::Min => wide.fold(first, |a, b| a.minimum(&b)),
        ReduceOp::Max => wide.fold(first, |a, b| a.maximum(&b)),
        ReduceOp::BitAnd => wide.fold(first, |a, b| a.bitwise_and_tensor(&b)),
        ReduceOp::BitOr => wide.fold(first, |a, b| a.bitwise_or_tensor(&b)),
        ReduceOp::BitXor => wide.fold(first, |a, b| a.bitwise_xor_tensor(&b)),
        ReduceOp::PremulSum(factor) => wide.fold(first * factor, |a, b| a + b * factor),
        other => panic!("the model does not know {other}"),
    };
    let combined = match op {
        ReduceOp::Avg if is_float(kind) || is_complex(kind) => combined / tensors.len() as f64,
        // The sum wraps first, as every sum of integers does.
        ReduceOp::Avg => {
            combined.to_kind(kind).to_kind(Kind::Int64).divide_scalar_mode(tensors.len() as i64, "trunc")
        }
        _ => combined,
    };
    if kind == Kind::Bool { combined.ne(0) } else { combined.to_kind(kind) }
}

/// Small whole numbers, different for every rank and element: exact in every kind, so that results do
/// not depend on the order of additions.
pub fn values(shape: &[i64], kind: Kind, seed: i64) -> Tensor {
    let n: i64 = shape.iter().product();
    let counter = Tensor::arange(n, (Kind::Int64, tch::Device::Cpu));
    let mixed = (counter * 7 + seed * 13 + 3) * 31;
    let numbers = match kind {
        Kind::Bool => mixed.remainder(3).ne(0).to_kind(Kind::Int64),
        Kind::Uint8 => mixed.remainder(5),
        _ => mixed.remainder(5) - 2,
    };
    let numbers = if is_complex(kind) {
        let imaginary = (&numbers + seed).remainder(3) - 1;
        Tensor::complex(&numbers.to_kind(Kind::Double), &imaginary.to_kind(Kind::Double))
    } else {
        numbers
    };
    numbers.to_kind(kind).view(shape)
}

/// Whether two tensors are the same: shape, kind and every element (NaN equals NaN).
pub fn same(a: &Tensor, b: &Tensor) -> bool {
    if a.size() != b.size() || a.kind() != b.kind() {
        return false;
    }
    let (a, b) = if is_complex(a.kind()) {
        let real = |t: &Tensor| t.to_kind(Kind::ComplexDouble).view_as_real();
        (real(a), real(b))
    } else {
        (a.to_kind(wide(a.kind())), b.to_kind(wide(b.kind())))
    };
    if a.kind() != Kind::Double {
        return a.equal(&b);
    }
    let both_nan = a.isnan().logical_and(&b.isnan());
    bool::try_from(a.eq_tensor(&b).logical_or(&both_nan).all()).expect("a bool")
}
