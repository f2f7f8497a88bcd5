//! Files that survive a power cut: written whole under another name, synced, renamed, and the directory synced.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::AgentError;

/// Replaces a file. Afterwards it holds either its old content or all of the new one, whatever happens.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<(), AgentError> {
    let partial = partial_of(path);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&partial)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    })();
    if let Err(source) = written {
        let _ = fs::remove_file(&partial);
        return Err(AgentError::Io { doing: "write", path: path.into(), source });
    }
    sync_parent(path)
}

/// The name under which [`write`] works.
pub(crate) fn partial_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Renames a file and makes the new name durable.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), AgentError> {
    fs::rename(from, to).map_err(AgentError::io("rename", from))?;
    sync_parent(to)
}

/// Makes a directory with its parents, durably.
pub(crate) fn create_dir(path: &Path) -> Result<(), AgentError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(AgentError::io("create directory", path))?;
    sync_parent(path)
}

/// Removes a file; it is fine when there is none.
pub(crate) fn remove_file(path: &Path) -> Result<(), AgentError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(AgentError::Io { doing: "remove", path: path.into(), source })
        }
        _ => Ok(()),
    }
}

/// Removes a directory with its content; it is fine when there is none.
pub(crate) fn remove_dir_all(path: &Path) -> Result<(), AgentError> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(AgentError::Io { doing: "remove", path: path.into(), source })
        }
        _ => Ok(()),
    }
}

/// Makes the entry of a path in its directory durable.
pub(crate) fn sync_parent(path: &Path) -> Result<(), AgentError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(AgentError::io("sync directory", parent))
}
