//! What a standalone instance runs in its own process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use runtime::loopback::Subnet;
use runtime::metrics::Metrics;
use store::Store;
use tokio_util::sync::CancellationToken;
use workloads::Workloads;
use workloads::local::{Local, LocalConfig};

use super::Layout;
use crate::roles::security;
use crate::running::Roles;

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

/// Starts every role; returns the workloads, which outlive them.
pub async fn start(roles: &mut Roles, plan: Plan) -> anyhow::Result<Arc<dyn Workloads>> {
    let Plan { store, layout, driver_name, node_names, subnet, metrics, engines } = plan;
    let program = std::env::current_exe().context("cannot find the own binary")?;
    let local = Local::open(LocalConfig {
        directory: layout.workloads(),
        program: program.clone(),
        addresses: subnet.workloads(),
        start_timeout: WORKLOAD_START_TIMEOUT,
    });
    let local = local.await.context("cannot open the workloads")?;
    local.register_metrics(&metrics);
    let workloads: Arc<dyn Workloads> = Arc::new(local);
    let (calls, instances) = (csi::Metrics::default(), instance::Metrics::default());
    metrics.register(|registry| {
        calls.register(registry);
        instances.register(registry);
    });

    let reconcilers = controller::Context {
        store: store.clone(),
        workloads: workloads.clone(),
        metrics: controller::Metrics::default(),
        security: security(),
        kubernetes: false,
        watching: Default::default(),
        deposed: CancellationToken::new(),
    };
    metrics.register(|registry| reconcilers.metrics.register(registry));
    let shutdown = roles.shutdown();
    roles.spawn("controller", async move { Ok(controller::run(reconcilers, shutdown).await?) });

    let services = csi::ControllerConfig {
        metrics: calls.clone(),
        ..csi::ControllerConfig::new(store.clone(), &driver_name, layout.csi().join("controller.sock"))
    };
    let shutdown = roles.shutdown();
    roles.spawn("csi-controller", async move { Ok(csi::serve_controller(services, shutdown).await?) });

    for (number, name) in (1..).zip(node_names) {
        let node = instance::Config {
            node: name.parse().with_context(|| format!("node name `{name}`"))?,
            ip: subnet.node(number).into(),
            directory: layout.node(&name).join("instance"),
            program: program.clone(),
            store: store.clone(),
            create_disks: true,
            discover: false,
            disk_owner: None,
            engines,
            security: security(),
            metrics: instances.clone(),
            ready: Default::default(),
        };
        let shutdown = roles.shutdown();
        roles.spawn(&format!("instance {name}"), async move { Ok(instance::run(node, shutdown).await?) });

        let socket = layout.csi().join(format!("{name}.sock"));
        let services = csi::NodeConfig {
            metrics: calls.clone(),
            ..csi::NodeConfig::new(store.clone(), &driver_name, &name, socket)
        };
        let shutdown = roles.shutdown();
        roles.spawn(&format!("csi {name}"), async move { Ok(csi::serve_node(services, shutdown).await?) });
    }
    Ok(workloads)
}
