//! Writes past the page cache, where the filesystem can do that.
//!
//! A copy that is received is not read soon: volumes read images past the page cache. To put it there first costs more time
//! than everything else that is done with a chunk, and leaves the whole file for the sync at the end.
//! What is not aligned (the end of a file), and every write where it cannot be done, goes through the cache as usual.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::sparse;

/// Alignment of memory, offset and length that suffices for nearly every disk; one that wants more is written through the cache.
const ALIGN_BYTES: usize = 4096;

/// A file that is being written, and the same file opened for writes past the cache.
pub(crate) struct DirectFile {
    file: File,
    direct: Option<File>,
}

impl DirectFile {
    /// `file` is what lies at `path`.
    pub fn new(file: File, path: &Path) -> DirectFile {
        // Some filesystems refuse the flag. That is no fault.
        let direct = File::options().write(true).custom_flags(libc::O_DIRECT).open(path).ok();
        DirectFile { file, direct }
    }

    /// The file as usual: to be read, and to be synced after all writes.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Writes bytes, and makes holes of those blocks in it that are zero, whatever was there.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        sparse::write_with(&self.file, offset, bytes, true, |bytes, offset| {
            let done = self.write_direct(bytes, offset)?;
            self.file.write_all_at(&bytes[done..], offset + done as u64)
        })
    }

    /// Writes as much of the beginning as can be; tells how much that was.
    fn write_direct(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let is_aligned = bytes.as_ptr().align_offset(ALIGN_BYTES) == 0 && offset.is_multiple_of(ALIGN_BYTES as u64);
        let Some(direct) = self.direct.as_ref().filter(|_| is_aligned) else { return Ok(0) };
        let whole = bytes.len() - bytes.len() % ALIGN_BYTES;
        match direct.write_all_at(&bytes[..whole], offset) {
            Ok(()) => Ok(whole),
            Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(0),
            Err(error) => Err(error),
        }
    }
}

/// Memory from which a [`DirectFile`] can write past the cache.
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// Zeros.
    pub fn new(length: usize) -> Buffer {
        let bytes = vec![0; length + ALIGN_BYTES];
        let start = bytes.as_ptr().align_offset(ALIGN_BYTES).min(ALIGN_BYTES);
        Buffer { bytes, start }
    }

    /// The first bytes of it.
    pub fn first(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;

    use rustix::io::{Errno, ReadWriteFlags, preadv2};

    use super::*;

    const SIZE: usize = (1 << 20) + 512;

    fn create(path: &Path) -> DirectFile {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
        file.set_len(2 * SIZE as u64).unwrap();
        DirectFile::new(file, path)
    }

    /// Whether a block of the file is in the page cache.
    fn is_cached(file: &File, offset: u64) -> bool {
        let mut block = [0; 512];
        match preadv2(file, &mut [IoSliceMut::new(&mut block)], offset, ReadWriteFlags::NOWAIT) {
            Ok(_) => true,
            Err(Errno::AGAIN) => false,
            Err(error) => panic!("cannot look into the cache: {error}"),
        }
    }

    #[test]
    fn what_is_written_is_there_whatever_its_alignment() {
        let dir = tempfile::tempdir().unwrap();
        let file = create(&dir.path().join("f"));
        let mut expected = vec![0; 2 * SIZE];
        let mut buffer = Buffer::new(SIZE + 1);
        for (round, (shift, offset, length)) in
            [(0, 0, SIZE), (0, 1 << 19, 1 << 19), (1, 1 << 20, 100_000), (0, 777, 4096), (0, 8192, 100)]
                .into_iter()
                .enumerate()
        {
            let bytes = &mut buffer.first(shift + length)[shift..];
            bytes.fill(round as u8 + 1);
            bytes[length / 2..].iter_mut().take(70_000).for_each(|b| *b = 0);
            expected[offset..offset + length].copy_from_slice(bytes);
            file.write_at(offset as u64, bytes).unwrap();
            let mut found = vec![0xff; 2 * SIZE];
            file.file().read_exact_at(&mut found, 0).unwrap();
            assert!(found == expected, "round {round}");
        }
    }

    #[test]
    fn what_is_aligned_does_not_fill_the_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let mut buffer = Buffer::new(SIZE);
        buffer.first(SIZE).fill(7);
        let mut leaves_the_cache_empty = |round: u64| {
            let file = create(&dir.path().join(round.to_string()));
            // Nothing to see on a filesystem that always has a cache.
            file.direct.is_none() || {
                file.write_at(0, buffer.first(SIZE)).unwrap();
                !is_cached(file.file(), 0) && !is_cached(file.file(), 1 << 19)
            }
        };
        // The look itself makes the kernel read the block, and finds it when the disk is faster than the look.
        assert!((0..20).any(&mut leaves_the_cache_empty));
    }

    #[test]
    fn a_filesystem_without_direct_writes_is_written_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let file = DirectFile { direct: None, ..create(&dir.path().join("f")) };
        let mut buffer = Buffer::new(SIZE);
        buffer.first(SIZE).fill(7);
        file.write_at(0, buffer.first(SIZE)).unwrap();
        let mut found = vec![0; SIZE];
        file.file().read_exact_at(&mut found, 0).unwrap();
        assert!(found == vec![7; SIZE]);
    }
}
