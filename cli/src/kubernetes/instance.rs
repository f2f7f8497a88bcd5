//! `instance`: replicas, engines and disks of one node, as a pod of a DaemonSet.
//!
//! As the main process of its container it supervises itself ([`super::supervisor`]), so that engines and replicas, which live in the
//! same pid namespace, outlive a crash of the role.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::Context;
use api::names::AGENT_UID;
use clap::Args;
use tokio::sync::watch;

use super::ready::Promise;
use super::{Cluster, Start, checked};
use crate::engines::Engines;
use crate::roles::{listen, security};

/// Runs replicas and engines of one node of a Kubernetes cluster, and reports its disks.
#[derive(Args, Debug)]
pub struct Instance {
    #[command(flatten)]
    cluster: Cluster,
    /// The name of this node in the cluster.
    #[arg(long, env = "NODE_NAME")]
    node: String,
    /// The address at which other nodes reach this pod: where its replicas listen.
    #[arg(long, env = "POD_IP")]
    ip: IpAddr,
    /// What it keeps: records, logs and sockets of its processes.
    #[arg(long, default_value = "/var/lib/backing-image-csi/instance")]
    directory: PathBuf,
    /// Where to serve probes and metrics; without a host part the address in POD_IP, else every address.
    #[arg(long, default_value = ":9502", value_parser = listen)]
    listen: SocketAddr,
    #[command(flatten)]
    engines: Engines,
}

/// Runs `instance`.
pub async fn run(Instance { cluster, node, ip, directory, listen, engines }: Instance) -> anyhow::Result<()> {
    let mut start = Start::begin("instance", &cluster, listen).await?;
    checked("instance", start.store.get::<api::Node>(&node).await)?;
    let directory_of = |path: &PathBuf| format!("cannot make the directory `{}`", path.display());
    runtime::files::create_dir_durably(&directory).with_context(|| directory_of(&directory))?;
    let config = ::instance::Config {
        node: node.parse().with_context(|| format!("node name `{node}`"))?,
        ip,
        directory,
        program: std::env::current_exe().context("cannot find the own binary")?,
        store: start.store.clone(),
        // An absent directory is a disk that is not mounted, or not into this container.
        create_disks: false,
        discover: true,
        disk_owner: Some(AGENT_UID),
        engines: engines.options(),
        security: security(),
        metrics: ::instance::Metrics::default(),
        ready: watch::Sender::new(false),
    };
    start.metrics.register(|registry| config.metrics.register(registry));
    ::instance::discovery::create(&config).await.with_context(|| format!("cannot make the Node object `{node}`"))?;
    let first_pass = Promise::Told(
        config.ready.subscribe(),
        "the first look at the disks and replicas of this node is not over; the log says what it meets",
    );
    let shutdown = start.roles.shutdown();
    start.roles.spawn("instance", async move { Ok(::instance::run(config, shutdown).await?) });
    start.run(vec![first_pass]).await
}
