//! What can go wrong in the instance role.

use std::io;
use std::path::PathBuf;

use api::ErrorKind;
use store::StoreError;

use crate::disk_calls::Silent;

/// A failed pass or process; retried by the queue with a back-off.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("cannot use the store")]
    Store(#[from] StoreError),
    #[error("cannot {action} `{path}`")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("`{path}` is not understood")]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("cannot start {what}")]
    Start { what: String, source: io::Error },
    #[error("cannot end {what}")]
    End { what: String, source: io::Error },
    #[error("{what} does not answer")]
    Control { what: String, source: io::Error },
    #[error("cannot {action}")]
    Device { action: String, source: dataplane::DataplaneError },
    #[error(transparent)]
    Disk(#[from] Silent),
    #[error("no free port on node {node}; at most {limit} replicas run on a node at a time")]
    NoPort { node: String, limit: usize },
    #[error("the cluster has no node `{node}`; give --node a name that `kubectl get nodes` shows")]
    NoMachine { node: String },
    #[error("replica `{replica}` cannot run: {reason}")]
    Replica { replica: String, reason: String },
    #[error(
        "this node has certificates that are in no directory, so its replicas and engines, which are processes of their own, \
         could not read them; give it a directory with `ca.crt`, `tls.crt` and `tls.key`"
    )]
    NoCertificateFiles,
}

impl InstanceError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            InstanceError::Store(source) => source.kind(),
            InstanceError::Device { source, .. } => source.kind(),
            InstanceError::Control { .. } | InstanceError::Disk(_) => ErrorKind::Unavailable,
            InstanceError::NoPort { .. } => ErrorKind::Exhausted,
            InstanceError::Replica { .. } => ErrorKind::NotReady,
            InstanceError::NoCertificateFiles => ErrorKind::Invalid,
            InstanceError::NoMachine { .. } => ErrorKind::NotFound,
            InstanceError::File { .. }
            | InstanceError::Parse { .. }
            | InstanceError::Start { .. }
            | InstanceError::End { .. } => ErrorKind::Internal,
        }
    }
}
