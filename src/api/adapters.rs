//! `/v1/adapters`: adapters as files.

use std::collections::HashSet;

use axum::{
    Json,
    extract::{FromRequest, Multipart, Request, State},
    http::header::{CONTENT_DISPOSITION, CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    AppState,
    auth::{Reading, Training},
    error::{ApiError, ErrorEnvelope},
    extract::{Id, IdempotencyHeader, IdempotencyKey, OptionalObject, Query},
    list::{List, Paging},
};
use crate::{
    domain::AdapterRecord,
    inference::{Handle, Residency, Tier},
    service::{
        Fault, Problem,
        adapters::{self, Form, Merged, Packing},
    },
};

/// A trained or imported adapter.
#[derive(Serialize, ToSchema)]
pub struct AdapterObject {
    /// `adapter-…`
    pub id: String,
    /// Always `adapter`.
    pub object: String,
    /// What requests put into `model`.
    pub model: String,
    /// The base.
    pub parent: String,
    /// `lora`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// SHA-256 of its files: the same bytes, the same generation.
    pub generation: String,
    pub bytes: i64,
    /// Unix seconds.
    pub created_at: i64,
    /// The job that made it; null for imports.
    pub fine_tuning_job_id: Option<String>,
    /// The step of a checkpoint.
    pub step_number: Option<i64>,
    /// The nearest place that has it: `memory`, `disk` or `store`.
    pub tier: String,
    /// Whether it is kept in memory and on disk whoever else is asked for.
    pub pinned: bool,
    /// Whether it is in memory now.
    pub resident: bool,
    /// Bytes that it takes up in memory; 0 when it is not there.
    pub resident_bytes: u64,
    /// Requests that it served since it was loaded.
    pub hits: u64,
    /// Seconds from the first request for it until it could be used; null when it is not in memory.
    pub load_seconds: Option<f64>,
}

impl AdapterObject {
    fn new(record: AdapterRecord, now: &Now) -> Self {
        let Now { engine, resident, pinned } = now;
        let tier = match engine.tier(&record.generation) {
            Tier::Memory => "memory",
            Tier::Disk => "disk",
            Tier::Store => "store",
        };
        let found = resident.iter().find(|r| r.generation == record.generation);
        Self {
            pinned: pinned.contains(&record.id),
            tier: tier.to_owned(),
            id: record.id,
            object: "adapter".to_owned(),
            model: record.model,
            parent: record.parent,
            kind: record.method,
            generation: record.generation,
            bytes: record.bytes,
            created_at: record.created_at,
            fine_tuning_job_id: record.job_id,
            step_number: record.step,
            resident: found.is_some(),
            resident_bytes: found.map_or(0, |r| r.bytes),
            hits: found.map_or(0, |r| r.hits),
            load_seconds: found.map(|r| r.load_time.as_secs_f64()),
        }
    }
}

/// How adapters stand now.
struct Now {
    engine: Handle,
    resident: Vec<Residency>,
    pinned: HashSet<String>,
}

impl Now {
    async fn of(state: &AppState, project: &str) -> Result<Self, ApiError> {
        let engine = state.service.engine.clone();
        Ok(Self { resident: engine.residency(), engine, pinned: state.service.db.pinned(project).await? })
    }
}

/// The project's adapters, newest first.
#[utoipa::path(get, path = "/v1/adapters", operation_id = "listAdapters", tag = "adapters", params(Paging),
    responses(
        (status = 200, description = "A page of adapters", body = List<AdapterObject>),
        (status = 400, description = "The query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "`after` is no adapter", body = ErrorEnvelope),
    ))]
pub async fn list(
    State(state): State<AppState>,
    Reading(project): Reading,
    Query(paging): Query<Paging>,
) -> Result<Json<List<AdapterObject>>, ApiError> {
    let page = state.service.db.adapters(&project, paging.after.as_deref(), paging.limit()?).await?;
    let now = Now::of(&state, &project).await?;
    let data = page.data.into_iter().map(|record| AdapterObject::new(record, &now)).collect();
    Ok(Json(List::new(data, page.has_more, |adapter| &adapter.id)))
}

/// One adapter.
#[utoipa::path(get, path = "/v1/adapters/{adapter_id}", operation_id = "retrieveAdapter", tag = "adapters",
    params(("adapter_id" = String, Path, description = "`adapter-…`, or the model's name")),
    responses(
        (status = 200, description = "The adapter", body = AdapterObject),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such adapter", body = ErrorEnvelope),
    ))]
pub async fn retrieve(
    State(state): State<AppState>,
    Reading(project): Reading,
    Id(id): Id,
) -> Result<Json<AdapterObject>, ApiError> {
    let record = state.service.adapter(&project, &id).await?;
    Ok(Json(AdapterObject::new(record, &Now::of(&state, &project).await?)))
}

/// Keeps an adapter in memory and on disk, whoever else is asked for; it is loaded at once. All pinned adapters may take
/// half of the memory that adapters have.
#[utoipa::path(post, path = "/v1/adapters/{adapter_id}/pin", operation_id = "pinAdapter", tag = "adapters",
    params(("adapter_id" = String, Path, description = "`adapter-…`, or the model's name")),
    responses(
        (status = 200, description = "It is pinned", body = AdapterObject),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such adapter", body = ErrorEnvelope),
        (status = 409, description = "Pinned adapters leave no room", body = ErrorEnvelope),
    ))]
pub async fn pin(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(id): Id,
) -> Result<Json<AdapterObject>, ApiError> {
    let record = state.service.pin_adapter(&caller, &id).await?;
    Ok(Json(AdapterObject::new(record, &Now::of(&state, &caller.project).await?)))
}

/// Lets an adapter go when its room is needed.
#[utoipa::path(delete, path = "/v1/adapters/{adapter_id}/pin", operation_id = "unpinAdapter", tag = "adapters",
    params(("adapter_id" = String, Path, description = "`adapter-…`, or the model's name")),
    responses(
        (status = 200, description = "It is not pinned", body = AdapterObject),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such adapter", body = ErrorEnvelope),
    ))]
pub async fn unpin(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(id): Id,
) -> Result<Json<AdapterObject>, ApiError> {
    let record = state.service.unpin_adapter(&caller, &id).await?;
    Ok(Json(AdapterObject::new(record, &Now::of(&state, &caller.project).await?)))
}

/// The multipart form of an import.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the form in the document")]
pub struct Import {
    /// The base's id.
    model: String,
    /// A zip or tar (also gzipped) of adapter_config.json and adapter_model.safetensors.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    /// Part of the model's name.
    suffix: Option<String>,
}

/// Imports a PEFT directory. Every tensor must match a module of the base.
#[utoipa::path(post, path = "/v1/adapters", operation_id = "importAdapter", tag = "adapters",
    params(IdempotencyHeader), request_body(content = Import, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "The adapter can be used as a model", body = AdapterObject),
        (status = 400, description = "The archive, its config or a tensor is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such base", body = ErrorEnvelope),
        (status = 409, description = "A request with this idempotency key is under way", body = ErrorEnvelope),
        (status = 413, description = "The archive is above the server's limit", body = ErrorEnvelope),
        (status = 415, description = "Pickled weights, or not a multipart form", body = ErrorEnvelope),
        (status = 422, description = "The idempotency key was used for another request", body = ErrorEnvelope),
    ))]
pub async fn import(
    State(state): State<AppState>,
    Training(caller): Training,
    IdempotencyKey(key): IdempotencyKey,
    request: Request,
) -> Result<Json<AdapterObject>, ApiError> {
    let form = Multipart::from_request(request, &state).await;
    let mut form = form.map_err(|e| Problem::new(Fault::UnsupportedMedia, "unsupported_media_type", e.body_text()))?;
    let broken =
        |e: axum::extract::multipart::MultipartError| Problem::new(Fault::Invalid, "invalid_multipart", e.body_text());
    let (mut model, mut suffix, mut file) = (None, None, None);
    while let Some(mut field) = form.next_field().await.map_err(broken)? {
        match field.name().unwrap_or_default() {
            "model" => model = Some(field.text().await.map_err(broken)?),
            "suffix" => suffix = Some(field.text().await.map_err(broken)?),
            "file" => {
                let mut bytes = Vec::new();
                while let Some(chunk) = field.chunk().await.map_err(broken)? {
                    if (bytes.len() + chunk.len()) as u64 > state.service.max_upload {
                        let message = format!("the archive is above the limit of {} bytes", state.service.max_upload);
                        return Err(Problem::new(Fault::TooLarge, "file_too_large", message).into());
                    }
                    bytes.extend_from_slice(&chunk);
                }
                file = Some(bytes);
            }
            other => {
                let param: String = other.chars().take(64).collect();
                return Err(Problem::invalid(&param, "unknown_parameter", format!("unknown field {param}")).into());
            }
        }
    }
    let missing = |name: &str| Problem::invalid(name, "missing_required_parameter", format!("the form has no {name}"));
    let (base, packed) = (model.ok_or_else(|| missing("model"))?, file.ok_or_else(|| missing("file"))?);
    let record = state.service.import_adapter(&caller, key, adapters::Import { base, suffix, packed }).await?;
    Ok(Json(AdapterObject::new(record, &Now::of(&state, &caller.project).await?)))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct DownloadQuery {
    /// `zip` (default) or `tar`.
    pub format: Option<String>,
    /// `lora`: as plain LoRA, where the method's change is one (AdaLoRA). `gguf`: the same as llama.cpp's adapter file,
    /// by itself. `adapterhub`: as AdapterHub's directory, with its head (UniPELT of `sequence_mean` gates). Without it, in
    /// the method's own format.
    pub r#as: Option<String>,
}

/// An adapter in PEFT's layout: `PeftModel.from_pretrained` reads it.
#[utoipa::path(get, path = "/v1/adapters/{adapter_id}/download", operation_id = "downloadAdapter", tag = "adapters",
    params(("adapter_id" = String, Path, description = "`adapter-…`, or the model's name"), DownloadQuery),
    responses(
        (status = 200, description = "The archive", content_type = "application/octet-stream", body = String),
        (status = 400, description = "The query is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such adapter", body = ErrorEnvelope),
        (status = 409, description = "Its files are damaged in the store", body = ErrorEnvelope),
    ))]
pub async fn download(
    State(state): State<AppState>,
    Reading(project): Reading,
    Id(id): Id,
    Query(query): Query<DownloadQuery>,
) -> Result<Response, ApiError> {
    let (packing, kind) = match query.format.as_deref() {
        None | Some("zip") => (Packing::Zip, "zip"),
        Some("tar") => (Packing::Tar, "tar"),
        Some(_) => return Err(Problem::invalid("format", "out_of_range", "format is neither zip nor tar").into()),
    };
    let form = match query.r#as.as_deref() {
        None => Form::Own,
        Some("lora") => Form::Lora,
        Some("gguf") if query.format.is_some() => {
            let message = "a gguf file is not packed: leave format out";
            return Err(Problem::invalid("format", "unsupported_parameter", message).into());
        }
        Some("gguf") => Form::Gguf,
        Some("adapterhub") => Form::AdapterHub,
        Some(_) => return Err(Problem::invalid("as", "out_of_range", "as is none of lora, gguf and adapterhub").into()),
    };
    let record = state.service.adapter(&project, &id).await?;
    let bytes = state.service.export_adapter(&record, packing, form).await?;
    let kind = if form == Form::Gguf { "gguf" } else { kind };
    let name = format!("attachment; filename=\"{}.{kind}\"", record.id);
    let headers = [(CONTENT_TYPE, "application/octet-stream".to_owned()), (CONTENT_DISPOSITION, name)];
    Ok((headers, bytes).into_response())
}

/// How a merged model is written. The body may be left out.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes the body in the document; the service reads it field by field")]
pub struct MergeAdapter {
    /// `safetensors` (default): a zip of config.json and model.safetensors in F32. `gguf`: one file for llama.cpp.
    format: Option<String>,
    /// Of a gguf file: `f16` (default), `f32`, `bf16`, `q8_0`, or `base`, each matrix as in the base's file.
    outtype: Option<String>,
}

/// The base with the adapter merged into its weights: the files of a Hugging Face directory in F32, or a GGUF file with
/// the base's tokenizer. A quantised base is merged as its dequantised copy, and where the adapter changes an end of a
/// tied model the two ends become two tensors. Methods that are no change of weights are refused with the reason, and a
/// base that was read from a directory has no GGUF file to be like.
#[utoipa::path(post, path = "/v1/adapters/{adapter_id}/merge", operation_id = "mergeAdapter", tag = "adapters",
    params(("adapter_id" = String, Path, description = "`adapter-…`, or the model's name")),
    request_body = Option<MergeAdapter>,
    responses(
        (status = 200, description = "A zip of config.json and model.safetensors, or a GGUF file",
            content_type = "application/octet-stream", body = String),
        (status = 400, description = "The adapter cannot be merged, or a field is wrong", body = ErrorEnvelope),
        (status = 401, description = "No or a wrong key", body = ErrorEnvelope),
        (status = 403, description = "The key's scopes do not reach", body = ErrorEnvelope),
        (status = 404, description = "No such adapter, or its base is not here", body = ErrorEnvelope),
        (status = 409, description = "Its files are damaged in the store", body = ErrorEnvelope),
        (status = 413, description = "The body is too large", body = ErrorEnvelope),
        (status = 415, description = "The body is not JSON", body = ErrorEnvelope),
        (status = 422, description = "The merged model is above the limit of an answer", body = ErrorEnvelope),
    ))]
pub async fn merge(
    State(state): State<AppState>,
    Training(caller): Training,
    Id(id): Id,
    OptionalObject(body): OptionalObject,
) -> Result<Response, ApiError> {
    let form = Merged::read(body)?;
    let record = state.service.adapter(&caller.project, &id).await?;
    let bytes = state.service.merge_adapter(&record, form).await?;
    let ending = if form == Merged::Safetensors { "zip" } else { "gguf" };
    let name = format!("attachment; filename=\"{}-merged.{ending}\"", record.id);
    let headers = [(CONTENT_TYPE, "application/octet-stream".to_owned()), (CONTENT_DISPOSITION, name)];
    Ok((headers, bytes).into_response())
}
