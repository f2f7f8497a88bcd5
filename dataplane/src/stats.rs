//! How full a filesystem is.

use std::path::Path;

use crate::DataplaneError;

/// Bytes and inodes of a mounted filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilesystemStats {
    pub total_bytes: u64,
    /// What an ordinary user may still take.
    pub available_bytes: u64,
    pub used_bytes: u64,
    pub total_inodes: u64,
    pub free_inodes: u64,
    pub used_inodes: u64,
    pub read_only: bool,
}

/// The figures of the filesystem that holds a path.
pub fn filesystem(path: &Path) -> Result<FilesystemStats, DataplaneError> {
    let s = rustix::fs::statvfs(path)
        .map_err(|e| DataplaneError::io(format!("ask for the free space of `{}`", path.display()), e))?;
    let block = if s.f_frsize == 0 { s.f_bsize } else { s.f_frsize };
    Ok(FilesystemStats {
        total_bytes: s.f_blocks * block,
        available_bytes: s.f_bavail * block,
        used_bytes: s.f_blocks.saturating_sub(s.f_bfree) * block,
        total_inodes: s.f_files,
        free_inodes: s.f_ffree,
        used_inodes: s.f_files.saturating_sub(s.f_ffree),
        read_only: s.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY),
    })
}

/// Bytes of a block device or regular file.
pub fn device_size(path: &Path) -> Result<u64, DataplaneError> {
    use std::io::{Seek, SeekFrom};
    std::fs::File::open(path)
        .and_then(|mut f| f.seek(SeekFrom::End(0)))
        .map_err(|e| DataplaneError::io(format!("ask for the size of `{}`", path.display()), e))
}
