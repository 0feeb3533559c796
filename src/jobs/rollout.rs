//! Completions of the policy that is trained, from the engine that serves; and graders over what it wrote.

use std::{collections::VecDeque, time::Duration};

use anyhow::{Context as _, bail};

use super::judge::Judges;
use crate::{
    domain::{
        Completion,
        rollout::{Answer, Ask, Policy, Reward, Rollout, Ungraded},
        spec::Grader,
    },
    inference::{EngineError, Handle, InMemory, Output, Request, Resident, Sampling, Task},
    methods::AdapterFiles,
    objectives::grade::Scene,
};

/// Completions under way at once: the engine batches them, and others wait beside them.
const TOGETHER: usize = 32;
/// How long a full queue is left alone.
const PATIENCE: Duration = Duration::from_millis(50);

/// Draws from the engine.
pub struct EngineRollout {
    pub engine: Handle,
    pub resident: Resident,
    pub project: String,
}

impl Rollout for EngineRollout {
    fn sample(&self, policy: Policy, asks: &[Ask]) -> anyhow::Result<Vec<Completion>> {
        let files = AdapterFiles { config: policy.config.to_vec(), weights: policy.weights.to_vec() };
        let policy = InMemory::new(&files, &self.resident).context("the policy of a step")?;
        let mut under_way = VecDeque::with_capacity(TOGETHER);
        let mut completions = Vec::with_capacity(asks.len());
        for ask in asks {
            if under_way.len() == TOGETHER
                && let Some(oldest) = under_way.pop_front()
            {
                completions.push(self.read(oldest)?);
            }
            under_way.push_back(self.submit(ask, &policy)?);
        }
        for receiver in under_way {
            completions.push(self.read(receiver)?);
        }
        Ok(completions)
    }
}

type Outputs = tokio::sync::mpsc::Receiver<Output>;

impl EngineRollout {
    fn submit(&self, ask: &Ask, policy: &InMemory) -> anyhow::Result<Outputs> {
        let request = Request {
            base: self.resident.base.info.id.clone(),
            adapter: Some(policy.adapter.clone()),
            project: self.project.clone(),
            prompt: ask.prompt.clone(),
            max_tokens: ask.max_tokens,
            sampling: Sampling { temperature: ask.temperature as f32, seed: ask.seed, ..Sampling::default() },
            // The token that ends a completion is part of what is learnt: it has to come back.
            stop_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            task: Task::Complete,
            grammar: None,
            is_background: true,
            deadline: None,
        };
        loop {
            match self.engine.submit_with(request.clone(), policy.lease.clone()) {
                Err(EngineError::Full { .. }) => std::thread::sleep(PATIENCE),
                other => return Ok(other?),
            }
        }
    }

    fn read(&self, mut outputs: Outputs) -> anyhow::Result<Completion> {
        let mut ids = Vec::new();
        loop {
            match outputs.blocking_recv() {
                Some(Output::Token { id, .. }) => {
                    ids.push(id);
                    if self.resident.text.stop_ids.contains(&id) {
                        return Ok(Completion { ids, is_ended: true });
                    }
                }
                Some(Output::Done(_)) => return Ok(Completion { ids, is_ended: false }),
                Some(Output::Failed(error)) => return Err(error.into()),
                Some(Output::Reused(_) | Output::Prompt(_) | Output::Scores { .. } | Output::Embedding(_)) => {}
                None => bail!("the engine ended a completion without a word"),
            }
        }
    }
}

/// A grader over the completion's text, and those whom it asks.
pub struct GraderReward {
    pub grader: Grader,
    pub judges: Judges,
    pub resident: Resident,
    pub runtime: tokio::runtime::Handle,
}

impl Reward for GraderReward {
    fn rewards(&self, answers: &[Answer]) -> anyhow::Result<Vec<Result<f64, Ungraded>>> {
        let scene = |answer: &Answer| Ok(Scene::new(answer.item, &written(&self.resident, answer.completion)?));
        let scenes = answers.iter().map(scene).collect::<anyhow::Result<Vec<_>>>()?;
        let graded = self.runtime.block_on(self.judges.grade_all(&self.grader, &scenes))?;
        Ok(graded.into_iter().map(|graded| graded.reward).collect())
    }
}

/// The completion's text, without the token that ended it.
fn written(resident: &Resident, completion: &Completion) -> anyhow::Result<String> {
    let written = completion.ids.len() - usize::from(completion.is_ended);
    Ok(resident.text.tokenizer.decode(&completion.ids[..written], true)?)
}
