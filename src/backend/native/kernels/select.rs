//! Which loop an op and a kind need, compiled for this processor.

use tch::Kind;

use super::element::{
    And, Avg, AvgPow2, Combine, Complex, Element, Max, Min, Or, Premul, Product, Sum, Xor, fold,
};
use crate::ReduceOp;

/// How many operands a loop takes at once.
pub(super) const MOST: usize = 4;

/// Combines 1 to [`MOST`] operands: destination, operands, their factors, number of units, ranks.
pub(super) type Kernel = unsafe fn(*mut u8, &[*const u8], &[f64], usize, f64);

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

/// The loop for elements that are combined as what they are (halves come as f32); in words what
/// means nothing.
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
        (ReduceOp::Sum, Half | BFloat16 | Float) => one(pick::<f32, Sum>(isa)),
        (ReduceOp::Sum, ComplexFloat) => many(2, pick::<f32, Sum>(isa)),
        (ReduceOp::Sum, Double) => one(pick::<f64, Sum>(isa)),
        (ReduceOp::Sum, ComplexDouble) => many(2, pick::<f64, Sum>(isa)),
        (ReduceOp::Product, Uint8 | Int8) => one(pick::<u8, Product>(isa)),
        (ReduceOp::Product, Int16) => one(pick::<u16, Product>(isa)),
        (ReduceOp::Product, Int) => one(pick::<u32, Product>(isa)),
        (ReduceOp::Product, Int64) => one(pick::<u64, Product>(isa)),
        (ReduceOp::Product, Half | BFloat16 | Float) => one(pick::<f32, Product>(isa)),
        (ReduceOp::Product, ComplexFloat) => one(pick::<Complex<f32>, Product>(isa)),
        (ReduceOp::Product, Double) => one(pick::<f64, Product>(isa)),
        (ReduceOp::Product, ComplexDouble) => one(pick::<Complex<f64>, Product>(isa)),
        (ReduceOp::Avg, Uint8) => one(pick::<u8, Avg>(isa)),
        (ReduceOp::Avg, Int8) => one(pick::<i8, Avg>(isa)),
        (ReduceOp::Avg, Int16) => one(pick::<i16, Avg>(isa)),
        (ReduceOp::Avg, Int) => one(pick::<i32, Avg>(isa)),
        (ReduceOp::Avg, Int64) => one(pick::<i64, Avg>(isa)),
        (ReduceOp::Avg, Half | BFloat16 | Float | ComplexFloat) => {
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
        (ReduceOp::Min, Half | BFloat16 | Float) => one(pick::<f32, Min>(isa)),
        (ReduceOp::Min, Double) => one(pick::<f64, Min>(isa)),
        (ReduceOp::Max, Uint8) => one(pick::<u8, Max>(isa)),
        (ReduceOp::Max, Int8) => one(pick::<i8, Max>(isa)),
        (ReduceOp::Max, Int16) => one(pick::<i16, Max>(isa)),
        (ReduceOp::Max, Int) => one(pick::<i32, Max>(isa)),
        (ReduceOp::Max, Int64) => one(pick::<i64, Max>(isa)),
        (ReduceOp::Max, Half | BFloat16 | Float) => one(pick::<f32, Max>(isa)),
        (ReduceOp::Max, Double) => one(pick::<f64, Max>(isa)),
        (ReduceOp::PremulSum(_), Half | BFloat16 | Float) => one(pick::<f32, Premul>(isa)),
        (ReduceOp::PremulSum(_), ComplexFloat) => many(2, pick::<f32, Premul>(isa)),
        (ReduceOp::PremulSum(_), Double) => one(pick::<f64, Premul>(isa)),
        (ReduceOp::PremulSum(_), ComplexDouble) => many(2, pick::<f64, Premul>(isa)),
        _ => None,
    }
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
/// As [`fold`]; there are 1 to [`MOST`] operands and as many factors.
#[inline(always)]
unsafe fn by_number<E: Element, C: Combine<E>>(
    dst: *mut u8,
    src: &[*const u8],
    factors: &[f64],
    numel: usize,
    ranks: f64,
) {
    let f = |n: usize| E::scalar(factors[n]);
    let ranks = E::scalar(ranks);
    // SAFETY: the caller's promise.
    unsafe {
        match *src {
            [a] => fold::<E, C, 1>(dst, [a], [f(0)], numel, ranks),
            [a, b] => fold::<E, C, 2>(dst, [a, b], [f(0), f(1)], numel, ranks),
            [a, b, c] => fold::<E, C, 3>(dst, [a, b, c], [f(0), f(1), f(2)], numel, ranks),
            [a, b, c, d] => {
                fold::<E, C, 4>(dst, [a, b, c, d], [f(0), f(1), f(2), f(3)], numel, ranks);
            }
            _ => unreachable!("a kernel takes 1 to 4 operands"),
        }
    }
}

/// # Safety
/// As [`by_number`].
unsafe fn plain<E: Element, C: Combine<E>>(
    dst: *mut u8,
    src: &[*const u8],
    factors: &[f64],
    numel: usize,
    ranks: f64,
) {
    // SAFETY: the caller's promise.
    unsafe { by_number::<E, C>(dst, src, factors, numel, ranks) }
}

/// # Safety
/// As [`by_number`], on a processor that has these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn avx2<E: Element, C: Combine<E>>(
    dst: *mut u8,
    src: &[*const u8],
    factors: &[f64],
    numel: usize,
    ranks: f64,
) {
    // SAFETY: the caller's promise.
    unsafe { by_number::<E, C>(dst, src, factors, numel, ranks) }
}

/// # Safety
/// As [`by_number`], on a processor that has these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn avx512<E: Element, C: Combine<E>>(
    dst: *mut u8,
    src: &[*const u8],
    factors: &[f64],
    numel: usize,
    ranks: f64,
) {
    // SAFETY: the caller's promise.
    unsafe { by_number::<E, C>(dst, src, factors, numel, ranks) }
}
