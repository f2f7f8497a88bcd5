//! Admission webhook: asks the same rules as the HTTP API for every change that a user makes in a Kubernetes cluster.
//!
//! `/mutate` fills in defaults, `/validate` has the last word. The certificate is made and renewed here ([`keeper`]), lies in a Secret
//! that all replicas serve from, and its authority is written into the webhook configurations; nothing else is needed.
//! What is asked at all, and what happens while nobody answers, stands in those configurations (`deploy/chart`, and
//! `docs/decisions/0010-admission-webhook.md`).

mod certificate;
mod configurations;
mod keeper;
mod patch;
mod review;

use std::net::SocketAddr;
use std::time::Duration;

use api::ErrorKind;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use runtime::backoff::Backoff;
use runtime::transport::{Identity, Listener, Protocol, SecurityError};
use store::{Store, StoreError};
use tokio_util::sync::CancellationToken;

use crate::Metrics;
use crate::admission::Admission;
use crate::limits;
use keeper::Keeper;

/// The Service by which the API server reaches us.
pub const SERVICE: &str = "backing-image-csi-webhook";
/// The Secret with the certificate.
pub const SECRET: &str = "backing-image-csi-webhook-tls";
/// The name of both webhook configurations.
pub const CONFIGURATION: &str = "backing-image-csi";

/// What a webhook works with.
#[derive(Clone)]
pub struct Config {
    pub store: Store,
    pub listen: SocketAddr,
    /// Names and addresses by which the API server calls us.
    pub names: Vec<String>,
    /// How long a certificate lasts.
    pub lifetime_days: u32,
    /// How long before its end the next one takes its place.
    pub renew_days: u32,
    /// How often certificate and configurations are looked at.
    pub recheck: Duration,
    /// See [`Metrics::register`].
    pub metrics: Metrics,
}

impl Config {
    /// A webhook behind [`SERVICE`], with the usual times.
    pub fn new(store: Store, listen: SocketAddr, metrics: Metrics) -> Config {
        Config {
            names: vec![format!("{SERVICE}.{}.svc", store.namespace())],
            store,
            listen,
            lifetime_days: limits::CERTIFICATE_DAYS,
            renew_days: limits::RENEW_DAYS,
            recheck: limits::CERTIFICATE_RECHECK,
            metrics,
        }
    }
}

/// Why a webhook could not begin, or ended.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("cannot serve the admission webhook")]
    Serve { source: std::io::Error },
    #[error("cannot use the certificate in Secret `{SECRET}`")]
    Certificate(#[from] SecurityError),
    #[error("cannot make a certificate for {names}")]
    Make { names: String, source: rcgen::Error },
    #[error("cannot {doing}")]
    Store { doing: &'static str, source: StoreError },
}

impl WebhookError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            WebhookError::Listen { .. } | WebhookError::Serve { .. } => ErrorKind::Unavailable,
            WebhookError::Certificate(error) => error.kind(),
            WebhookError::Make { .. } => ErrorKind::Internal,
            WebhookError::Store { source, .. } => source.kind(),
        }
    }
}

/// A webhook that listens.
pub struct Webhook {
    config: Config,
    keeper: Keeper,
    identity: Identity,
    listener: Listener,
}

impl Webhook {
    /// Takes the certificate, or makes it, and listens.
    ///
    /// # Errors
    /// When it cannot listen. While the store does not answer it waits.
    pub async fn start(config: Config) -> Result<Webhook, WebhookError> {
        let keeper = Keeper::new(&config);
        let backoff = Backoff { initial: limits::FIRST_RETRY, max: limits::CERTIFICATE_RECHECK };
        let mut failures = 0;
        let pair = loop {
            match keeper.pass().await {
                Ok(pair) => break pair,
                Err(error @ WebhookError::Make { .. }) => return Err(error),
                Err(error) => {
                    tracing::warn!(error = crate::error::chain(&error), "no certificate yet");
                    failures += 1;
                    tokio::time::sleep(backoff.delay(failures)).await;
                }
            }
        };
        let identity = Identity::from_pem(&pair.chain, &pair.key)?;
        let listener = identity
            .listen(config.listen, Protocol::Http1)
            .await
            .map_err(|source| WebhookError::Listen { address: config.listen, source })?;
        tracing::info!(address = %listener.address(), "admission webhook started");
        Ok(Webhook { config, keeper, identity, listener })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.address()
    }

    /// Answers reviews until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), WebhookError> {
        let Webhook { config, keeper, identity, listener } = self;
        let admission = Admission { store: config.store.clone() };
        let reviews = review::Reviews { admission, metrics: config.metrics.clone() };
        let router = Router::new()
            .route("/mutate", post(review::mutate))
            .route("/validate", post(review::validate))
            .route("/healthz", get(async || "ok"))
            .layer(DefaultBodyLimit::max(limits::MAX_REVIEW_BYTES))
            .with_state(reviews);
        let server = axum::serve(listener, router).with_graceful_shutdown(shutdown.clone().cancelled_owned());
        let late = async {
            shutdown.cancelled().await;
            tokio::time::sleep(limits::DRAIN_TIMEOUT).await;
        };
        tokio::select! {
            served = async { server.await } => served.map_err(|source| WebhookError::Serve { source }),
            () = late => Ok(()),
            () = keep(&keeper, &identity, config.recheck) => Ok(()),
        }
    }
}

/// Sees to the certificate for ever.
async fn keep(keeper: &Keeper, identity: &Identity, recheck: Duration) {
    loop {
        tokio::time::sleep(recheck).await;
        let replaced = match keeper.pass().await {
            Ok(pair) => identity.replace(&pair.chain, &pair.key).map_err(WebhookError::from),
            Err(error) => Err(error),
        };
        if let Err(error) = replaced {
            // What is served stays; it is looked at again long before it ends.
            tracing::warn!(error = crate::error::chain(&error), "the certificate could not be looked at");
        }
    }
}
