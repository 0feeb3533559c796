//! Threads that make adapters ready: hashing, copying to the disk, checking and laying out. They give way to those that
//! serve, so that a cold adapter takes time that is left over and tokens come as evenly as before.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::LazyLock,
};

use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::sync::oneshot;

/// Low, but not so low that a busy engine starves them: on a core that others want they have a tenth.
const NICE: i32 = 10;

/// None where threads cannot be had, and then the caller does the work.
static HANDS: LazyLock<Option<ThreadPool>> = LazyLock::new(|| pool("loading", give_way));

/// For adapters in training: those threads would stand behind the ones that train.
static QUICK: LazyLock<Option<ThreadPool>> = LazyLock::new(|| pool("making", || ()));

/// As many threads as compute.
fn pool(name: &'static str, start: fn()) -> Option<ThreadPool> {
    let threads = rayon::current_num_threads();
    let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(move |i| format!("{name}-{i}"));
    let pool = pool.start_handler(move |_| start()).build();
    pool.inspect_err(|error| tracing::warn!("adapters are made ready beside other work: {error}")).ok()
}

/// Puts the calling thread behind those of usual priority.
fn give_way() {
    // SAFETY: sets a number of this thread alone, which is what 0 names on Linux; elsewhere of the process, and then
    // it is not asked for.
    #[cfg(target_os = "linux")]
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, NICE.max(libc::getpriority(libc::PRIO_PROCESS, 0)))
    };
}

/// Begins work and says where its result comes: an error there when it crashed.
pub fn begin<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> oneshot::Receiver<R> {
    let (result, found) = oneshot::channel();
    let work = move || _ = catch_unwind(AssertUnwindSafe(work)).map(|made| result.send(made));
    match &*HANDS {
        Some(pool) => pool.spawn(work),
        None => work(),
    }
    found
}

/// Work that somebody waits for beside training: not on the threads that train, and not behind them.
pub fn at_once<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    match &*QUICK {
        Some(pool) => pool.install(work),
        None => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_comes_back_and_a_crash_is_no_result() {
        assert_eq!(begin(|| 7).await, Ok(7));
        assert!(begin(|| -> u8 { panic!("on purpose") }).await.is_err());
        // The thread is still there.
        assert_eq!(begin(|| 8).await, Ok(8));
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn hands_give_way_and_nobody_else() {
        // SAFETY: reads a number.
        let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = nice();
        assert_eq!(begin(nice).await, Ok(before.max(NICE)));
        assert_eq!(nice(), before);
    }
}
