//! `runtime::files` with this crate's errors, and what goes with directories.

use std::fs;
use std::path::Path;

use runtime::files;

use crate::error::AgentError;

/// Replaces a file. Afterwards it holds either its old content or all of the new one, whatever happens.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<(), AgentError> {
    files::write_durably(path, content).map_err(AgentError::io("write", path))
}

/// Renames a file and makes the new name durable.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), AgentError> {
    fs::rename(from, to).map_err(AgentError::io("rename", from))?;
    sync_parent(to)
}

/// Makes a directory with its parents, durably.
pub(crate) fn create_dir(path: &Path) -> Result<(), AgentError> {
    files::create_dir_durably(path).map_err(AgentError::io("create directory", path))
}

/// Removes a file and what an interrupted [`write`] left of it; it is fine when there is none.
pub(crate) fn remove_file(path: &Path) -> Result<(), AgentError> {
    files::remove_if_present(path)
        .and_then(|()| files::remove_if_present(&files::temporary_name(path)))
        .map_err(AgentError::io("remove", path))
}

/// Removes a directory with its content, durably; it is fine when there is none.
pub(crate) fn remove_dir(path: &Path) -> Result<(), AgentError> {
    files::remove_dir_durably(path).map_err(AgentError::io("remove", path))
}

/// Makes the entry of a path in its directory durable.
pub(crate) fn sync_parent(path: &Path) -> Result<(), AgentError> {
    files::sync_parent(path).map_err(AgentError::io("sync the directory of", path))
}
