//! The process `backing-image-csi replica`: one replica's files, its `qemu-storage-daemon`, its generations.
//!
//! It answers a request that changes something only after the change is durable (see ARCHITECTURE.md, "Generations").
//! Its directory belongs to one process at a time, by a lock that the daemon inherits.
//! With certificates the daemon serves on a unix socket in that directory, and this process relays to it.

mod control;
mod data;
mod directory;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use api::ErrorKind;
use dataplane::DataplaneError;
use dataplane::storage_daemon::{self, Base, BaseFormat, StorageDaemon};
use proto::replica::file;
use runtime::transport::{Protocol, Security, SecurityError};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use control::Replica;
pub(crate) use directory::LOCK;
pub use directory::read_record;

/// What a replica process works on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Config {
    pub directory: PathBuf,
    pub volume: String,
    pub replica: String,
    pub size_bytes: u64,
    /// `None`: a volume without image.
    pub image: Option<Image>,
    /// NBD over TCP; the control protocol is at the next port.
    pub listen: SocketAddr,
    /// A directory with certificates, for both; absent: they are plain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificates: Option<PathBuf>,
}

/// The local copy that a replica reads what it has not written from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Image {
    pub name: String,
    pub uuid: String,
    pub path: PathBuf,
    /// As recorded at ingest; never probed.
    pub format: BaseFormat,
}

impl Config {
    /// Reads a configuration file, the argument of `backing-image-csi replica --config FILE`.
    pub fn read(path: &Path) -> Result<Config, ReplicaError> {
        let text = std::fs::read(path).map_err(|e| ReplicaError::io(format!("read `{}`", path.display()), e))?;
        serde_json::from_slice(&text).map_err(|source| ReplicaError::Config { path: path.to_owned(), source })
    }
}

/// Why a replica process ended or could not start.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    #[error("cannot {action}")]
    Io { action: String, source: std::io::Error },
    #[error("configuration `{}` is not understood", path.display())]
    Config { path: PathBuf, source: serde_json::Error },
    #[error("`{}` is in use by another replica process; end that one first", directory.display())]
    InUse { directory: PathBuf },
    /// The sentence says what does not fit.
    #[error("{message}")]
    Mismatch { message: String },
    #[error("cannot serve the files of replica `{replica}`")]
    Daemon { replica: String, source: DataplaneError },
    #[error("{message}")]
    DaemonEnded { message: String },
    #[error("the certificates of replica `{replica}` cannot be used")]
    Certificates { replica: String, source: SecurityError },
}

impl ReplicaError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ReplicaError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => ErrorKind::Exhausted,
            ReplicaError::Io { .. } | ReplicaError::DaemonEnded { .. } => ErrorKind::Internal,
            ReplicaError::Config { .. } => ErrorKind::Invalid,
            ReplicaError::InUse { .. } => ErrorKind::NotReady,
            ReplicaError::Mismatch { .. } => ErrorKind::Corrupt,
            ReplicaError::Daemon { source, .. } => source.kind(),
            ReplicaError::Certificates { source, .. } => source.kind(),
        }
    }

    fn io(action: impl Into<String>, source: std::io::Error) -> ReplicaError {
        ReplicaError::Io { action: action.into(), source }
    }
}

/// Serves a replica until `shutdown` (everything is flushed then) or until its daemon dies (an error).
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), ReplicaError> {
    let security = Security::from_directory(config.certificates.as_deref());
    let security = security.map_err(|source| ReplicaError::Certificates { replica: config.replica.clone(), source })?;
    let lock = directory::claim(&config.directory).await?;
    let mut record = directory::open_record(&config)?;
    let inherited = lock.try_clone().map_err(|e| ReplicaError::io("share the lock of the replica", e))?;
    let network = storage_daemon::listener::listen(config.listen)
        .map_err(|e| ReplicaError::io(format!("listen on {}", config.listen), e))?;
    let (listener, relayed) = if security.is_plain() {
        (network, None)
    } else {
        let path = config.directory.join(file::NBD_SOCKET);
        let socket = runtime::socket::bind_private(&path);
        (socket.map_err(|e| ReplicaError::io(format!("listen on `{}`", path.display()), e))?, Some(network))
    };
    let failed = |source| ReplicaError::Daemon { replica: config.replica.clone(), source };
    let daemon = StorageDaemon::start(storage_daemon::Config {
        directory: config.directory.clone(),
        head: file::HEAD.into(),
        listener,
        base: config.image.as_ref().map(|i| Base { path: i.path.clone(), format: i.format }),
        size_bytes: config.size_bytes,
        recorded_bytes: record.size_bytes,
        // Generation 0: no export was ever opened, so there is nothing to lose.
        create_head: record.generation == 0,
        lock: Some(inherited.into()),
    })
    .await
    .map_err(failed)?;
    if record.size_bytes < config.size_bytes {
        // The head has grown durably. Until this is recorded its process may be cut off at any step and do it again.
        record.size_bytes = config.size_bytes;
        if let Err(error) = directory::write_record(&config.directory, &record) {
            let _ = daemon.quit().await;
            return Err(error);
        }
    }
    let replica = Replica::new(config.directory.clone(), record, daemon);
    let outcome = serve(&config, &security, relayed, replica, shutdown).await;
    drop(lock);
    outcome
}

async fn serve(
    config: &Config,
    security: &Security,
    relayed: Option<OwnedFd>,
    replica: Replica,
    shutdown: CancellationToken,
) -> Result<(), ReplicaError> {
    let tasks = TaskTracker::new();
    let stop = shutdown.child_token();
    let control_address = SocketAddr::new(config.listen.ip(), config.listen.port() + 1);
    let listen = async {
        let data = relayed.map(|socket| security.listen_on(socket, Protocol::Nbd)).transpose();
        let data = data.map_err(|e| ReplicaError::io(format!("listen on {}", config.listen), e))?;
        let tcp = security
            .listen(control_address, Protocol::Lines)
            .await
            .map_err(|e| ReplicaError::io(format!("listen on {control_address}"), e))?;
        let path = config.directory.join(file::CONTROL_SOCKET);
        // Last, because whoever sees it may rely on the others. The lock makes sure that nobody else serves it.
        let unix =
            runtime::socket::bind(&path).map_err(|e| ReplicaError::io(format!("listen on `{}`", path.display()), e))?;
        Ok((data, tcp, unix))
    };
    let (data, tcp, unix) = match listen.await {
        Ok(listeners) => listeners,
        Err(error) => {
            let _ = replica.quit().await;
            return Err(error);
        }
    };
    if let Some(data) = data {
        tasks.spawn(data::serve(data, config.directory.join(file::NBD_SOCKET), stop.clone(), tasks.clone()));
    }
    tasks.spawn(control::serve_tcp(tcp, replica.clone(), stop.clone(), tasks.clone()));
    tasks.spawn(control::serve_unix(unix, replica.clone(), stop.clone(), tasks.clone()));
    tracing::info!(replica = %config.replica, address = %config.listen, "replica serves");
    runtime::memory::release_startup_code();

    let ended = tokio::select! {
        message = replica.daemon_ended() => Some(message),
        () = shutdown.cancelled() => None,
    };
    stop.cancel();
    tasks.close();
    tasks.wait().await;
    match ended {
        Some(message) => Err(ReplicaError::DaemonEnded { message }),
        None => replica.quit().await.map_err(|source| ReplicaError::Daemon { replica: config.replica.clone(), source }),
    }
}
