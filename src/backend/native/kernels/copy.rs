//! Copying past the caches.

/// From how many bytes on the destination of a copy is better not brought into the caches first: it would
/// not stay there.
pub(crate) const PAST_CACHE: usize = 32 << 20;

/// Copies without reading the destination's lines first and without keeping them in the caches: for what is
/// larger than those and has not been touched lately.
///
/// # Safety
/// As [`std::ptr::copy_nonoverlapping`].
pub(crate) unsafe fn copy_past_cache(from: *const u8, to: *mut u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    if bytes >= 4 * LINE && is_x86_feature_detected!("avx") {
        let head = to.align_offset(LINE).min(bytes);
        let whole = (bytes - head) / LINE * LINE;
        // SAFETY: the three parts are the whole; the second begins at a line; the processor has AVX.
        unsafe {
            from.copy_to_nonoverlapping(to, head);
            stream_lines(from.add(head), to.add(head), whole);
            from.add(head + whole).copy_to_nonoverlapping(to.add(head + whole), bytes - head - whole);
        }
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { from.copy_to_nonoverlapping(to, bytes) };
}

#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Whole lines, written around the caches; ordered before what is written after this.
///
/// # Safety
/// As [`copy_past_cache`], on a processor with AVX; `to` begins a line and `bytes` are whole lines.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn stream_lines(from: *const u8, to: *mut u8, bytes: usize) {
    use std::arch::x86_64::{_mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};
    // SAFETY: each step is a line of both; `to` is aligned.
    unsafe {
        for at in (0..bytes).step_by(LINE) {
            let (low, high) = (from.add(at).cast(), from.add(at + 32).cast());
            let (low, high) = (_mm256_loadu_si256(low), _mm256_loadu_si256(high));
            _mm256_stream_si256(to.add(at).cast(), low);
            _mm256_stream_si256(to.add(at + 32).cast(), high);
        }
        // Who learns by a flag that the data is there has to find it: streaming stores wait for no release.
        _mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::copy_past_cache;

    #[test]
    fn every_length_at_every_alignment_is_copied_and_nothing_else_is_touched() {
        let source: Vec<u8> = (0..1200).map(|n| (n % 251) as u8).collect();
        for start in [0, 1, 31, 63, 64] {
            for bytes in [0, 1, 255, 256, 257, 511, 1000] {
                let mut to = vec![255_u8; 1200];
                // SAFETY: within both.
                unsafe { copy_past_cache(source.as_ptr().add(start / 2), to.as_mut_ptr().add(start), bytes) };
                let want = &source[start / 2..start / 2 + bytes];
                assert_eq!(&to[start..start + bytes], want, "{bytes} bytes to {start}");
                assert!(to[..start].iter().chain(&to[start + bytes..]).all(|&b| b == 255));
            }
        }
    }
}
