//! What can go wrong outside.

use std::io;
use std::path::PathBuf;

use api::ErrorKind;

/// A failed call to the node's outside.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    #[error("cannot {action}")]
    Io { action: String, source: io::Error },
    #[error("`{program}` is not installed; install the package `{package}` on this node")]
    Missing { program: String, package: String },
    #[error("`{command}` did not end within {seconds} s and was killed; the device may be stuck")]
    Slow { command: String, seconds: u64 },
    #[error("`{command}` failed ({outcome}): {stderr}")]
    Failed { command: String, outcome: String, stderr: String },
    #[error("qemu-storage-daemon refused `{command}`: {message}")]
    Refused { command: String, message: String },
    #[error("qemu-storage-daemon did not answer `{command}` within {seconds} s")]
    Silent { command: String, seconds: u64 },
    #[error("qemu-storage-daemon has ended{detail}")]
    Ended { detail: String },
    /// The sentence says what is wrong with a file.
    #[error("{message}")]
    Unusable { message: String },
    /// The sentence says what is not blank and what it holds.
    #[error("{message}")]
    NotBlank { message: String },
    #[error(
        "the filesystem on `{}` is damaged, so it is neither grown nor mounted: {said}; repair it with `e2fsck` on that device, then try again",
        device.display()
    )]
    Damaged { device: PathBuf, said: String },
    /// It is whole, and was used before.
    #[error("the filesystem on `{}` cannot be grown, so it keeps the size that it has: {said}", device.display())]
    NotGrown { device: PathBuf, said: String },
    #[error(
        "`{}` is in use: a growth of its filesystem goes on, somebody repairs it, or it is mounted in another mount namespace; repeat the call when that has ended",
        device.display()
    )]
    StillGrowing { device: PathBuf },
    #[error("`{}` is in use by {users}", path.display())]
    Busy { path: PathBuf, users: String },
    #[error("{message}")]
    Unsupported { message: String },
}

impl DataplaneError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            DataplaneError::Io { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::StorageFull => ErrorKind::Exhausted,
                _ => ErrorKind::Internal,
            },
            DataplaneError::Failed { .. } | DataplaneError::Refused { .. } => ErrorKind::Internal,
            DataplaneError::Missing { .. }
            | DataplaneError::NotBlank { .. }
            | DataplaneError::Damaged { .. }
            | DataplaneError::NotGrown { .. }
            | DataplaneError::Busy { .. } => ErrorKind::NotReady,
            DataplaneError::Slow { .. } | DataplaneError::Silent { .. } | DataplaneError::Ended { .. } => {
                ErrorKind::Unavailable
            }
            DataplaneError::StillGrowing { .. } => ErrorKind::Pending,
            DataplaneError::Unusable { .. } => ErrorKind::Corrupt,
            DataplaneError::Unsupported { .. } => ErrorKind::Unsupported,
        }
    }

    pub(crate) fn io(action: impl Into<String>, source: impl Into<io::Error>) -> DataplaneError {
        DataplaneError::Io { action: action.into(), source: source.into() }
    }
}
