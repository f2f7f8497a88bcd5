//! What can go wrong in the instance role.

use std::io;
use std::path::PathBuf;

use api::ErrorKind;
use store::StoreError;

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
    #[error("no free port on node {node}; at most {limit} replicas run on a node at a time")]
    NoPort { node: String, limit: usize },
    #[error("the cluster has no node `{node}`; give --node a name that `kubectl get nodes` shows")]
    NoMachine { node: String },
    #[error("replica `{replica}` cannot run: {reason}")]
    Replica { replica: String, reason: String },
    #[error(
        "TLS between engines and replicas is not supported yet: run this node in plain text, \
         in a network that only its own processes reach"
    )]
    PlainOnly,
}

impl InstanceError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            InstanceError::Store(source) => source.kind(),
            InstanceError::Device { source, .. } => source.kind(),
            InstanceError::Control { .. } => ErrorKind::Unavailable,
            InstanceError::NoPort { .. } => ErrorKind::Exhausted,
            InstanceError::Replica { .. } => ErrorKind::NotReady,
            InstanceError::PlainOnly => ErrorKind::Unsupported,
            InstanceError::NoMachine { .. } => ErrorKind::NotFound,
            InstanceError::File { .. }
            | InstanceError::Parse { .. }
            | InstanceError::Start { .. }
            | InstanceError::End { .. } => ErrorKind::Internal,
        }
    }
}
