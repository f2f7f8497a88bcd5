//! `controller`: the CSI controller service on every replica of a Deployment, the reconcilers on the one that leads.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ::controller::leader::{Candidate, Term, Timing};
use ::controller::webhook::{self, Webhook};
use ::controller::{Context, ControllerError, Metrics};
use api::{ErrorKind, Setting};
use clap::Args;
use k8s_openapi::api::core::v1::Toleration;
use store::Selector;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use workloads::Workloads;
use workloads::pods::{Pods, PodsConfig, Resources, tolerations};

use super::ready::Promise;
use super::{Cluster, Start, checked};
use crate::failure::Failure;
use crate::roles::{listen, security};

/// Between two attempts of a leader whose store went away at its first step.
const RETRY: Duration = Duration::from_secs(1);

/// Serves the CSI controller service of a Kubernetes cluster, and reconciles its objects while it leads.
#[derive(Args, Debug)]
pub struct Controller {
    #[command(flatten)]
    cluster: Cluster,
    /// Where the sidecars find the CSI services.
    #[arg(long, default_value = "/csi/csi.sock")]
    csi_socket: PathBuf,
    /// Where to serve probes and metrics; without a host part the address in POD_IP, else every address.
    #[arg(long, default_value = ":9500", value_parser = listen)]
    listen: SocketAddr,
    /// Where the API server reaches the admission webhook; without a host part the address in POD_IP, else every address.
    #[arg(long, default_value = ":9443", value_parser = listen)]
    webhook_listen: SocketAddr,
    /// The name of this pod, to be told from other candidates for the lead.
    #[arg(long, env = "POD_NAME", default_value = "controller")]
    pod_name: String,
    #[command(flatten)]
    agents: Agents,
}

/// The pods that managers and data sources run in.
#[derive(Args, Debug)]
struct Agents {
    /// The image of this program, for the pods of managers and data sources.
    #[arg(long, env = "BACKING_IMAGE_CSI_IMAGE")]
    image: String,
    /// Their service account; it needs no rights.
    #[arg(long, default_value = "default")]
    agent_service_account: String,
    /// Always, IfNotPresent or Never.
    #[arg(long)]
    agent_pull_policy: Option<String>,
    /// A secret to pull the image with; may be given several times.
    #[arg(long)]
    agent_pull_secret: Vec<String>,
    #[arg(long)]
    agent_priority_class: Option<String>,
    /// Taints that they tolerate: KEY=VALUE:EFFECT;KEY:EFFECT.
    #[arg(long, default_value = "", value_parser = read_tolerations)]
    agent_tolerations: Tolerations,
    /// Empty: none.
    #[arg(long, default_value_t = Resources::default().cpu_request)]
    agent_cpu_request: String,
    /// Empty: none.
    #[arg(long, default_value_t = Resources::default().memory_request)]
    agent_memory_request: String,
    /// Empty: none.
    #[arg(long, default_value_t = Resources::default().cpu_limit)]
    agent_cpu_limit: String,
    /// Empty: none.
    #[arg(long, default_value_t = Resources::default().memory_limit)]
    agent_memory_limit: String,
}

/// All of one flag.
#[derive(Clone, Debug)]
struct Tolerations(Vec<Toleration>);

fn read_tolerations(text: &str) -> Result<Tolerations, String> {
    tolerations(text).map(Tolerations)
}

impl Agents {
    fn config(self, namespace: &str) -> PodsConfig {
        PodsConfig {
            namespace: namespace.to_owned(),
            image: self.image,
            pull_policy: self.agent_pull_policy,
            pull_secrets: self.agent_pull_secret,
            service_account: self.agent_service_account,
            priority_class: self.agent_priority_class,
            tolerations: self.agent_tolerations.0,
            resources: Resources {
                cpu_request: self.agent_cpu_request,
                memory_request: self.agent_memory_request,
                cpu_limit: self.agent_cpu_limit,
                memory_limit: self.agent_memory_limit,
            },
        }
    }
}

/// Runs `controller`.
pub async fn run(controller: Controller) -> anyhow::Result<()> {
    let Controller { cluster, csi_socket, listen, webhook_listen, pod_name, agents } = controller;
    let mut start = Start::begin("controller", &cluster, listen).await?;
    checked("controller", start.store.list::<Setting>(&Selector::default()).await)?;
    let pods = Pods::open(start.client.clone(), agents.config(&cluster.namespace)).await.map_err(|error| {
        let message = format!("the controller cannot work: {}", api::error::sentence(&error));
        Failure::new(error.kind(), message)
    })?;
    let calls = csi::Metrics::default();
    start.metrics.register(|registry| calls.register(registry));
    let services = csi::ControllerConfig {
        metrics: calls,
        ..csi::ControllerConfig::new(start.store.clone(), &cluster.driver_name, &csi_socket)
    };
    let shutdown = start.roles.shutdown();
    start.roles.spawn("csi-controller", async move { Ok(csi::serve_controller(services, shutdown).await?) });

    let metrics = Metrics::default();
    start.metrics.register(|registry| {
        metrics.register(registry);
        metrics.register_webhook(registry);
    });
    let webhook = webhook::Config::new(start.store.clone(), webhook_listen, metrics.clone());
    let shutdown = start.roles.shutdown();
    let (listens, is_listening) = watch::channel(false);
    start.roles.spawn("webhook", async move {
        let Some(webhook) = shutdown.run_until_cancelled(Webhook::start(webhook)).await else { return Ok(()) };
        let webhook = webhook?;
        listens.send_replace(true);
        Ok(webhook.run(shutdown).await?)
    });
    let (watching, is_watching) = watch::channel(true);
    let candidate = Candidate {
        store: start.store.clone(),
        // A container that was started anew is another candidate: what its former process had begun may still arrive.
        identity: format!("{pod_name}_{}", uuid::Uuid::new_v4()),
        timing: Timing::default(),
    };
    let context = Context {
        store: start.store.clone(),
        workloads: Arc::new(pods) as Arc<dyn Workloads>,
        metrics,
        security: security(),
        kubernetes: true,
        watching,
        deposed: CancellationToken::new(),
    };
    let shutdown = start.roles.shutdown();
    let reconcilers = async move { Ok(candidate.run(&shutdown, |term| reconcile(context.clone(), term)).await?) };
    start.roles.spawn("reconcilers", reconcilers);
    let promises = vec![
        Promise::Socket(csi_socket),
        Promise::Told(
            is_listening,
            "the admission webhook does not listen yet: it has no certificate, the log says why",
        ),
        Promise::Told(is_watching, "this process leads, and does not see yet what changes: the log says why"),
        Promise::Heard(start.heard.clone()),
    ];
    start.run(promises).await
}

/// The reconcilers for one term. An API server that goes away at their first step is no reason to end the CSI services too.
async fn reconcile(context: Context, term: Term) -> Result<(), ControllerError> {
    let context = Context { deposed: term.over.clone(), ..context };
    match ::controller::run(context, term.ending.clone()).await {
        Err(error) if error.kind() == ErrorKind::Unavailable && !term.ending.is_cancelled() => {
            warn!(error = api::error::sentence(&error), "the reconcilers ended; they begin anew");
            tokio::time::sleep(RETRY).await;
            Ok(())
        }
        ended => ended,
    }
}
