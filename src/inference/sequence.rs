//! One running completion.

use super::{
    EngineError, Finish, Output, Request, Resident, Task, TokenLogprob,
    batch::Wish,
    registry::Lease,
    reply::Reply,
    sample::{History, choose, logprob},
};
use crate::model::SequenceCache;

pub struct Running {
    pub request: Box<Request>,
    pub reply: Reply,
    pub resident: Resident,
    pub lease: Option<Lease>,
    pub cache: SequenceCache,
    /// Grows with every request: who came first.
    pub arrival: u64,
    /// Was in a step that failed; computed by itself from then on, so that only the one at fault ends.
    pub is_suspect: bool,
    generated: Vec<u32>,
    /// Of the prompt's tokens so far; none once they are sent.
    prompt_logprobs: Option<Vec<Option<TokenLogprob>>>,
}

impl Running {
    pub fn new(request: Box<Request>, reply: Reply, resident: Resident, lease: Option<Lease>, arrival: u64) -> Self {
        let cache = resident.base.new_cache();
        let prompt_logprobs = request.prompt_logprobs.map(|_| vec![None]);
        let generated = Vec::new();
        Self { request, reply, resident, lease, cache, arrival, is_suspect: false, generated, prompt_logprobs }
    }

    /// Tokens that the cache can come to hold.
    pub fn reserved(request: &Request) -> usize {
        let before = request.adapter.as_ref().map_or(0, |adapter| adapter.virtual_tokens);
        before + request.prompt.len() + request.max_tokens
    }

    fn unread(&self) -> usize {
        self.request.prompt.len() + self.generated.len() - self.cache.len()
    }

    /// What it would read in a step of its own.
    pub fn wish(&self) -> Wish {
        let tokens = self.unread();
        Wish { arrival: self.arrival, tokens, is_decoding: tokens == 1 && !self.generated.is_empty() }
    }

    /// The next `n` tokens to read: of the prompt, then of what was generated.
    pub fn next_tokens(&self, n: usize) -> Vec<u32> {
        let all = self.request.prompt.iter().chain(&self.generated);
        all.skip(self.cache.len()).take(n).copied().collect()
    }

    /// Which of the `n` rows just computed need scores: all while the prompt's are wanted, else only the last one
    /// once everything is read.
    pub fn wanted_rows(&self, n: usize) -> std::ops::Range<usize> {
        match (self.prompt_logprobs.is_some(), self.unread()) {
            (true, _) => 0..n,
            (false, 0) => n - 1..n,
            (false, _) => n..n,
        }
    }

    /// Takes the scores of the wanted rows, in order.
    pub fn advance(&mut self, rows: &[Vec<f32>]) {
        if rows.iter().flatten().any(|score| !score.is_finite()) {
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
        if self.unread() > 0 {
            return;
        }
        if self.request.task == Task::Score {
            rows.last().and_then(|row| row.first()).iter().for_each(|score| self.reply.send(Output::Score(**score)));
            return self.reply.done(Finish::Stop);
        }
        if let Some(found) = self.prompt_logprobs.take() {
            self.reply.send(Output::Prompt(found));
        }
        if self.request.max_tokens == 0 {
            return self.reply.done(Finish::Length);
        }
        let Some(scores) = rows.last() else { return };
        let history = History { prompt: &self.request.prompt, generated: &self.generated };
        let id = choose(scores, &self.request.sampling, &history);
        if self.request.stop_ids.contains(&id) && !self.request.sampling.ignore_eos {
            return self.reply.done(Finish::Stop);
        }
        let logprob = self.request.logprobs.map(|top| logprob(scores, id, top));
        self.generated.push(id);
        self.reply.send(Output::Token { id, logprob });
        if self.generated.len() == self.request.max_tokens {
            self.reply.done(Finish::Length);
        }
    }

    /// Forgets what a broken step may have left half done: everything is read again, and nothing is said twice.
    pub fn read_again(&mut self) {
        self.cache = self.resident.base.new_cache();
        if let Some(found) = &mut self.prompt_logprobs {
            found.truncate(1);
        }
    }
}
