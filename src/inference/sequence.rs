//! One running completion.

use tokio::sync::mpsc;

use super::{
    Finish, Output, Request, Resident, TokenLogprob,
    registry::Lease,
    sample::{History, choose, logprob},
};
use crate::model::SequenceCache;

pub struct Running {
    pub request: Box<Request>,
    pub output: mpsc::Sender<Output>,
    pub resident: Resident,
    pub lease: Option<Lease>,
    pub cache: SequenceCache,
    pub generated: Vec<u32>,
    prompt_logprobs: Vec<Option<TokenLogprob>>,
}

/// Whether a sequence goes on.
#[derive(PartialEq, Eq)]
pub enum Next {
    Continue,
    Ended,
}

impl Running {
    pub fn new(request: Box<Request>, output: mpsc::Sender<Output>, resident: Resident, lease: Option<Lease>) -> Self {
        let cache = resident.base.new_cache();
        Self { request, output, resident, lease, cache, generated: Vec::new(), prompt_logprobs: vec![None] }
    }

    /// Tokens that the cache can come to hold.
    pub fn reserved(request: &Request) -> usize {
        request.prompt.len() + request.max_tokens
    }

    /// The next tokens to feed, at most `budget`: what is left of the prompt, or the last token.
    pub fn pending(&self, budget: usize) -> Vec<u32> {
        let fed = self.cache.len();
        let prompt = &self.request.prompt;
        match fed.checked_sub(prompt.len()) {
            None => prompt[fed..].iter().take(budget).copied().collect(),
            Some(fed) => self.generated[fed..].iter().take(1).copied().collect(),
        }
    }

    /// Which of the rows just computed need scores: all while the prompt's are wanted, else only the last one once
    /// the prompt is read.
    pub fn wanted_rows(&self, n: usize) -> std::ops::Range<usize> {
        let is_read = self.cache.len() >= self.request.prompt.len();
        let in_prompt = self.generated.is_empty();
        match (self.request.prompt_logprobs, is_read) {
            (Some(_), _) if in_prompt => 0..n,
            (_, true) => n - 1..n,
            (_, false) => n..n,
        }
    }

    /// Takes the scores of the wanted rows, in order.
    pub fn advance(&mut self, rows: &[Vec<f32>]) -> Next {
        if let (Some(top), true) = (self.request.prompt_logprobs, self.generated.is_empty()) {
            for scores in rows {
                // The scores behind token i speak of token i + 1.
                if let Some(next) = self.request.prompt.get(self.prompt_logprobs.len()) {
                    self.prompt_logprobs.push(Some(logprob(scores, *next, top)));
                }
            }
        }
        if self.cache.len() < self.request.prompt.len() {
            return Next::Continue;
        }
        if self.generated.is_empty() && self.request.prompt_logprobs.is_some() {
            let all = std::mem::take(&mut self.prompt_logprobs);
            if self.send(Output::Prompt(all)) == Next::Ended {
                return Next::Ended;
            }
        }
        if self.request.max_tokens == 0 {
            return self.end(Finish::Length);
        }
        let Some(scores) = rows.last() else { return Next::Continue };
        let history = History { prompt: &self.request.prompt, generated: &self.generated };
        let id = choose(scores, &self.request.sampling, &history);
        if self.request.stop_ids.contains(&id) && !self.request.sampling.ignore_eos {
            return self.end(Finish::Stop);
        }
        let logprob = self.request.logprobs.map(|top| logprob(scores, id, top));
        self.generated.push(id);
        if self.send(Output::Token { id, logprob }) == Next::Ended {
            return Next::Ended;
        }
        if self.generated.len() == self.request.max_tokens { self.end(Finish::Length) } else { Next::Continue }
    }

    fn end(&self, finish: Finish) -> Next {
        self.send(Output::Done(finish));
        Next::Ended
    }

    /// The channel has room for all that a request can make; a failure means that the reader is gone.
    fn send(&self, output: Output) -> Next {
        if self.output.try_send(output).is_ok() { Next::Continue } else { Next::Ended }
    }
}
