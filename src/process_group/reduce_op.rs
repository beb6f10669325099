//! How operands are combined.

use std::fmt;

/// How the ranks' operands are combined, element by element.
///
/// | op | integers | floats | bool | complex |
/// |---|---|---|---|---|
/// | `Sum`, `Product` | wrapping | yes | or, and | yes |
/// | `Avg` | sum, then division toward zero | yes | no | yes |
/// | `Min`, `Max` | yes | NaN propagates | and, or | no |
/// | `BitAnd`, `BitOr`, `BitXor` | yes | no | yes | no |
/// | `PremulSum(f)` | no | each operand times `f`, then the sum | no | yes |
///
/// Half and BFloat16 are accumulated in f32 and rounded once. What means nothing is
/// [`Unsupported`](crate::Error::Unsupported).
///
/// ```
/// use tch_distributed::ReduceOp;
/// assert_eq!(ReduceOp::default(), ReduceOp::Sum);
/// assert_eq!(ReduceOp::PremulSum(0.5).to_string(), "PremulSum(0.5)");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum ReduceOp {
    /// The sum.
    #[default]
    Sum,
    /// The sum divided by the number of ranks.
    Avg,
    /// The product.
    Product,
    /// The smallest.
    Min,
    /// The largest.
    Max,
    /// Bitwise and.
    BitAnd,
    /// Bitwise or.
    BitOr,
    /// Bitwise exclusive or.
    BitXor,
    /// Each rank's operand times this factor, then the sum (each rank may give its own).
    PremulSum(f64),
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
