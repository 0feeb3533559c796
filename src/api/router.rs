//! The route table. No route exists without its documentation.

use axum::{
    Json, Router,
    extract::DefaultBodyLimit,
    http::{HeaderName, Request},
    response::IntoResponse,
    routing::get,
};
use tower::ServiceBuilder;
use tower_http::{
    catch_panic::CatchPanicLayer,
    request_id::{MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer},
    trace::TraceLayer,
};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    AppState, adapters, aliases, batches, chat, classify, completions, embeddings, error, estimate, extract::MAX_JSON,
    feedback, files, graders, health, jobs, kept, methods, models, preferences, uploads,
};
use crate::{domain::id, service::Problem};

/// Every route with its documentation.
pub fn routes(max_upload: u64) -> OpenApiRouter<AppState> {
    let uploads = DefaultBodyLimit::max(usize::try_from(max_upload).unwrap_or(usize::MAX).saturating_add(1 << 20));
    OpenApiRouter::new()
        .routes(routes!(chat::create))
        .routes(routes!(kept::retrieve, kept::delete))
        .routes(routes!(completions::create))
        .routes(routes!(classify::create))
        .routes(routes!(embeddings::create))
        .routes(routes!(batches::create, batches::list))
        .routes(routes!(batches::retrieve))
        .routes(routes!(batches::cancel))
        .routes(routes!(models::list))
        .routes(routes!(models::retrieve, models::delete))
        .merge(
            OpenApiRouter::new()
                .routes(routes!(files::create, files::list))
                .routes(routes!(adapters::import, adapters::list))
                .routes(routes!(uploads::add_part))
                .layer(uploads),
        )
        .routes(routes!(uploads::create))
        .routes(routes!(uploads::complete))
        .routes(routes!(uploads::cancel))
        .routes(routes!(files::retrieve, files::delete))
        .routes(routes!(files::content))
        .routes(routes!(files::report))
        .routes(routes!(jobs::create, jobs::list))
        .routes(routes!(jobs::retrieve))
        .routes(routes!(estimate::create))
        .routes(routes!(jobs::cancel))
        .routes(routes!(jobs::pause))
        .routes(routes!(jobs::resume))
        .routes(routes!(jobs::events))
        .routes(routes!(jobs::checkpoints))
        .routes(routes!(adapters::retrieve))
        .routes(routes!(adapters::download))
        .routes(routes!(adapters::merge))
        .routes(routes!(adapters::pin, adapters::unpin))
        .routes(routes!(aliases::list))
        .routes(routes!(aliases::put, aliases::retrieve, aliases::delete))
        .routes(routes!(feedback::create, feedback::list))
        .routes(routes!(feedback::export))
        .routes(routes!(feedback::delete))
        .routes(routes!(preferences::create, preferences::list))
        .routes(routes!(preferences::retrieve))
        .routes(routes!(preferences::cancel))
        .routes(routes!(methods::list))
        .routes(routes!(graders::run))
        .routes(routes!(graders::validate))
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
}

/// The whole application.
pub fn router(state: AppState) -> Router {
    let (router, _) = routes(state.service.max_upload).split_for_parts();
    let request_id = HeaderName::from_static("x-request-id");
    let layers = ServiceBuilder::new()
        .layer(SetRequestIdLayer::new(request_id.clone(), NewId))
        .layer(TraceLayer::new_for_http())
        .layer(PropagateRequestIdLayer::new(request_id))
        .layer(CatchPanicLayer::custom(|_| error::ApiError(Problem::internal("a handler crashed")).into_response()))
        .layer(DefaultBodyLimit::max(MAX_JSON));
    router
        .route("/openapi.json", get(|| async { Json(super::document()) }))
        .fallback(error::no_route)
        .method_not_allowed_fallback(error::no_method)
        .layer(layers)
        .with_state(state)
}

#[derive(Clone)]
struct NewId;

impl MakeRequestId for NewId {
    fn make_request_id<B>(&mut self, _: &Request<B>) -> Option<RequestId> {
        id::new("req_").parse().ok().map(RequestId::new)
    }
}
