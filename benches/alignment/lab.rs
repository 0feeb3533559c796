//! A tiny model that has learnt the language, an engine that draws from it, and short runs.

use std::{fs, path::Path, sync::Arc};

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

use crate::{
    language,
    settings::{Settings, Side},
    tiny::{Random, Tiny},
};

/// Nobody is asked.
pub const NOBODY: Rule = Rule(&|_, _| 0.0);

pub struct Lab {
    pub settings: Arc<Settings>,
    seed: u64,
    scale: f64,
    base: Arc<Base>,
    rollout: EngineRollout,
    _runtime: tokio::runtime::Runtime,
    _dir: Option<tempfile::TempDir>,
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
    pub fn new(seed: u64, scale: f64, settings: Arc<Settings>) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (raw, known) = (dir.path().join("raw"), dir.path().join("known"));
        Tiny { seed, tied: false, ..Tiny::default() }.write(&raw);
        let untaught = Self::over(&raw, seed, scale, settings.clone())?;
        let files = untaught.taught()?;
        fs::create_dir(&known)?;
        for (name, bytes) in methods::merged::directory(&files, &untaught.base)? {
            fs::write(known.join(name), bytes)?;
        }
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(raw.join(name), known.join(name))?;
        }
        Ok(Self { _dir: Some(dir), ..Self::over(&known, seed, scale, settings)? })
    }

    /// Over the model in a directory.
    fn over(dir: &Path, seed: u64, scale: f64, settings: Arc<Settings>) -> Result<Self> {
        let base = Base::open("tiny", dir)?;
        let resident = Resident { base: base.clone(), text: Arc::new(Text::open(dir)?) };
        let runtime = tokio::runtime::Runtime::new()?;
        let blobs = format!("file:{}", dir.join("blobs").display());
        let store = runtime.block_on(open(&blobs, &S3Settings::default()))?;
        let bases = Bases::new([resident.clone()]);
        let engine = Handle::start(bases, store, runtime.handle().clone(), EngineSettings::default())?;
        let rollout = EngineRollout { engine, resident, project: "bench".into() };
        Ok(Self { settings, seed, scale, base, rollout, _runtime: runtime, _dir: None })
    }

    /// An adapter that knows the language.
    fn taught(&self) -> Result<AdapterFiles> {
        let base = &self.settings.base;
        let mut random = Random(1000 * self.seed);
        let rows: Vec<Row> = (0..self.few(base.answers))
            .map(|_| {
                let prompt = language::prompt(&mut random);
                Row::Example(text(&prompt, &language::answer(&mut random, &prompt)))
            })
            .collect();
        let method = json!({"type": "supervised"});
        let adapter = MethodSpec::from_json(&base.adapter)?;
        let (files, metrics) = self.run(&method, adapter, &base.training, &rows, &NOBODY)?;
        if let (Some(first), Some(last)) = (metrics.first(), metrics.last()) {
            eprintln!("the base of seed {}: loss {:.3?} to {:.3?}", self.seed, first.train_loss, last.train_loss);
        }
        Ok(files)
    }

    /// So many rows or steps at this scale.
    fn few(&self, n: u64) -> u64 {
        ((n as f64 * self.scale) as u64).max(4)
    }

    /// Random prompts; a stream has its own.
    pub fn prompts(&self, n: u64, stream: u64) -> Vec<Vec<u32>> {
        let mut random = Random(1000 * self.seed + stream);
        (0..self.few(n)).map(|_| language::prompt(&mut random)).collect()
    }

    /// Numbers of a stream.
    pub fn random(&self, stream: u64) -> Random {
        Random(1000 * self.seed + 500 + stream)
    }

    fn adapter(&self) -> Result<MethodSpec> {
        Ok(MethodSpec::from_json(&self.settings.adapter)?)
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

    /// The adapter of a side's run.
    pub fn train(&self, side: &Side, rows: &[Row], reward: &dyn Reward) -> Result<AdapterFiles> {
        let name = &side.objective;
        let mut method = json!({"type": name, name: {"hyperparameters": side.knobs}});
        if ["grpo", "rloo", "ppo"].contains(&name.as_str()) {
            // Not asked: the reward is a rule.
            method[name]["grader"] = json!({"type": "json_valid", "name": "rule", "input": "a"});
        }
        Ok(self.run(&method, self.adapter()?, &json!(side.training), rows, reward)?.0)
    }

    /// A run to its end, as long as its steps.
    fn run(
        &self,
        method: &Value,
        adapter: MethodSpec,
        training: &Value,
        rows: &[Row],
        reward: &dyn Reward,
    ) -> Result<(AdapterFiles, Vec<Metrics>)> {
        let objective = ObjectiveSpec::from_json(method)?;
        let mut settings = json!({"n_epochs": 1000, "batch_size": 8, "max_seq_len": 64});
        for (key, value) in training.as_object().into_iter().flatten() {
            settings[key] = value.clone();
        }
        settings["max_steps"] = json!(self.few(training["max_steps"].as_u64().unwrap_or(100)));
        let request = TrainingRequest::from_json(&settings, &Default::default())?;
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

    /// `log π` of each answer; of the base without a model.
    fn log_probs(&self, model: Option<&AdapterFiles>, asked: &[Asked]) -> Result<Vec<Vec<f64>>> {
        let hook = model.map(|model| methods::load(model, &self.base)).transpose()?;
        let of = |asked: &Asked| {
            let texts: Vec<Example> = asked.answers.iter().map(|answer| text(&asked.prompt, answer)).collect();
            Ok(score_only(&self.base, hook.as_ref(), &texts.iter().collect::<Vec<_>>())?)
        };
        asked.iter().map(of).collect()
    }

    /// `log π − log π_ref` of each answer.
    pub fn log_ratios(&self, model: &AdapterFiles, asked: &[Asked]) -> Result<Vec<Vec<f64>>> {
        let (policy, base) = (self.log_probs(Some(model), asked)?, self.log_probs(None, asked)?);
        let apart = |(policy, base): (Vec<f64>, Vec<f64>)| policy.iter().zip(base).map(|(a, b)| a - b).collect();
        Ok(policy.into_iter().zip(base).map(apart).collect())
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
        Ok(told_apart(&self.log_ratios(model, pairs)?))
    }

    /// `log π` of each answer's mean token.
    pub fn means(&self, model: &AdapterFiles, asked: &[Asked]) -> Result<Vec<Vec<f64>>> {
        let mut means = self.log_probs(Some(model), asked)?;
        for (means, asked) in means.iter_mut().zip(asked) {
            means.iter_mut().zip(&asked.answers).for_each(|(mean, answer)| *mean /= answer.len() as f64);
        }
        Ok(means)
    }
}

/// How often the first is the larger of two.
fn told_apart(pairs: &[Vec<f64>]) -> f64 {
    mean(&pairs.iter().map(|two| f64::from(u8::from(two[0] > two[1]))).collect::<Vec<_>>())
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

/// Spearman's.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let [a, b] = [a, b].map(ranks);
    let (middle_a, middle_b) = (mean(&a), mean(&b));
    let sum = |of: &dyn Fn(f64, f64) -> f64| a.iter().zip(&b).map(|(a, b)| of(a - middle_a, b - middle_b)).sum::<f64>();
    sum(&|a, b| a * b) / (sum(&|a, _| a * a) * sum(&|_, b| b * b)).sqrt()
}

/// Equal values share the mean of their ranks.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let (mut ranks, mut before) = (vec![0.0; values.len()], 0);
    for same in order.chunk_by(|a, b| values[*a] == values[*b]) {
        same.iter().for_each(|i| ranks[*i] = before as f64 + (same.len() - 1) as f64 / 2.0);
        before += same.len();
    }
    ranks
}

pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}
