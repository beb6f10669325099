//! What an element is, how two combine, and the one loop over both.

use super::Operand;

/// An element as it lies in memory, and the number it is combined as.
pub(super) trait Element: Copy {
    /// What it is combined as: itself, or f32 for halves.
    type Value: Copy;
    /// As many elements as are read and written at once: a cache line of values.
    type Line: Copy;
    /// Their values.
    type Values: Copy + AsMut<[Self::Value]> + AsRef<[Self::Value]>;
    /// What a factor or divisor is converted to.
    type Scalar: Copy;
    /// Nothing: what fills up the last line.
    const ZEROS: Self::Line;

    fn widen(line: Self::Line) -> Self::Values;
    fn narrow(values: Self::Values) -> Self::Line;
    fn scalar(value: f64) -> Self::Scalar;
}

macro_rules! elements {
    ($($t:ty: $line:expr, $zero:expr, $scalar:ty;)*) => {$(
        impl Element for $t {
            type Value = Self;
            type Line = [Self; $line];
            type Values = [Self; $line];
            type Scalar = $scalar;
            const ZEROS: Self::Line = [$zero; $line];

            #[inline(always)]
            fn widen(line: Self::Line) -> Self::Values {
                line
            }

            #[inline(always)]
            fn narrow(values: Self::Values) -> Self::Line {
                values
            }

            #[inline(always)]
            fn scalar(value: f64) -> $scalar {
                value as $scalar
            }
        }
    )*};
}

/// A complex number, as libtorch lays it out. Only its product needs more than its two parts.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Complex<T>(pub(super) T, pub(super) T);

// The divisor of integers is wider than the small ones: 200 ranks may average bytes. A quotient of two
// 32-bit numbers is so far from the next integer that f64 division and truncation are exact, and f64 has
// vector instructions for it.
elements! {
    u8: 64, 0, f64;
    i8: 64, 0, f64;
    u16: 32, 0, f64;
    i16: 32, 0, f64;
    u32: 16, 0, f64;
    i32: 16, 0, f64;
    u64: 8, 0, i64;
    i64: 8, 0, i64;
    f32: 16, 0.0, f32;
    f64: 8, 0.0, f64;
    Complex<f32>: 8, Complex(0.0, 0.0), f32;
    Complex<f64>: 4, Complex(0.0, 0.0), f64;
}

/// How values combine.
pub(super) trait Combine<E: Element> {
    #[inline(always)]
    fn premultiply(operand: E::Value, _factor: E::Scalar) -> E::Value {
        operand
    }

    fn combine(left: E::Value, right: E::Value) -> E::Value;

    #[inline(always)]
    fn finish(total: E::Value, _ranks: E::Scalar) -> E::Value {
        total
    }
}

pub(super) struct Sum;
pub(super) struct Product;
pub(super) struct Min;
pub(super) struct Max;
/// The sum divided by the number of ranks.
pub(super) struct Avg;
/// The same where that number is a power of two, so that multiplying by 1/n gives the same bits.
pub(super) struct AvgPow2;
pub(super) struct Premul;
pub(super) struct And;
pub(super) struct Or;
pub(super) struct Xor;

macro_rules! integers {
    ($($t:ty, $quotient:expr;)*) => {$(
        impl Combine<$t> for Sum {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left.wrapping_add(right)
            }
        }
        impl Combine<$t> for Product {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left.wrapping_mul(right)
            }
        }
        impl Combine<$t> for Avg {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left.wrapping_add(right)
            }
            #[inline(always)]
            fn finish(total: $t, ranks: <$t as Element>::Scalar) -> $t {
                let quotient: fn($t, <$t as Element>::Scalar) -> $t = $quotient;
                quotient(total, ranks)
            }
        }
        impl Combine<$t> for Min {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left.min(right)
            }
        }
        impl Combine<$t> for Max {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left.max(right)
            }
        }
    )*};
}

macro_rules! small_integers {
    ($($t:ty)*) => {
        integers! {$(
            // SAFETY: dividing by one or more stays within the type.
            $t, |total, ranks| unsafe { (f64::from(total) / ranks).to_int_unchecked() };
        )*}
    };
}

small_integers! { u8 i8 u16 i16 u32 i32 }
integers! {
    i64, |total, ranks| total.wrapping_div(ranks);
    u64, |total, ranks| total / ranks as u64;
}

/// Floats, and halves, whose values are f32.
macro_rules! floats {
    ([$($generic:tt)*] $e:ty, $t:ty) => {
        impl<$($generic)*> Combine<$e> for Sum {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left + right
            }
        }
        impl<$($generic)*> Combine<$e> for Product {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left * right
            }
        }
        impl<$($generic)*> Combine<$e> for Avg {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left + right
            }
            #[inline(always)]
            fn finish(total: $t, ranks: $t) -> $t {
                total / ranks
            }
        }
        impl<$($generic)*> Combine<$e> for AvgPow2 {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left + right
            }
            #[inline(always)]
            fn finish(total: $t, ranks: $t) -> $t {
                total * (1.0 / ranks)
            }
        }
        impl<$($generic)*> Combine<$e> for Premul {
            #[inline(always)]
            fn premultiply(operand: $t, factor: $t) -> $t {
                operand * factor
            }
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left + right
            }
        }
        impl<$($generic)*> Combine<$e> for Min {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                // A NaN on the right fails the comparison and is taken; one on the left is kept.
                if left.is_nan() || left < right { left } else { right }
            }
        }
        impl<$($generic)*> Combine<$e> for Max {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                if left.is_nan() || left > right { left } else { right }
            }
        }
    };
}
floats! { [] f32, f32 }
floats! { [] f64, f64 }
floats! { [H: super::halves::Half] super::halves::As<H>, f32 }

macro_rules! complex {
    ($($t:ty)*) => {$(
        impl Combine<Complex<$t>> for Product {
            #[inline(always)]
            fn combine(left: Complex<$t>, right: Complex<$t>) -> Complex<$t> {
                Complex(left.0 * right.0 - left.1 * right.1, left.0 * right.1 + left.1 * right.0)
            }
        }
    )*};
}
complex! { f32 f64 }

macro_rules! bits {
    ($($op:ident $symbol:tt)*) => {$(
        impl Combine<u8> for $op {
            #[inline(always)]
            fn combine(left: u8, right: u8) -> u8 {
                left $symbol right
            }
        }
    )*};
}
bits! { And & Or | Xor ^ }

/// Keeps the compiler from combining iterations: a line is what fills its registers; several lines at
/// once it would have to shuffle, which is ten times slower.
#[inline(always)]
fn one_at_a_time() {
    // Miri compiles nothing, and knows no assembly.
    #[cfg(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri)))]
    // SAFETY: no instruction at all.
    unsafe {
        std::arch::asm!("", options(nomem, nostack, preserves_flags));
    }
}

/// `dst[i] = finish(first[i] ∘ rest[0][i] ∘ …)`, in that order.
///
/// A line of every operand is read before the line of `dst` is written, so `dst` may be an operand.
///
/// # Safety
/// `dst` is writable and every operand readable for `numel` elements, at any alignment; each operand is
/// `dst` itself or does not overlap it.
#[inline(always)]
pub(super) unsafe fn fold<E: Element, C: Combine<E>>(
    dst: *mut u8,
    first: &Operand,
    rest: &[Operand],
    numel: usize,
    ranks: f64,
) {
    let ranks = E::scalar(ranks);
    let bytes = numel * size_of::<E>();
    let line = size_of::<E::Line>();
    let whole = bytes / line * line;
    let read = |operand: &Operand, at: usize| {
        // SAFETY: `at` begins a whole line of `numel` elements.
        E::widen(unsafe { operand.data.add(at).cast::<E::Line>().read_unaligned() })
    };
    for at in (0..whole).step_by(line) {
        one_at_a_time();
        let values = combined::<E, C>(first, rest, ranks, |operand| read(operand, at));
        // SAFETY: as in `read`, and all operands of this line have been read.
        unsafe { dst.add(at).cast::<E::Line>().write_unaligned(E::narrow(values)) };
    }
    if whole < bytes {
        let left = bytes - whole;
        let values = combined::<E, C>(first, rest, ranks, |operand| {
            let mut line = E::ZEROS;
            // SAFETY: `left` bytes remain, which is less than a line.
            unsafe { (&raw mut line).cast::<u8>().copy_from_nonoverlapping(operand.data.add(whole), left) };
            E::widen(line)
        });
        let line = E::narrow(values);
        // SAFETY: as above.
        unsafe { dst.add(whole).copy_from_nonoverlapping((&raw const line).cast(), left) };
    }
}

/// One line of all operands.
#[inline(always)]
fn combined<E: Element, C: Combine<E>>(
    first: &Operand,
    rest: &[Operand],
    ranks: E::Scalar,
    read: impl Fn(&Operand) -> E::Values,
) -> E::Values {
    let mut total = read(first);
    let factor = E::scalar(first.factor);
    for t in total.as_mut() {
        *t = C::premultiply(*t, factor);
    }
    for operand in rest {
        let right = read(operand);
        let factor = E::scalar(operand.factor);
        for (t, &r) in total.as_mut().iter_mut().zip(right.as_ref()) {
            *t = C::combine(*t, C::premultiply(r, factor));
        }
    }
    for t in total.as_mut() {
        *t = C::finish(*t, ranks);
    }
    total
}
