//! What every role serves over HTTP: whether it lives, whether it is ready, what it counts.

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::watch::Receiver;

use crate::metrics::{CONTENT_TYPE, Metrics};

/// Whether a role does now what it promises; otherwise what is missing, in sentences.
pub type Readiness = Result<(), String>;

/// `/healthz` and `/livez`: the process answers, whatever the world around it does, since whoever asks there kills it when it does not.
/// `/readyz`: everything that it promises works now. `/metrics`.
pub fn router(metrics: Metrics, ready: Receiver<Readiness>) -> Router {
    let alive = || get(async || "ok");
    Router::new()
        .route("/healthz", alive())
        .route("/livez", alive())
        .route("/readyz", get(readyz).with_state(ready))
        .route("/metrics", get(render_metrics).with_state(metrics))
}

async fn readyz(State(ready): State<Receiver<Readiness>>) -> (StatusCode, String) {
    match &*ready.borrow() {
        Ok(()) => (StatusCode::OK, "ok".into()),
        Err(missing) => (StatusCode::SERVICE_UNAVAILABLE, missing.clone()),
    }
}

async fn render_metrics(State(metrics): State<Metrics>) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], metrics.render()).into_response()
}
