//! Which of two answers is better: a model reads both in each order, or a grader scores each by itself.
//!
//! A model is asked for 1 or 2, and `p = P(1) / (P(1) + P(2))` is read from the probabilities of its first token; the
//! label is the mean over both orders (Lee et al., "RLAIF", arXiv 2309.00267).

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::{
    domain::{
        PairJudge,
        rollout::Ungraded,
        spec::{Grader, SamplingParams},
    },
    inference::sha256,
    jobs::judge::{Afar, Judges, Means, Seat, SeatError, Spent, likelihoods},
    objectives::grade::{GradeError, Scene},
    outbound::Web,
};

/// Below this share a model says other things than 1 or 2.
const HEARD: f64 = 1e-4;

/// Who judges.
pub struct Panel {
    who: Who,
    /// Before the conversation.
    preamble: String,
}

enum Who {
    Here { seat: Seat, name: String },
    Afar { web: Web, address: String, name: String, tells: AtomicBool },
    Grader { grader: Grader, judges: Judges },
}

/// Two answers to a conversation.
pub struct Contest<'a> {
    pub messages: &'a [Value],
    pub item: &'a Value,
    pub answers: [String; 2],
}

impl Panel {
    pub async fn open(means: &Means, project: &str, judge: &PairJudge, criteria: &[String]) -> Result<Self, SeatError> {
        let who = match judge.clone() {
            PairJudge::Model { model: name, endpoint: None } => {
                Who::Here { seat: means.seat(project, &name, true).await?, name }
            }
            PairJudge::Model { model: name, endpoint: Some(address) } => {
                Who::Afar { web: means.web.clone(), address, name, tells: AtomicBool::new(true) }
            }
            PairJudge::Grader { grader } => {
                Who::Grader { judges: Judges::of(means, project, &grader, true).await?, grader }
            }
        };
        Ok(Self { who, preamble: preamble(criteria) })
    }

    /// What is kept beside a label: who judged, by what, and what was said in each order.
    pub fn judgement(&self, judge: &PairJudge, criteria: &[String], orders: [f64; 2]) -> Value {
        match judge {
            PairJudge::Model { model, endpoint } => {
                let prompt = sha256(question(&self.preamble, &[], ["", ""]).as_bytes());
                json!({"judge": model, "endpoint": endpoint, "criteria": criteria, "prompt_sha256": prompt,
                       "orders": orders})
            }
            PairJudge::Grader { grader } => json!({"grader": grader, "orders": orders}),
        }
    }

    /// The probability that the first answer is better: shown first, and shown second. An error of the outer kind is
    /// the request's.
    pub async fn orders(
        &self,
        contest: &Contest<'_>,
        spent: &mut Spent,
    ) -> Result<Result<[f64; 2], Ungraded>, GradeError> {
        let [a, b] = &contest.answers;
        match &self.who {
            Who::Grader { grader, judges } => {
                let mut scores = [0.0; 2];
                for (answer, score) in contest.answers.iter().zip(&mut scores) {
                    let graded = judges.grade(grader, &Scene::new(contest.item, answer)).await?;
                    spent.merge(graded.spent);
                    match graded.reward {
                        Ok(reward) => *score = reward,
                        Err(why) => return Ok(Err(why)),
                    }
                }
                // A score does not depend on what else is shown.
                let better = match scores[0].total_cmp(&scores[1]) {
                    std::cmp::Ordering::Greater => 1.0,
                    std::cmp::Ordering::Equal => 0.5,
                    std::cmp::Ordering::Less => 0.0,
                };
                Ok(Ok([better; 2]))
            }
            _ => {
                let first = self.first_is_better(contest.messages, [a, b], spent).await;
                let second = match &first {
                    Ok(_) => self.first_is_better(contest.messages, [b, a], spent).await,
                    Err(why) => Err(why.clone()),
                };
                Ok(first.and_then(|first| Ok([first, 1.0 - second?])).map_err(Ungraded))
            }
        }
    }

    async fn first_is_better(&self, messages: &[Value], shown: [&str; 2], spent: &mut Spent) -> Result<f64, String> {
        let question = [json!({"role": "user", "content": question(&self.preamble, messages, shown)})];
        let labels = ["1".to_owned(), "2".to_owned()];
        match &self.who {
            Who::Here { seat, name } => {
                let prompt = seat.prompt(&question)?;
                share(&likelihoods(seat, &prompt, &labels, |read| spent.add(name, read, 1)).await?)
            }
            Who::Afar { web, address, name, tells } => {
                let afar = Afar { web, address, model: name };
                if tells.load(Ordering::Relaxed) {
                    match afar.likelihoods(&question, &labels, spent).await {
                        Ok(found) => return share(&found),
                        // Not every server tells log-probabilities: then the word itself has to do.
                        Err(_) => tells.store(false, Ordering::Relaxed),
                    }
                }
                let params = SamplingParams {
                    temperature: Some(0.0),
                    max_completions_tokens: Some(8),
                    ..SamplingParams::default()
                };
                afar.write(&question, &params, spent, chosen).await
            }
            Who::Grader { .. } => Err("a grader reads one answer at a time".to_owned()),
        }
    }
}

/// 1 or 2, at the beginning of an answer.
fn chosen(text: &str) -> Result<f64, String> {
    let word: String = text.trim().chars().take_while(char::is_ascii_digit).collect();
    match word.as_str() {
        "1" => Ok(1.0),
        "2" => Ok(0.0),
        _ => Err("it answers neither 1 nor 2".to_owned()),
    }
}

fn share(found: &[f64]) -> Result<f64, String> {
    let total: f64 = found.iter().sum();
    match found {
        [first, _] if total >= HEARD => Ok(first / total),
        _ => Err(format!("its answer is 1 or 2 with a probability of {total:.1e}")),
    }
}

fn preamble(criteria: &[String]) -> String {
    let task = "Two responses to a conversation follow. Decide which of them is better";
    match criteria {
        [] => format!("{task}."),
        criteria => {
            let list: String = criteria.iter().map(|one| format!("\n- {one}")).collect();
            format!("{task} by these criteria:{list}")
        }
    }
}

fn question(preamble: &str, messages: &[Value], [first, second]: [&str; 2]) -> String {
    let line = |message: &Value| {
        let (role, text) = (message["role"].as_str().unwrap_or_default(), message["content"].as_str());
        format!("{role}: {}\n", text.unwrap_or_default())
    };
    let conversation: String = messages.iter().map(line).collect();
    format!(
        "{preamble}\n\nConversation:\n{conversation}\nResponse 1:\n{first}\n\nResponse 2:\n{second}\n\n\
         Answer with the number of the better response, 1 or 2, and nothing else.\nPreferred Response="
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_1_or_2_or_nonsense() {
        assert_eq!((chosen(" 1."), chosen("2")), (Ok(1.0), Ok(0.0)));
        for text in ["", "12", "Response 1", "3"] {
            assert!(chosen(text).is_err(), "{text}");
        }
        assert_eq!(share(&[0.3, 0.1]), Ok(0.3 / 0.4));
        assert!(share(&[1e-6, 1e-6]).is_err() && share(&[f64::NAN, 0.1]).is_err());
    }

    #[test]
    fn the_question_has_the_criteria_and_both_answers() {
        let criteria = ["be short".to_owned(), "be kind".to_owned()];
        let messages = [json!({"role": "user", "content": "Hi"})];
        let text = question(&preamble(&criteria), &messages, ["A", "B"]);
        let places: Vec<_> = ["- be short\n- be kind", "user: Hi", "Response 1:\nA", "Response 2:\nB"]
            .iter()
            .map(|part| text.find(part).unwrap_or_else(|| panic!("{part}: {text}")))
            .collect();
        assert!(places.is_sorted());
    }
}
