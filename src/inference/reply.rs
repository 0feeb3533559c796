//! A request's way back to its sender, and the place that it takes up meanwhile.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::mpsc;

use super::{EngineError, Finish, Output};

/// One of a number of places; dropping it gives it back.
pub struct Place(Arc<AtomicUsize>);

impl Place {
    pub fn take(taken: &Arc<AtomicUsize>) -> Self {
        taken.fetch_add(1, Ordering::Relaxed);
        Self(taken.clone())
    }

    /// None when `limit` are taken.
    pub fn take_below(taken: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let free = |n: usize| (n < limit).then_some(n + 1);
        taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).ok()?;
        Some(Self(taken.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whoever drops it, wherever the request was: its sender hears of an end.
pub struct Reply {
    output: mpsc::Sender<Output>,
    /// Given back before the sender hears of the end, so that it can ask again at once.
    place: Option<Place>,
    ended: bool,
}

impl Reply {
    pub fn new(output: mpsc::Sender<Output>, place: Place) -> Self {
        Self { output, place: Some(place), ended: false }
    }

    /// The request goes on from one kind of place to another.
    pub fn move_to(&mut self, place: Place) {
        self.place = Some(place);
    }

    /// The channel has room for all that a request can make; a failure means that the reader is gone.
    pub fn send(&mut self, output: Output) {
        if !self.ended {
            self.ended = self.output.try_send(output).is_err();
        }
    }

    pub fn done(&mut self, finish: Finish) {
        self.end(Output::Done(finish));
    }

    pub fn fail(&mut self, error: EngineError) {
        self.end(Output::Failed(error));
    }

    fn end(&mut self, output: Output) {
        self.place = None;
        self.send(output);
        self.ended = true;
    }

    /// Nobody waits for more.
    pub fn is_ended(&self) -> bool {
        self.ended || self.output.is_closed()
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.fail(EngineError::Stopping);
    }
}
