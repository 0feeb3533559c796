//! The document that SDKs are made from.

use utoipa::{
    Modify, OpenApi,
    openapi::{
        RefOr, Schema,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use super::router::routes;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Attune",
        description = "Fine-tuning as a service over one resident base. The wire is OpenAI's, with extensions: in a \
                       job's request `method` keeps OpenAI's meaning, the objective; the sibling object `adapter` \
                       says which fine-tuning method changes the model.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    security(("key" = [])),
    modifiers(&Key),
    components(schemas(crate::domain::Metrics)),
    tags(
        (name = "chat", description = "Answers to conversations and prompts"),
        (name = "batches", description = "Many requests as one file"),
        (name = "files", description = "Datasets and results"),
        (name = "fine-tuning", description = "Jobs and what can be trained"),
        (name = "models", description = "Bases and tuned models"),
        (name = "adapters", description = "Adapters as files"),
        (name = "feedback", description = "What people say of answers, and datasets made of it"),
        (name = "health", description = "For whoever runs the server"),
    ),
)]
struct Document;

struct Key;

impl Modify for Key {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        document.components.get_or_insert_default().add_security_scheme("key", scheme);
    }
}

/// The document, made from the code.
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = Document::openapi();
    document.merge(routes(0).into_openapi());
    join_variants(&mut document);
    document
}

/// Makes one object of each variant that is a type with a tag beside it: all of a closed object and a tag would refuse
/// the tag, and generators know no union of such.
fn join_variants(document: &mut utoipa::openapi::OpenApi) {
    let Some(components) = &mut document.components else { return };
    let known = components.schemas.clone();
    let object = |part: &RefOr<Schema>| match part {
        RefOr::T(Schema::Object(object)) => Some(object.clone()),
        RefOr::Ref(reference) => match known.get(reference.ref_location.rsplit('/').next()?)? {
            RefOr::T(Schema::Object(object)) => Some(object.clone()),
            _ => None,
        },
        RefOr::T(_) => None,
    };
    for schema in components.schemas.values_mut() {
        let RefOr::T(Schema::OneOf(union)) = schema else { continue };
        for variant in &mut union.items {
            let RefOr::T(Schema::AllOf(all)) = variant else { continue };
            let parts = all.items.iter().map(object).collect::<Option<Vec<_>>>();
            let joined = parts.and_then(|parts| {
                parts.into_iter().reduce(|mut joined, part| {
                    joined.properties.extend(part.properties);
                    joined.required.extend(part.required);
                    joined
                })
            });
            if let Some(joined) = joined {
                *variant = RefOr::T(Schema::Object(joined));
            }
        }
    }
}
