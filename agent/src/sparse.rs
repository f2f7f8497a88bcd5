//! Files with holes: zeros are never written, and room is reserved before the first byte.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate, statvfs};

use crate::error::AgentError;
use crate::limits::HOLE_BYTES;

static ZEROS: [u8; HOLE_BYTES] = [0; HOLE_BYTES];

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Slices of bytes compare by memcmp, which is fast even in unoptimized builds.
    bytes.chunks(ZEROS.len()).all(|part| part == &ZEROS[..part.len()])
}

/// Writes bytes, and makes holes of those blocks in it that are zero.
///
/// `punch` is needed where something may lie already: reserved blocks, or what an earlier try left.
pub(crate) fn write_at(file: &File, offset: u64, bytes: &[u8], punch: bool) -> io::Result<()> {
    write_with(file, offset, bytes, punch, |bytes, offset| file.write_all_at(bytes, offset))
}

/// As [`write_at`], with another way to write what is not zero.
pub(crate) fn write_with(
    file: &File,
    offset: u64,
    bytes: &[u8],
    punch: bool,
    write: impl Fn(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut run_start = 0;
    let mut run_is_zero = None;
    let mut position = 0;
    let flush = |start: usize, end: usize, zero: Option<bool>| match zero {
        Some(true) if punch => punch_hole(file, offset + start as u64, (end - start) as u64),
        Some(false) => write(&bytes[start..end], offset + start as u64),
        _ => Ok(()),
    };
    for part in bytes.chunks(HOLE_BYTES) {
        let zero = is_zero(part);
        if run_is_zero != Some(zero) {
            flush(run_start, position, run_is_zero)?;
            (run_start, run_is_zero) = (position, Some(zero));
        }
        position += part.len();
    }
    flush(run_start, position, run_is_zero)
}

/// Begins to bring a range to the disk, so that the sync at the end finds little to do. Volumes read images past the page
/// cache: what is on the disk already need not stay in it.
pub(crate) fn write_back(file: &File, range: Range<u64>) {
    if let Some(length) = NonZeroU64::new(range.end.saturating_sub(range.start)) {
        // A hint: without it the same is done later.
        let _ = fadvise(file, range.start, Some(length), Advice::DontNeed);
    }
}

/// Frees a range of a file, which then reads as zeros. Has no effect behind the end of the file.
pub(crate) fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
        Err(rustix::io::Errno::OPNOTSUPP) => write_zeros(file, offset, length),
        other => other.map_err(Into::into),
    }
}

fn write_zeros(file: &File, mut offset: u64, mut length: u64) -> io::Result<()> {
    while length > 0 {
        let part = length.min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..part as usize], offset)?;
        offset += part;
        length -= part;
    }
    Ok(())
}

/// Takes room for a range of a file, so that later writes cannot fail for want of it. Tells whether it is taken: on a
/// filesystem that cannot reserve, the caller compares the free space by [`check_free`].
///
/// A later write, or the sync at the end, can still find the disk full there, and everywhere what describes the file needs
/// room too. Such an error is of the kind `Exhausted` wherever it comes from, and then nothing of the file is kept.
pub(crate) fn reserve(file: &File, path: &Path, offset: u64, length: u64) -> Result<bool, AgentError> {
    match fallocate(file, FallocateFlags::KEEP_SIZE, offset, length) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(false),
        Err(rustix::io::Errno::NOSPC) => {
            Err(AgentError::NoSpace { path: path.into(), needed_bytes: length, free_bytes: free_bytes(path)? })
        }
        Err(errno) => Err(AgentError::Io { doing: "reserve room for", path: path.into(), source: errno.into() }),
    }
}

/// Refuses when the filesystem of a path has less than so many bytes free.
pub(crate) fn check_free(path: &Path, needed_bytes: u64) -> Result<(), AgentError> {
    let free_bytes = free_bytes(path)?;
    if free_bytes < needed_bytes {
        return Err(AgentError::NoSpace { path: path.into(), needed_bytes, free_bytes });
    }
    Ok(())
}

fn free_bytes(path: &Path) -> Result<u64, AgentError> {
    let stat = statvfs(path).map_err(|errno| AgentError::Io {
        doing: "ask for the free space of",
        path: path.into(),
        source: errno.into(),
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn zero_blocks_become_holes_also_in_reserved_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(reserve(&file, &path, 0, 1 << 20).unwrap());
        let mut bytes = vec![0; 1 << 20];
        bytes[300_000] = 7;
        write_at(&file, 0, &bytes, true).unwrap();
        file.sync_all().unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
        let used = file.metadata().unwrap().blocks() * 512;
        assert!(used <= 2 * HOLE_BYTES as u64, "{used} bytes used");
    }

    #[test]
    fn a_full_disk_is_told_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let error = check_free(dir.path(), u64::MAX).unwrap_err();
        assert_eq!(error.kind(), api::ErrorKind::Exhausted);
    }
}
