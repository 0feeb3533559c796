//! One running completion.

use super::{
    EngineError, Finish, Output, Pooling, Request, Resident, TokenLogprob,
    batch::Wish,
    registry::Lease,
    reply::Reply,
    sample::{History, choose, logprob},
};
use crate::{
    model::SequenceCache,
    text::{Grammar, TextError},
};

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
    /// Less is earlier: what its project has had.
    pub rank: u64,
    generated: Vec<u32>,
    /// Of the generated tokens, those that its project was charged for.
    counted: usize,
    /// What the rows of hidden states come to so far.
    pooled: Vec<f32>,
    /// Of the prompt's tokens so far; none once they are sent.
    prompt_logprobs: Option<Vec<Option<TokenLogprob>>>,
}

impl Running {
    pub fn new(request: Box<Request>, reply: Reply, resident: Resident, lease: Option<Lease>, arrival: u64) -> Self {
        let cache = resident.base.new_cache();
        let prompt_logprobs = request.prompt_logprobs.map(|_| vec![None]);
        let generated = Vec::new();
        let (is_suspect, rank, counted, pooled) = (false, 0, 0, Vec::new());
        Self {
            request,
            reply,
            resident,
            lease,
            cache,
            arrival,
            is_suspect,
            rank,
            generated,
            counted,
            pooled,
            prompt_logprobs,
        }
    }

    /// Tokens that the cache can come to hold.
    pub fn reserved(request: &Request) -> usize {
        request.prompt.len() + request.max_tokens
    }

    fn unread(&self) -> usize {
        self.request.prompt.len() + self.generated.len() - self.cache.len()
    }

    /// What it would read in a step of its own.
    pub fn wish(&self) -> Wish {
        let tokens = self.unread();
        Wish { arrival: (self.rank, self.arrival), tokens, is_decoding: tokens == 1 && !self.generated.is_empty() }
    }

    /// The next `n` tokens to read: of the prompt, then of what was generated.
    pub fn next_tokens(&self, n: usize) -> Vec<u32> {
        let all = self.request.prompt.iter().chain(&self.generated);
        all.skip(self.cache.len()).take(n).copied().collect()
    }

    /// Which of the `n` rows just computed need scores: all while the prompt's are wanted, else only the last one
    /// once everything is read.
    pub fn wanted_rows(&self, n: usize) -> std::ops::Range<usize> {
        if self.request.pooling.is_some() {
            return n..n;
        }
        match (self.prompt_logprobs.is_some(), self.unread()) {
            (true, _) => 0..n,
            (false, 0) => n - 1..n,
            (false, _) => n..n,
        }
    }

    /// Tokens generated since it was last asked.
    pub fn take_made(&mut self) -> usize {
        let made = self.generated.len() - self.counted;
        self.counted = self.generated.len();
        made
    }

    /// Takes hidden states of the rows just computed, one behind another.
    pub fn pool(&mut self, hidden: &[f32]) {
        let Some(pooling) = self.request.pooling else { return };
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
        if self.unread() > 0 || self.request.pooling.is_some() {
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

    /// Forgets what a broken step may have left half done: everything is read again, and nothing is said twice.
    pub fn read_again(&mut self) {
        self.cache = self.resident.base.new_cache();
        self.pooled.clear();
        if let Some(found) = &mut self.prompt_logprobs {
            found.truncate(1);
        }
    }
}
