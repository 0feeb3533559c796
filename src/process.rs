//! What a program that computes settles before its first thread starts.

use std::ffi::{c_int, c_long};

use libmimalloc_sys::mi_option_set_default;

/// `mi_option_purge_delay` of mimalloc 3.
const PURGE_DELAY: c_int = 15;

/// Freed memory goes back to the system after so many milliseconds. A step's tensors are those of the step before: given
/// back in between, as mimalloc does after a second, each of their pages is cleared and faulted in again, which took a
/// quarter of a step of 8 × 256 tokens.
const KEPT: c_long = 60_000;

/// # Safety
/// No other thread has started.
pub unsafe fn prepare() {
    // candle adds what gradients have in common with a pool of its own. It would spin between its loops and take the
    // cores from rayon's, on which the kernels run; and waking many for one sum takes longer than the sum.
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4)).to_string();
    for (name, value) in [("CANDLE_NUM_THREADS", threads.as_str()), ("CANDLE_BARRIER_POOL_SPIN_LIMIT", "1")] {
        // SAFETY: by the caller.
        unsafe { std::env::set_var(name, value) };
    }
    // SAFETY: sets a number among mimalloc's options, where the environment (`MIMALLOC_PURGE_DELAY`) has not.
    unsafe { mi_option_set_default(PURGE_DELAY, KEPT) };
}

/// Gives back what was freed so far: what loading took is no step's.
pub fn settle() {
    // SAFETY: memory that nobody has goes back to the system.
    unsafe { libmimalloc_sys::mi_collect(true) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number is that of this version: a second, until somebody sets it.
    #[test]
    fn the_option_is_the_delay() {
        // SAFETY: reads a number.
        assert_eq!(unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) }, 1000);
    }
}
