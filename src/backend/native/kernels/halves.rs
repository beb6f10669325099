//! 16-bit floats to f32 and back, rounding to nearest even.

#[cfg(test)]
use half::bf16;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// The two 16-bit floats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    F16,
    Bf16,
}

impl Half {
    /// Reads `dst.len()` halves at `src`.
    ///
    /// # Safety
    /// `src` is readable for that many halves, at any alignment.
    pub(super) unsafe fn widen(self, src: *const u8, dst: &mut [f32]) {
        match self {
            Self::F16 => {
                let mut line = [f16::ZERO; 64];
                for (i, dst) in dst.chunks_mut(64).enumerate() {
                    // SAFETY: the caller's promise; a byte copy needs no alignment.
                    unsafe {
                        line.as_mut_ptr().cast::<u8>().copy_from(src.add(i * 128), dst.len() * 2);
                    }
                    line[..dst.len()].convert_to_f32_slice(dst);
                }
            }
            Self::Bf16 => {
                for (i, dst) in dst.iter_mut().enumerate() {
                    // SAFETY: the caller's promise.
                    let bits = unsafe { src.cast::<u16>().add(i).read_unaligned() };
                    *dst = f32::from_bits(u32::from(bits) << 16);
                }
            }
        }
    }

    /// Writes `src.len()` halves at `dst`.
    ///
    /// # Safety
    /// `dst` is writable for that many halves, at any alignment.
    pub(super) unsafe fn narrow(self, src: &[f32], dst: *mut u8) {
        match self {
            Self::F16 => {
                let mut line = [f16::ZERO; 64];
                for (i, src) in src.chunks(64).enumerate() {
                    line[..src.len()].convert_from_f32_slice(src);
                    // SAFETY: the caller's promise; a byte copy needs no alignment.
                    unsafe { dst.add(i * 128).copy_from(line.as_ptr().cast(), src.len() * 2) };
                }
            }
            Self::Bf16 => {
                for (i, &value) in src.iter().enumerate() {
                    let bits = round_to_bf16(value);
                    // SAFETY: the caller's promise.
                    unsafe { dst.cast::<u16>().add(i).write_unaligned(bits) };
                }
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
