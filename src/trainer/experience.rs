//! A step's completions: drawn from the policy as it is, judged, and made rows of.

use candle_core::Result as TensorResult;

use super::{TrainError, order};
use crate::{
    data::{Example, Prompt, Row, Sampled},
    domain::{
        Completion,
        rollout::{Answer, Ask, Policy, Reward, Rollout, Ungraded},
    },
    methods::AdapterFiles,
    objectives::{Figures, Models, Online, online},
};

/// Log-probabilities of each row's trained tokens.
type Score<'a> = dyn Fn(&[&Example]) -> TensorResult<Vec<Vec<f64>>> + 'a;

/// Where completions and their worth come from.
#[derive(Clone, Copy)]
pub struct World<'a> {
    pub rollout: &'a dyn Rollout,
    pub reward: &'a dyn Reward,
}

/// Where a step stands: completions are a function of it and of the policy.
pub struct Place {
    pub seed: u64,
    pub step: u64,
}

/// A step's completions.
pub struct Gathered {
    /// Each prompt's completions, side by side.
    pub rows: Vec<Row>,
    pub figures: Figures,
    /// What is to be said of completions without a reward.
    pub warning: Option<String>,
}

pub fn gather(
    world: &World,
    online: &dyn Online,
    policy: &AdapterFiles,
    models: &Models,
    prompts: &[&Prompt],
    place: &Place,
) -> Result<Gathered, TrainError> {
    let draw = online.draw();
    let group = draw.num_generations as usize;
    let ask = |(i, prompt): (usize, &&Prompt)| Ask {
        prompt: prompt.text.ids.clone(),
        max_tokens: draw.max_completion_length as usize,
        temperature: draw.temperature,
        seed: order::rollout_key(place.seed, place.step, i as u64),
    };
    let asks = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, group));
    let asks: Vec<Ask> = asks.enumerate().map(ask).collect();
    let policy = Policy { config: &policy.config, weights: &policy.weights };
    let completions = world.rollout.sample(policy, &asks).map_err(TrainError::Observer)?;
    let answer = |(i, completion): (usize, _)| Answer { item: &prompts[i / group].item, completion };
    let answers: Vec<Answer> = completions.iter().enumerate().map(answer).collect();
    let found = world.reward.rewards(&answers).map_err(TrainError::Observer)?;
    let warning = ungraded(&found, draw.max_ungraded)?;
    let rewards: Vec<Option<f64>> = found.into_iter().map(Result::ok).collect();
    let texts: Vec<Example> =
        completions.iter().enumerate().map(|(i, completion)| text(prompts[i / group], completion)).collect();
    let texts: Vec<&Example> = texts.iter().collect();
    let apart = |needed: bool, score: &Score| match needed {
        true => batched(&texts, group, score).map(Some),
        false => Ok(None),
    };
    let reference = apart(online.has_reference(), &|texts| online::reference(models, texts, draw.temperature))?;
    let is_kept = draw.num_iterations > 1 || online.has_reference();
    let old = apart(is_kept, &|texts| online::policy(models, texts, draw.temperature))?;
    let divergence = |i: usize| match (&old, &reference) {
        (Some(old), Some(reference)) => old[i].iter().zip(&reference[i]).map(|(old, reference)| old - reference).sum(),
        _ => 0.0,
    };
    let divergences: Vec<f64> = (0..texts.len()).map(divergence).collect();
    let advantages = advantages(online, &rewards, &divergences, group);
    let rows = texts.iter().enumerate().map(|(i, text)| {
        Row::Sampled(Sampled {
            example: (*text).clone(),
            advantage: advantages[i],
            temperature: draw.temperature,
            old: old.as_ref().map(|old| old[i].clone()),
            reference: reference.as_ref().map(|reference| reference[i].clone()).unwrap_or_default(),
        })
    });
    let graded: Vec<Vec<f64>> = rewards.chunks(group).map(|group| group.iter().flatten().copied().collect()).collect();
    let mut figures = figures(&completions, &graded);
    rewards.iter().for_each(|reward| figures.add("frac_ungraded", f64::from(u8::from(reward.is_none()))));
    Ok(Gathered { rows: rows.collect(), figures, warning })
}

/// What is to be said where rewards are missing; too many of them are an error.
fn ungraded(found: &[Result<f64, Ungraded>], most: f64) -> Result<Option<String>, TrainError> {
    let missing: Vec<&str> =
        found.iter().filter_map(|reward| reward.as_ref().err()).map(|why| why.0.as_str()).collect();
    let Some(first) = missing.first() else { return Ok(None) };
    let text = format!("{} of {} completions have no reward: {first}", missing.len(), found.len());
    if missing.len() as f64 > most * found.len() as f64 {
        return Err(TrainError::Ungraded(format!("{text}. max_ungraded is {most}")));
    }
    Ok(Some(text))
}

/// Among the completions of each group that have a reward; those without one, and those that are alone, teach nothing.
fn advantages(online: &dyn Online, rewards: &[Option<f64>], divergences: &[f64], group: usize) -> Vec<f64> {
    let graded: Vec<Vec<(f64, f64)>> = (rewards.chunks(group).zip(divergences.chunks(group)))
        .map(|(rewards, apart)| rewards.iter().zip(apart).filter_map(|(r, d)| r.map(|r| (r, *d))).collect())
        .filter(|group: &Vec<_>| group.len() > 1)
        .collect();
    let part =
        |of: fn(&(f64, f64)) -> f64| graded.iter().map(|group| group.iter().map(of).collect()).collect::<Vec<_>>();
    let mut found = online.advantages(&part(|(r, _)| *r), &part(|(_, d)| *d)).into_iter().flatten();
    let of_group = |rewards: &[Option<f64>]| {
        let is_alone = rewards.iter().flatten().count() < 2;
        let of = |reward: &Option<f64>| reward.filter(|_| !is_alone).and_then(|_| found.next()).unwrap_or(0.0);
        rewards.iter().map(of).collect::<Vec<f64>>()
    };
    rewards.chunks(group).flat_map(of_group).collect()
}

/// A prompt and its completion, which alone is trained on.
fn text(prompt: &Prompt, completion: &Completion) -> Example {
    let labels = prompt.text.ids.iter().map(|_| None).chain(completion.ids.iter().copied().map(Some));
    let ids = prompt.text.ids.iter().chain(&completion.ids).copied();
    Example { line: prompt.text.line, ids: ids.collect(), labels: labels.collect() }
}

/// Some texts at a time: a step's completions are many.
fn batched(texts: &[&Example], size: usize, score: &Score) -> Result<Vec<Vec<f64>>, TrainError> {
    let parts = texts.chunks(size).map(score).collect::<TensorResult<Vec<_>>>()?;
    Ok(parts.concat())
}

fn figures(completions: &[Completion], rewards: &[Vec<f64>]) -> Figures {
    let mut figures = Figures::default();
    for completion in completions {
        figures.add("completions/mean_length", completion.ids.len() as f64);
        figures.add("completions/clipped_ratio", f64::from(u8::from(!completion.is_ended)));
    }
    for group in rewards.iter().filter(|group| !group.is_empty()) {
        group.iter().for_each(|reward| figures.add("reward", *reward));
        let (_, deviation) = online::moments(group);
        figures.add("reward_std", deviation);
        figures.add("frac_reward_zero_std", f64::from(u8::from(deviation == 0.0)));
    }
    figures
}
