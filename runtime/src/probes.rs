//! What every role serves over HTTP: whether it lives, whether it is ready, what it counts.

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::watch::Receiver;

use crate::metrics::{CONTENT_TYPE, Metrics};

/// `/healthz` and `/livez`: the process answers. `/readyz`: so does everything that it promises. `/metrics`.
pub fn router(metrics: Metrics, ready: Receiver<bool>) -> Router {
    let alive = || get(async || "ok");
    Router::new()
        .route("/healthz", alive())
        .route("/livez", alive())
        .route("/readyz", get(readyz).with_state(ready))
        .route("/metrics", get(render_metrics).with_state(metrics))
}

async fn readyz(State(ready): State<Receiver<bool>>) -> (StatusCode, &'static str) {
    if *ready.borrow() { (StatusCode::OK, "ok") } else { (StatusCode::SERVICE_UNAVAILABLE, "starting") }
}

async fn render_metrics(State(metrics): State<Metrics>) -> Response {
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], metrics.render()).into_response()
}
