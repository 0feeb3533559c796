//! The engine thread: continuous batching, one forward a step for all rows of a base, whatever their adapters.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Weak,
        atomic::AtomicUsize,
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use super::{
    Bases, EngineError, EngineSettings, Finish, Request, Resident, Task, batch,
    fairness::Fairness,
    prefixes::Prefixes,
    registry::{Found, Lease, Registry},
    reply::Reply,
    sequence::Running,
};
use crate::{
    domain::TaskHead,
    model::{Turns, cache::KvBudget},
};

/// How often an engine without work looks after those that wait for adapters.
const GLANCE: Duration = Duration::from_millis(20);

pub enum Command {
    /// With its adapter, if the sender holds one.
    Request(Box<Request>, Reply, Option<Lease>),
    /// An adapter is in memory now, or has failed.
    Loaded,
    Stop(Duration),
}

/// What the thread starts with.
pub struct Engine {
    pub bases: Bases,
    pub turns: Arc<Turns>,
    pub registry: Arc<Registry>,
    /// How many sequences run.
    pub running: Arc<AtomicUsize>,
    pub settings: EngineSettings,
    /// Its own, so that serving does not wait for what training has put into the common one.
    pub pool: rayon::ThreadPool,
    pub inbox: Receiver<Command>,
    /// For keys and values.
    pub memory: Arc<KvBudget>,
    /// For those who load; the thread ends with the last handle.
    pub commands: Weak<Sender<Command>>,
}

/// A request that waits for its adapter.
struct Waiting {
    request: Box<Request>,
    reply: Reply,
    resident: Resident,
    arrival: u64,
    since: Instant,
}

#[derive(Default)]
struct State {
    /// Their adapters are there, and stay; some had to give their memory back and read again when their turn comes.
    ready: Vec<Running>,
    /// In order of arrival; their adapters are on the way, or have no room yet.
    cold: Vec<Waiting>,
    running: Vec<Running>,
    arrivals: u64,
    fairness: Fairness,
    prefixes: Prefixes,
    stop_at: Option<Instant>,
}

impl State {
    /// The project of every request in hand.
    fn projects(&self) -> impl Iterator<Item = &str> + Clone {
        let here = self.ready.iter().chain(&self.running).map(|running| running.request.project.as_str());
        here.chain(self.cold.iter().map(|waiting| waiting.request.project.as_str()))
    }

    /// Where the request is that comes next, but for those that are held: background work last, then the project that
    /// has had least, then who came first.
    fn next(&self, held: &[u64]) -> Option<usize> {
        (0..self.ready.len()).filter(|i| !held.contains(&self.ready[*i].arrival)).min_by_key(|i| {
            let ready = &self.ready[*i];
            (ready.request.is_background, self.fairness.served(&ready.request.project), ready.arrival)
        })
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.ready.is_empty()
    }

    /// What nobody wants any more fails before it has spoken, and ends after.
    fn expire(&mut self) {
        let now = Instant::now();
        let is_late = |request: &Request| request.deadline.is_some_and(|deadline| deadline <= now);
        for waiting in self.cold.iter_mut().filter(|waiting| is_late(&waiting.request)) {
            waiting.reply.fail(EngineError::Timeout);
        }
        for late in self.ready.iter_mut().chain(&mut self.running).filter(|running| is_late(&running.request)) {
            match late.has_spoken() {
                true => late.reply.done(Finish::Length),
                false => late.reply.fail(EngineError::Timeout),
            }
        }
    }

    /// Whoever went away frees the place and the adapter at once.
    fn forget_the_gone(&mut self) {
        self.ready.retain(|ready| !ready.reply.is_ended());
        self.cold.retain(|waiting| !waiting.reply.is_ended());
        self.running.retain(|running| !running.reply.is_ended());
    }
}

impl Engine {
    /// Works until it is told to stop. What is left then, here or on its way, hears of the stop as it is dropped.
    pub fn run(self) {
        let mut state = State::default();
        let serving = self.turns.serving();
        while self.listen(&mut state) {
            state.expire();
            state.forget_the_gone();
            self.warm(&mut state);
            self.admit(&mut state);
            let begun = Instant::now();
            serving.close();
            self.step(&mut state);
            state.forget_the_gone();
            if state.is_idle() { serving.open() } else { serving.slice(begun.elapsed()) }
        }
    }

    /// Takes what has come, and waits for it when there is nothing else to do; false at the end.
    fn listen(&self, state: &mut State) -> bool {
        if state.is_idle() {
            if state.stop_at.is_some() {
                return false;
            }
            let patience = if state.cold.is_empty() { Duration::MAX } else { GLANCE };
            match self.inbox.recv_timeout(patience) {
                Ok(command) => self.take(state, command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        while let Ok(command) = self.inbox.try_recv() {
            self.take(state, command);
        }
        state.stop_at.is_none_or(|at| Instant::now() < at)
    }

    fn take(&self, state: &mut State, command: Command) {
        match command {
            Command::Request(request, mut reply, lease) if state.stop_at.is_none() => {
                let Some(resident) = self.bases.get(&request.base).cloned() else {
                    let message = format!("the base {} is not resident", request.base);
                    return reply.fail(EngineError::Adapter(message));
                };
                state.arrivals += 1;
                let mut fairness = std::mem::take(&mut state.fairness);
                fairness.join(&request.project, state.projects());
                state.fairness = fairness;
                let (arrival, since) = (state.arrivals, Instant::now());
                if let Some(reason) = lease.as_ref().and_then(|lease| refusal(lease.task_head(), &request.task)) {
                    return reply.fail(EngineError::Task(reason));
                }
                if request.adapter.is_some() && lease.is_none() {
                    state.cold.push(Waiting { request, reply, resident, arrival, since });
                } else {
                    state.ready.push(Running::new(request, reply, resident, lease, arrival, &self.memory));
                }
            }
            // Dropped: its sender hears of the stop.
            Command::Request(..) => {}
            Command::Loaded => {}
            Command::Stop(grace) => {
                state.stop_at = Some(Instant::now() + grace);
                state.ready.clear();
                state.cold.clear();
            }
        }
    }

    /// Lines those up whose adapters are there. Once one finds no room, those behind it wait too: the adapters in use
    /// become free in time, and nobody is overtaken for ever.
    fn warm(&self, state: &mut State) {
        let mut is_full = false;
        for mut waiting in std::mem::take(&mut state.cold) {
            if waiting.since.elapsed() > self.settings.adapter_patience {
                waiting.reply.fail(EngineError::Late(self.settings.adapter_patience));
                continue;
            }
            match waiting.request.adapter.as_ref().filter(|_| !is_full) {
                None => state.cold.push(waiting),
                Some(adapter) => match self.registry.get(&waiting.resident, adapter, self.when_loaded()) {
                    Found::Ready(lease) => match refusal(lease.task_head(), &waiting.request.task) {
                        Some(reason) => waiting.reply.fail(EngineError::Task(reason)),
                        None => {
                            let Waiting { request, reply, resident, arrival, .. } = waiting;
                            let running = Running::new(request, reply, resident, Some(lease), arrival, &self.memory);
                            state.ready.push(running);
                        }
                    },
                    Found::Failed(error) => waiting.reply.fail(error),
                    found => {
                        is_full = matches!(found, Found::NoRoom);
                        state.cold.push(waiting);
                    }
                },
            }
        }
    }

    fn when_loaded(&self) -> impl FnOnce() + Send + 'static {
        let commands = self.commands.clone();
        move || _ = commands.upgrade().map(|commands| commands.send(Command::Loaded))
    }

    /// Moves requests into the batch while there is room, each project in its turn.
    fn admit(&self, state: &mut State) {
        // What those in the batch come to take soon: all that they know, and a page more.
        let mut wanted: usize = state.running.iter().map(|r| r.wanted() + r.cache.page_bytes()).sum();
        // Who begins as one that is just being read waits until that is done: it reads the rest only.
        let mut held = Vec::new();
        while let Some(next) = state.next(&held).filter(|_| state.running.len() < self.settings.max_batch) {
            let ready = &mut state.ready[next];
            if state.prefixes.is_coming(ready, &state.running) {
                held.push(ready.arrival);
                continue;
            }
            let shared = state.prefixes.find(ready);
            let known = shared.as_ref().map_or(0, |(_, pages)| pages.iter().map(|page| page.bytes()).sum());
            let bytes = ready.wanted().saturating_sub(known);
            let is_alone = state.running.is_empty();
            let room = || self.memory.free() + state.prefixes.evictable();
            let more = wanted + bytes + if is_alone { 0 } else { ready.cache.page_bytes() };
            if more > self.memory.free() && more > room() {
                if !is_alone {
                    return;
                }
                let mut ready = state.ready.swap_remove(next);
                let (bytes, limit) = (ready.wanted(), self.memory.limit());
                match ready.has_spoken() {
                    true => ready.reply.done(Finish::Length),
                    false => ready.reply.fail(EngineError::Memory { bytes, limit }),
                }
                continue;
            }
            let mut ready = state.ready.swap_remove(next);
            wanted += bytes + ready.cache.page_bytes();
            if let Some((chain, pages)) = shared {
                ready.share(chain, pages);
            }
            if ready.begin(&self.running) {
                state.fairness.charge(&ready.request.project, ready.request.prompt.len(), 0);
            }
            state.running.push(ready);
        }
    }

    /// How many tokens each sequence of a batch reads in this step. Where pages run out, what nobody has goes first;
    /// then those whose turn is last give theirs back, and read again later. `is_all` says that nobody else has any.
    fn plan(&self, batch: &mut [Running], prefixes: &mut Prefixes, is_all: bool) -> Vec<usize> {
        loop {
            let wishes: Vec<_> = batch.iter().map(Running::wish).collect();
            let shares = batch::share(&wishes, self.settings.max_tokens_per_step);
            let missing: usize = batch.iter().zip(&shares).map(|(running, n)| running.bytes_for(*n)).sum();
            let free = self.memory.free();
            if missing <= free {
                return shares;
            }
            if prefixes.evict(missing - free) > 0 {
                continue;
            }
            let mut active: Vec<&mut Running> = batch.iter_mut().filter(|running| !running.is_paused).collect();
            active.sort_by_key(|running| (running.request.is_background, running.rank, running.arrival));
            let is_alone = is_all && active.len() == 1;
            match active.pop() {
                None => return shares,
                // The text has come to fill all the memory that there is.
                Some(last) if is_alone => {
                    last.reply.done(Finish::Length);
                    last.pause();
                }
                Some(last) => last.pause(),
            }
        }
    }

    /// One forward for each base that has running sequences. A failure ends the sequence that fails alone too, and no
    /// other: the rest read again what they had read.
    fn step(&self, state: &mut State) {
        let State { running, ready, fairness, prefixes, .. } = state;
        for running in running.iter_mut() {
            running.rank = fairness.served(&running.request.project);
        }
        // Rows of one adapter stand side by side.
        running.sort_by(|a, b| order(a).cmp(&order(b)));
        let together = |a: &Running, b: &Running| {
            Arc::ptr_eq(&a.resident.base, &b.resident.base) && !a.is_suspect && !b.is_suspect
        };
        let all = running.len();
        for batch in running.chunk_by_mut(together) {
            let is_all = batch.len() == all;
            let shares = self.plan(batch, prefixes, is_all);
            // Inside the pool: the many short parallel regions of a step start without waking anybody.
            let forward = || self.pool.install(|| batch::forward(batch, &shares));
            let failure = match catch_unwind(AssertUnwindSafe(forward)) {
                Ok(Ok(())) => {
                    for running in batch.iter_mut() {
                        let made = running.take_made();
                        fairness.charge(&running.request.project, 0, made);
                        prefixes.keep(running);
                    }
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => "a step of the engine crashed".to_owned(),
            };
            tracing::error!(sequences = batch.len(), "engine: {failure}");
            match batch {
                [alone] => alone.reply.fail(EngineError::Internal(failure)),
                _ => batch.iter_mut().for_each(|running| {
                    running.is_suspect = true;
                    running.read_again();
                }),
            }
        }
        ready.extend(running.extract_if(.., |running| running.is_paused).map(Running::resumed));
    }
}

/// Why an adapter cannot do a task.
fn refusal(head: Option<&TaskHead>, task: &Task) -> Option<&'static str> {
    match (head, task) {
        (None, Task::Classify { .. }) => Some("the model writes text: it neither scores nor labels it"),
        (Some(head), Task::Classify { rows, .. }) if head.reads() == *rows => None,
        (Some(TaskHead::Score), _) => Some("the model scores answers: messages, or prompt and completion"),
        (Some(TaskHead::Sequence { .. }), _) => Some("the model labels texts: a string, or an object with text"),
        (Some(TaskHead::Token { .. }), _) => Some("the model tags words: an object with tokens"),
        (None, _) => None,
    }
}

/// Sequences of one base, then of one adapter, side by side, in order of arrival; suspects behind the others.
fn order(running: &Running) -> (&str, bool, Option<usize>, u64) {
    let request = &running.request;
    // Where it lies in memory: as good a name as any, also for those that have no other.
    let lease = running.lease.as_ref().map(|lease| Arc::as_ptr(lease).addr());
    (&request.base, running.is_suspect, lease, running.arrival)
}
