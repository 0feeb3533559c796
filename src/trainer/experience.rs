//! A step's completions: drawn from the policy as it is, judged, and made rows of.

use super::{TrainError, order};
use crate::{
    data::{Example, Prompt, Row, Sampled},
    domain::{
        Completion,
        rollout::{Answer, Ask, Policy, Reward, Rollout, Ungraded},
    },
    methods::AdapterFiles,
    objectives::{Drawn, Figures, Models, Online, online, score::Spoken},
};

/// Texts in one forward pass, at least.
const TOGETHER: usize = 8;

/// Where completions and their worth come from.
#[derive(Clone, Copy)]
pub struct World<'a> {
    pub rollout: &'a dyn Rollout,
    pub reward: &'a dyn Reward,
}

/// Where a step stands: what it learns from is a function of it and of the policy.
pub struct Place {
    pub seed: u64,
    pub step: u64,
    /// The weight of the divergence from the reference.
    pub kl_coef: f64,
}

/// A step's completions.
pub struct Gathered {
    /// Each prompt's completions, side by side: those that have a reward.
    pub rows: Vec<Row>,
    pub figures: Figures,
    /// Their mean divergence from the reference, `Σ log π − log π_ref`; none without one.
    pub kl: Option<f64>,
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
    let found: Vec<Result<f64, Ungraded>> = found.into_iter().map(finite).collect();
    let warning = ungraded(&found, draw.max_ungraded)?;
    let kept: Vec<(usize, f64)> =
        found.into_iter().enumerate().filter_map(|(i, reward)| Some((i, reward.ok()?))).collect();
    let texts: Vec<Example> = kept.iter().map(|(i, _)| text(prompts[i / group], &completions[*i])).collect();
    let texts: Vec<&Example> = texts.iter().collect();
    let spoken = speak(online, models, &texts, group)?;
    let mut groups: Vec<Vec<Drawn>> = vec![Vec::new(); prompts.len()];
    for (row, (i, reward)) in kept.iter().enumerate() {
        let of = |table: &Vec<Vec<f64>>| table.get(row).cloned().unwrap_or_default();
        groups[i / group].push(Drawn {
            reward: *reward,
            is_ended: completions[*i].is_ended,
            old: of(&spoken.policy.log_probs),
            reference: of(&spoken.reference),
            values: of(&spoken.policy.values),
        });
    }
    let (kl, mut figures) = figures(&completions, &groups, place.kl_coef);
    figures.add_many("frac_ungraded", (completions.len() - kept.len()) as f64, completions.len());
    let credits = online.credit(&groups, place.kl_coef);
    let rows = texts.into_iter().zip(groups.into_iter().flatten()).zip(credits).map(|((text, drawn), credit)| {
        Row::Sampled(Sampled {
            example: text.clone(),
            advantage: credit.advantage,
            temperature: draw.temperature,
            old: Some(drawn.old).filter(|old| !old.is_empty()),
            reference: drawn.reference,
            worth: credit.worth,
        })
    });
    Ok(Gathered { rows: rows.collect(), figures, kl, warning })
}

/// What the models say of completions before the first update.
#[derive(Default)]
struct Words {
    policy: Spoken,
    reference: Vec<Vec<f64>>,
}

/// Some texts at a time, as far as it is needed: a step's completions are many.
fn speak(online: &dyn Online, models: &Models, texts: &[&Example], size: usize) -> Result<Words, TrainError> {
    let (draw, mut words) = (online.draw(), Words::default());
    let has_reference = online.has_reference();
    for texts in texts.chunks(size.max(TOGETHER)) {
        if online.reads_policy() {
            let Spoken { log_probs, values } = online::policy(models, texts, draw.temperature)?;
            words.policy.log_probs.extend(log_probs);
            words.policy.values.extend(values);
        }
        if has_reference {
            words.reference.extend(online::reference(models, texts, draw.temperature)?);
        }
    }
    Ok(words)
}

/// A reward that is no number is none.
fn finite(reward: Result<f64, Ungraded>) -> Result<f64, Ungraded> {
    reward.and_then(|reward| match reward.is_finite() {
        true => Ok(reward),
        false => Err(Ungraded(format!("the reward is {reward}"))),
    })
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

/// A prompt and its completion, which alone is trained on.
fn text(prompt: &Prompt, completion: &Completion) -> Example {
    let labels = prompt.text.ids.iter().map(|_| None).chain(completion.ids.iter().copied().map(Some));
    let ids = prompt.text.ids.iter().chain(&completion.ids).copied();
    Example { line: prompt.text.line, ids: ids.collect(), labels: labels.collect() }
}

/// The mean divergence, and what is told of a step.
fn figures(completions: &[Completion], groups: &[Vec<Drawn>], kl_coef: f64) -> (Option<f64>, Figures) {
    let mut figures = Figures::default();
    for completion in completions {
        figures.add("completions/mean_length", completion.ids.len() as f64);
        figures.add("completions/clipped_ratio", f64::from(u8::from(!completion.is_ended)));
    }
    for drawn in groups.iter().flatten() {
        figures.add("reward", drawn.reward);
        if !drawn.reference.is_empty() {
            let apart: f64 = drawn.log_ratios().sum();
            figures.add("objective/kl", apart);
            figures.add("objective/rlhf_reward", drawn.reward - kl_coef * apart);
            figures.add("objective/kl_coef", kl_coef);
        }
    }
    for group in groups.iter().filter(|group| group.len() > 1) {
        let rewards: Vec<f64> = group.iter().map(|drawn| drawn.reward).collect();
        let (_, deviation) = online::moments(&rewards);
        figures.add("reward_std", deviation);
        figures.add("frac_reward_zero_std", f64::from(u8::from(deviation == 0.0)));
    }
    (figures.mean("objective/kl"), figures)
}
