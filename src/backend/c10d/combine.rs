//! How operands are combined: what an engine does itself, and what is done before and after.

use tch::{Kind, Tensor};

use crate::libtorch::C10dReduce;
use crate::{ReduceOp, Result};

/// Which of libtorch's engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flavor {
    Gloo,
    Nccl,
}

impl Flavor {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Gloo => "gloo",
            Self::Nccl => "nccl",
        }
    }
}

/// As c10d numbers them.
const SUM: u8 = 0;
const AVG: u8 = 1;
const PRODUCT: u8 = 2;
const MIN: u8 = 3;
const MAX: u8 = 4;
const BIT_AND: u8 = 5;
const BIT_OR: u8 = 6;
const BIT_XOR: u8 = 7;
const PREMUL_SUM: u8 = 8;

/// One reduction in the engine's terms.
#[derive(Clone, Copy, Debug)]
pub(super) struct Combine {
    /// What the engine does.
    pub(super) how: C10dReduce,
    /// As what the engine sees the elements.
    seen_as: Kind,
    /// Whether it sees a converted copy of them.
    converts: bool,
    /// What operands are multiplied by before.
    scale: Option<f64>,
    /// What is done to the result.
    after: After,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum After {
    Nothing,
    /// Divided by the number of ranks, or by what is left of it.
    Divide(f64),
    /// Any byte but 0 is true.
    Truth,
    /// An odd byte is true.
    Parity,
}

/// How to combine elements of a kind, or what the engine cannot do, in words. `pure`: every rank does as this says.
pub(super) fn combine(
    flavor: Flavor,
    op: ReduceOp,
    kind: Kind,
    size: usize,
    pure: bool,
) -> Result<Combine, String> {
    use Kind::*;
    let cannot = || Err(format!("{op} of {kind:?}"));
    let float = matches!(kind, Float | Double | Half | BFloat16);
    let integer = matches!(kind, Int8 | Uint8 | Int16 | Int | Int64);
    let seen_as = match kind {
        _ if float || integer && kind != Int16 => kind,
        Bool => Uint8,
        ComplexFloat => Float,
        ComplexDouble => Double,
        ComplexHalf => Half,
        // Gloo and NCCL do not know it: it travels as i32. What wraps wraps alike.
        Int16 => Int,
        _ => return cannot(),
    };
    let complex = matches!(kind, ComplexHalf | ComplexFloat | ComplexDouble);
    let (mut scale, mut factor, mut after) = (None, 0.0, After::Nothing);
    if kind == Bool {
        after = After::Truth;
    }
    let op = match op {
        // Truth values are bytes 0 and 1 to the engine: no sum of them must wrap to 0.
        ReduceOp::Sum if kind == Bool => MAX,
        ReduceOp::Product if kind == Bool => MIN,
        ReduceOp::Sum => SUM,
        ReduceOp::Avg if kind == Bool => return cannot(),
        ReduceOp::Avg if flavor == Flavor::Nccl && float => AVG,
        ReduceOp::Avg => {
            let mut divisor = size as f64;
            if seen_as == Half && pure {
                // The sum of a few gradients is more than a half can hold. A power of two first is exact but for the
                // smallest numbers, and leaves what divides as exactly as the number of ranks would.
                let share = size.next_power_of_two() as f64;
                (scale, divisor) = ((size > 1).then_some(1.0 / share), divisor / share);
            }
            after = After::Divide(divisor);
            SUM
        }
        ReduceOp::Product | ReduceOp::Min | ReduceOp::Max if complex => return cannot(),
        ReduceOp::Product => PRODUCT,
        ReduceOp::Min => MIN,
        ReduceOp::Max => MAX,
        ReduceOp::PremulSum(f) if float || complex => {
            // libtorch up to 2.13 hands NCCL a factor of the wrong width with BFloat16: half of its bits, which for a
            // power of two are all 0 (https://github.com/pytorch/pytorch/issues/190745). A reduce-scatter of one rank it
            // makes a copy, without the factor.
            if flavor == Flavor::Nccl && float && kind != BFloat16 && size > 1 {
                factor = f;
                PREMUL_SUM
            } else {
                scale = Some(f);
                SUM
            }
        }
        ReduceOp::BitOr if kind == Bool => MAX,
        ReduceOp::BitAnd if kind == Bool => MIN,
        // How many are true, but for 256 of them; of bytes that wrap too, the lowest bit says whether it is odd.
        ReduceOp::BitXor if kind == Bool && flavor == Flavor::Nccl => {
            after = After::Parity;
            SUM
        }
        ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor if flavor == Flavor::Nccl => return cannot(),
        ReduceOp::BitAnd if integer => BIT_AND,
        ReduceOp::BitOr if integer => BIT_OR,
        ReduceOp::BitXor if integer || kind == Bool => BIT_XOR,
        _ => return cannot(),
    };
    let how = C10dReduce { op, factor };
    Ok(Combine { how, seen_as, converts: kind == Int16, scale, after })
}

impl Combine {
    /// The elements as the engine shall see them: the memory itself, but where it must be converted.
    pub(super) fn view(&self, flat: &Tensor) -> Result<Tensor> {
        if flat.f_kind()? == self.seen_as {
            return Ok(flat.shallow_clone());
        }
        if self.converts || flat.numel() == 0 {
            return Ok(flat.f_to_kind(self.seen_as)?);
        }
        Ok(flat.f_view_dtype(self.seen_as)?)
    }

    /// Whether operands change before they are combined.
    pub(super) fn prepares(&self) -> bool {
        self.scale.is_some()
    }

    /// Whether there is nothing to do before or after.
    pub(super) fn is_all(&self) -> bool {
        !self.converts && self.scale.is_none() && self.after == After::Nothing
    }

    /// Prepares operands, in place.
    pub(super) fn prepare(&self, view: &mut Tensor) -> Result<()> {
        if let Some(scale) = self.scale {
            let _ = view.f_mul_(&scalar(scale, view)?)?;
        }
        Ok(())
    }

    /// Finishes the result: `view` is what [`view`](Self::view) made of `flat`.
    pub(super) fn finish(&self, view: &mut Tensor, flat: &mut Tensor) -> Result<()> {
        let result = if self.converts {
            flat.f_copy_(view)?;
            flat
        } else {
            view
        };
        match self.after {
            After::Nothing => {}
            After::Divide(by) => {
                let by = scalar(by, result)?;
                let _ = match result.f_kind()? {
                    Kind::Int8 | Kind::Uint8 | Kind::Int16 | Kind::Int | Kind::Int64 => {
                        result.f_div_tensor_mode_(&by, "trunc")?
                    }
                    _ => result.f_div_(&by)?,
                };
            }
            After::Parity => {
                let _ = result.f_bitwise_and_(1)?;
            }
            After::Truth => {
                let truth = result.f_to_kind(Kind::Bool)?;
                result.f_copy_(&truth)?;
            }
        }
        Ok(())
    }
}

/// A number as a tensor of no dimensions, of the kind of another one. It stays on the CPU, as such tensors may: a copy
/// to the device would wait for what the device was given before.
fn scalar(value: f64, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_from_slice(&[value])?.f_to_kind(like.f_kind()?)?.f_view([] as [i64; 0])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nccl_multiplies_itself_where_libtorch_hands_it_the_factor_whole() {
        for kind in [Kind::Half, Kind::Float, Kind::Double] {
            let combine = combine(Flavor::Nccl, ReduceOp::PremulSum(0.5), kind, 2, true).unwrap();
            assert_eq!(
                (combine.how.op, combine.how.factor, combine.scale),
                (PREMUL_SUM, 0.5, None),
                "{kind:?}"
            );
        }
        for (kind, size) in [(Kind::BFloat16, 2), (Kind::Float, 1)] {
            let combine = combine(Flavor::Nccl, ReduceOp::PremulSum(0.5), kind, size, true).unwrap();
            assert_eq!((combine.how.op, combine.scale), (SUM, Some(0.5)), "{kind:?} of {size}");
        }
    }
}
