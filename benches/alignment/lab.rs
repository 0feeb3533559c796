//! A tiny model, an engine that draws from it, and short runs.

use std::sync::Arc;

use anyhow::{Result, bail};
use attune::{
    data::{Example, Pair, Prompt, Row},
    domain::{
        Completion, Control, MethodSpec, Metrics, ObjectiveSpec, Observer, Snapshot, TrainSpec, Training,
        TrainingRequest,
        rollout::{Answer, Ask, Policy, Reward, Rollout, Ungraded},
    },
    inference::{Bases, EngineSettings, Handle, Resident},
    jobs::EngineRollout,
    methods::{self, AdapterFiles, Start},
    model::Base,
    objectives::score::score_only,
    storage::{S3Settings, open},
    text::Text,
    trainer::{self, Outcome, Run, World},
};
use serde_json::{Value, json};

use crate::tiny::{Random, Tiny};

/// The tokens that judges like: an eighth of the bytes.
pub fn is_liked(id: u32) -> bool {
    id < 256 && id % 8 == 3
}

/// The share of liked tokens.
pub fn liked(ids: &[u32]) -> f64 {
    ids.iter().filter(|id| is_liked(**id)).count() as f64 / ids.len().max(1) as f64
}

pub struct Lab {
    pub seed: u64,
    scale: f64,
    base: Arc<Base>,
    rollout: EngineRollout,
    _runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

/// A rule as the reward of a completion.
pub struct Rule<'a>(pub &'a (dyn Fn(&[u32], &[u32]) -> f64 + Sync));

impl Reward for Rule<'_> {
    fn rewards(&self, answers: &[Answer]) -> Result<Vec<std::result::Result<f64, Ungraded>>> {
        let one = |answer: &Answer| {
            let prompt: Vec<u32> = serde_json::from_value(answer.item.clone())?;
            Ok(Ok((self.0)(&prompt, &answer.completion.ids)))
        };
        answers.iter().map(one).collect()
    }
}

/// A prompt with its completions.
pub struct Asked {
    pub prompt: Vec<u32>,
    pub answers: Vec<Vec<u32>>,
}

#[derive(Default)]
struct Notes(Vec<Metrics>);

impl Observer for Notes {
    fn step(&mut self, metrics: &Metrics) -> Result<Control> {
        self.0.push(metrics.clone());
        Ok(Control::Continue)
    }

    fn checkpoint(&mut self, _: Snapshot, _: &Metrics) -> Result<()> {
        Ok(())
    }

    fn message(&mut self, _: &str, _: &str) -> Result<()> {
        Ok(())
    }
}

impl Lab {
    pub fn new(seed: u64, scale: f64) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        Tiny { seed, ..Tiny::default() }.write(dir.path());
        let base = Base::open("tiny", dir.path())?;
        let resident = Resident { base: base.clone(), text: Arc::new(Text::open(dir.path())?) };
        let runtime = tokio::runtime::Runtime::new()?;
        let blobs = format!("file:{}", dir.path().join("blobs").display());
        let store = runtime.block_on(open(&blobs, &S3Settings::default()))?;
        let bases = Bases::new([resident.clone()]);
        let engine = Handle::start(bases, store, runtime.handle().clone(), EngineSettings::default())?;
        let rollout = EngineRollout { engine, resident, project: "bench".into() };
        Ok(Self { seed, scale, base, rollout, _runtime: runtime, _dir: dir })
    }

    /// So many rows or steps at this scale.
    pub fn few(&self, n: u64) -> u64 {
        ((n as f64 * self.scale) as u64).max(4)
    }

    /// Random prompts of five bytes.
    pub fn prompts(&self, n: u64, stream: u64) -> Vec<Vec<u32>> {
        let mut random = Random(1000 * self.seed + stream);
        (0..n).map(|_| (0..5).map(|_| random.below(256) as u32).collect()).collect()
    }

    fn adapter(&self) -> Result<MethodSpec> {
        Ok(MethodSpec::from_json(&json!({"type": "lora", "r": 8, "alpha": 16}))?)
    }

    /// An adapter that has learnt nothing: the base.
    pub fn fresh(&self) -> Result<AdapterFiles> {
        let tokenize = &|_: &str| Ok(Vec::new());
        let start = Start { base: &self.base, seed: self.seed, total_steps: 1, experts: &[], tokenize };
        Ok(methods::create(&self.adapter()?, &start)?.export()?)
    }

    /// `n` completions of each prompt.
    pub fn ask(&self, model: &AdapterFiles, prompts: &[Vec<u32>], n: usize, longest: usize) -> Result<Vec<Asked>> {
        let asks = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, n)).enumerate();
        let ask = |(i, prompt): (usize, &Vec<u32>)| Ask {
            prompt: prompt.clone(),
            max_tokens: longest,
            temperature: 1.0,
            seed: self.seed << 32 | i as u64,
        };
        let policy = Policy { config: &model.config, weights: &model.weights };
        let drawn = self.rollout.sample(policy, &asks.map(ask).collect::<Vec<_>>())?;
        let answers = |completions: &[Completion]| completions.iter().map(|one| one.ids.clone()).collect();
        Ok((prompts.iter().zip(drawn.chunks(n)))
            .map(|(prompt, drawn)| Asked { prompt: prompt.clone(), answers: answers(drawn) })
            .collect())
    }

    /// A run to its end: `knobs` are the objective's, `training` the loop's.
    pub fn train(
        &self,
        objective: &str,
        knobs: Value,
        training: Value,
        rows: &[Row],
        reward: &dyn Reward,
    ) -> Result<(AdapterFiles, Vec<Metrics>)> {
        let mut method = json!({"type": objective, objective: {"hyperparameters": knobs}});
        if ["grpo", "rloo", "ppo"].contains(&objective) {
            // Not asked: the reward is a rule.
            method[objective]["grader"] = json!({"type": "json_valid", "name": "rule", "input": "a"});
        }
        let objective = ObjectiveSpec::from_json(&method)?;
        let adapter = self.adapter()?;
        let request = TrainingRequest::from_json(&training, &Default::default())?;
        let spec = TrainSpec {
            base: self.base.info.id.clone(),
            continue_from: None,
            suffix: None,
            training: Training::resolve(&request, &adapter, &self.base.info, rows.len() as u64)?,
            adapter,
            objective,
            seed: self.seed,
        };
        let run = Run {
            experts: &[],
            spec: &spec,
            base: self.base.clone(),
            train: rows,
            valid: &[],
            resume: None,
            start: None,
            world: Some(World { rollout: &self.rollout, reward }),
            turns: None,
            tokenize: &|_| Ok(Vec::new()),
        };
        let mut notes = Notes::default();
        match trainer::train(run, &mut notes)? {
            Outcome::Finished { adapter, .. } => Ok((adapter, notes.0)),
            other => bail!("the run ended as {other:?}"),
        }
    }

    /// `log π − log π_ref` of each answer.
    pub fn log_ratios(&self, model: &AdapterFiles, asked: &[Asked]) -> Result<Vec<Vec<f64>>> {
        let hook = methods::load(model, &self.base)?;
        let of = |asked: &Asked| {
            let texts: Vec<Example> = asked.answers.iter().map(|answer| text(&asked.prompt, answer)).collect();
            let texts: Vec<&Example> = texts.iter().collect();
            let (policy, base) = (score_only(&self.base, Some(&hook), &texts)?, score_only(&self.base, None, &texts)?);
            Ok(policy.iter().zip(base).map(|(policy, base)| policy - base).collect())
        };
        asked.iter().map(of).collect()
    }

    /// Mean reward and mean divergence of fresh completions.
    pub fn weigh(
        &self,
        model: &AdapterFiles,
        prompts: &[Vec<u32>],
        longest: usize,
        reward: impl Fn(&[u32]) -> f64,
    ) -> Result<[f64; 2]> {
        let asked = self.ask(model, prompts, 4, longest)?;
        let rewards: Vec<f64> = asked.iter().flat_map(|asked| &asked.answers).map(|answer| reward(answer)).collect();
        Ok([mean(&rewards), mean(&self.log_ratios(model, &asked)?.concat())])
    }

    /// The share of pairs whose better answer became likelier than the other, against the base.
    pub fn accuracy(&self, model: &AdapterFiles, pairs: &[Asked]) -> Result<f64> {
        let ratios = self.log_ratios(model, pairs)?;
        Ok(mean(&ratios.iter().map(|two| f64::from(u8::from(two[0] > two[1]))).collect::<Vec<_>>()))
    }
}

/// A prompt and its answer, which alone is trained on.
pub fn text(prompt: &[u32], answer: &[u32]) -> Example {
    let labels = prompt.iter().map(|_| None).chain(answer.iter().copied().map(Some)).collect();
    Example { line: 1, ids: [prompt, answer].concat(), labels }
}

pub fn questions(prompts: &[Vec<u32>]) -> Vec<Row> {
    let row = |prompt: &Vec<u32>| {
        let text = Example { line: 1, ids: prompt.clone(), labels: vec![None; prompt.len()] };
        Row::Prompt(Prompt { text, item: json!(prompt) })
    };
    prompts.iter().map(row).collect()
}

/// The better answer is the first.
pub fn pair(two: &Asked) -> Row {
    let [chosen, rejected] = [0, 1].map(|side| text(&two.prompt, &two.answers[side]));
    Row::Pair(Pair { chosen, rejected, margin: 0.0, probability: 1.0 })
}

/// The best and the worst answer of each prompt, where they differ.
pub fn contrasts(asked: Vec<Asked>, reward: impl Fn(&[u32]) -> f64) -> Vec<Asked> {
    let contrast = |mut asked: Asked| {
        asked.answers.sort_by(|a, b| reward(b).total_cmp(&reward(a)));
        let (best, worst) = (asked.answers.first()?.clone(), asked.answers.last()?.clone());
        let differ = reward(&best) > reward(&worst);
        differ.then_some(Asked { answers: vec![best, worst], ..asked })
    };
    asked.into_iter().filter_map(contrast).collect()
}

pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
