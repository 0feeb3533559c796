//! `/v1/methods`: what can be trained, and when to choose it.

use axum::Json;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::{
    auth::Reading,
    error::{ApiError, ErrorEnvelope},
};
use crate::domain::{MethodSpec, ObjectiveSpec};

/// A fine-tuning method or an objective.
#[derive(Serialize, ToSchema)]
pub struct MethodObject {
    /// The `type` in requests.
    pub id: String,
    /// `method` or `objective`.
    pub object: String,
    pub definition: String,
    pub choose_when: String,
    pub avoid_when: String,
    /// What a request pays beside the base's own work; null for objectives.
    pub inference_overhead: Option<String>,
    /// `peft_type` of the files that a method writes; null for objectives.
    pub file_format: Option<String>,
    /// Whether its result can be merged into the base's weights.
    pub mergeable: bool,
    pub default_learning_rate: Option<f64>,
    /// Every knob with its default.
    pub defaults: Value,
}

#[derive(Serialize, ToSchema)]
pub struct MethodList {
    /// Always `list`.
    pub object: String,
    pub data: Vec<MethodObject>,
}

fn method(spec: &MethodSpec) -> MethodObject {
    let card = spec.card();
    let mut defaults = serde_json::to_value(spec).unwrap_or_default();
    defaults.as_object_mut().map(|fields| fields.shift_remove("type"));
    MethodObject {
        id: spec.type_name().to_owned(),
        object: "method".to_owned(),
        definition: card.definition.to_owned(),
        choose_when: card.choose_when.to_owned(),
        avoid_when: card.avoid_when.to_owned(),
        inference_overhead: Some(card.inference_overhead.to_owned()),
        file_format: Some(card.file_format.to_owned()),
        mergeable: card.mergeable,
        default_learning_rate: Some(spec.default_learning_rate()),
        defaults,
    }
}

fn objective(spec: &ObjectiveSpec) -> MethodObject {
    let card = spec.card();
    let mut defaults = json!({"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 1.0});
    if let (Some(all), Some(own)) = (defaults.as_object_mut(), spec.knobs().as_object()) {
        all.extend(own.clone());
    }
    MethodObject {
        id: spec.type_name().to_owned(),
        object: "objective".to_owned(),
        definition: card.definition.to_owned(),
        choose_when: card.choose_when.to_owned(),
        avoid_when: card.avoid_when.to_owned(),
        inference_overhead: None,
        file_format: None,
        mergeable: false,
        default_learning_rate: None,
        defaults,
    }
}

/// Every method and objective, with its knobs.
#[utoipa::path(get, path = "/v1/methods", operation_id = "listMethods", tag = "fine-tuning",
    responses(
        (status = 200, description = "Methods, then objectives", body = MethodList),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
    ))]
pub async fn list(_project: Reading) -> Result<Json<MethodList>, ApiError> {
    let data = MethodSpec::all().iter().map(method).chain(ObjectiveSpec::all().iter().map(objective)).collect();
    Ok(Json(MethodList { object: "list".to_owned(), data }))
}
