//! What can end an engine or a holder.

use std::io;
use std::path::PathBuf;

use api::ErrorKind;
use runtime::transport::SecurityError;

/// Why an engine may not have a successor under a mounted volume.
pub const NOT_REPLACEABLE: &str = "this kernel cannot repeat the requests that it had taken (that takes Linux 6.9), or replacing engines is switched off";

/// Why an engine or a holder ended, or a control request failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("cannot read the engine's configuration `{path}`")]
    ReadConfig { path: PathBuf, source: io::Error },
    #[error("the engine's configuration `{path}` is not valid")]
    ParseConfig { path: PathBuf, source: serde_json::Error },
    #[error("the engine's configuration is not valid: {problem}")]
    Config { problem: String },
    #[error("the certificates of the engine of volume `{volume}` cannot be used")]
    Certificates { volume: String, source: SecurityError },
    #[error("volume `{volume}` has no replica to start with: {reason}")]
    NoReplica { volume: String, reason: String },
    #[error("cannot mount the volume on `{path}`; FUSE is needed (/dev/fuse, root)")]
    Mount { path: PathBuf, source: io::Error },
    #[error("volume `{volume}` is already served from `{path}` by another engine; shut that one down first")]
    Served { volume: String, path: PathBuf },
    #[error("cannot start the engine process `{command}`")]
    Spawn { command: String, source: io::Error },
    #[error(
        "no engine came to serve volume `{volume}` within {limit_ms} ms, so its device was given up; the data stays on the replicas; the last engine: {last}"
    )]
    GaveUp { volume: String, limit_ms: u64, last: String },
    #[error(
        "the engine of volume `{volume}` ended ({last}) and is not replaced: {NOT_REPLACEABLE}; the data stays on the replicas, and the volume can be attached again"
    )]
    Lost { volume: String, last: String },
    #[error("the engine of volume `{volume}` made room for the next one")]
    HandedOver { volume: String },
    #[error(
        "the engine of volume `{volume}` was killed and does not end within {limit_ms} ms, so its device was given up; the data stays on the replicas"
    )]
    Undead { volume: String, limit_ms: u64 },
    #[error("the engine of volume `{volume}` ends: {reason}")]
    Superseded { volume: String, reason: String },
    #[error("cannot listen on `{path}`")]
    Listen { path: PathBuf, source: io::Error },
    #[error("the engine's connection to the kernel failed")]
    Fuse { source: io::Error },
    #[error("the engine cannot wait for events")]
    Events { source: io::Error },
    #[error("cannot write `{path}`")]
    Write { path: PathBuf, source: io::Error },
    #[error("the engine behind `{path}` does not answer")]
    Control { path: PathBuf, source: io::Error },
    #[error("the engine refused: {message}")]
    Refused { message: String },
}

impl EngineError {
    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            EngineError::ParseConfig { .. } | EngineError::Config { .. } => ErrorKind::Invalid,
            EngineError::Certificates { source, .. } => source.kind(),
            EngineError::ReadConfig { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            EngineError::NoReplica { .. }
            | EngineError::GaveUp { .. }
            | EngineError::Lost { .. }
            | EngineError::HandedOver { .. }
            | EngineError::Undead { .. }
            | EngineError::Superseded { .. }
            | EngineError::Control { .. } => ErrorKind::Unavailable,
            EngineError::Served { .. } | EngineError::Refused { .. } => ErrorKind::NotReady,
            EngineError::ReadConfig { .. }
            | EngineError::Mount { .. }
            | EngineError::Spawn { .. }
            | EngineError::Listen { .. }
            | EngineError::Fuse { .. }
            | EngineError::Events { .. }
            | EngineError::Write { .. } => ErrorKind::Internal,
        }
    }

    /// The error with its causes, in one line.
    pub fn chain(&self) -> String {
        api::error::sentence(self)
    }
}
