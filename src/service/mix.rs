//! `adapters`: several LoRAs of one base, mixed for one request.

use serde::Deserialize;
use utoipa::ToSchema;

use super::{Problem, Service, catalogue::Model};
use crate::{domain::AdapterRecord, inference::Mix, methods::mix::MIXABLE};

/// Adapters of one mixture.
const MAX_PARTS: usize = 8;
/// The largest weight, in size.
const MAX_WEIGHT: f32 = 100.0;

/// One adapter of a mixture.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MixPart {
    /// The tuned model's name, or the adapter's id.
    model: String,
    /// Its change of the base is multiplied by this, -100 to 100. Default 1.
    weight: Option<f32>,
}

impl Service {
    /// What a request's `model` and `adapters` mean together.
    pub async fn model_of(&self, project: &str, name: &str, parts: Option<&[MixPart]>) -> Result<Model, Problem> {
        let model = self.served(project, name).await?;
        let Some(parts) = parts else { return Ok(model) };
        let param = |i: usize, field: &str| format!("adapters.{i}.{field}");
        if model.adapter.is_some() {
            let message = format!("adapters are mixed on a base, and {name} is a tuned model: name it among them");
            return Err(Problem::invalid("adapters", "invalid_combination", message));
        }
        if parts.is_empty() || parts.len() > MAX_PARTS {
            let message = format!("adapters has {} of them, outside 1 to {MAX_PARTS}", parts.len());
            return Err(Problem::invalid("adapters", "out_of_range", message));
        }
        let base = &model.resident.base.info.id;
        let mut records: Vec<(AdapterRecord, f32)> = Vec::with_capacity(parts.len());
        for (i, part) in parts.iter().enumerate() {
            let found = self.model(project, &part.model).await.map_err(|problem| problem.at(&param(i, "model")))?;
            let wrong = |code: &str, why: String| Err(Problem::invalid(param(i, "model"), code, why));
            let Some(record) = found.adapter else {
                return wrong("not_an_adapter", format!("{} is a base", part.model));
            };
            if record.parent != *base {
                return wrong(
                    "wrong_base",
                    format!("{} is an adapter of {}, not of {base}", part.model, record.parent),
                );
            }
            if !MIXABLE.contains(&record.method.as_str()) {
                let known = MIXABLE.join(", ");
                let why = format!("an adapter of method {} cannot be mixed, only those of {known}", record.method);
                return wrong("not_mixable", why);
            }
            if records.iter().any(|(other, _)| other.generation == record.generation) {
                return wrong("given_twice", format!("{} stands twice in adapters", part.model));
            }
            let weight = part.weight.unwrap_or(1.0);
            if !weight.is_finite() || weight.abs() > MAX_WEIGHT {
                let message = format!("{} is {weight}, outside -{MAX_WEIGHT} to {MAX_WEIGHT}", param(i, "weight"));
                return Err(Problem::invalid(param(i, "weight"), "out_of_range", message));
            }
            records.push((record, weight));
        }
        let Some((first, _)) = records.first().cloned() else { return Ok(model) };
        let parts = records.iter().map(|(record, weight)| (record.generation.clone(), *weight)).collect();
        let mixed = AdapterRecord {
            model: base.clone(),
            generation: Mix(parts).to_string(),
            bytes: records.iter().map(|(record, _)| record.bytes).sum(),
            virtual_tokens: 0,
            job_id: None,
            step: None,
            ..first
        };
        Ok(Model { adapter: Some(mixed), ..model })
    }
}
