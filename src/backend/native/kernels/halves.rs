//! 16-bit floats to f32 and back, rounding to nearest even.

#[cfg(test)]
use half::bf16;
use half::f16;

use super::select::Isa;

/// The two 16-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    F16,
    Bf16,
}

impl Half {
    /// Reads `numel` halves at `src` into floats at `dst`.
    ///
    /// # Safety
    /// `src` is readable and `dst` writable for that many, at any alignment; the processor has `isa`.
    pub(super) unsafe fn widen(self, isa: Isa, src: *const u8, dst: *mut f32, numel: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match (self, isa) {
                (Self::F16, Isa::Plain) => plain::widen_f16(src, dst, numel),
                (Self::Bf16, Isa::Plain) => plain::widen_bf16(src, dst, numel),
                #[cfg(target_arch = "x86_64")]
                (Self::F16, _) => x86::widen_f16(src, dst, numel),
                #[cfg(target_arch = "x86_64")]
                (Self::Bf16, _) => x86::widen_bf16(src, dst, numel),
            }
        }
    }

    /// Writes `numel` floats at `src` as halves at `dst`.
    ///
    /// # Safety
    /// As [`widen`](Self::widen).
    pub(super) unsafe fn narrow(self, isa: Isa, src: *const f32, dst: *mut u8, numel: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match (self, isa) {
                (Self::F16, Isa::Plain) => plain::narrow_f16(src, dst, numel),
                (Self::Bf16, Isa::Plain) => plain::narrow_bf16(src, dst, numel),
                #[cfg(target_arch = "x86_64")]
                (Self::F16, _) => x86::narrow_f16(src, dst, numel),
                #[cfg(target_arch = "x86_64")]
                (Self::Bf16, _) => x86::narrow_bf16(src, dst, numel),
            }
        }
    }

    /// The half nearest to `value`, as bits.
    #[cfg(test)]
    pub(super) fn bits(self, value: f32) -> u16 {
        match self {
            Self::F16 => f16::from_f32(value).to_bits(),
            Self::Bf16 => bf16::from_f32(value).to_bits(),
        }
    }

    /// The value of a half.
    #[cfg(test)]
    pub(super) fn value(self, bits: u16) -> f32 {
        match self {
            Self::F16 => f16::from_bits(bits).to_f32(),
            Self::Bf16 => bf16::from_bits(bits).to_f32(),
        }
    }
}

/// What `half::bf16::from_f32` does, without branches: to nearest even; a NaN stays one, made quiet.
#[inline(always)]
fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let quiet = bits | 0x0040_0000;
    ((if value.is_nan() { quiet } else { rounded }) >> 16) as u16
}

/// Loops for any processor; the compiler makes of them what the caller's features allow.
///
/// # Safety
/// Of all of these: as [`Half::widen`].
mod plain {
    use super::{f16, round_to_bf16};

    #[inline(always)]
    pub(super) unsafe fn widen_bf16(src: *const u8, dst: *mut f32, numel: usize) {
        for i in 0..numel {
            // SAFETY: the caller's promise.
            unsafe {
                let bits = src.cast::<u16>().add(i).read_unaligned();
                dst.add(i).write_unaligned(f32::from_bits(u32::from(bits) << 16));
            }
        }
    }

    #[inline(always)]
    pub(super) unsafe fn narrow_bf16(src: *const f32, dst: *mut u8, numel: usize) {
        for i in 0..numel {
            // SAFETY: the caller's promise.
            unsafe { dst.cast::<u16>().add(i).write_unaligned(round_to_bf16(src.add(i).read_unaligned())) };
        }
    }

    #[inline(always)]
    pub(super) unsafe fn widen_f16(src: *const u8, dst: *mut f32, numel: usize) {
        for i in 0..numel {
            // SAFETY: the caller's promise.
            unsafe {
                let bits = src.cast::<u16>().add(i).read_unaligned();
                dst.add(i).write_unaligned(f16::from_bits(bits).to_f32());
            }
        }
    }

    #[inline(always)]
    pub(super) unsafe fn narrow_f16(src: *const f32, dst: *mut u8, numel: usize) {
        for i in 0..numel {
            // SAFETY: the caller's promise.
            unsafe {
                let bits = f16::from_f32(src.add(i).read_unaligned()).to_bits();
                dst.cast::<u16>().add(i).write_unaligned(bits);
            }
        }
    }
}

/// The same with AVX2 and F16C, which every processor with AVX-512 has too.
///
/// # Safety
/// Of all of these: as [`Half::widen`], on a processor that has these features.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128, _mm256_cvtph_ps, _mm256_cvtps_ph,
        _mm256_loadu_ps, _mm256_storeu_ps,
    };

    use super::plain;

    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn widen_bf16(src: *const u8, dst: *mut f32, numel: usize) {
        // SAFETY: the caller's promise.
        unsafe { plain::widen_bf16(src, dst, numel) }
    }

    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn narrow_bf16(src: *const f32, dst: *mut u8, numel: usize) {
        // SAFETY: the caller's promise.
        unsafe { plain::narrow_bf16(src, dst, numel) }
    }

    #[target_feature(enable = "avx2,f16c")]
    pub(super) unsafe fn widen_f16(src: *const u8, dst: *mut f32, numel: usize) {
        let whole = numel / 8 * 8;
        for i in (0..whole).step_by(8) {
            // SAFETY: the caller's promise, for eight from `i` on.
            unsafe {
                let halves = _mm_loadu_si128(src.add(2 * i).cast());
                _mm256_storeu_ps(dst.add(i), _mm256_cvtph_ps(halves));
            }
        }
        // SAFETY: the caller's promise.
        unsafe { plain::widen_f16(src.add(2 * whole), dst.add(whole), numel - whole) }
    }

    #[target_feature(enable = "avx2,f16c")]
    pub(super) unsafe fn narrow_f16(src: *const f32, dst: *mut u8, numel: usize) {
        let whole = numel / 8 * 8;
        for i in (0..whole).step_by(8) {
            // SAFETY: the caller's promise, for eight from `i` on.
            unsafe {
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(src.add(i)));
                _mm_storeu_si128(dst.add(2 * i).cast(), halves);
            }
        }
        // SAFETY: the caller's promise.
        unsafe { plain::narrow_f16(src.add(whole), dst.add(2 * whole), numel - whole) }
    }
}
