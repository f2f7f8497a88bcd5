//! What can go wrong with a pass.

use api::ErrorKind;
pub(crate) use api::error::sentence as chain;
use store::StoreError;
use workloads::WorkloadError;

/// A failed pass over one object.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error("cannot {doing}")]
    Store { doing: &'static str, source: StoreError },
    #[error("cannot {doing}")]
    Workload { doing: &'static str, source: WorkloadError },
    #[error("cannot {doing} at agent {address}")]
    Agent { doing: &'static str, address: String, source: Box<tonic::Status> },
    #[error("{what} `{text}` cannot be used")]
    Name { what: &'static str, text: String },
    #[error("the pass took too long and was given up; it begins anew")]
    Timeout,
    #[error("the store has not told yet what was written to it last, so nothing is decided; this is tried again")]
    Behind,
}

impl ReconcileError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ReconcileError::Store { source, .. } => source.kind(),
            ReconcileError::Workload { source, .. } => source.kind(),
            ReconcileError::Agent { source, .. } => {
                let named = source.metadata().get(proto::ERROR_KIND_KEY).and_then(|name| name.to_str().ok());
                named.and_then(ErrorKind::from_name).unwrap_or(ErrorKind::Unavailable)
            }
            ReconcileError::Timeout | ReconcileError::Behind => ErrorKind::Unavailable,
            ReconcileError::Name { .. } => ErrorKind::Invalid,
        }
    }

    /// What was decided on has changed in the meantime: observe again, at once.
    pub fn is_conflict(&self) -> bool {
        match self {
            ReconcileError::Store { source, .. } => {
                source.is_conflict()
                    || matches!(
                        source,
                        StoreError::NotFound { .. }
                            | StoreError::AlreadyExists { .. }
                            | StoreError::Precondition { .. }
                    )
            }
            _ => false,
        }
    }

    /// This error and its causes, in one line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// Why the controller as a whole ended.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    #[error("cannot watch {what}")]
    Watch { what: &'static str, source: StoreError },
    #[error("cannot create the default settings")]
    Settings { source: StoreError },
}

impl ControllerError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            ControllerError::Watch { source, .. } | ControllerError::Settings { source } => source.kind(),
        }
    }
}

/// Says what was being done when a store call failed.
pub(crate) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, ReconcileError>;
}

impl<T> Doing<T> for Result<T, StoreError> {
    fn doing(self, doing: &'static str) -> Result<T, ReconcileError> {
        self.map_err(|source| ReconcileError::Store { doing, source })
    }
}

impl<T> Doing<T> for Result<T, WorkloadError> {
    fn doing(self, doing: &'static str) -> Result<T, ReconcileError> {
        self.map_err(|source| ReconcileError::Workload { doing, source })
    }
}
