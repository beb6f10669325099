//! 16-bit floats: combined as f32, rounded once, to nearest even.

use std::marker::PhantomData;

use half::f16;

use super::element::Element;

/// How a line of 16-bit floats becomes a line of f32, and back.
pub(super) trait Half: Copy {
    fn widen(line: [u16; 16]) -> [f32; 16];
    fn narrow(values: [f32; 16]) -> [u16; 16];
}

/// An element that is such a float.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct As<H>(u16, PhantomData<H>);

impl<H: Half> Element for As<H> {
    type Value = f32;
    type Line = [u16; 16];
    type Values = [f32; 16];
    type Scalar = f32;
    const ZEROS: Self::Line = [0; 16];

    #[inline(always)]
    fn widen(line: Self::Line) -> Self::Values {
        H::widen(line)
    }

    #[inline(always)]
    fn narrow(values: Self::Values) -> Self::Line {
        H::narrow(values)
    }

    #[inline(always)]
    fn scalar(value: f64) -> f32 {
        value as f32
    }
}

/// BFloat16: the upper half of an f32.
#[derive(Clone, Copy)]
pub(super) struct Bf16;

impl Half for Bf16 {
    #[inline(always)]
    fn widen(line: [u16; 16]) -> [f32; 16] {
        line.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    fn narrow(values: [f32; 16]) -> [u16; 16] {
        let mut bits = [0_u32; 16];
        for (bits, value) in bits.iter_mut().zip(values) {
            *bits = round_to_bf16(value);
        }
        bits.map(|bits| bits as u16)
    }
}

/// What `half::bf16::from_f32` does, without branches: to nearest even; a NaN stays one, made quiet.
#[inline(always)]
fn round_to_bf16(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    let quiet = bits | 0x0040_0000;
    (if value.is_nan() { quiet } else { rounded }) >> 16
}

/// IEEE half precision on any processor.
#[derive(Clone, Copy)]
pub(super) struct F16;

impl Half for F16 {
    #[inline(always)]
    fn widen(line: [u16; 16]) -> [f32; 16] {
        line.map(|bits| f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    fn narrow(values: [f32; 16]) -> [u16; 16] {
        values.map(|value| f16::from_f32(value).to_bits())
    }
}

/// The same by instruction: only in loops compiled for a processor that has F16C.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct F16c;

#[cfg(target_arch = "x86_64")]
impl Half for F16c {
    #[inline(always)]
    fn widen(line: [u16; 16]) -> [f32; 16] {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
        let mut values = [0.0; 16];
        for half in 0..2 {
            // SAFETY: eight of sixteen; the processor has the instruction, as this type says.
            unsafe {
                let bits = _mm_loadu_si128(line.as_ptr().add(8 * half).cast());
                _mm256_storeu_ps(values.as_mut_ptr().add(8 * half), _mm256_cvtph_ps(bits));
            }
        }
        values
    }

    #[inline(always)]
    fn narrow(values: [f32; 16]) -> [u16; 16] {
        use std::arch::x86_64::{
            _MM_FROUND_TO_NEAREST_INT, _mm_storeu_si128, _mm256_cvtps_ph, _mm256_loadu_ps,
        };
        let mut line = [0; 16];
        for half in 0..2 {
            // SAFETY: as in `widen`.
            unsafe {
                let values = _mm256_loadu_ps(values.as_ptr().add(8 * half));
                let bits = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(values);
                _mm_storeu_si128(line.as_mut_ptr().add(8 * half).cast(), bits);
            }
        }
        line
    }
}
