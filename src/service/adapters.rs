//! Adapters in and out.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Fault, Problem, Service, catalogue::Model, fields::read, once::remembered};
use crate::{
    db::Once,
    domain::{AdapterRecord, Caller, MethodSpec, id},
    formats::archive,
    inference::{CONFIG, MANIFEST, WEIGHTS, read_adapter, sha256},
    jobs::{now, publish_adapter},
    methods::{self, AdapterFiles, MethodError},
    model::gguf::Outtype,
    storage::Key,
};

/// Bytes that an adapter's archive may hold when unpacked.
const MAX_UNPACKED: u64 = 2 << 30;

/// Bytes of the largest model that is merged into one answer.
const MAX_MERGED: u64 = 3 << 30;

/// How a download is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    Zip,
    Tar,
}

/// In which method's format an adapter is downloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Its own.
    Own,
    /// As plain LoRA, where the change is one.
    Lora,
    /// The same as llama.cpp's adapter file, which is not packed.
    Gguf,
    /// AdapterHub's directory.
    AdapterHub,
}

/// What a merged model is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// A zip of the files of a Hugging Face directory.
    Safetensors,
    Gguf(Outtype),
}

/// The body of a merge.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MergeBody {
    format: Option<String>,
    outtype: Option<String>,
}

impl Merged {
    /// What a request's body asks for.
    pub fn read(body: Map<String, Value>) -> Result<Self, Problem> {
        let body: MergeBody = read(body)?;
        match (body.format.as_deref(), body.outtype.as_deref()) {
            (None | Some("safetensors"), None) => Ok(Self::Safetensors),
            (Some("gguf"), outtype) => match Outtype::parse(outtype.unwrap_or("f16")) {
                Some(outtype) => Ok(Self::Gguf(outtype)),
                None => {
                    let message = "outtype is none of f32, f16, bf16, q8_0 and base";
                    Err(Problem::invalid("outtype", "out_of_range", message))
                }
            },
            (None | Some("safetensors"), Some(_)) => {
                let message = "outtype says how a gguf file stores its weights; safetensors are F32";
                Err(Problem::invalid("outtype", "unsupported_parameter", message))
            }
            (Some(_), _) => Err(Problem::invalid("format", "out_of_range", "format is neither safetensors nor gguf")),
        }
    }
}

/// A PEFT directory to be imported.
pub struct Import {
    /// The id of the base that it was trained on.
    pub base: String,
    pub suffix: Option<String>,
    /// The archive.
    pub packed: Vec<u8>,
}

impl Service {
    /// A PEFT directory, packed, becomes a model.
    pub async fn import_adapter(
        &self,
        caller: &Caller,
        idempotency_key: Option<String>,
        import: Import,
    ) -> Result<AdapterRecord, Problem> {
        let Import { base, suffix, packed } = &import;
        let content = format!("{base}\n{suffix:?}\n{}", sha256(packed));
        let once = remembered(idempotency_key, "adapters", &content);
        let work = self.make_adapter(caller, once.as_ref(), import);
        self.once(&caller.project, once.as_ref(), work).await
    }

    async fn make_adapter(
        &self,
        caller: &Caller,
        once: Option<&Once>,
        Import { base, suffix, packed }: Import,
    ) -> Result<AdapterRecord, Problem> {
        let project = &caller.project;
        let model = self.model(project, &base).await?;
        if model.adapter.is_some() {
            let message = format!("{base} is a tuned model: an import names a base");
            return Err(Problem::invalid("model", "not_a_base", message));
        }
        let suffix = suffix.map(|s| super::jobs::check_suffix(&s)).transpose()?.unwrap_or_default();
        let (files, spec) = unpack(&model, packed).await?;
        let (info, method) = (&model.resident.base.info, spec.type_name());
        let manifest = publish_adapter(&self.store, &files, info, method).await?;
        let record = AdapterRecord {
            id: id::new("adapter-"),
            project: project.to_owned(),
            model: format!("ft:{}:{project}:{suffix}:{}", info.id, id::random(8).to_lowercase()),
            parent: info.id.clone(),
            method: method.to_owned(),
            generation: manifest.generation,
            bytes: manifest.files.iter().map(|file| file.bytes as i64).sum(),
            created_at: now(),
            job_id: None,
            step: None,
            virtual_tokens: spec.virtual_tokens() as i64,
        };
        self.db.insert_adapter(&caller.key, &record, once).await?;
        Ok(record)
    }

    pub async fn adapter(&self, project: &str, id: &str) -> Result<AdapterRecord, Problem> {
        self.db.adapter(project, id).await.map_err(|error| match error {
            crate::db::DbError::NotFound => Problem::not_found("adapter", id),
            error => error.into(),
        })
    }

    /// PEFT's directory, packed, or one file of llama.cpp's.
    pub async fn export_adapter(
        &self,
        record: &AdapterRecord,
        packing: Packing,
        form: Form,
    ) -> Result<Vec<u8>, Problem> {
        let (_, files) = read_adapter(&self.store, &record.generation).await?;
        let unsupported = |error: MethodError| Problem::invalid("as", "unsupported", error.to_string());
        let base = match form {
            Form::Own => None,
            _ => Some(self.model(&record.project, &record.model).await?.resident.base),
        };
        let work = move || {
            let files = match (form, base) {
                (Form::Gguf, Some(base)) => return methods::as_gguf(&files, &base).map_err(unsupported),
                (Form::AdapterHub, Some(base)) => methods::as_adapterhub(&files, &base.info).map_err(unsupported)?,
                (Form::Lora, Some(base)) => {
                    let lora = methods::as_lora(&files, &base.info).map_err(unsupported)?;
                    methods::directory(lora).map_err(Problem::internal)?
                }
                _ => methods::directory(files).map_err(Problem::internal)?,
            };
            let packed = match packing {
                Packing::Zip => archive::write_zip(&files),
                Packing::Tar => archive::write_tar(&files),
            };
            packed.map_err(Problem::internal)
        };
        tokio::task::spawn_blocking(work).await.map_err(Problem::internal)?
    }

    /// The base with the adapter in its weights: a zip of config.json and model.safetensors, or a GGUF file.
    pub async fn merge_adapter(&self, record: &AdapterRecord, form: Merged) -> Result<Vec<u8>, Problem> {
        let resident = self.bases.get(&record.parent).ok_or_else(|| Problem::model_not_found(&record.model))?;
        let base = resident.base.clone();
        let bytes = 4 * base.info.parameters;
        if bytes > MAX_MERGED {
            let message = format!("merged, the model has {bytes} bytes, above the limit of {MAX_MERGED} of an answer");
            return Err(Problem::new(Fault::Unprocessable, "model_too_large", message).at("adapter_id"));
        }
        let (_, files) = read_adapter(&self.store, &record.generation).await?;
        let work = move || {
            let refused = |error: MethodError| {
                Problem { code: Some("not_mergeable".to_owned()), ..error.into() }.at("adapter_id")
            };
            match form {
                Merged::Gguf(outtype) => methods::merged::gguf(&files, &base, outtype).map_err(refused),
                Merged::Safetensors => {
                    let merged = methods::merged::directory(&files, &base).map_err(refused)?;
                    archive::write_zip(&merged).map_err(Problem::internal)
                }
            }
        };
        tokio::task::spawn_blocking(work).await.map_err(Problem::internal)?
    }

    pub(super) async fn delete_adapter_files(&self, generation: &str) -> Result<(), Problem> {
        // The manifest first: without it nothing is loaded.
        for name in [MANIFEST, CONFIG, WEIGHTS] {
            let key = Key::Adapter { generation: generation.to_owned(), name: name.to_owned() };
            self.store.delete(&key).await?;
        }
        Ok(())
    }
}

/// The files and what they hold, after they were tried on the base.
async fn unpack(model: &Model, packed: Vec<u8>) -> Result<(AdapterFiles, MethodSpec), Problem> {
    let base = model.resident.base.clone();
    let work = move || {
        let files = methods::of_directory(archive::read_adapter(&packed, MAX_UNPACKED).map_err(of_archive)?)?;
        let spec = methods::spec_of(&files)?;
        spec.check(&base.info).map_err(|error| Problem::invalid("file", error.code, error.message))?;
        methods::load(&files, &base)?;
        Ok((files, spec))
    };
    tokio::task::spawn_blocking(work).await.map_err(Problem::internal)?
}

fn of_archive(error: crate::formats::FormatError) -> Problem {
    use crate::formats::FormatError;
    match error {
        FormatError::Pickle(_) => {
            Problem { fault: super::Fault::UnsupportedMedia, ..Problem::invalid("file", "pickle", error.to_string()) }
        }
        error => Problem::invalid("file", "invalid_archive", error.to_string()),
    }
}
