//! `standalone`: every role in one process, over an embedded store, with simulated nodes; no Kubernetes.
//!
//! Managers, data sources and data-plane processes are processes of their own and outlive this one: it finds them again.

mod leftovers;
mod lock;
mod nodes;
mod ready;
mod roles;
mod settings;
mod stop;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use api::ErrorKind;
use clap::{Args, Subcommand};
use runtime::loopback::Subnet;
use runtime::metrics::Metrics;
use store::Store;
use store::embedded::Embedded;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::engines::Engines;
use crate::failure::{Failure, failed};
use crate::orchestrator::Orchestrator;
use crate::running::Roles;
use crate::web;
use lock::Lock;

/// Runs everything on this machine, without Kubernetes.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Standalone {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    start: Start,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// Ends a standalone instance.
    Stop(stop::Stop),
}

/// How to run a standalone instance.
#[derive(Args, Clone, Debug, Default)]
pub struct Start {
    /// Where everything is kept; made when absent.
    #[arg(long, env = "BACKING_IMAGE_CSI_DATA")]
    data: Option<PathBuf>,
    /// How many nodes to simulate; as before when not given, 1 at first.
    #[arg(long, env = "BACKING_IMAGE_CSI_NODES", value_parser = clap::value_parser!(u8).range(1..=63))]
    nodes: Option<u8>,
    /// How many disks each node has; as before when not given, 1 at first.
    #[arg(long, env = "BACKING_IMAGE_CSI_DISKS_PER_NODE", value_parser = clap::value_parser!(u8).range(1..=16))]
    disks_per_node: Option<u8>,
    /// Where the HTTP API listens.
    #[arg(long, env = "BACKING_IMAGE_CSI_LISTEN", default_value = "127.0.0.1:9500")]
    listen: String,
    /// The CSI driver's name: the provisioner of StorageClasses.
    #[arg(long, env = "BACKING_IMAGE_CSI_DRIVER_NAME", default_value = api::names::DEFAULT_DRIVER_NAME)]
    driver_name: String,
    /// The namespace of our own objects.
    #[arg(long, env = "BACKING_IMAGE_CSI_SYSTEM_NAMESPACE", default_value = api::names::DEFAULT_NAMESPACE)]
    namespace: String,
    #[command(flatten)]
    engines: Engines,
}

/// Runs `standalone …`.
pub async fn run(Standalone { action, start }: Standalone) -> anyhow::Result<()> {
    match action {
        Some(Action::Stop(stop)) => stop::run(stop).await,
        None => {
            crate::roles::start_logs(false);
            let signals = runtime::shutdown::on_signal().context("cannot listen for signals")?;
            instance(start, signals, false).await
        }
    }
}

/// Where an instance keeps what.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub data: PathBuf,
}

impl Layout {
    fn new(data: &Path) -> anyhow::Result<Layout> {
        runtime::files::create_dir_durably(data)
            .with_context(|| format!("cannot make the directory `{}`", data.display()))?;
        let data = data.canonicalize().with_context(|| format!("cannot find `{}`", data.display()))?;
        Ok(Layout { data })
    }

    fn store(&self) -> PathBuf {
        self.data.join("store.redb")
    }
    fn ready(&self) -> PathBuf {
        self.data.join("ready")
    }
    fn csi(&self) -> PathBuf {
        self.data.join("csi")
    }
    fn workloads(&self) -> PathBuf {
        self.data.join("workloads")
    }
    fn node(&self, node: &str) -> PathBuf {
        self.data.join("nodes").join(node)
    }
}

/// Runs an instance until `signals`, or with `end_all` until everything is detached and ended.
async fn instance(start: Start, signals: CancellationToken, end_all: bool) -> anyhow::Result<()> {
    let Start { data, nodes, disks_per_node, listen, driver_name, namespace, engines } = start;
    let Some(data) = data else {
        return failed(ErrorKind::Invalid, "where is the data? give --data DIR");
    };
    let layout = Layout::new(&data)?;
    let mut lock = Lock::take(&layout.data)?;
    runtime::files::remove_if_present(&layout.ready())?;
    std::fs::create_dir_all(layout.csi())?;
    let listener = web::bind(&listen).await?;
    let address = listener.address();
    lock.announce(address)?;
    let subnet = Subnet::claim(&layout.data).context("cannot claim loopback addresses")?;
    let embedded = Embedded::open(&layout.store()).map_err(|e| {
        let kind = e.kind();
        anyhow::Error::new(e).context(Failure::new(kind, format!("cannot open `{}`", layout.store().display())))
    })?;
    let metrics = Metrics::default();
    embedded.register_metrics(&metrics);
    let store = Store::new(Arc::new(embedded), &namespace);
    let node_names = nodes::ensure(&store, &layout, nodes, disks_per_node).await?;
    settings::ensure(&store).await?;

    let (stop_sender, mut stop_requests) = watch::channel(false);
    let (ready_sender, ready_receiver) = watch::channel(Err("its CSI sockets do not answer yet".to_owned()));
    let shutdown = CancellationToken::new();
    let orchestrator = Orchestrator::new(store.clone(), &driver_name, &layout.data, shutdown.child_token());
    let mut roles = Roles::new(shutdown.clone());
    let plan = roles::Plan {
        store: store.clone(),
        layout: layout.clone(),
        driver_name,
        node_names: node_names.clone(),
        subnet: subnet.clone(),
        metrics: metrics.clone(),
        engines: engines.options(),
    };
    let workloads = roles::start(&mut roles, plan).await?;
    let state = controller::http::ApiState { store, metrics, ready: ready_receiver, shutdown: shutdown.child_token() };
    let router = controller::http::router(state)
        .merge(crate::orchestrator::router(orchestrator.clone()))
        .merge(stop::router(orchestrator.clone(), stop_sender));
    roles.spawn("http", web::serve(listener, router, shutdown.clone()));
    let running = orchestrator.clone();
    roles.spawn("orchestrator", async move {
        running.run().await;
        Ok(())
    });
    let url = format!("http://{address}");
    let (csi, file) = (layout.csi(), layout.ready());
    roles.spawn("ready", ready::announce(csi, file, node_names, url.clone(), ready_sender, shutdown.clone()));
    info!(data = %layout.data.display(), listen = %address, "standalone instance started");

    let mut everything = end_all;
    let ended = if end_all {
        let say = |sentence: String| eprintln!("{sentence}");
        tokio::select! {
            result = roles.unexpected_end() => result,
            result = orchestrator.detach_all(&say) => result.map_err(Into::into),
        }
    } else {
        tokio::select! {
            result = roles.unexpected_end() => result,
            () = signals.cancelled() => Ok(()),
            _ = stop_requests.wait_for(|all| *all) => { everything = true; Ok(()) }
        }
    };
    runtime::files::remove_if_present(&layout.ready())?;
    shutdown.cancel();
    roles.drain().await;
    if everything && ended.is_ok() {
        stop::end_workloads(&workloads).await?;
        subnet.release(&layout.data).context("cannot give the loopback addresses back")?;
    }
    info!("standalone instance ended");
    ended
}
