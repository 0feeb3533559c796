//! One running completion.

use std::{
    ops::Range,
    sync::{Arc, atomic::AtomicUsize},
};

use super::{
    EngineError, Finish, Output, Pooling, Request, Resident, Task, TokenLogprob,
    batch::Wish,
    prefixes::Chain,
    registry::Lease,
    reply::{Place, Reply},
    sample::{History, choose, logprob},
};
use crate::{
    model::{
        SequenceCache,
        cache::{KvBudget, Page},
    },
    text::{Grammar, TextError},
};

pub struct Running {
    pub request: Box<Request>,
    pub reply: Reply,
    pub resident: Resident,
    pub lease: Option<Lease>,
    pub cache: SequenceCache,
    memory: Arc<KvBudget>,
    /// Grows with every request: who came first.
    pub arrival: u64,
    /// Was in a step that failed; computed by itself from then on, so that only the one at fault ends.
    pub is_suspect: bool,
    /// Had to give its pages back: it reads again when its turn comes.
    pub is_paused: bool,
    /// Less is earlier: what its project has had.
    pub rank: u64,
    /// How far its pages are known to others; none where they must not be.
    pub chain: Option<Chain>,
    /// Has been in the batch.
    is_begun: bool,
    generated: Vec<u32>,
    /// Of the generated tokens, those that its project was charged for.
    counted: usize,
    /// What the rows of hidden states come to so far.
    pooled: Vec<f32>,
    /// What the adapter's head has said so far, span by span.
    said: Vec<Vec<f32>>,
    /// Of the prompt's tokens so far; none once they are sent.
    prompt_logprobs: Option<Vec<Option<TokenLogprob>>>,
}

fn new_cache(resident: &Resident, lease: &Option<Lease>, memory: &Arc<KvBudget>) -> SequenceCache {
    let cache = resident.base.cache_within(memory.clone());
    match lease.as_ref().and_then(|lease| lease.first_pass()) {
        Some(_) => cache.of_two_passes(),
        None => cache,
    }
}

impl Running {
    pub fn new(
        request: Box<Request>,
        reply: Reply,
        resident: Resident,
        lease: Option<Lease>,
        arrival: u64,
        memory: &Arc<KvBudget>,
    ) -> Self {
        let cache = new_cache(&resident, &lease, memory);
        let prompt_logprobs = request.prompt_logprobs.map(|_| vec![None]);
        let generated = Vec::new();
        let (is_suspect, is_paused, is_begun, rank, counted) = (false, false, false, 0, 0);
        let (pooled, said) = (Vec::new(), Vec::new());
        let mut new = Self {
            request,
            reply,
            resident,
            lease,
            cache,
            arrival,
            is_suspect,
            is_paused,
            is_begun,
            chain: None,
            memory: memory.clone(),
            rank,
            generated,
            counted,
            pooled,
            said,
            prompt_logprobs,
        };
        new.chain = Chain::start(&new);
        new
    }

    /// Tokens of the prompt and those generated.
    pub fn known(&self) -> usize {
        self.request.prompt.len() + self.generated.len()
    }

    /// Some of the known tokens, in order.
    pub fn tokens(&self, places: Range<usize>) -> impl Iterator<Item = u32> {
        self.request.prompt.iter().chain(&self.generated).skip(places.start).take(places.len()).copied()
    }

    pub fn virtual_tokens(&self) -> usize {
        self.lease.as_ref().map_or(0, |lease| lease.virtual_tokens())
    }

    fn unread(&self) -> usize {
        self.known() - self.cache.len()
    }

    /// Whether it may begin with what others have read: it asks for nothing of these rows but what follows them.
    pub fn may_share(&self) -> bool {
        let is_last = |place: usize| place + 1 == self.known();
        let asks_of_last = self.places().is_none_or(|mut places| places.all(is_last));
        self.cache.is_empty() && self.prompt_logprobs.is_none() && !self.is_embedding() && asks_of_last
    }

    /// Begins with pages that others have read.
    pub fn share(&mut self, chain: Chain, pages: Vec<Arc<Page>>) {
        self.cache.adopt(pages, self.virtual_tokens());
        self.chain = Some(chain);
        if !self.is_begun {
            self.reply.send(Output::Reused(self.cache.len()));
        }
    }

    /// Has made tokens.
    pub fn has_spoken(&self) -> bool {
        !self.generated.is_empty()
    }

    /// Takes its place in the batch; says whether this is the first time.
    pub fn begin(&mut self, running: &Arc<AtomicUsize>) -> bool {
        if self.is_begun {
            return false;
        }
        self.is_begun = true;
        self.reply.move_to(Place::take(running));
        true
    }

    /// Bytes of pages that so many tokens more would take.
    pub fn bytes_for(&self, tokens: usize) -> usize {
        let before = if self.cache.is_empty() && tokens > 0 { self.virtual_tokens() } else { 0 };
        self.cache.missing(before + tokens) * self.cache.page_bytes()
    }

    /// Bytes of pages that all it knows would take.
    pub fn wanted(&self) -> usize {
        self.bytes_for(self.unread())
    }

    /// What it would read in a step of its own.
    pub fn wish(&self) -> Wish {
        let tokens = if self.is_paused { 0 } else { self.unread() };
        let is_decoding = tokens == 1 && !self.generated.is_empty();
        let is_whole = self.lease.as_ref().is_some_and(|lease| lease.sees_ahead());
        Wish { arrival: (self.rank, self.arrival), tokens, is_decoding, is_whole }
    }

    /// The next `n` tokens to read: of the prompt, then of what was generated.
    pub fn next_tokens(&self, n: usize) -> Vec<u32> {
        let read = self.cache.len();
        self.tokens(read..read + n).collect()
    }

    /// Which of the `n` rows just computed need scores: all while the prompt's are wanted, else only the last one
    /// once everything is read.
    pub fn wanted_rows(&self, n: usize) -> std::ops::Range<usize> {
        if self.is_embedding() {
            return n..n;
        }
        if let Some(places) = self.places() {
            let first = self.cache.len() - n;
            let here: Vec<usize> =
                places.filter(|place| (first..first + n).contains(place)).map(|p| p - first).collect();
            return here.iter().min().map_or(n..n, |least| *least..here.iter().max().map_or(n, |most| most + 1));
        }
        match (self.prompt_logprobs.is_some(), self.unread()) {
            (true, _) => 0..n,
            (false, 0) => n - 1..n,
            (false, _) => n..n,
        }
    }

    /// The tokens that speak for the spans that the adapter's head is asked about, in order.
    fn places(&self) -> Option<impl Iterator<Item = usize>> {
        let (Task::Classify { spans, .. }, Some(head)) = (&self.request.task, self.lease.as_ref()?.task_head()) else {
            return None;
        };
        Some(spans.iter().map(|span| head.place(span)))
    }

    /// Takes the head's scores of the wanted rows; the first of them belongs to the first span not yet spoken of.
    fn classify(&mut self, rows: &[&[f32]]) {
        let Some(places) = self.places() else { return };
        let left: Vec<usize> = places.skip(self.said.len()).collect();
        let here = left.iter().map_while(|place| rows.get(place - left[0])).map(|row| row.to_vec());
        let here: Vec<Vec<f32>> = here.collect();
        self.said.extend(here);
        if self.unread() > 0 {
            return;
        }
        if let Some(head) = self.lease.as_ref().and_then(|lease| lease.task_head()) {
            let scores = Output::Scores { head: head.clone(), rows: std::mem::take(&mut self.said) };
            self.reply.send(scores);
        }
        self.reply.done(Finish::Stop);
    }

    /// Tokens generated since it was last asked.
    pub fn take_made(&mut self) -> usize {
        let made = self.generated.len() - self.counted;
        self.counted = self.generated.len();
        made
    }

    pub fn is_embedding(&self) -> bool {
        matches!(self.request.task, Task::Embed(_))
    }

    /// Takes hidden states of the rows just computed, one behind another.
    pub fn pool(&mut self, hidden: &[f32]) {
        let Task::Embed(pooling) = self.request.task else { return };
        let width = self.resident.base.info.hidden;
        self.pooled.resize(width, 0.0);
        for row in hidden.chunks(width) {
            match pooling {
                Pooling::Mean => self.pooled.iter_mut().zip(row).for_each(|(sum, x)| *sum += x),
                Pooling::Last => self.pooled.copy_from_slice(row),
            }
        }
        if self.unread() > 0 {
            return;
        }
        if self.pooled.iter().any(|x| !x.is_finite()) {
            return self.reply.fail(EngineError::Scores);
        }
        self.reply.send(Output::Embedding(std::mem::take(&mut self.pooled)));
        self.reply.done(Finish::Length);
    }

    /// Takes the scores of the wanted rows, in order.
    pub fn advance(&mut self, rows: &[&[f32]]) {
        if rows.iter().copied().flatten().any(|score| !score.is_finite()) {
            return self.reply.fail(EngineError::Scores);
        }
        if let (Some(top), Some(found)) = (self.request.prompt_logprobs, &mut self.prompt_logprobs) {
            for scores in rows {
                // The scores behind token i speak of token i + 1.
                if let Some(next) = self.request.prompt.get(found.len()) {
                    found.push(Some(logprob(scores, *next, top)));
                }
            }
        }
        if matches!(self.request.task, Task::Classify { .. }) {
            return self.classify(rows);
        }
        if self.unread() > 0 || self.is_embedding() {
            return;
        }
        if let Some(found) = self.prompt_logprobs.take() {
            self.reply.send(Output::Prompt(found));
        }
        if self.request.max_tokens == 0 {
            return self.reply.done(Finish::Length);
        }
        let Some(scores) = rows.last() else { return };
        let id = match self.choose(scores) {
            Ok(id) => id,
            Err(error) => return self.reply.fail(EngineError::Grammar(error.to_string())),
        };
        if self.request.stop_ids.contains(&id) && !self.request.sampling.ignore_eos {
            return self.reply.done(Finish::Stop);
        }
        let logprob = self.request.logprobs.map(|top| logprob(scores, id, top));
        if let Some(Err(error)) = self.request.grammar.as_mut().map(|grammar| grammar.take(id)) {
            return self.reply.fail(EngineError::Grammar(error.to_string()));
        }
        self.generated.push(id);
        self.reply.send(Output::Token { id, logprob });
        if self.request.grammar.as_ref().is_some_and(Grammar::is_complete) {
            self.reply.done(Finish::Stop);
        } else if self.generated.len() == self.request.max_tokens {
            self.reply.done(Finish::Length);
        }
    }

    fn choose(&mut self, scores: &[f32]) -> Result<u32, TextError> {
        let Request { prompt, sampling, grammar, .. } = &mut *self.request;
        let history = History { prompt, generated: &self.generated };
        match grammar {
            None => Ok(choose(scores, sampling, &history)),
            Some(grammar) => {
                let mut scores = scores.to_vec();
                grammar.mask(&mut scores)?;
                Ok(choose(&scores, sampling, &history))
            }
        }
    }

    /// Gives its pages back.
    pub fn pause(&mut self) {
        self.is_paused = true;
        self.read_again();
    }

    pub fn resumed(mut self) -> Self {
        self.is_paused = false;
        self
    }

    /// Forgets what it has read, which a broken step may have left half done: everything is read again, and nothing is
    /// said twice.
    pub fn read_again(&mut self) {
        self.cache = new_cache(&self.resident, &self.lease, &self.memory);
        self.chain = Chain::start(self);
        self.pooled.clear();
        self.said.clear();
        if let Some(found) = &mut self.prompt_logprobs {
            found.truncate(1);
        }
    }
}
