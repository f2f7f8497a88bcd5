//! The roles as tasks of this process: started together, and one that ends by surprise ends the process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use runtime::loopback::Subnet;
use runtime::metrics::Metrics;
use store::Store;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use workloads::Workloads;
use workloads::local::{Local, LocalConfig};

use super::Layout;
use crate::roles::security;

/// How long roles may take to finish what they have begun.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(25);

/// How long a manager or data source may take until its ports accept connections.
const WORKLOAD_START_TIMEOUT: Duration = Duration::from_secs(30);

/// What the roles are started with.
pub struct Plan {
    pub store: Store,
    pub layout: Layout,
    pub driver_name: String,
    pub node_names: Vec<String>,
    pub subnet: Subnet,
    pub metrics: Metrics,
    pub engines: instance::EngineOptions,
}

/// The running roles.
pub struct Roles {
    tasks: JoinSet<(String, anyhow::Result<()>)>,
    shutdown: CancellationToken,
}

impl Roles {
    pub fn new(shutdown: CancellationToken) -> Roles {
        Roles { tasks: JoinSet::new(), shutdown }
    }

    /// Starts every role; returns the workloads, which outlive them.
    pub async fn start(&mut self, plan: Plan) -> anyhow::Result<Arc<dyn Workloads>> {
        let Plan { store, layout, driver_name, node_names, subnet, metrics, engines } = plan;
        let program = std::env::current_exe().context("cannot find the own binary")?;
        let local = Local::open(LocalConfig {
            directory: layout.workloads(),
            program: program.clone(),
            addresses: subnet.workloads(),
            start_timeout: WORKLOAD_START_TIMEOUT,
        });
        let workloads: Arc<dyn Workloads> = Arc::new(local.await.context("cannot open the workloads")?);

        let reconcilers = controller::Context {
            store: store.clone(),
            workloads: workloads.clone(),
            metrics: controller::Metrics::default(),
            security: security(),
        };
        metrics.register(|registry| reconcilers.metrics.register(registry));
        let shutdown = self.shutdown.clone();
        self.spawn("controller", async move { Ok(controller::run(reconcilers, shutdown).await?) });

        let services = csi::ControllerConfig {
            allow_loopback_sources: true,
            ..csi::ControllerConfig::new(store.clone(), &driver_name, layout.csi().join("controller.sock"))
        };
        let shutdown = self.shutdown.clone();
        self.spawn("csi-controller", async move { Ok(csi::serve_controller(services, shutdown).await?) });

        for (number, name) in (1..).zip(node_names) {
            let node = instance::Config {
                node: name.parse().with_context(|| format!("node name `{name}`"))?,
                ip: subnet.node(number).into(),
                directory: layout.node(&name).join("instance"),
                program: program.clone(),
                store: store.clone(),
                create_disks: true,
                engines,
                security: security(),
            };
            let shutdown = self.shutdown.clone();
            self.spawn(&format!("instance {name}"), async move { Ok(instance::run(node, shutdown).await?) });

            let socket = layout.csi().join(format!("{name}.sock"));
            let services = csi::NodeConfig::new(store.clone(), &driver_name, &name, socket);
            let shutdown = self.shutdown.clone();
            self.spawn(&format!("csi {name}"), async move { Ok(csi::serve_node(services, shutdown).await?) });
        }
        Ok(workloads)
    }

    /// Runs a role until it ends.
    pub fn spawn(&mut self, name: &str, role: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        let name = name.to_owned();
        self.tasks.spawn(async move { (name, role.await) });
    }

    /// Returns when a role ends that should not have; says why.
    pub async fn unexpected_end(&mut self) -> anyhow::Result<()> {
        match self.tasks.join_next().await {
            Some(Ok((name, Ok(())))) => Err(anyhow::anyhow!("role {name} ended by itself")),
            Some(Ok((name, Err(error)))) => Err(error.context(format!("role {name} failed"))),
            Some(Err(panic)) => Err(anyhow::Error::new(panic).context("a role panicked")),
            None => Err(anyhow::anyhow!("no role runs")),
        }
    }

    /// Waits until every role has ended; gives up on those that take too long.
    pub async fn drain(&mut self) {
        let all = async {
            while let Some(ended) = self.tasks.join_next().await {
                match ended {
                    Ok((name, Ok(()))) => info!(role = name, "role ended"),
                    Ok((name, Err(failure))) => {
                        error!(role = name, error = format!("{failure:#}"), "role ended with an error")
                    }
                    Err(panic) => error!(error = %panic, "a role panicked"),
                }
            }
        };
        if tokio::time::timeout(DRAIN_TIMEOUT, all).await.is_err() {
            warn!("roles did not end in time and are dropped");
            self.tasks.abort_all();
        }
    }
}
