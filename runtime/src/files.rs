//! Durable files: whole or absent, also after a loss of power.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The temporary name that [`write_durably`] uses beside a file.
pub fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".writing");
    path.with_file_name(name)
}

/// Replaces a file: written under a temporary name, synced, renamed, directory synced.
///
/// When it fails (a full disk) the old content stands, or all of the new one, and no temporary file is left.
pub fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = temporary_name(path);
    let replaced = write_synced(&temporary, content).and_then(|()| fs::rename(&temporary, path));
    if replaced.is_err() {
        // Best effort: the error of the write is the one that matters, and the next write begins anew.
        let _ = fs::remove_file(&temporary);
    }
    replaced.and_then(|()| sync_parent(path))
}

fn write_synced(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Makes a creation, removal or rename of a name durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

/// Makes a directory with its parents; every name that is new is durable then, not only the last one.
pub fn create_dir_durably(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        create_dir_durably(parent)?;
    }
    match fs::create_dir(path) {
        // Somebody else was faster.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        other => other?,
    }
    sync_parent(path)
}

/// Removes a directory with its content, durably; no error when there is none.
///
/// Durably also when an earlier try has removed it and did not get to say so: whoever forgets it next must be able to rely on that.
pub fn remove_dir_durably(path: &Path) -> io::Result<()> {
    let none_is_fine = |result: io::Result<()>| match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    none_is_fine(fs::remove_dir_all(path))?;
    none_is_fine(sync_parent(path))
}

/// Removes a file; no error when there is none.
pub fn remove_if_present(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makes_a_directory_with_its_parents_again_and_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/c");
        create_dir_durably(&path).unwrap();
        create_dir_durably(&path).unwrap();
        assert!(path.is_dir());
        fs::write(folder.path().join("file"), b"").unwrap();
        assert!(create_dir_durably(&folder.path().join("file/below")).is_err());
    }

    #[test]
    fn removes_a_directory_again_and_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        create_dir_durably(&path.join("c")).unwrap();
        remove_dir_durably(&path).unwrap();
        remove_dir_durably(&path).unwrap();
        assert!(!path.exists());
        remove_dir_durably(&path.join("c")).unwrap();
        fs::write(&path, b"").unwrap();
        assert!(remove_dir_durably(&path).is_err());
    }

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_no_temporary_one() {
        let folder = tempfile::tempdir().unwrap();
        // A directory that is not empty cannot be replaced by a file.
        let path = folder.path().join("record.json");
        create_dir_durably(&path.join("old")).unwrap();
        assert!(write_durably(&path, b"new").is_err());
        assert!(path.join("old").is_dir());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn leaves_one_whole_file_and_no_temporary_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        write_durably(&path, b"old").unwrap();
        write_durably(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        remove_if_present(&path).unwrap();
        remove_if_present(&path).unwrap();
    }
}
