//! The engine thread: continuous batching, one forward a step for all rows of a base, whatever their adapters.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc as channel,
    },
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor};
use tokio::sync::mpsc;

use super::{
    Bases, EngineError, EngineSettings, Output, Request,
    registry::{Found, Lease, Registry},
    sequence::{Next, Running},
};
use crate::model::{Base, Batch, Hook, Sequence};

pub enum Command {
    Request(Box<Request>, mpsc::Sender<Output>),
    /// A generation is in memory now, or has failed.
    Loaded(String),
    Stop(Duration),
}

/// What the thread starts with.
pub struct Engine {
    pub bases: Bases,
    pub registry: Arc<Registry>,
    /// Requests that no step has taken up yet.
    pub waiting: Arc<AtomicUsize>,
    pub settings: EngineSettings,
    pub inbox: channel::Receiver<Command>,
    pub commands: channel::Sender<Command>,
}

/// A request that waits for its turn, or for its adapter.
struct Waiting {
    request: Box<Request>,
    output: mpsc::Sender<Output>,
    /// Its adapter once it is in memory; kept, so that it is not evicted before the turn comes.
    lease: Option<Lease>,
}

#[derive(Default)]
struct State {
    /// In order of arrival; adapters are there.
    ready: VecDeque<Waiting>,
    /// For adapters that are being loaded.
    cold: Vec<Waiting>,
    running: Vec<Running>,
    stop_at: Option<Instant>,
}

impl Engine {
    pub fn run(self) {
        let mut state = State::default();
        loop {
            if state.running.is_empty() && state.ready.is_empty() {
                if state.stop_at.is_some() {
                    return;
                }
                match self.inbox.recv() {
                    Ok(command) => self.take(&mut state, command),
                    Err(_) => return,
                }
            }
            while let Ok(command) = self.inbox.try_recv() {
                self.take(&mut state, command);
            }
            if state.stop_at.is_some_and(|at| Instant::now() >= at) {
                let running = state.running.drain(..);
                running.for_each(|r| _ = r.output.try_send(Output::Failed(EngineError::Stopping)));
                return;
            }
            self.admit(&mut state);
            let stepped = catch_unwind(AssertUnwindSafe(|| self.step(&mut state)));
            let failure = match stepped {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "a step of the engine crashed".to_owned(),
            };
            tracing::error!("engine: {failure}");
            for running in state.running.drain(..) {
                _ = running.output.try_send(Output::Failed(EngineError::Internal(failure.clone())));
            }
        }
    }

    fn take(&self, state: &mut State, command: Command) {
        match command {
            Command::Request(_, output) if state.stop_at.is_some() => self.refuse(&output, EngineError::Stopping),
            Command::Request(request, output) => self.place(state, Waiting { request, output, lease: None }),
            Command::Loaded(generation) => {
                let (now, still): (Vec<_>, Vec<_>) = std::mem::take(&mut state.cold)
                    .into_iter()
                    .partition(|w| w.request.generation.as_deref() == Some(&generation));
                state.cold = still;
                now.into_iter().for_each(|waiting| self.place(state, waiting));
            }
            Command::Stop(grace) => {
                state.stop_at = Some(Instant::now() + grace);
                let waiting = state.ready.drain(..).chain(state.cold.drain(..));
                waiting.for_each(|w| self.refuse(&w.output, EngineError::Stopping));
            }
        }
    }

    /// Puts a request where it belongs: in line, or beside it until its adapter is there.
    fn place(&self, state: &mut State, mut waiting: Waiting) {
        let Some(generation) = waiting.request.generation.clone() else { return state.ready.push_back(waiting) };
        let commands = self.commands.clone();
        let loaded = move |generation| _ = commands.send(Command::Loaded(generation));
        match self.registry.get(&waiting.request.base, &generation, loaded) {
            Found::Ready(lease) => {
                waiting.lease = Some(lease);
                state.ready.push_back(waiting);
            }
            Found::Loading => state.cold.push(waiting),
            Found::Failed(error) => self.refuse(&waiting.output, error),
        }
    }

    fn refuse(&self, output: &mpsc::Sender<Output>, error: EngineError) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        _ = output.try_send(Output::Failed(error));
    }

    /// Moves requests into the batch while there is room, first come first served.
    fn admit(&self, state: &mut State) {
        state.running.retain(|running| !running.output.is_closed());
        while let Some(first) = state.ready.front() {
            let held: usize = state.running.iter().map(|r| Running::reserved(&r.request)).sum();
            let fits = held + Running::reserved(&first.request) <= self.settings.max_cached_tokens;
            let is_full = state.running.len() >= self.settings.max_batch || !(fits || state.running.is_empty());
            if is_full {
                return;
            }
            let Some(Waiting { request, output, lease }) = state.ready.pop_front() else { return };
            match self.bases.get(&request.base).cloned() {
                _ if output.is_closed() => _ = self.waiting.fetch_sub(1, Ordering::Relaxed),
                None => {
                    let message = format!("the base {} is not resident", request.base);
                    self.refuse(&output, EngineError::Adapter(message));
                }
                Some(resident) => {
                    self.waiting.fetch_sub(1, Ordering::Relaxed);
                    state.running.push(Running::new(request, output, resident, lease));
                }
            }
        }
    }

    /// One forward for each base that has running sequences.
    fn step(&self, state: &mut State) -> candle_core::Result<()> {
        // Rows of one adapter stand side by side; sequences keep their order otherwise.
        state
            .running
            .sort_by(|a, b| (&a.request.base, &a.request.generation).cmp(&(&b.request.base, &b.request.generation)));
        let mut ended = vec![false; state.running.len()];
        let mut start = 0;
        while start < state.running.len() {
            let base = state.running[start].resident.base.clone();
            let count = state.running[start..].iter().take_while(|r| Arc::ptr_eq(&r.resident.base, &base)).count();
            let range = start..start + count;
            self.forward(&base, &mut state.running[range.clone()], &mut ended[range])?;
            start += count;
        }
        let mut ended = ended.into_iter();
        state.running.retain(|_| !ended.next().unwrap_or(false));
        Ok(())
    }

    fn forward(&self, base: &Base, running: &mut [Running], ended: &mut [bool]) -> candle_core::Result<()> {
        // Decoding sequences first: a long prompt takes what is left of the step.
        let decoding = running.iter().filter(|r| !r.generated.is_empty()).count();
        let mut budget = self.settings.max_tokens_per_step.saturating_sub(decoding).max(1);
        let mut pieces: Vec<(usize, Vec<u32>)> = Vec::with_capacity(running.len());
        for (i, r) in running.iter().enumerate() {
            let room = if r.generated.is_empty() { budget } else { 1 };
            let piece = r.pending(room);
            if r.generated.is_empty() {
                budget -= piece.len();
            }
            if !piece.is_empty() {
                pieces.push((i, piece));
            }
        }
        let mut sequences = Vec::with_capacity(pieces.len());
        let mut rest = running.iter_mut().enumerate();
        for (i, tokens) in &pieces {
            let Some((_, r)) = rest.find(|(at, _)| at == i) else { continue };
            sequences.push(Sequence { tokens, hook: r.lease.clone(), cache: Some(&mut r.cache) });
        }
        let hidden = base.forward(&mut Batch { sequences, train: None })?;
        let mut wanted = Vec::with_capacity(pieces.len());
        let mut row = 0;
        for (i, tokens) in &pieces {
            let rows = running[*i].wanted_rows(tokens.len());
            wanted.push(row + rows.start..row + rows.end);
            row += tokens.len();
        }
        let mut at = 0;
        while at < pieces.len() {
            // Neighbours with one adapter share the output layer's product.
            let lease = running[pieces[at].0].lease.clone();
            let same = |other: &Option<Lease>| match (&lease, other) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (None, None) => true,
                _ => false,
            };
            let n = pieces[at..].iter().take_while(|(i, _)| same(&running[*i].lease)).count();
            let rows: Vec<u32> = wanted[at..at + n].iter().cloned().flatten().map(|row| row as u32).collect();
            let mut scores = scores(base, &hidden, rows, lease.as_deref())?.into_iter();
            for k in at..at + n {
                let i = pieces[k].0;
                let own: Vec<Vec<f32>> = scores.by_ref().take(wanted[k].len()).collect();
                ended[i] = running[i].advance(&own) == Next::Ended;
            }
            at += n;
        }
        Ok(())
    }
}

fn scores(base: &Base, hidden: &Tensor, rows: Vec<u32>, hook: Option<&dyn Hook>) -> candle_core::Result<Vec<Vec<f32>>> {
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let rows = Tensor::new(rows, &Device::Cpu)?;
    base.logits(&hidden.index_select(&rows, 0)?, hook)?.to_vec2()
}
