//! A step's completions: drawn from the policy as it is, judged, and made rows of.

use candle_core::Result as TensorResult;

use super::{TrainError, order};
use crate::{
    data::{Example, Prompt, Row, Sampled},
    domain::{
        Completion,
        rollout::{Ask, Policy, Reward, Rollout},
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

/// The rows of a step: each prompt's completions, side by side.
pub fn gather(
    world: &World,
    online: &dyn Online,
    policy: &AdapterFiles,
    models: &Models,
    prompts: &[&Prompt],
    place: &Place,
) -> Result<(Vec<Row>, Figures), TrainError> {
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
    let rewards: Vec<f64> = (completions.iter().enumerate())
        .map(|(i, completion)| world.reward.reward(&prompts[i / group].item, completion))
        .collect::<Result<_, _>>()
        .map_err(TrainError::Observer)?;
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
    let groups = |values: &[f64]| values.chunks(group).map(<[f64]>::to_vec).collect::<Vec<_>>();
    let advantages = online.advantages(&groups(&rewards), &groups(&divergences)).concat();
    let rows = texts.iter().enumerate().map(|(i, text)| {
        Row::Sampled(Sampled {
            example: (*text).clone(),
            advantage: advantages[i],
            temperature: draw.temperature,
            old: old.as_ref().map(|old| old[i].clone()),
            reference: reference.as_ref().map(|reference| reference[i].clone()).unwrap_or_default(),
        })
    });
    Ok((rows.collect(), figures(&completions, &groups(&rewards))))
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
    for group in rewards {
        group.iter().for_each(|reward| figures.add("reward", *reward));
        let (_, deviation) = online::moments(group);
        figures.add("reward_std", deviation);
        figures.add("frac_reward_zero_std", f64::from(u8::from(deviation == 0.0)));
    }
    figures
}
