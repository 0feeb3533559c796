//! Serving and training on the same cores: a training step is sliced between the engine's steps.
//!
//! While the engine has work, training stands still at its next product. A share of the time is training's all the
//! same, in slices between the engine's steps; and all of it is, while the engine has nothing to do. What training has
//! begun it finishes beside the engine's step: the engine never waits for it, but for the slices.

use std::{
    cell::RefCell,
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

/// The longest slice, and the most that training comes to owe: what one token is late for the sake of training.
const SLICE: f64 = 0.01;
/// Products of two numbers between two looks: some milliseconds.
const PART: usize = 1 << 26;

thread_local! {
    static TURNS: RefCell<Option<Arc<Turns>>> = const { RefCell::new(None) };
}

/// Between one engine and any number of training threads.
pub struct Turns {
    /// Training seconds for each second of the engine.
    rate: f64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Since when training has to stand still.
    closed: Option<Instant>,
    /// Threads that stand still.
    waiting: usize,
    /// Seconds that training has a right to; less than 0 where it took more.
    owed: f64,
}

impl Turns {
    /// `share` of the time is training's while requests are served: from 0 to below 1.
    pub fn new(share: f64) -> Self {
        let share = share.clamp(0.0, 0.95);
        Self { rate: share / (1.0 - share), state: Mutex::default(), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Training threads that stand still now.
    pub fn waiting(&self) -> usize {
        self.state().waiting
    }

    /// For the engine's thread, as long as it lives.
    pub fn serving(&self) -> Serving<'_> {
        Serving(self)
    }

    /// Runs `work`, a training run, on this thread: its products give way.
    pub fn training<R>(self: &Arc<Self>, work: impl FnOnce() -> R) -> R {
        struct Reset(Option<Arc<Turns>>);
        impl Drop for Reset {
            fn drop(&mut self) {
                TURNS.set(self.0.take());
            }
        }
        let _reset = Reset(TURNS.replace(Some(self.clone())));
        work()
    }

    fn give_way(&self) {
        let mut state = self.state();
        let Some(closed) = state.closed else { return };
        // It went on while the engine was at work.
        state.owed = (state.owed - closed.elapsed().as_secs_f64()).max(-SLICE);
        state.waiting += 1;
        let mut state =
            self.changed.wait_while(state, |state| state.closed.is_some()).unwrap_or_else(|e| e.into_inner());
        state.waiting -= 1;
    }
}

/// The engine's side. Training goes on once it is dropped.
pub struct Serving<'a>(&'a Turns);

impl Serving<'_> {
    /// A step begins: training stands still.
    pub fn close(&self) {
        self.0.state().closed.get_or_insert_with(Instant::now);
    }

    /// There is nothing to do: training has all the time.
    pub fn open(&self) {
        let mut state = self.0.state();
        (state.closed, state.owed) = (None, 0.0);
        self.0.changed.notify_all();
    }

    /// A step took so long and another follows: training has its slice first, if it waits for one.
    pub fn slice(&self, step: Duration) {
        let mut state = self.0.state();
        if state.waiting == 0 {
            return;
        }
        state.owed = (state.owed + self.0.rate * step.as_secs_f64()).min(SLICE);
        if state.owed <= 0.0 {
            return;
        }
        let slice = Duration::from_secs_f64(state.owed);
        state.closed = None;
        self.0.changed.notify_all();
        drop(state);
        std::thread::sleep(slice);
        let mut state = self.0.state();
        state.owed -= slice.as_secs_f64();
        state.closed = Some(Instant::now());
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.open();
    }
}

/// Runs `work` in so many pieces, of which each takes as long as `size` products of two numbers; on a training thread a
/// few pieces at a time, as many as threads or more, giving way before them, so that nobody waits for long.
pub(super) fn in_parts(pieces: usize, size: usize, mut work: impl FnMut(Range<usize>)) {
    let turns = TURNS.with_borrow(Clone::clone);
    let Some(turns) = turns else { return work(0..pieces) };
    let threads = rayon::current_num_threads();
    let few = (PART / size.max(1)).next_multiple_of(threads).max(threads);
    for at in (0..pieces).step_by(few) {
        turns.give_way();
        work(at..(at + few).min(pieces));
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, sync::mpsc};

    use super::*;

    /// A training thread that says so at each of its parts.
    fn trainer(turns: &Arc<Turns>) -> (mpsc::Receiver<usize>, std::thread::JoinHandle<()>) {
        let (said, heard) = mpsc::sync_channel(0);
        let turns = turns.clone();
        let work = move || {
            turns.training(|| {
                (0..).all(|i| {
                    let sent = Cell::new(false);
                    in_parts(1, 1, |_| sent.set(said.send(i).is_ok()));
                    sent.get()
                })
            })
        };
        (heard, std::thread::spawn(move || _ = work()))
    }

    fn until_it_waits(turns: &Turns) {
        while turns.waiting() == 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn training_stands_still_while_the_engine_works() {
        let turns = Arc::new(Turns::new(0.0));
        let serving = turns.serving();
        let (heard, thread) = trainer(&turns);
        heard.recv().unwrap();
        serving.close();
        // It ends what it had begun, and no more.
        while turns.waiting() == 0 {
            _ = heard.try_recv();
        }
        assert!(heard.try_recv().is_err());
        serving.slice(Duration::from_secs(1));
        assert_eq!(turns.waiting(), 1, "a share of nothing gives no slices");
        serving.open();
        heard.recv().unwrap();
        serving.close();
        while turns.waiting() == 0 {
            _ = heard.try_recv();
        }
        // An engine that is gone is in nobody's way.
        drop(serving);
        heard.recv().unwrap();
        drop(heard);
        thread.join().unwrap();
    }

    #[test]
    fn a_busy_engine_leaves_training_its_share() {
        let turns = Arc::new(Turns::new(0.5));
        let serving = turns.serving();
        serving.close();
        let (heard, thread) = trainer(&turns);
        until_it_waits(&turns);
        let parts = std::thread::spawn(move || {
            heard.recv().unwrap();
            heard
        });
        while !parts.is_finished() {
            serving.slice(Duration::from_millis(4));
        }
        assert!(turns.state().owed <= SLICE);
        drop(serving);
        drop(parts.join().unwrap());
        thread.join().unwrap();
    }

    #[test]
    fn long_products_come_in_parts_on_training_threads_only() {
        let threads = rayon::current_num_threads();
        let parts = |pieces: usize, size: usize| {
            let all = RefCell::new(Vec::new());
            in_parts(pieces, size, |part| all.borrow_mut().push(part));
            all.into_inner()
        };
        let (few, small) = (4 * threads, PART / (4 * threads));
        assert_eq!(parts(2 * few + 3, small), std::slice::from_ref(&(0..2 * few + 3)));
        let turns = Arc::new(Turns::new(0.2));
        turns.training(|| {
            assert_eq!(parts(2 * few + 3, small), [0..few, few..2 * few, 2 * few..2 * few + 3]);
            // However large, each thread has one.
            assert_eq!(parts(threads + 1, 2 * PART), [0..threads, threads..threads + 1]);
        });
        assert_eq!(parts(few + 1, small), std::slice::from_ref(&(0..few + 1)));
    }
}
