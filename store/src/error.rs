//! What can go wrong with a store.

use std::path::PathBuf;

use api::ErrorKind;

/// A failed call to a store. The sentence names the object.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{resource} `{name}` does not exist")]
    NotFound { resource: String, name: String },
    #[error("{resource} `{name}` exists already")]
    AlreadyExists { resource: String, name: String },
    #[error("{resource} `{name}` was changed by somebody else in the meantime; read it again")]
    Conflict { resource: String, name: String },
    #[error("{resource} `{name}` is not the object that the request was decided on")]
    Precondition { resource: String, name: String },
    #[error("{resource} `{name}` is invalid: {reason}")]
    Invalid { resource: String, name: String, reason: String },
    #[error("the Kubernetes API does not allow this for {resource} `{name}`: {reason}")]
    Forbidden { resource: String, name: String, reason: String },
    #[error(
        "the Kubernetes API does not know the kind {resource} ({reason}): \
         install the custom resource definitions of this version (`kubectl apply -f deploy/crds`)"
    )]
    UnknownKind { resource: String, reason: String },
    #[error("the store does not answer")]
    Unavailable { source: Box<dyn std::error::Error + Send + Sync> },
    #[error(
        "store file `{path}` is in use by another process, and only one may have it open: \
         stop that process, or choose another data directory"
    )]
    InUse { path: PathBuf },
    #[error("cannot open store file `{path}`")]
    Open { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("cannot write store file `{path}`; whether the change was made is unknown until it can be read again")]
    Write { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("stored {resource} `{name}` cannot be read")]
    Corrupt { resource: String, name: String, source: serde_json::Error },
}

impl StoreError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            StoreError::NotFound { .. } => ErrorKind::NotFound,
            StoreError::AlreadyExists { .. } => ErrorKind::Incompatible,
            StoreError::Conflict { .. } => ErrorKind::Pending,
            StoreError::Precondition { .. } => ErrorKind::NotReady,
            StoreError::Invalid { .. } => ErrorKind::Invalid,
            StoreError::Forbidden { .. } | StoreError::UnknownKind { .. } => ErrorKind::NotReady,
            StoreError::Unavailable { .. } => ErrorKind::Unavailable,
            StoreError::InUse { .. } => ErrorKind::NotReady,
            StoreError::Open { .. } => ErrorKind::Internal,
            StoreError::Write { .. } => ErrorKind::Unavailable,
            StoreError::Corrupt { .. } => ErrorKind::Internal,
        }
    }

    /// Somebody else was faster: observe again.
    pub fn is_conflict(&self) -> bool {
        matches!(self, StoreError::Conflict { .. })
    }
}
