//! `node`: the CSI node service of one node, as a pod of a DaemonSet.

use std::net::SocketAddr;
use std::path::PathBuf;

use api::Volume;
use clap::Args;
use store::Selector;

use super::ready::Promise;
use super::{Cluster, Start, checked};
use crate::roles::listen;

/// Serves the CSI node service of one node of a Kubernetes cluster.
#[derive(Args, Debug)]
pub struct Node {
    #[command(flatten)]
    cluster: Cluster,
    /// The name of this node in the cluster.
    #[arg(long, env = "NODE_NAME")]
    node: String,
    /// Where the kubelet finds the CSI services.
    #[arg(long, default_value = "/csi/csi.sock")]
    csi_socket: PathBuf,
    /// Where to serve probes and metrics; without a host part the address in POD_IP, else every address.
    #[arg(long, default_value = ":9501", value_parser = listen)]
    listen: SocketAddr,
}

/// Runs `node`.
pub async fn run(Node { cluster, node, csi_socket, listen }: Node) -> anyhow::Result<()> {
    let mut start = Start::begin("node", &cluster, listen).await?;
    checked("node", start.store.list::<Volume>(&Selector::label("longhorn.io/none", "none")).await)?;
    let calls = csi::Metrics::default();
    start.metrics.register(|registry| calls.register(registry));
    let services = csi::NodeConfig {
        metrics: calls,
        ..csi::NodeConfig::new(start.store.clone(), &cluster.driver_name, &node, &csi_socket)
    };
    let shutdown = start.roles.shutdown();
    start.roles.spawn("csi-node", async move { Ok(csi::serve_node(services, shutdown).await?) });
    // Its store has answered; to ask again and again, on every node, would tell nobody anything: each call says so for itself.
    start.run(vec![Promise::Socket(csi_socket)]).await
}
