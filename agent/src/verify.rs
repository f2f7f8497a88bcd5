//! Files that exist already: are they what their manifest says, and what are they when there is none?

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use api::ids::ImageUuid;
use tokio_util::sync::CancellationToken;

use crate::config_file::Format;
use crate::error::AgentError;
use crate::limits::{CHUNK_BYTES, MAX_FILE_BYTES};
use crate::manifest::{Manifest, chunk_count, hash_chunk};
use crate::metrics::VERIFIED_BYTES;
use crate::qcow2;
use crate::sha512::Sha512;

/// Reads a whole file and tells its manifest's chunks that are wrong.
pub(crate) fn bad_chunks(
    file: &File,
    path: &Path,
    manifest: &Manifest,
    cancel: &CancellationToken,
    progress: &dyn Fn(u32),
) -> Result<Vec<u64>, AgentError> {
    let mut bad = vec![];
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    let total = manifest.chunks.len() as u64;
    for chunk in 0..total {
        if cancel.is_cancelled() {
            return Err(AgentError::Cancelled);
        }
        if !read_chunk(file, path, manifest, chunk, &mut buffer)?.is_some_and(|bytes| manifest.accepts(chunk, bytes)) {
            bad.push(chunk);
        }
        progress((chunk * 100 / total) as u32);
    }
    Ok(bad)
}

/// The bytes of one chunk; `None` when the file ends before it does.
pub(crate) fn read_chunk<'a>(
    file: &File,
    path: &Path,
    manifest: &Manifest,
    chunk: u64,
    buffer: &'a mut [u8],
) -> Result<Option<&'a [u8]>, AgentError> {
    let range = manifest.range(chunk);
    let bytes = &mut buffer[..(range.end - range.start) as usize];
    match file.read_exact_at(bytes, range.start) {
        Ok(()) => {
            VERIFIED_BYTES.add(bytes.len() as u64);
            Ok(Some(bytes))
        }
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(source) => Err(AgentError::Io { doing: "read", path: path.into(), source }),
    }
}

/// Makes the manifest of a file that has none: one that Longhorn left, or whose manifest was lost. Reads all of it.
///
/// The format is the recorded one; only when none was ever recorded the first bytes decide.
pub(crate) fn make_manifest(
    file: &File,
    path: &Path,
    uuid: &ImageUuid,
    recorded: Option<Format>,
    cancel: &CancellationToken,
    progress: &dyn Fn(u32),
) -> Result<Manifest, AgentError> {
    let size_bytes = file.metadata().map_err(AgentError::io("look at", path))?.len();
    if size_bytes == 0 {
        return Err(AgentError::Empty);
    }
    if size_bytes > MAX_FILE_BYTES {
        return Err(AgentError::TooLarge { size_bytes, limit_bytes: MAX_FILE_BYTES });
    }
    let mut context = Sha512::new();
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    let mut chunks = vec![];
    let mut format = recorded;
    let total = chunk_count(size_bytes);
    for chunk in 0..total {
        if cancel.is_cancelled() {
            return Err(AgentError::Cancelled);
        }
        let start = chunk * CHUNK_BYTES;
        let bytes = &mut buffer[..(size_bytes - start).min(CHUNK_BYTES) as usize];
        file.read_exact_at(bytes, start).map_err(AgentError::io("read", path))?;
        format = format.or(Some(if bytes.starts_with(&qcow2::MAGIC) { Format::Qcow2 } else { Format::Raw }));
        context.update(bytes);
        chunks.push(hash_chunk(bytes));
        progress((chunk * 100 / total) as u32);
    }
    let format = format.expect("there is at least one chunk");
    let virtual_size_bytes = match format {
        Format::Raw if !size_bytes.is_multiple_of(512) => return Err(AgentError::NotWholeSectors { size_bytes }),
        Format::Raw => size_bytes,
        Format::Qcow2 => qcow2::inspect(file, size_bytes).map_err(AgentError::Qcow2)?.virtual_size_bytes,
    };
    let sha512 = context.finish();
    Ok(Manifest { uuid: uuid.clone(), sha512, format, size_bytes, virtual_size_bytes, chunks })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is made of a file that nobody has described, or why it is refused.
    fn check(content: &[u8], size_bytes: u64, recorded: Option<Format>) -> Result<Manifest, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        file.as_file().set_len(size_bytes).unwrap();
        let uuid = "0a1b2c3d".parse().unwrap();
        make_manifest(file.as_file(), file.path(), &uuid, recorded, &CancellationToken::new(), &|_| ())
            .map_err(|error| error.chain())
    }

    #[test]
    fn a_file_of_somebody_else_is_judged_as_a_downloaded_one() {
        assert_eq!(check(b"x", 512, None).unwrap().virtual_size_bytes, 512);
        assert!(check(b"", 0, None).unwrap_err().contains("0 bytes are no image"));
        assert!(check(b"x", 513, None).unwrap_err().contains("multiple of 512"));
        assert!(check(b"x", MAX_FILE_BYTES + 512, None).unwrap_err().contains("that are accepted"));
        let error = check(b"QFI\xfb\0\0\0\x03", 1 << 20, None).unwrap_err();
        assert!(error.contains("the file is refused"), "{error}");
        assert!(check(b"QFI\xfb\0\0\0\x03", 1 << 20, Some(Format::Raw)).is_ok(), "it was raw from the start");
    }
}
