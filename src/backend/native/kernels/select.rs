//! Which loop an op and a kind need, compiled for this processor.

use tch::Kind;

use super::Operand;
use super::element::{
    And, Avg, AvgPow2, Combine, Complex, Element, Max, Min, Or, Premul, Product, Sum, Xor, fold,
};
#[cfg(target_arch = "x86_64")]
use super::halves::F16c;
use super::halves::{As, Bf16, F16};
use crate::ReduceOp;

/// Combines operands: destination, operands, number of units, ranks.
pub(super) type Kernel = unsafe fn(*mut u8, &[Operand], usize, f64);

/// A loop and how many of its units make an element (a complex number is two floats).
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub(super) kernel: Kernel,
    pub(super) units: usize,
}

/// The instructions a loop is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    /// What the target always has; on aarch64 that is NEON.
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The best of this machine. The detection macros keep what they found, so this is cheap.
    pub(super) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
                return Self::Avx2;
            }
        }
        Self::Plain
    }
}

/// The loop for an op and a kind; `None` where that means nothing.
pub(super) fn choose(op: ReduceOp, kind: Kind, ranks: usize, isa: Isa) -> Option<Choice> {
    use Kind::{
        BFloat16, Bool, ComplexDouble, ComplexFloat, Double, Float, Half, Int, Int8, Int16, Int64, Uint8,
    };
    let pow2 = ranks.is_power_of_two();
    let one = |kernel| Some(Choice { kernel, units: 1 });
    let many = |units, kernel| Some(Choice { kernel, units });
    match (op, kind) {
        (ReduceOp::Sum | ReduceOp::Max, Bool) | (ReduceOp::BitOr, Bool) => one(pick::<u8, Or>(isa)),
        (ReduceOp::Product | ReduceOp::Min, Bool) | (ReduceOp::BitAnd, Bool) => one(pick::<u8, And>(isa)),
        (ReduceOp::BitXor, Bool) => one(pick::<u8, Xor>(isa)),
        (ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor, Uint8 | Int8 | Int16 | Int | Int64) => {
            let kernel = match op {
                ReduceOp::BitAnd => pick::<u8, And>(isa),
                ReduceOp::BitOr => pick::<u8, Or>(isa),
                _ => pick::<u8, Xor>(isa),
            };
            many(kind.elt_size_in_bytes(), kernel)
        }
        // Wrapping sums and products do not know signs.
        (ReduceOp::Sum, Uint8 | Int8) => one(pick::<u8, Sum>(isa)),
        (ReduceOp::Sum, Int16) => one(pick::<u16, Sum>(isa)),
        (ReduceOp::Sum, Int) => one(pick::<u32, Sum>(isa)),
        (ReduceOp::Sum, Int64) => one(pick::<u64, Sum>(isa)),
        (ReduceOp::Sum, Float) => one(pick::<f32, Sum>(isa)),
        (ReduceOp::Sum, ComplexFloat) => many(2, pick::<f32, Sum>(isa)),
        (ReduceOp::Sum, Double) => one(pick::<f64, Sum>(isa)),
        (ReduceOp::Sum, ComplexDouble) => many(2, pick::<f64, Sum>(isa)),
        (ReduceOp::Product, Uint8 | Int8) => one(pick::<u8, Product>(isa)),
        (ReduceOp::Product, Int16) => one(pick::<u16, Product>(isa)),
        (ReduceOp::Product, Int) => one(pick::<u32, Product>(isa)),
        (ReduceOp::Product, Int64) => one(pick::<u64, Product>(isa)),
        (ReduceOp::Product, Float) => one(pick::<f32, Product>(isa)),
        (ReduceOp::Product, ComplexFloat) => one(pick::<Complex<f32>, Product>(isa)),
        (ReduceOp::Product, Double) => one(pick::<f64, Product>(isa)),
        (ReduceOp::Product, ComplexDouble) => one(pick::<Complex<f64>, Product>(isa)),
        (ReduceOp::Avg, Uint8) => one(pick::<u8, Avg>(isa)),
        (ReduceOp::Avg, Int8) => one(pick::<i8, Avg>(isa)),
        (ReduceOp::Avg, Int16) => one(pick::<i16, Avg>(isa)),
        (ReduceOp::Avg, Int) => one(pick::<i32, Avg>(isa)),
        (ReduceOp::Avg, Int64) => one(pick::<i64, Avg>(isa)),
        (ReduceOp::Avg, Float | ComplexFloat) => {
            let kernel = if pow2 { pick::<f32, AvgPow2>(isa) } else { pick::<f32, Avg>(isa) };
            many(if kind == ComplexFloat { 2 } else { 1 }, kernel)
        }
        (ReduceOp::Avg, Double | ComplexDouble) => {
            let kernel = if pow2 { pick::<f64, AvgPow2>(isa) } else { pick::<f64, Avg>(isa) };
            many(if kind == ComplexDouble { 2 } else { 1 }, kernel)
        }
        (ReduceOp::Min, Uint8) => one(pick::<u8, Min>(isa)),
        (ReduceOp::Min, Int8) => one(pick::<i8, Min>(isa)),
        (ReduceOp::Min, Int16) => one(pick::<i16, Min>(isa)),
        (ReduceOp::Min, Int) => one(pick::<i32, Min>(isa)),
        (ReduceOp::Min, Int64) => one(pick::<i64, Min>(isa)),
        (ReduceOp::Min, Float) => one(pick::<f32, Min>(isa)),
        (ReduceOp::Min, Double) => one(pick::<f64, Min>(isa)),
        (ReduceOp::Max, Uint8) => one(pick::<u8, Max>(isa)),
        (ReduceOp::Max, Int8) => one(pick::<i8, Max>(isa)),
        (ReduceOp::Max, Int16) => one(pick::<i16, Max>(isa)),
        (ReduceOp::Max, Int) => one(pick::<i32, Max>(isa)),
        (ReduceOp::Max, Int64) => one(pick::<i64, Max>(isa)),
        (ReduceOp::Max, Float) => one(pick::<f32, Max>(isa)),
        (ReduceOp::Max, Double) => one(pick::<f64, Max>(isa)),
        (ReduceOp::PremulSum(_), Float) => one(pick::<f32, Premul>(isa)),
        (ReduceOp::PremulSum(_), ComplexFloat) => many(2, pick::<f32, Premul>(isa)),
        (ReduceOp::PremulSum(_), Double) => one(pick::<f64, Premul>(isa)),
        (ReduceOp::PremulSum(_), ComplexDouble) => many(2, pick::<f64, Premul>(isa)),
        (_, BFloat16) => half::<Bf16>(op, pow2, isa),
        (_, Half) => match isa {
            Isa::Plain => half::<F16>(op, pow2, isa),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => half::<F16c>(op, pow2, isa),
        },
        _ => None,
    }
}

fn half<H: super::halves::Half>(op: ReduceOp, pow2: bool, isa: Isa) -> Option<Choice> {
    let kernel = match op {
        ReduceOp::Sum => pick::<As<H>, Sum>(isa),
        ReduceOp::Product => pick::<As<H>, Product>(isa),
        ReduceOp::Avg if pow2 => pick::<As<H>, AvgPow2>(isa),
        ReduceOp::Avg => pick::<As<H>, Avg>(isa),
        ReduceOp::Min => pick::<As<H>, Min>(isa),
        ReduceOp::Max => pick::<As<H>, Max>(isa),
        ReduceOp::PremulSum(_) => pick::<As<H>, Premul>(isa),
        // Bits of floats.
        _ => return None,
    };
    Some(Choice { kernel, units: 1 })
}

fn pick<E: Element, C: Combine<E>>(isa: Isa) -> Kernel {
    match isa {
        Isa::Plain => plain::<E, C>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::<E, C>,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::<E, C>,
    }
}

/// # Safety
/// As [`fold`].
#[inline(always)]
unsafe fn by_number<E: Element, C: Combine<E>>(dst: *mut u8, src: &[Operand], numel: usize, ranks: f64) {
    // SAFETY: the caller's promise.
    unsafe {
        match src {
            // Two is the usual number: the loop over the others unrolls.
            [first, second] => {
                fold::<E, C>(dst, first, std::slice::from_ref(second), numel, ranks);
            }
            [first, rest @ ..] => fold::<E, C>(dst, first, rest, numel, ranks),
            [] => {}
        }
    }
}

macro_rules! compiled {
    ($($name:ident $(for $arch:literal with $features:literal)?;)*) => {$(
        /// # Safety
        /// As [`fold`], on a processor that has the features.
        $(#[cfg(target_arch = $arch)] #[target_feature(enable = $features)])?
        unsafe fn $name<E: Element, C: Combine<E>>(dst: *mut u8, src: &[Operand], numel: usize, ranks: f64) {
            // SAFETY: the caller's promise.
            unsafe { by_number::<E, C>(dst, src, numel, ranks) }
        }
    )*};
}

compiled! {
    plain;
    avx2 for "x86_64" with "avx2,f16c";
    avx512 for "x86_64" with "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c";
}
