//! What an element is, how two combine, and the one loop over both.

/// A number as it lies in memory, combined as itself.
pub(super) trait Element: Copy {
    /// As many elements as fill a cache line: read whole, combined in registers, written whole.
    type Line: Copy + AsMut<[Self]> + AsRef<[Self]>;
    /// What a factor or divisor is converted to.
    type Scalar: Copy;

    fn scalar(value: f64) -> Self::Scalar;
}

macro_rules! elements {
    ($($t:ty: $line:expr, $scalar:ty;)*) => {$(
        impl Element for $t {
            type Line = [Self; $line];
            type Scalar = $scalar;

            #[inline(always)]
            fn scalar(value: f64) -> $scalar {
                value as $scalar
            }
        }
    )*};
}

// The divisor of integers is wider than the small ones: 200 ranks may average bytes. A quotient of two
// 32-bit numbers is so far from the next integer that f64 division and truncation are exact, and f64 has
// vector instructions for it.
elements! {
    u8: 64, f64;
    i8: 64, f64;
    u16: 32, f64;
    i16: 32, f64;
    u32: 16, f64;
    i32: 16, f64;
    u64: 8, i64;
    i64: 8, i64;
    f32: 16, f32;
    f64: 8, f64;
}

/// A complex number, as libtorch lays it out. Only its product needs more than its two parts.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Complex<T>(pub(super) T, pub(super) T);

impl Element for Complex<f32> {
    type Line = [Self; 8];
    type Scalar = f32;

    #[inline(always)]
    fn scalar(value: f64) -> f32 {
        value as f32
    }
}

impl Element for Complex<f64> {
    type Line = [Self; 4];
    type Scalar = f64;

    #[inline(always)]
    fn scalar(value: f64) -> f64 {
        value
    }
}

/// How elements combine.
pub(super) trait Combine<E: Element> {
    #[inline(always)]
    fn premultiply(operand: E, _factor: E::Scalar) -> E {
        operand
    }

    fn combine(left: E, right: E) -> E;

    #[inline(always)]
    fn finish(total: E, _ranks: E::Scalar) -> E {
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
    ($($t:ty, $wide:ty;)*) => {$(
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
            fn finish(total: $t, ranks: $wide) -> $t {
                (total as $wide / ranks) as $t
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
integers! { u8, f64; i8, f64; u16, f64; i16, f64; u32, f64; i32, f64; u64, i64; i64, i64; }

macro_rules! floats {
    ($($t:ty)*) => {$(
        impl Combine<$t> for Sum {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left + right
            }
        }
        impl Combine<$t> for Product {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left * right
            }
        }
        impl Combine<Complex<$t>> for Product {
            #[inline(always)]
            fn combine(left: Complex<$t>, right: Complex<$t>) -> Complex<$t> {
                Complex(left.0 * right.0 - left.1 * right.1, left.0 * right.1 + left.1 * right.0)
            }
        }
        impl Combine<$t> for Avg {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left + right
            }
            #[inline(always)]
            fn finish(total: $t, ranks: $t) -> $t {
                total / ranks
            }
        }
        impl Combine<$t> for AvgPow2 {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left + right
            }
            #[inline(always)]
            fn finish(total: $t, ranks: $t) -> $t {
                total * (1.0 / ranks)
            }
        }
        impl Combine<$t> for Premul {
            #[inline(always)]
            fn premultiply(operand: $t, factor: $t) -> $t {
                operand * factor
            }
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                left + right
            }
        }
        impl Combine<$t> for Min {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                // A NaN on the right fails the comparison and is taken; one on the left is kept.
                if left.is_nan() || left < right { left } else { right }
            }
        }
        impl Combine<$t> for Max {
            #[inline(always)]
            fn combine(left: $t, right: $t) -> $t {
                if left.is_nan() || left > right { left } else { right }
            }
        }
    )*};
}
floats! { f32 f64 }

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
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    // SAFETY: no instruction at all.
    unsafe {
        std::arch::asm!("", options(nomem, nostack, preserves_flags));
    }
}

/// `dst[i] = finish(src[0][i] ∘ src[1][i] ∘ …)`, in that order.
///
/// A line of every operand is read before the line of `dst` is written, so `dst` may be an operand.
///
/// # Safety
/// `dst` is writable and every `src` readable for `numel` elements, at any alignment; each `src` is
/// `dst` itself or does not overlap it.
#[inline(always)]
pub(super) unsafe fn fold<E: Element, C: Combine<E>, const N: usize>(
    dst: *mut u8,
    src: [*const u8; N],
    factors: [E::Scalar; N],
    numel: usize,
    ranks: E::Scalar,
) {
    let line = size_of::<E::Line>() / size_of::<E>();
    let lines = numel / line;
    for l in 0..lines {
        one_at_a_time();
        let at = l * size_of::<E::Line>();
        // SAFETY: line `l` lies within `numel` elements.
        let mut total: E::Line = unsafe { src[0].add(at).cast::<E::Line>().read_unaligned() };
        for t in total.as_mut() {
            *t = C::premultiply(*t, factors[0]);
        }
        for n in 1..N {
            // SAFETY: as above.
            let right: E::Line = unsafe { src[n].add(at).cast::<E::Line>().read_unaligned() };
            for (t, &r) in total.as_mut().iter_mut().zip(right.as_ref()) {
                *t = C::combine(*t, C::premultiply(r, factors[n]));
            }
        }
        for t in total.as_mut() {
            *t = C::finish(*t, ranks);
        }
        // SAFETY: as above, and all operands of this line have been read.
        unsafe { dst.add(at).cast::<E::Line>().write_unaligned(total) };
    }
    for i in lines * line..numel {
        one_at_a_time();
        let at = i * size_of::<E>();
        // SAFETY: element `i` lies within `numel` elements.
        unsafe {
            let mut total = C::premultiply(src[0].add(at).cast::<E>().read_unaligned(), factors[0]);
            for n in 1..N {
                let right = C::premultiply(src[n].add(at).cast::<E>().read_unaligned(), factors[n]);
                total = C::combine(total, right);
            }
            dst.add(at).cast::<E>().write_unaligned(C::finish(total, ranks));
        }
    }
}
