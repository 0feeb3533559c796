//! One row: two answers, drawn or given, and which of them is better.

use super::panel::{Contest, Panel};
use crate::{
    data::{Compared, Side},
    domain::{Dropped, LabelSpec, Labelled, Labelling, Outcome, rng::Stream},
    inference::Sampling,
    jobs::judge::{Means, Seat, SeatError, Spent},
    objectives::grade::GradeError,
};

/// How often another second answer is drawn where it is the first one again.
const DRAWS: u64 = 4;

/// Who writes and who judges.
pub struct Desk<'a> {
    spec: &'a LabelSpec,
    writer: Option<(String, Seat)>,
    panel: Panel,
}

/// Why a row has no label, and what was said of it.
type Reason = (Dropped, Option<String>);

impl<'a> Desk<'a> {
    pub async fn open(means: &Means, task: &'a Labelling) -> Result<Self, SeatError> {
        let spec = &task.spec;
        let writer = match &spec.model {
            Some(name) => Some((name.clone(), means.seat(&task.project, name, true).await?)),
            None => None,
        };
        let panel = Panel::open(means, &task.project, &spec.judge, &spec.criteria).await?;
        Ok(Self { spec, writer, panel })
    }

    /// An error is the grader's: no row will fare better.
    pub async fn label(&self, row: &Compared) -> Result<Labelled, GradeError> {
        let mut spent = Spent::default();
        let (outcome, orders) = match self.answers(row, &mut spent).await {
            Ok(answers) => self.judged(row, answers, &mut spent).await?,
            Err((why, said)) => (Outcome::Dropped(why, said), None),
        };
        Ok(Labelled { outcome, orders, spent: spent.0 })
    }

    async fn judged(
        &self,
        row: &Compared,
        answers: [Side; 2],
        spent: &mut Spent,
    ) -> Result<(Outcome, Option<[f64; 2]>), GradeError> {
        let texts = answers.each_ref().map(Side::text);
        let contest = Contest { messages: &row.messages, item: &row.item, answers: texts };
        let orders = match self.panel.orders(&contest, spent).await? {
            Ok(orders) => orders,
            Err(why) => return Ok((Outcome::Dropped(Dropped::Unjudged, Some(why.0)), None)),
        };
        let first = (orders[0] + orders[1]) / 2.0;
        if first == 0.5 || (first - 0.5).abs() < self.spec.min_margin {
            return Ok((Outcome::Dropped(Dropped::Undecided, None), Some(orders)));
        }
        let [a, b] = answers;
        let (better, worse, probability) = if first > 0.5 { (a, b, first) } else { (b, a, 1.0 - first) };
        // That the better answer is better: shown first, and shown second.
        let shown = if first > 0.5 { orders } else { [1.0 - orders[1], 1.0 - orders[0]] };
        let judgement = self.panel.judgement(&self.spec.judge, &self.spec.criteria, shown);
        Ok((Outcome::Row(row.row(&better, &worse, probability, &judgement)), Some(orders)))
    }

    async fn answers(&self, row: &Compared, spent: &mut Spent) -> Result<[Side; 2], Reason> {
        if let Some(answers) = &row.answers {
            return Ok(answers.clone());
        }
        let unanswered = |why: String| (Dropped::Unanswered, Some(why));
        let (name, seat) = self.writer.as_ref().ok_or_else(|| unanswered("there is no model to answer".to_owned()))?;
        let prompt = seat.prompt(&row.messages).map_err(unanswered)?;
        let mut first: Option<String> = None;
        for draw in 0..DRAWS {
            let most = self.spec.sampling.max_completion_tokens;
            let written = seat.write(&prompt, most, self.sampling(row.line, draw)).await.map_err(unanswered)?;
            spent.add(name, prompt.len() as u64, written.tokens);
            if written.text.trim().is_empty() {
                continue;
            }
            match first.take() {
                None => first = Some(written.text),
                Some(first) if first != written.text => return Ok([first, written.text].map(Side::said)),
                same => first = same,
            }
        }
        Err((if first.is_some() { Dropped::EqualAnswers } else { Dropped::EmptyAnswer }, None))
    }

    /// All randomness is a function of the task's seed, the line and the draw.
    fn sampling(&self, line: u64, draw: u64) -> Sampling {
        let own = &self.spec.sampling;
        Sampling {
            temperature: own.temperature as f32,
            top_p: own.top_p as f32,
            seed: Stream::new(own.seed, line).below(draw, u64::MAX),
            ..Sampling::default()
        }
    }
}
