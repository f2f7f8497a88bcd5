//! Role `backing-image-manager`: owns the image files of one disk.
//!
//! gRPC (`bimrpc.BackingImageManagerService`, LF 5.1) on port 8000, chunk data for other managers on the next port. Nothing is
//! kept besides the files: a manager that starts looks at the disk and goes on from what it finds.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api::ids::DiskId;
use proto::bimrpc::backing_image_manager_service_server::BackingImageManagerServiceServer;
use runtime::transport::{Listener, Protocol, Security};
use tokio_util::sync::CancellationToken;

use crate::error::{AgentError, blocking};
use crate::layout::Disk;
use crate::limits::{DRAIN_TIMEOUT, IDLE_TIMEOUT, RECHECK_INTERVAL};

mod adopt;
mod operations;
mod registry;
mod serve;
mod service;
mod shared_look;
mod verification;
mod watcher;

use registry::Registry;

/// What a manager works on.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to serve gRPC: its own address, port 8000. Chunk data is served on the port after it.
    pub listen: SocketAddr,
    /// The root of the disk (`/data` in a container).
    pub disk_path: PathBuf,
    /// The uuid that the disk must have; `None`: whatever its `longhorn-disk.cfg` says.
    pub disk_uuid: Option<DiskId>,
    /// How long a peer may stay silent.
    pub idle_timeout: Duration,
    /// How often to look whether files were changed from outside.
    pub recheck_interval: Duration,
    /// Whether the kernel is asked to tell of changes; otherwise only that look finds them.
    pub watch_files: bool,
    /// How it listens and connects.
    pub security: Security,
}

impl Config {
    /// A manager for a disk, with the usual limits.
    pub fn new(listen: SocketAddr, disk_path: impl Into<PathBuf>) -> Config {
        Config {
            listen,
            disk_path: disk_path.into(),
            disk_uuid: None,
            idle_timeout: IDLE_TIMEOUT,
            recheck_interval: RECHECK_INTERVAL,
            watch_files: true,
            security: Security::default(),
        }
    }
}

/// Works until `shutdown`.
///
/// # Errors
/// `NotReady` when the directory is not that of the disk; `Unavailable` when an address is taken.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), AgentError> {
    let disk = Disk::new(&config.disk_path);
    let own = disk.clone();
    let disk_uuid = blocking(move || own.read_uuid()).await?;
    if let Some(wanted) = config.disk_uuid.filter(|wanted| *wanted != disk_uuid) {
        let problem = format!("it is disk `{disk_uuid}`, not `{wanted}`");
        return Err(AgentError::DiskConfig { path: config.disk_path, problem });
    }
    let data_address = SocketAddr::new(config.listen.ip(), config.listen.port().wrapping_add(1));
    let listener = listen(&config.security, config.listen, Protocol::Grpc).await?;
    let data_listener = listen(&config.security, data_address, Protocol::Http1).await?;

    let tasks = shutdown.child_token();
    let registry =
        Arc::new(Registry::new(disk, disk_uuid.clone(), config.idle_timeout, config.security.clone(), tasks.clone()));
    registry.adopt_all().await?;
    tell(&registry).await;
    registry.clone().spawn_background(config.recheck_interval, config.watch_files);
    tracing::info!(disk = %disk_uuid, address = %config.listen, "manager started");

    let service = BackingImageManagerServiceServer::new(service::Service::new(registry.clone()));
    let grpc = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .add_service(service)
        .serve_with_incoming_shutdown(listener.into_stream(), shutdown.clone().cancelled_owned());
    let data = serve::serve(data_listener, registry.clone(), shutdown.clone());
    let serving = async {
        let (grpc, data) = tokio::join!(grpc, data);
        grpc.map_err(|e| AgentError::Serve { what: "gRPC", source: e.into() })?;
        data.map_err(|e| AgentError::Serve { what: "chunk data", source: e.into() })
    };
    let drained = async {
        shutdown.cancelled().await;
        tokio::time::sleep(DRAIN_TIMEOUT).await;
    };
    let served = tokio::select! { served = serving => served, () = drained => Ok(()) };
    tasks.cancel();
    registry.close(DRAIN_TIMEOUT).await;
    served
}

/// Tells the log what lies on the disk besides the copies. Whether somebody needs it is for the controller to say.
async fn tell(registry: &Arc<Registry>) {
    let survey = registry.survey().await.unwrap_or_default();
    for found in survey.remains {
        tracing::info!(image = %found.key, place = ?found.place, size_bytes = found.size_bytes, "files without a copy found");
    }
    for path in survey.foreign {
        tracing::warn!(path, "not a file of an image, left alone");
    }
}

async fn listen(security: &Security, address: SocketAddr, protocol: Protocol) -> Result<Listener, AgentError> {
    security.listen(address, protocol).await.map_err(|source| AgentError::Listen { address, source })
}

#[cfg(test)]
mod tests;
