//! Graders that ask: models here, models elsewhere, services. What they say is checked, and asked for again when it
//! cannot be used; who never says anything of use is an answer too, which is counted.

mod afar;
mod answer;
mod likely;
mod seat;

use std::collections::{BTreeMap, HashMap};

use futures::{StreamExt, future::join_all};
use serde_json::Value;

use crate::{
    db::{Db, DbError},
    domain::{
        rollout::Ungraded,
        spec::{Asked, Grader, RewardModel, ScoreModel, Scoring},
    },
    inference::{AdapterRef, Bases, Handle, Sampling},
    objectives::grade::{self, Answers, GradeError, Scene},
    outbound::Web,
};

pub use afar::Afar;
pub use likely::likelihoods;
pub use seat::{Seat, Written};

/// Attempts at an answer that can be used.
const ATTEMPTS: u64 = 3;
/// Texts that are judged at once.
const TOGETHER: usize = 32;
/// What a judge of `scoring` expected chooses from.
const SCALE: std::ops::RangeInclusive<u32> = 1..=10;

/// With what models and services are asked. Cheap to clone.
#[derive(Clone)]
pub struct Means {
    pub db: Db,
    pub bases: Bases,
    pub engine: Handle,
    pub web: Web,
}

/// Why a model cannot be asked at all.
#[derive(Debug, thiserror::Error)]
pub enum SeatError {
    #[error("the judge {0} does not exist here, or its base is not resident")]
    Unknown(String),
    #[error(transparent)]
    Db(#[from] DbError),
}

impl Means {
    /// A base, or a tuned model of the project.
    pub async fn seat(&self, project: &str, name: &str, is_background: bool) -> Result<Seat, SeatError> {
        let unknown = || SeatError::Unknown(name.to_owned());
        let (resident, adapter) = match self.bases.get(name) {
            Some(resident) => (resident.clone(), None),
            None => {
                let record = self.db.adapter(project, name).await.map_err(|error| match error {
                    DbError::NotFound => unknown(),
                    error => error.into(),
                })?;
                (self.bases.get(&record.parent).ok_or_else(unknown)?.clone(), Some(AdapterRef::from(&record)))
            }
        };
        Ok(Seat { engine: self.engine.clone(), resident, adapter, project: project.to_owned(), is_background })
    }
}

/// Tokens read and written, by the name of the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spent(pub BTreeMap<String, (u64, u64)>);

impl Spent {
    pub fn add(&mut self, model: &str, read: u64, written: u64) {
        let spent = self.0.entry(model.to_owned()).or_default();
        *spent = (spent.0 + read, spent.1 + written);
    }

    pub fn merge(&mut self, other: Self) {
        other.0.into_iter().for_each(|(model, (read, written))| self.add(&model, read, written));
    }
}

/// What was said, and what it took.
pub struct Said<T> {
    pub answer: Result<T, Ungraded>,
    pub spent: Spent,
}

/// What a grader makes of a text.
pub struct Graded {
    pub reward: Result<f64, Ungraded>,
    /// Of each grader inside a multi grader, by its key.
    pub parts: Vec<(String, f64)>,
    pub spent: Spent,
}

/// Those whom a grader asks.
pub struct Judges {
    seats: HashMap<String, Seat>,
    web: Web,
}

impl Judges {
    /// Looks for the models that are asked here. Each is the same one from now on, whatever becomes of its name.
    pub async fn of(means: &Means, project: &str, grader: &Grader, is_background: bool) -> Result<Self, SeatError> {
        let mut seats = HashMap::new();
        for (_, asked) in grader.asked() {
            let (Asked::Model(ScoreModel { model, endpoint: None, .. }) | Asked::Reward(RewardModel { model, .. })) =
                asked
            else {
                continue;
            };
            if !seats.contains_key(model) {
                seats.insert(model.clone(), means.seat(project, model, is_background).await?);
            }
        }
        Ok(Self { seats, web: means.web.clone() })
    }

    /// An error is the grader's or the row's: it stays whoever is asked.
    pub async fn grade(&self, grader: &Grader, scene: &Scene) -> Result<Graded, GradeError> {
        let asked = grader.asked();
        let all = join_all(asked.iter().map(|(_, asked)| self.ask(*asked, scene))).await;
        let (mut answers, mut spent, mut silent) = (Answers::new(), Spent::default(), None);
        for ((place, _), said) in asked.into_iter().zip(all) {
            let said = said?;
            spent.merge(said.spent);
            match said.answer {
                Ok(score) => _ = answers.insert(place, score),
                Err(why) => _ = silent.get_or_insert(why),
            }
        }
        let parts = grade::parts(grader, scene, &answers);
        let reward = match silent {
            Some(why) => Err(why),
            None => match grade::grade_with(grader, scene, &answers)? {
                reward if reward.is_finite() => Ok(reward),
                other => Err(Ungraded(format!("the formula gives {other}"))),
            },
        };
        Ok(Graded { reward, parts, spent })
    }

    /// In the order of the scenes, many at once.
    pub async fn grade_all(&self, grader: &Grader, scenes: &[Scene]) -> Result<Vec<Graded>, GradeError> {
        let all = futures::stream::iter(scenes.iter().map(|scene| self.grade(grader, scene)));
        all.buffered(TOGETHER).collect::<Vec<_>>().await.into_iter().collect()
    }

    async fn ask(&self, asked: Asked<'_>, scene: &Scene) -> Result<Said<f64>, GradeError> {
        match asked {
            Asked::Endpoint(endpoint) => {
                let answer = self.web.ask(&endpoint.url, scene.values(), answer::score).await;
                Ok(Said { answer: answer.map_err(|error| Ungraded(error.to_string())), spent: Spent::default() })
            }
            Asked::Reward(asked) => {
                let row = scene.conversation()?;
                let answer = match self.seats.get(&asked.model) {
                    Some(seat) => seat.score(&row).await,
                    None => Err("nobody looked for it".to_owned()),
                };
                let mut spent = Spent::default();
                let answer = answer.map(|(score, read)| {
                    spent.add(&asked.model, read, 0);
                    score
                });
                Ok(Said { answer: answer.map_err(|why| Ungraded(format!("{}: {why}", asked.name))), spent })
            }
            Asked::Model(asked) => {
                let question = scene.question(asked)?;
                let mut spent = Spent::default();
                let answer = self.opinion(asked, &question, &mut spent).await;
                let why = |why: String| Ungraded(format!("{}: {why}", asked.name));
                Ok(Said { answer: answer.map_err(why), spent })
            }
        }
    }

    async fn opinion(&self, asked: &ScoreModel, question: &[Value], spent: &mut Spent) -> Result<f64, String> {
        let labels: Vec<String> = SCALE.map(|label| label.to_string()).collect();
        match (&asked.endpoint, asked.scoring()) {
            (Some(address), scoring) => {
                let afar = Afar { web: &self.web, address, model: &asked.model };
                match scoring {
                    Scoring::Answer => {
                        let params = asked.sampling_params.clone().unwrap_or_default();
                        let read = |text: &str| answer::number(text, asked.range());
                        afar.write(question, &params, spent, read).await
                    }
                    Scoring::Expected => expected(&afar.likelihoods(question, &labels, spent).await?, asked.range()),
                }
            }
            (None, scoring) => {
                let seat = self.seats.get(&asked.model).ok_or("nobody looked for it")?;
                let prompt = seat.prompt(question)?;
                match scoring {
                    Scoring::Answer => answered(seat, asked, &prompt, spent).await,
                    Scoring::Expected => {
                        let found = likelihoods(seat, &prompt, &labels, |n| spent.add(&asked.model, n, 1)).await?;
                        expected(&found, asked.range())
                    }
                }
            }
        }
    }
}

/// Asks until the answer is a number, each time with another seed.
async fn answered(seat: &Seat, asked: &ScoreModel, prompt: &[u32], spent: &mut Spent) -> Result<f64, String> {
    let params = asked.sampling_params.clone().unwrap_or_default();
    let attempts = if params.temperature() == 0.0 { 1 } else { ATTEMPTS };
    let mut why = String::new();
    for attempt in 0..attempts {
        let sampling = Sampling {
            temperature: params.temperature() as f32,
            top_p: params.top_p.unwrap_or(1.0) as f32,
            seed: (params.seed.unwrap_or(0) as u64).wrapping_add(attempt),
            ..Sampling::default()
        };
        let written = seat.write(prompt, params.max_tokens(), sampling).await?;
        spent.add(&asked.model, prompt.len() as u64, written.tokens);
        match answer::number(&written.text, asked.range()) {
            Ok(score) => return Ok(score),
            Err(said) => why = said,
        }
    }
    Err(format!("{why} ({attempts} attempts)"))
}

/// `Σ i·P(i) / Σ P(i)` over 1…10, brought to `range`.
fn expected(likelihoods: &[f64], [least, greatest]: [f64; 2]) -> Result<f64, String> {
    /// Below this share the model says other things than a number.
    const HEARD: f64 = 1e-4;
    let total: f64 = likelihoods.iter().sum();
    if total.is_nan() || total < HEARD {
        return Err(format!("its answer is a number from 1 to 10 with a probability of {total:.1e}"));
    }
    let mean = SCALE.zip(likelihoods).map(|(label, p)| f64::from(label) * p).sum::<f64>() / total;
    let (first, last) = (f64::from(*SCALE.start()), f64::from(*SCALE.end()));
    Ok(least + (mean - first) / (last - first) * (greatest - least))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_expected_is_a_mean_over_the_numbers() {
        let mut p = vec![0.0; 10];
        (p[0], p[9]) = (0.1, 0.3);
        // (1·0.1 + 10·0.3) / 0.4 = 7.75, three quarters of the way from 1 to 10.
        assert!((expected(&p, [-1.0, 1.0]).unwrap() - 0.5).abs() < 1e-12);
        assert!((expected(&p, [1.0, 10.0]).unwrap() - 7.75).abs() < 1e-12);
        assert!(expected(&[1e-6; 10], [0.0, 1.0]).is_err());
        assert!(expected(&[f64::NAN; 10], [0.0, 1.0]).is_err());
    }
}
