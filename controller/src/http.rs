//! HTTP API: the objects of the store as a Kubernetes API server would serve them, and the probes.
//!
//! Paths, verbs, list and watch forms and `Status` errors are those of Kubernetes, so that its clients work. Every kind that is
//! served stands in [`registry`]; what is refused on the way in is decided in [`crate::admission`].

mod discovery;
pub mod failure;
mod path;
pub mod registry;
mod rest;
mod watch;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use runtime::metrics::{CONTENT_TYPE, Metrics};
use store::Store;
use tokio::sync::watch::Receiver;
use tokio_util::sync::CancellationToken;

use crate::admission::Admission;

/// What the API serves from.
#[derive(Clone)]
pub struct ApiState {
    pub store: Store,
    pub metrics: Metrics,
    /// Whether everything that this process promises answers; `/readyz`.
    pub ready: Receiver<bool>,
    /// Whether images may be downloaded from this very machine (the standalone mode, where every node is this machine).
    pub allow_loopback_sources: bool,
    /// Ends open watches, so that a server that waits for its connections can stop.
    pub shutdown: CancellationToken,
}

impl ApiState {
    fn admission(&self) -> Admission {
        Admission { store: self.store.clone(), allow_loopback_sources: self.allow_loopback_sources }
    }
}

/// The whole API below `/`.
pub fn router(state: ApiState) -> Router {
    let probes = probes(state.metrics.clone(), state.ready.clone());
    Router::new().fallback(rest::serve).with_state(state).merge(probes)
}

/// What every role serves: whether it lives, whether it is ready, what it counts.
pub fn probes(metrics: Metrics, ready: Receiver<bool>) -> Router {
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
