//! The roles as pods of a Kubernetes cluster: `controller`, `node`, `instance`.
//!
//! Objects live in the Kubernetes API, reached with the credentials of the pod (or KUBECONFIG). Each role serves its probes and
//! metrics, ends in order by SIGTERM, and ends with an error when a part of it ends by surprise: Kubernetes starts it again.

pub mod controller;
pub mod instance;
pub mod node;
mod ready;
pub mod supervisor;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use api::ErrorKind;
use api::error::sentence;
use clap::Args;
use kube::Client;
use runtime::metrics::Metrics;
use runtime::probes::Readiness;
use store::Store;
use store::kubernetes::{Heard, Kubernetes};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::failure::{Failure, failed};
use crate::running::Roles;
use crate::web;
use ready::Promise;

/// How long the Kubernetes API may take to answer at the start; afterwards every call is repeated.
const FIRST_ANSWER: Duration = Duration::from_secs(20);

/// Which cluster, and what our objects are called there.
#[derive(Args, Clone, Debug)]
pub struct Cluster {
    /// The CSI driver's name: the provisioner of StorageClasses.
    #[arg(long, env = "BACKING_IMAGE_CSI_DRIVER_NAME", default_value = api::names::DEFAULT_DRIVER_NAME)]
    pub driver_name: String,
    /// The namespace of our own objects and pods.
    #[arg(long, env = "POD_NAMESPACE", default_value = api::names::DEFAULT_NAMESPACE)]
    pub namespace: String,
}

/// A role that is about to run: what every one of them has.
pub struct Start {
    pub client: Client,
    pub store: Store,
    pub metrics: Metrics,
    pub roles: Roles,
    /// When the API server last said something to the store.
    pub heard: Heard,
    ready: watch::Sender<Readiness>,
    signals: CancellationToken,
}

impl Start {
    /// Logs, signals, the cluster, and a listener for probes.
    ///
    /// # Errors
    /// When there are no credentials, the API does not answer, or does not know our kinds.
    pub async fn begin(role: &str, cluster: &Cluster, listen: SocketAddr) -> anyhow::Result<Start> {
        crate::roles::start_logs(false);
        let signals = runtime::shutdown::on_signal().context("cannot listen for signals")?;
        let listener = web::bind(&listen.to_string()).await?;
        let (ready, is_ready) = watch::channel(Err("the role has not begun yet".to_owned()));
        let metrics = Metrics::default();
        let mut roles = Roles::new(CancellationToken::new());
        let router = runtime::probes::router(metrics.clone(), is_ready);
        roles.spawn("http", web::serve(listener, router, roles.shutdown()));
        let client = client().await?;
        let objects = Kubernetes::new(client.clone());
        let heard = objects.heard();
        let store = Store::new(Arc::new(objects), &cluster.namespace);
        info!(role, %listen, namespace = cluster.namespace, driver = cluster.driver_name, "role started");
        Ok(Start { client, store, metrics, roles, heard, ready, signals })
    }

    /// Runs what was spawned until a signal; it is ready while all of this is so.
    pub async fn run(mut self, promises: Vec<Promise>) -> anyhow::Result<()> {
        let report = ready::report(promises, self.ready.clone(), self.roles.shutdown());
        self.roles.spawn("ready", report);
        let ended = tokio::select! {
            ended = self.roles.unexpected_end() => ended,
            () = self.signals.cancelled() => Ok(()),
        };
        self.roles.shutdown().cancel();
        drop(self.ready.send_replace(Err("the role ends".into())));
        self.roles.drain().await;
        info!("role ended");
        ended
    }
}

/// A client with the credentials of this pod, or those of KUBECONFIG.
async fn client() -> anyhow::Result<Client> {
    let no_credentials = |reason: String| {
        let message = format!(
            "there are no credentials for a Kubernetes cluster: run in a pod with a service account, or set KUBECONFIG ({reason})"
        );
        Failure::new(ErrorKind::NotReady, message)
    };
    let client = Client::try_default().await.map_err(|error| no_credentials(error.to_string()))?;
    match tokio::time::timeout(FIRST_ANSWER, client.apiserver_version()).await {
        Ok(Ok(version)) => {
            info!(version = version.git_version, "the Kubernetes API answers");
            Ok(client)
        }
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
            failed(ErrorKind::NotReady, format!("the Kubernetes API refuses these credentials: {}", status.message))
        }
        Ok(Err(error)) => {
            failed(ErrorKind::Unavailable, format!("the Kubernetes API does not answer: {}", sentence(&error)))
        }
        Err(_) => {
            let seconds = FIRST_ANSWER.as_secs();
            failed(ErrorKind::Unavailable, format!("the Kubernetes API does not answer within {seconds} s"))
        }
    }
}

/// The first use of the store tells whether our kinds are installed and may be used.
pub fn checked<T>(role: &str, result: Result<T, store::StoreError>) -> anyhow::Result<T> {
    result.map_err(|error| {
        let message = format!("the {role} cannot work: {}", sentence(&error));
        Failure::new(error.kind(), message).into()
    })
}
