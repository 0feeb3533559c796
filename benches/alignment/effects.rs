//! The effects: each a small experiment that says what it saw.

use anyhow::Result;
use attune::{
    data::{Judged, Row},
    methods::AdapterFiles,
};
use serde_json::{Value, json};

use crate::lab::{Asked, Lab, Rule, contrasts, is_liked, liked, mean, pair, questions, text};

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
    Effect { name: "curve", claim: "dpo and ppo pay for reward with divergence, and beta sets the price", show: curve },
    Effect {
        name: "hacking",
        claim: "without a divergence term the proxy rises and the true reward falls",
        show: hacking,
    },
    Effect { name: "grpo", claim: "grpo goes from below 20 % to above 60 % in 100 updates", show: grpo },
    Effect { name: "kto", claim: "kto learns from one thumb up to four down, without pairs", show: kto },
    Effect { name: "labels", claim: "a fifth of wrong labels costs dpo little, robust dpo less", show: labels },
    Effect {
        name: "length",
        claim: "where longer answers are preferred, simpo grows them less than dpo",
        show: length,
    },
];

/// Tokens of a completion, at most.
const LONGEST: usize = 12;

/// Nobody is asked.
const NOBODY: Rule = Rule(&|_, _| 0.0);

/// Pairs of the base's own answers to fresh prompts: those with more liked tokens are better.
fn pairs(lab: &Lab, n: u64, stream: u64) -> Result<Vec<Asked>> {
    Ok(contrasts(lab.ask(&lab.fresh()?, &lab.prompts(n, stream), 6, LONGEST)?, liked))
}

fn offline(epochs: u64, rate: f64) -> Value {
    json!({"n_epochs": epochs, "batch_size": 8, "learning_rate": rate, "max_seq_len": 64})
}

/// `steps` updates, each on `prompts` prompts.
fn online(steps: u64, prompts: u64, rate: f64) -> Value {
    json!({"n_epochs": 1000, "max_steps": steps, "batch_size": prompts, "learning_rate": rate, "max_seq_len": 64,
           "lr_scheduler": "constant"})
}

fn dpo(lab: &Lab) -> Result<Found> {
    let (train, held) = (pairs(lab, lab.few(240), 1)?, pairs(lab, lab.few(120), 2)?);
    let rows: Vec<Row> = train.iter().map(pair).collect();
    let before = lab.accuracy(&lab.fresh()?, &held)?;
    let (model, _) = lab.train("dpo", json!({"beta": 0.1}), offline(6, 5e-3), &rows, &NOBODY)?;
    let accuracy = lab.accuracy(&model, &held)?;
    let figures = json!({"pairs": train.len(), "held_out": held.len(), "before": before, "accuracy": accuracy});
    Ok(Found { seen: accuracy > 0.9, figures })
}

/// The share of liked tokens beside the divergence, at several weights of it.
fn curve(lab: &Lab) -> Result<Found> {
    let (asked, fresh) = (lab.prompts(lab.few(64), 3), lab.prompts(lab.few(64), 4));
    let rows: Vec<Row> = pairs(lab, lab.few(240), 1)?.iter().map(pair).collect();
    let start = lab.weigh(&lab.fresh()?, &fresh, LONGEST, liked)?;
    let mut points = Vec::new();
    for beta in [0.5, 0.1, 0.02] {
        let (model, _) = lab.train("dpo", json!({"beta": beta}), offline(6, 5e-3), &rows, &NOBODY)?;
        points.push(("dpo", beta, lab.weigh(&model, &fresh, LONGEST, liked)?));
    }
    for beta in [0.2, 0.05, 0.01] {
        let knobs = json!({"kl_coef": beta, "max_completion_length": LONGEST, "num_ppo_epochs": 2,
                           "vf_learning_rate_multiplier": 1});
        let rule = Rule(&|_, answer| liked(answer));
        let (model, _) = lab.train("ppo", knobs, online(lab.few(40), 32, 3e-3), &questions(&asked), &rule)?;
        points.push(("ppo", beta, lab.weigh(&model, &fresh, LONGEST, liked)?));
    }
    // More weight, less divergence; and whoever went away from the base got something for it.
    let of = |name: &str| points.iter().filter(|point| point.0 == name).map(|point| point.2).collect::<Vec<_>>();
    let seen = ["dpo", "ppo"].iter().all(|name| {
        let points = of(name);
        points[0][1] < points[2][1] && points.iter().all(|[reward, _]| *reward > start[0])
    });
    let points: Vec<Value> = (points.iter())
        .map(|(name, beta, [reward, kl])| json!({"objective": name, "beta": beta, "reward": reward, "kl": kl}))
        .collect();
    Ok(Found { seen, figures: json!({"base": start[0], "points": points}) })
}

/// The proxy likes tokens; what is really wanted is that they differ, too.
fn hacking(lab: &Lab) -> Result<Found> {
    let wanted = |answer: &[u32]| {
        let mut different: Vec<u32> = answer.iter().copied().filter(|id| is_liked(*id)).collect();
        different.sort_unstable();
        different.dedup();
        different.len() as f64 / answer.len().max(1) as f64
    };
    let (asked, fresh) = (lab.prompts(lab.few(64), 3), lab.prompts(lab.few(64), 4));
    let rule = Rule(&|_, answer| liked(answer));
    let both = |beta: f64| -> Result<[f64; 3]> {
        let knobs = json!({"num_generations": 8, "max_completion_length": LONGEST, "beta": beta});
        let (model, _) = lab.train("rloo", knobs, online(lab.few(120), 8, 5e-3), &questions(&asked), &rule)?;
        let [proxy, kl] = lab.weigh(&model, &fresh, LONGEST, liked)?;
        Ok([proxy, lab.weigh(&model, &fresh, LONGEST, wanted)?[0], kl])
    };
    let (start, free, held) = (lab.weigh(&lab.fresh()?, &fresh, LONGEST, wanted)?[0], both(0.0)?, both(0.05)?);
    let shown = |[proxy, wanted, kl]: [f64; 3]| json!({"proxy": proxy, "wanted": wanted, "kl": kl});
    let seen = free[0] > held[0] && free[1] < held[1];
    Ok(Found { seen, figures: json!({"base_wanted": start, "without": shown(free), "with": shown(held)}) })
}

/// The prompt's last byte says which eighth of the bytes the answer must begin with.
fn grpo(lab: &Lab) -> Result<Found> {
    let is_right = |prompt: &[u32], answer: &[u32]| {
        let wanted = prompt.last().map_or(0, |last| 3 * (last % 2));
        answer.first().is_some_and(|first| *first < 256 && first % 8 == wanted)
    };
    let rule = Rule(&|prompt, answer| f64::from(u8::from(is_right(prompt, answer))));
    let (asked, fresh) = (lab.prompts(lab.few(256), 3), lab.prompts(lab.few(128), 4));
    let share = |model: &AdapterFiles| -> Result<f64> {
        let asked = lab.ask(model, &fresh, 4, 2)?;
        let right = |asked: &Asked| -> Vec<f64> {
            asked.answers.iter().map(|answer| f64::from(u8::from(is_right(&asked.prompt, answer)))).collect()
        };
        Ok(mean(&asked.iter().flat_map(right).collect::<Vec<_>>()))
    };
    let before = share(&lab.fresh()?)?;
    let knobs = json!({"num_generations": 8, "max_completion_length": 2});
    let (model, _) = lab.train("grpo", knobs, online(lab.few(100), 16, 1e-2), &questions(&asked), &rule)?;
    let after = share(&model)?;
    Ok(Found { seen: before < 0.2 && after > 0.6, figures: json!({"before": before, "after": after}) })
}

/// One answer in five is liked, each by itself.
fn kto(lab: &Lab) -> Result<Found> {
    let prompts = lab.prompts(lab.few(240), 1);
    let asked = lab.ask(&lab.fresh()?, &prompts, 1, LONGEST)?;
    let mut shares: Vec<f64> = asked.iter().map(|asked| liked(&asked.answers[0])).collect();
    shares.sort_by(f64::total_cmp);
    let bar = shares[shares.len() * 4 / 5];
    let rows: Vec<Row> = (asked.iter())
        .map(|asked| {
            let answer = &asked.answers[0];
            Row::Judged(Judged {
                example: text(&asked.prompt, answer),
                is_desirable: liked(answer) >= bar && bar > 0.0,
            })
        })
        .collect();
    let up = rows.iter().filter(|row| matches!(row, Row::Judged(judged) if judged.is_desirable)).count();
    let (fresh, held) = (lab.prompts(lab.few(64), 4), pairs(lab, lab.few(120), 2)?);
    let before = lab.weigh(&lab.fresh()?, &fresh, LONGEST, liked)?[0];
    // As many thumbs down as there are to one up: both sides weigh the same.
    let knobs = json!({"desirable_weight": (rows.len() - up) as f64 / up.max(1) as f64});
    let (model, _) = lab.train("kto", knobs, offline(8, 5e-3), &rows, &NOBODY)?;
    let (after, accuracy) = (lab.weigh(&model, &fresh, LONGEST, liked)?[0], lab.accuracy(&model, &held)?);
    let figures = json!({"up": up, "down": rows.len() - up, "before": before, "after": after, "accuracy": accuracy});
    Ok(Found { seen: after > before && accuracy > 0.75, figures })
}

/// Every fifth pair the wrong way round, as a careless judge would have it.
fn labels(lab: &Lab) -> Result<Found> {
    let (clean, held) = (pairs(lab, lab.few(240), 1)?, pairs(lab, lab.few(120), 2)?);
    let turned = |(i, asked): (usize, &Asked)| match i % 5 {
        0 => pair(&Asked { prompt: asked.prompt.clone(), answers: asked.answers.iter().rev().cloned().collect() }),
        _ => pair(asked),
    };
    let rows: Vec<Row> = clean.iter().map(pair).collect();
    let noisy: Vec<Row> = clean.iter().enumerate().map(turned).collect();
    let accuracy = |rows: &[Row], knobs: Value| -> Result<f64> {
        let (model, _) = lab.train("dpo", knobs, offline(6, 5e-3), rows, &NOBODY)?;
        lab.accuracy(&model, &held)
    };
    let (of_clean, of_noisy) = (accuracy(&rows, json!({}))?, accuracy(&noisy, json!({}))?);
    let robust = accuracy(&noisy, json!({"loss_type": "robust", "label_smoothing": 0.2}))?;
    let figures = json!({"clean": of_clean, "noisy": of_noisy, "noisy_robust": robust});
    Ok(Found { seen: of_noisy > 0.8 && robust >= of_noisy - 0.02, figures })
}

/// A judge that counts, and so likes long answers; they end where the end token stands.
fn length(lab: &Lab) -> Result<Found> {
    const END: u32 = 258;
    let count = |answer: &[u32]| answer.iter().filter(|id| is_liked(**id)).count() as f64 + 0.1 * answer.len() as f64;
    let mut asked = lab.ask(&lab.fresh()?, &lab.prompts(lab.few(240), 1), 6, LONGEST)?;
    for asked in &mut asked {
        for (i, answer) in asked.answers.iter_mut().enumerate() {
            answer.truncate(3 + 2 * i);
            if answer.last() != Some(&END) {
                answer.push(END);
            }
        }
    }
    let rows: Vec<Row> = contrasts(asked, count).iter().map(pair).collect();
    let fresh = lab.prompts(lab.few(64), 4);
    let long = 4 * LONGEST;
    let of = |objective: &str, knobs: Value| -> Result<[f64; 2]> {
        let (model, _) = lab.train(objective, knobs, offline(6, 2e-3), &rows, &NOBODY)?;
        let length = lab.weigh(&model, &fresh, long, |answer| answer.len() as f64)?[0];
        Ok([length, lab.weigh(&model, &fresh, long, liked)?[0]])
    };
    let (dpo, simpo) = (of("dpo", json!({"beta": 0.1}))?, of("simpo", json!({"beta": 2.0, "gamma": 1.0}))?);
    let start = lab.weigh(&lab.fresh()?, &fresh, long, |answer| answer.len() as f64)?[0];
    let shown = |[length, liked]: [f64; 2]| json!({"length": length, "liked": liked});
    Ok(Found {
        seen: simpo[0] < dpo[0],
        figures: json!({"base_length": start, "dpo": shown(dpo), "simpo": shown(simpo)}),
    })
}
