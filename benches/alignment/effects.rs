//! The effects: each a small experiment that says what it saw. What its sides are trained with is in `settings.json`.

use anyhow::Result;
use attune::{
    data::{Judged, Pair, Row},
    methods::AdapterFiles,
};
use serde_json::{Value, json};

use crate::{
    lab::{Asked, Lab, NOBODY, Rule, contrasts, mean, pair, questions, rank_correlation, text},
    language::{is_rare, row, share, vowels},
};

pub struct Effect {
    pub name: &'static str,
    pub claim: &'static str,
    pub show: fn(&Lab) -> Result<Found>,
}

pub struct Found {
    pub seen: bool,
    pub figures: Value,
}

pub const EFFECTS: &[Effect] = &[
    Effect { name: "dpo", claim: "dpo tells held-out pairs apart, more than 9 of 10", show: dpo },
    Effect {
        name: "curve",
        claim: "dpo and ppo pay for reward with divergence, and its weight sets the price",
        show: curve,
    },
    Effect {
        name: "hacking",
        claim: "without a divergence term the proxy rises and the true reward falls; with one both rise",
        show: hacking,
    },
    Effect { name: "grpo", claim: "grpo goes from below 20 % to above 60 % in 100 updates", show: grpo },
    Effect { name: "kto", claim: "kto learns from one thumb up to four down, without pairs", show: kto },
    Effect { name: "labels", claim: "a fifth of wrong labels costs dpo little", show: labels },
    Effect {
        name: "length",
        claim: "where length takes the judge in, simpo grows answers less than dpo, and its reward goes less with length",
        show: length,
    },
];

/// Tokens of a completion, at most.
const LONGEST: usize = 12;

/// Streams of prompts: those that are learnt from, and those that are asked afterwards.
const TRAIN: u64 = 1;
const HELD_OUT: u64 = 2;

/// The base's own answers to prompts: the better one of two has more vowels.
fn pairs(lab: &Lab, n: u64, stream: u64) -> Result<Vec<Asked>> {
    Ok(contrasts(lab.ask(&lab.fresh()?, &lab.prompts(n, stream), 6, LONGEST)?, vowels))
}

fn rows(pairs: &[Asked]) -> Vec<Row> {
    pairs.iter().map(pair).collect()
}

fn dpo(lab: &Lab) -> Result<Found> {
    let (train, held) = (pairs(lab, 960, TRAIN)?, pairs(lab, 240, HELD_OUT)?);
    let model = lab.train(lab.settings.side("dpo")?, &rows(&train), &NOBODY)?;
    let [seen, accuracy] = [lab.accuracy(&model, &train)?, lab.accuracy(&model, &held)?];
    let figures = json!({"pairs": train.len(), "held_out": held.len(), "accuracy_train": seen, "accuracy": accuracy});
    Ok(Found { seen: accuracy > 0.9, figures })
}

/// The share of vowels beside the divergence, at several weights of it. The judge of the pairs is as sure as a
/// Bradley–Terry model of `SURE` times the share, so that both objectives have the same optimum at the same weight: the
/// base's distribution times `exp(share/weight)`. Both read as many completions: two each of 960 prompts.
fn curve(lab: &Lab) -> Result<Found> {
    const SURE: f64 = 10.0;
    let (prompts, fresh) = (lab.prompts(960, TRAIN), lab.prompts(64, HELD_OUT));
    let judged = |asked: Asked| {
        let [a, b] = [0, 1].map(|side| vowels(&asked.answers[side]));
        let Row::Pair(pair) = pair(&asked) else { return None };
        Some(Row::Pair(Pair { probability: 1.0 / (1.0 + (SURE * (b - a)).exp()), ..pair }))
    };
    let pairs: Vec<Row> = lab.ask(&lab.fresh()?, &prompts, 2, LONGEST)?.into_iter().filter_map(judged).collect();
    let (asked, rule) = (questions(&prompts), Rule(&|_, answer| vowels(answer)));
    let [start, _] = lab.weigh(&lab.fresh()?, &fresh, LONGEST, vowels)?;
    let points = |name: &str, rows: &[Row]| -> Result<Vec<[f64; 3]>> {
        let side = lab.settings.side(name)?;
        let point = |weight: &f64| {
            let side = match side.objective.as_str() {
                "dpo" => side.with("beta", SURE * weight),
                _ => side.with("kl_coef", *weight),
            };
            let [reward, kl] = lab.weigh(&lab.train(&side, rows, &rule)?, &fresh, LONGEST, vowels)?;
            Ok([*weight, reward, kl])
        };
        lab.settings.weights.iter().map(point).collect()
    };
    let both = [points("curve_dpo", &pairs)?, points("curve_ppo", &asked)?];
    // Less weight, more divergence; and whoever went away from the base got something for it.
    let seen = both.iter().all(|points| {
        points.windows(2).all(|two| two[0][2] < two[1][2]) && points.iter().all(|[_, reward, _]| *reward > start)
    });
    let shown = |points: &[[f64; 3]]| -> Vec<Value> {
        points.iter().map(|[weight, reward, kl]| json!({"weight": weight, "reward": reward, "kl": kl})).collect()
    };
    Ok(Found { seen, figures: json!({"base": start, "dpo": shown(&both[0]), "ppo": shown(&both[1])}) })
}

/// Vowels are wanted. The judge that stands in for it errs where the base seldom goes: it takes a q for two vowels.
fn hacking(lab: &Lab) -> Result<Found> {
    let proxy = |answer: &[u32]| vowels(answer) + 2.0 * share(answer, is_rare);
    let (asked, fresh) = (questions(&lab.prompts(240, TRAIN)), lab.prompts(64, HELD_OUT));
    let rule = Rule(&|_, answer| proxy(answer));
    let weighed = |model: &AdapterFiles| -> Result<[f64; 3]> {
        let [proxy, kl] = lab.weigh(model, &fresh, LONGEST, proxy)?;
        Ok([proxy, lab.weigh(model, &fresh, LONGEST, vowels)?[0], kl])
    };
    let of = |side: &str| weighed(&lab.train(lab.settings.side(side)?, &asked, &rule)?);
    let (start, free, held) = (weighed(&lab.fresh()?)?, of("hacking_free")?, of("hacking_held")?);
    let shown = |[proxy, wanted, kl]: [f64; 3]| json!({"proxy": proxy, "wanted": wanted, "kl": kl});
    let seen = free[0] > held[0] && held[0] > start[0] && free[1] < start[1] && held[1] > start[1];
    Ok(Found { seen, figures: json!({"base": shown(start), "without": shown(free), "with": shown(held)}) })
}

/// The answer has to begin in the row of the alphabet (of four letters) that the prompt ends in.
fn grpo(lab: &Lab) -> Result<Found> {
    let is_right = |prompt: &[u32], answer: &[u32]| {
        let of = |ids: Option<&u32>| ids.and_then(|id| row(*id));
        of(answer.first()).is_some_and(|first| Some(first) == of(prompt.last()))
    };
    let rule = Rule(&|prompt, answer| f64::from(u8::from(is_right(prompt, answer))));
    let (asked, fresh) = (questions(&lab.prompts(1600, TRAIN)), lab.prompts(128, HELD_OUT));
    let passed = |model: &AdapterFiles| -> Result<f64> {
        let asked = lab.ask(model, &fresh, 4, 1)?;
        let right = |asked: &Asked| -> Vec<f64> {
            asked.answers.iter().map(|answer| f64::from(u8::from(is_right(&asked.prompt, answer)))).collect()
        };
        Ok(mean(&asked.iter().flat_map(right).collect::<Vec<_>>()))
    };
    let before = passed(&lab.fresh()?)?;
    let after = passed(&lab.train(lab.settings.side("grpo")?, &asked, &rule)?)?;
    Ok(Found { seen: before < 0.2 && after > 0.6, figures: json!({"before": before, "after": after}) })
}

/// One answer in five is liked, each by itself: those with the largest shares of vowels.
fn kto(lab: &Lab) -> Result<Found> {
    let thumbs = |n: u64, stream: u64| -> Result<[Vec<Asked>; 2]> {
        let mut asked = lab.ask(&lab.fresh()?, &lab.prompts(n, stream), 1, LONGEST)?;
        asked.sort_by(|a, b| vowels(&b.answers[0]).total_cmp(&vowels(&a.answers[0])));
        let down = asked.split_off(asked.len() / 5);
        Ok([asked, down])
    };
    let ([up, down], fresh) = (thumbs(2400, TRAIN)?, lab.prompts(64, HELD_OUT));
    let judged = |asked: &[Asked], is_desirable: bool| -> Vec<Row> {
        let row = |asked: &Asked| Row::Judged(Judged { example: text(&asked.prompt, &asked.answers[0]), is_desirable });
        asked.iter().map(row).collect()
    };
    let rows = [judged(&up, true), judged(&down, false)].concat();
    let [before, _] = lab.weigh(&lab.fresh()?, &fresh, LONGEST, vowels)?;
    let model = lab.train(lab.settings.side("kto")?, &rows, &NOBODY)?;
    let [after, kl] = lab.weigh(&model, &fresh, LONGEST, vowels)?;
    // Of any liked and any other answer to prompts that were not trained on.
    let [liked, other] = thumbs(240, HELD_OUT)?;
    let [liked, other] = [lab.log_ratios(&model, &liked)?.concat(), lab.log_ratios(&model, &other)?.concat()];
    let wins = |liked: &f64| mean(&other.iter().map(|other| f64::from(u8::from(liked > other))).collect::<Vec<_>>());
    let accuracy = mean(&liked.iter().map(wins).collect::<Vec<_>>());
    let figures = json!({"up": up.len(), "down": down.len(), "before": before, "after": after, "kl": kl,
                         "accuracy": accuracy});
    Ok(Found { seen: after > before && accuracy > 0.85, figures })
}

/// Every fifth pair the wrong way round, as a careless judge would have it.
fn labels(lab: &Lab) -> Result<Found> {
    let (clean, held) = (pairs(lab, 960, TRAIN)?, pairs(lab, 240, HELD_OUT)?);
    let fresh = lab.prompts(64, HELD_OUT);
    let turned = |(i, asked): (usize, &Asked)| match i % 5 {
        0 => pair(&Asked { prompt: asked.prompt.clone(), answers: asked.answers.iter().rev().cloned().collect() }),
        _ => pair(asked),
    };
    let (clean, noisy) = (rows(&clean), clean.iter().enumerate().map(turned).collect::<Vec<_>>());
    let of = |side: &str, rows: &[Row]| -> Result<[f64; 3]> {
        let model = lab.train(lab.settings.side(side)?, rows, &NOBODY)?;
        let [reward, kl] = lab.weigh(&model, &fresh, LONGEST, vowels)?;
        Ok([lab.accuracy(&model, &held)?, reward, kl])
    };
    let (clean, plain) = (of("labels_clean", &clean)?, of("labels_noisy", &noisy)?);
    let robust = of("labels_robust", &noisy)?;
    let shown = |[accuracy, reward, kl]: [f64; 3]| json!({"accuracy": accuracy, "reward": reward, "kl": kl});
    Ok(Found {
        seen: plain[0] > clean[0] - 0.05,
        figures: json!({"clean": shown(clean), "noisy": shown(plain), "noisy_robust": shown(robust)}),
    })
}

/// A judge that wants vowels, whatever the length, and is taken in by length as well: of two answers it prefers the first
/// with `σ(SURE · (share − share) ± BIAS)`, plus where that is the longer one. What each objective's own reward says of
/// the base's answers is held against both.
fn length(lab: &Lab) -> Result<Found> {
    const SURE: f64 = 10.0;
    const BIAS: f64 = 1.5;
    let long = 4 * LONGEST;
    let base = lab.fresh()?;
    let two = |stream: u64| lab.ask(&base, &lab.prompts(960, stream), 2, long);
    let mut coin = lab.random(TRAIN);
    let mut longer = Vec::new();
    let mut judged = |mut asked: Asked| {
        let [a, b] = [0, 1].map(|side| &asked.answers[side]);
        let bias = BIAS * (a.len() as f64 - b.len() as f64).signum();
        let sure = SURE * (vowels(a) - vowels(b)) + if a.len() == b.len() { 0.0 } else { bias };
        if f64::from(coin.uniform()) > 1.0 / (1.0 + (-sure).exp()) {
            asked.answers.swap(0, 1);
        }
        let lengths = [0, 1].map(|side| asked.answers[side].len());
        if lengths[0] != lengths[1] {
            longer.push(f64::from(u8::from(lengths[0] > lengths[1])));
        }
        asked
    };
    let train: Vec<Row> = two(TRAIN)?.into_iter().map(&mut judged).map(|asked| pair(&asked)).collect();
    let (held, fresh) = (two(HELD_OUT)?, lab.prompts(64, HELD_OUT));
    let answers: Vec<&Vec<u32>> = held.iter().flat_map(|asked| &asked.answers).collect();
    let each = |of: &dyn Fn(&[u32]) -> f64| -> Vec<f64> { answers.iter().map(|answer| of(answer)).collect() };
    let (lengths, shares) = (each(&|answer| answer.len() as f64), each(&vowels));
    let weighed = |model: &AdapterFiles, rewards: Vec<Vec<f64>>| -> Result<Value> {
        let [length, kl] = lab.weigh(model, &fresh, long, |answer| answer.len() as f64)?;
        let share = lab.weigh(model, &fresh, long, vowels)?[0];
        let better =
            held.iter().zip(&rewards).filter(|(asked, _)| vowels(&asked.answers[0]) != vowels(&asked.answers[1]));
        let is_right = |(asked, rewards): (&Asked, &Vec<f64>)| {
            f64::from(u8::from((vowels(&asked.answers[0]) > vowels(&asked.answers[1])) == (rewards[0] > rewards[1])))
        };
        let accuracy = mean(&better.map(is_right).collect::<Vec<_>>());
        let rewards = rewards.concat();
        let (of_length, of_share) = (rank_correlation(&rewards, &lengths), rank_correlation(&rewards, &shares));
        Ok(json!({"length": length, "share": share, "kl": kl, "accuracy": accuracy, "reward_and_length": of_length,
                  "reward_and_share": of_share}))
    };
    let of = |side: &str| lab.train(lab.settings.side(side)?, &train, &NOBODY);
    let (dpo, simpo) = (of("length_dpo")?, of("length_simpo")?);
    let start = weighed(&base, lab.means(&base, &held)?)?;
    let dpo = weighed(&dpo, lab.log_ratios(&dpo, &held)?)?;
    let simpo = weighed(&simpo, lab.means(&simpo, &held)?)?;
    let number = |side: &Value, name: &str| side[name].as_f64().unwrap_or(f64::NAN);
    let seen = number(&simpo, "length") < number(&dpo, "length")
        && number(&simpo, "reward_and_length") < number(&dpo, "reward_and_length")
        && [&dpo, &simpo].iter().all(|side| number(side, "accuracy") > 0.75);
    let figures = json!({"longer_chosen": mean(&longer), "share_and_length": rank_correlation(&shares, &lengths),
                         "base": start, "dpo": dpo, "simpo": simpo});
    Ok(Found { seen, figures })
}
