//! A request of chat or completions: its own fields, beside those that both have.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};

use crate::service::{Problem, fields::read, sampling::SamplingFields};

/// One object on the wire and in the document. serde's `flatten` would neither refuse unknown fields nor say which
/// field is wrong.
pub struct Asked<T> {
    pub own: T,
    pub sampling: SamplingFields,
}

impl<T: DeserializeOwned> Asked<T> {
    pub fn read(body: Map<String, Value>) -> Result<Self, Problem> {
        let (shared, own) = body.into_iter().partition(|(name, _)| SamplingFields::NAMES.contains(&name.as_str()));
        Ok(Self { own: read(own)?, sampling: read(shared)? })
    }
}

impl<T: PartialSchema> PartialSchema for Asked<T> {
    fn schema() -> RefOr<Schema> {
        match (T::schema(), SamplingFields::schema()) {
            (RefOr::T(Schema::Object(mut own)), RefOr::T(Schema::Object(shared))) => {
                own.properties.extend(shared.properties);
                own.into()
            }
            (own, _) => own,
        }
    }
}

impl<T: ToSchema> ToSchema for Asked<T> {
    fn name() -> std::borrow::Cow<'static, str> {
        T::name()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        T::schemas(schemas);
        SamplingFields::schemas(schemas);
    }
}
