//! What can go wrong with image files.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use api::ErrorKind;
pub use api::error::sentence as chain;

use crate::manifest::ManifestError;
use crate::qcow2::Qcow2Error;

/// A failure of this crate. A variant never prints its source: [`AgentError::chain`] does.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("cannot {doing} `{}`", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("the disk of `{}` has {free_bytes} bytes free, the file needs {needed_bytes}: free some space or choose another disk", path.display())]
    NoSpace { path: PathBuf, needed_bytes: u64, free_bytes: u64 },
    #[error("`{}` is not the directory of a disk: {problem}", path.display())]
    DiskConfig { path: PathBuf, problem: String },
    #[error("cannot listen on `{address}`")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("the {what} server ended")]
    Serve { what: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the file is refused")]
    Qcow2(#[source] Qcow2Error),
    #[error("the source is empty: 0 bytes are no image")]
    Empty,
    #[error("a raw image must be a multiple of 512 bytes, this one has {size_bytes}: set the source parameter `padToSector: \"true\"` to append {} zero bytes, or give a whole image", 512 - size_bytes % 512)]
    NotWholeSectors { size_bytes: u64 },
    #[error("the file has {size_bytes} bytes, more than the {limit_bytes} that are accepted")]
    TooLarge { size_bytes: u64, limit_bytes: u64 },
    #[error("SHA-512 is {actual}, but {expected} was expected{note}")]
    Checksum { expected: String, actual: String, note: String },
    #[error("cannot download `{url}`: the server answered {status}")]
    HttpStatus { url: String, status: u16 },
    #[error("cannot download `{url}`: {problem}")]
    Download { url: String, problem: String },
    #[error("cannot download `{url}`: {problem}; gave up after {tries} tries without progress")]
    Exhausted { url: String, problem: String, tries: u32 },
    #[error(
        "the server sent {received_bytes} bytes without saying how many there are and closed the connection, \
         so a cut transfer cannot be told from a whole one: give the SHA-512 as `checksum`, or use a server that sends Content-Length"
    )]
    UnknownLength { received_bytes: u64 },
    #[error("the manifest of `{file}` cannot be used")]
    Manifest { file: String, source: ManifestError },
    #[error("no peer can give the copy: {reasons}")]
    NoPeer { reasons: String },
    #[error("chunk {chunk} (bytes {} to {}) has the wrong BLAKE3 hash on every peer that is left: {peers}", chunk * crate::limits::CHUNK_BYTES, (chunk + 1) * crate::limits::CHUNK_BYTES - 1)]
    ChunkBadEverywhere { chunk: u64, peers: String },
    #[error(
        "{bad} of {total} chunks differ from the manifest, the first is chunk {first}: ask for a sync, which fetches only those again"
    )]
    Damaged { bad: u64, total: u64, first: u64 },
    #[error("{message}")]
    Invalid { message: String },
    #[error("{message}")]
    Incompatible { message: String },
    #[error("{message}")]
    NotFound { message: String },
    #[error("{message}")]
    NotReady { message: String },
    #[error("{message}")]
    Unsupported { message: String },
    #[error("{message}")]
    Unavailable { message: String },
    #[error("stopped before it was finished")]
    Cancelled,
}

impl AgentError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            AgentError::Io { source, .. } if source.raw_os_error() == Some(libc::ENOSPC) => ErrorKind::Exhausted,
            AgentError::Io { .. } | AgentError::Serve { .. } => ErrorKind::Internal,
            AgentError::NoSpace { .. } => ErrorKind::Exhausted,
            AgentError::DiskConfig { .. } | AgentError::NotReady { .. } => ErrorKind::NotReady,
            AgentError::Listen { .. }
            | AgentError::Exhausted { .. }
            | AgentError::NoPeer { .. }
            | AgentError::Unavailable { .. } => ErrorKind::Unavailable,
            AgentError::HttpStatus { status: 404 | 410, .. } | AgentError::NotFound { .. } => ErrorKind::NotFound,
            AgentError::Qcow2(_)
            | AgentError::Empty
            | AgentError::NotWholeSectors { .. }
            | AgentError::HttpStatus { .. }
            | AgentError::Download { .. }
            | AgentError::UnknownLength { .. }
            | AgentError::Invalid { .. } => ErrorKind::Invalid,
            AgentError::TooLarge { .. } => ErrorKind::OutOfRange,
            AgentError::Checksum { .. }
            | AgentError::Manifest { .. }
            | AgentError::ChunkBadEverywhere { .. }
            | AgentError::Damaged { .. } => ErrorKind::Corrupt,
            AgentError::Incompatible { .. } => ErrorKind::Incompatible,
            AgentError::Unsupported { .. } => ErrorKind::Unsupported,
            AgentError::Cancelled => ErrorKind::Pending,
        }
    }

    /// The message with those of its sources, for a status field or a log line.
    pub fn chain(&self) -> String {
        chain(self)
    }

    /// Wraps an I/O error, for `map_err`.
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> AgentError {
        let path = path.into();
        move |source| AgentError::Io { doing, path, source }
    }
}

/// Runs file work of unknown length away from the async threads. A panic in it goes on here.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, AgentError> + Send + 'static,
) -> Result<T, AgentError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(AgentError::Cancelled),
    }
}
