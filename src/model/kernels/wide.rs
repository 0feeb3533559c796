//! Types that a product's right-hand matrix is kept in; its numbers become f32 in registers as they are loaded.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

pub trait Wide: Copy + Send + Sync {
    fn number(self) -> f32;

    /// # Safety
    /// Eight numbers are there, and the machine has the instructions of `Isa::Avx2`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(from: *const Self) -> __m256;

    /// # Safety
    /// Sixteen numbers are there, and the machine has the instructions of `Isa::Avx512`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16(from: *const Self) -> __m512;

    /// Those of the mask; zeros for the others.
    ///
    /// # Safety
    /// As `load16`, for the numbers of the mask.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load16_some(mask: u16, from: *const Self) -> __m512;
}

impl Wide for f32 {
    #[inline(always)]
    fn number(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> __m256 {
        // SAFETY: by the caller.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16(from: *const Self) -> __m512 {
        // SAFETY: by the caller.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16_some(mask: u16, from: *const Self) -> __m512 {
        // SAFETY: by the caller.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }
}

impl Wide for i8 {
    #[inline(always)]
    fn number(self) -> f32 {
        f32::from(self)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(from: *const Self) -> __m256 {
        // SAFETY: by the caller.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16(from: *const Self) -> __m512 {
        // SAFETY: by the caller.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load16_some(mask: u16, from: *const Self) -> __m512 {
        // SAFETY: by the caller.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, from))) }
    }
}
