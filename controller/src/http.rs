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
use runtime::metrics::Metrics;
use runtime::probes::{self, Readiness};
use store::Store;
use tokio::sync::watch::Receiver;
use tokio_util::sync::CancellationToken;

use crate::admission::Admission;

/// What the API serves from.
#[derive(Clone)]
pub struct ApiState {
    pub store: Store,
    pub metrics: Metrics,
    /// Whether everything that this process promises works; `/readyz`.
    pub ready: Receiver<Readiness>,
    /// Ends open watches, so that a server that waits for its connections can stop.
    pub shutdown: CancellationToken,
}

impl ApiState {
    fn admission(&self) -> Admission {
        Admission { store: self.store.clone() }
    }
}

/// The whole API below `/`.
pub fn router(state: ApiState) -> Router {
    let probes = probes::router(state.metrics.clone(), state.ready.clone());
    Router::new().fallback(rest::serve).with_state(state).merge(probes)
}
