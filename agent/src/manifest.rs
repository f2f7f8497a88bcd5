//! `backing.chunks`: the BLAKE3 hash of every 1 MiB chunk of one image file, bound to its SHA-512.
//!
//! With it a copy can be verified in any order, by several threads, from several peers, and repaired chunk by chunk.
//! A chunk of zeros is a hole: it is never sent.
//!
//! Little-endian: magic, version (u32), chunk size (u32), file size (u64), virtual size (u64), format (u8, padded to 8),
//! image uuid (8 ASCII), SHA-512 (64), number of chunks (u64), 32 bytes for each chunk (all zero: hole), and at the end the
//! BLAKE3 hash of everything before. Files come from peers, so every length is checked before it is believed.

use std::path::Path;

use api::ids::{ImageUuid, Sha512Digest};

use crate::config_file::Format;
use crate::durable;
use crate::error::AgentError;
use crate::limits::{CHUNK_BYTES, MAX_FILE_BYTES, MAX_VIRTUAL_BYTES};

const MAGIC: &[u8; 8] = b"BIchunks";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 8 + 4 + 4 + 8 + 8 + 8 + 8 + 64 + 8;
const HASH_BYTES: usize = 32;

/// Largest manifest that can be valid.
pub const MAX_MANIFEST_BYTES: u64 =
    HEADER_BYTES as u64 + (MAX_FILE_BYTES / CHUNK_BYTES) * HASH_BYTES as u64 + HASH_BYTES as u64;

/// The hash of one chunk; `None` is a hole.
pub type ChunkHash = Option<[u8; HASH_BYTES]>;

/// Why bytes are not a manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("it is not a chunk manifest")]
    Magic,
    #[error("it has version {found}, this program reads version {VERSION}")]
    Version { found: u32 },
    #[error("it is cut or has extra bytes: {found_bytes} instead of {expected_bytes}")]
    Length { found_bytes: u64, expected_bytes: u64 },
    #[error("its own checksum does not match")]
    Checksum,
    #[error("its {field} is impossible")]
    Field { field: &'static str },
    #[error("it describes {found}, but {expected} is wanted")]
    Other { found: String, expected: String },
}

/// The chunk hashes of one image file. `chunks` has exactly one entry for each begun MiB of `size_bytes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub uuid: ImageUuid,
    pub sha512: Sha512Digest,
    pub format: Format,
    pub size_bytes: u64,
    pub virtual_size_bytes: u64,
    pub chunks: Vec<ChunkHash>,
}

impl Manifest {
    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        assert_eq!(self.chunks.len() as u64, chunk_count(self.size_bytes), "one hash for each chunk");
        let mut out = Vec::with_capacity(HEADER_BYTES + (self.chunks.len() + 1) * HASH_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(CHUNK_BYTES as u32).to_le_bytes());
        out.extend_from_slice(&self.size_bytes.to_le_bytes());
        out.extend_from_slice(&self.virtual_size_bytes.to_le_bytes());
        let format: u64 = match self.format {
            Format::Raw => 0,
            Format::Qcow2 => 1,
        };
        out.extend_from_slice(&format.to_le_bytes());
        out.extend_from_slice(self.uuid.as_str().as_bytes());
        out.extend_from_slice(&hex::decode(self.sha512.as_str()).expect("a digest is hexadecimal"));
        out.extend_from_slice(&(self.chunks.len() as u64).to_le_bytes());
        for chunk in &self.chunks {
            out.extend_from_slice(&chunk.unwrap_or_default());
        }
        let hash = blake3::hash(&out);
        out.extend_from_slice(hash.as_bytes());
        out
    }

    /// Reads the bytes of a manifest, which nobody vouches for.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        if bytes.len() < HEADER_BYTES + HASH_BYTES {
            let prefix = &bytes[..bytes.len().min(MAGIC.len())];
            return Err(if prefix == &MAGIC[..prefix.len()] {
                ManifestError::Length {
                    found_bytes: bytes.len() as u64,
                    expected_bytes: (HEADER_BYTES + HASH_BYTES) as u64,
                }
            } else {
                ManifestError::Magic
            });
        }
        let mut fields = Fields(bytes);
        if fields.take::<8>() != *MAGIC {
            return Err(ManifestError::Magic);
        }
        let version = u32::from_le_bytes(fields.take());
        if version != VERSION {
            return Err(ManifestError::Version { found: version });
        }
        if u64::from(u32::from_le_bytes(fields.take())) != CHUNK_BYTES {
            return Err(ManifestError::Field { field: "chunk size" });
        }
        let size_bytes = u64::from_le_bytes(fields.take());
        if size_bytes == 0 || size_bytes > MAX_FILE_BYTES {
            return Err(ManifestError::Field { field: "file size" });
        }
        let virtual_size_bytes = u64::from_le_bytes(fields.take());
        if virtual_size_bytes == 0 || virtual_size_bytes > MAX_VIRTUAL_BYTES {
            return Err(ManifestError::Field { field: "virtual size" });
        }
        let format = match u64::from_le_bytes(fields.take()) {
            0 => Format::Raw,
            1 => Format::Qcow2,
            _ => return Err(ManifestError::Field { field: "format" }),
        };
        let uuid = std::str::from_utf8(&fields.take::<8>())
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or(ManifestError::Field { field: "image uuid" })?;
        let sha512 = hex::encode(fields.take::<64>()).parse().expect("64 bytes are 128 hexadecimal digits");
        let count = u64::from_le_bytes(fields.take());
        if count != chunk_count(size_bytes) {
            return Err(ManifestError::Field { field: "number of chunks" });
        }
        let expected_bytes = HEADER_BYTES as u64 + (count + 1) * HASH_BYTES as u64;
        if bytes.len() as u64 != expected_bytes {
            return Err(ManifestError::Length { found_bytes: bytes.len() as u64, expected_bytes });
        }
        let (content, hash) = bytes.split_at(bytes.len() - HASH_BYTES);
        if blake3::hash(content).as_bytes() != hash {
            return Err(ManifestError::Checksum);
        }
        let chunks = content[HEADER_BYTES..]
            .chunks_exact(HASH_BYTES)
            .map(|hash| {
                Some(<[u8; HASH_BYTES]>::try_from(hash).expect("exact chunks")).filter(|h| *h != [0; HASH_BYTES])
            })
            .collect();
        Ok(Manifest { uuid, sha512, format, size_bytes, virtual_size_bytes, chunks })
    }

    /// Reads a manifest of ours from the disk; `None` when there is none.
    pub fn read(path: &Path) -> Result<Option<Manifest>, AgentError> {
        let bytes = match std::fs::metadata(path) {
            Ok(metadata) if metadata.len() > MAX_MANIFEST_BYTES => {
                return Err(AgentError::Manifest { file: path.display().to_string(), source: ManifestError::Magic });
            }
            Ok(_) => std::fs::read(path).map_err(AgentError::io("read", path))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(AgentError::Io { doing: "read", path: path.into(), source }),
        };
        Manifest::decode(&bytes)
            .map(Some)
            .map_err(|source| AgentError::Manifest { file: path.display().to_string(), source })
    }

    /// Writes it durably.
    pub fn write(&self, path: &Path) -> Result<(), AgentError> {
        durable::write(path, &self.encode())
    }

    /// Where a chunk lies in the file.
    pub fn range(&self, chunk: u64) -> std::ops::Range<u64> {
        let start = chunk * CHUNK_BYTES;
        start..(start + CHUNK_BYTES).min(self.size_bytes)
    }

    /// Whether the bytes of a chunk are the right ones.
    pub fn accepts(&self, chunk: u64, bytes: &[u8]) -> bool {
        let range = self.range(chunk);
        bytes.len() as u64 == range.end - range.start && hash_chunk(bytes) == self.chunks[chunk as usize]
    }

    /// Bytes in chunks that are no holes.
    pub fn data_bytes(&self) -> u64 {
        self.bytes_of((0..self.chunks.len() as u64).filter(|c| self.chunks[*c as usize].is_some()))
    }

    /// Bytes in these chunks.
    pub fn bytes_of(&self, chunks: impl IntoIterator<Item = u64>) -> u64 {
        chunks.into_iter().map(|chunk| self.range(chunk)).map(|range| range.end - range.start).sum()
    }
}

/// The hash of a chunk's bytes, or a hole when they are all zero.
pub fn hash_chunk(bytes: &[u8]) -> ChunkHash {
    if crate::sparse::is_zero(bytes) { None } else { Some(*blake3::hash(bytes).as_bytes()) }
}

/// Chunks of a file of that size.
pub fn chunk_count(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(CHUNK_BYTES)
}

/// Fixed-size fields off the front; the caller has checked the length.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk::<N>().expect("the length of the header was checked");
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(size_bytes: u64) -> Manifest {
        let chunks = (0..chunk_count(size_bytes)).map(|c| (c % 3 != 1).then_some([c as u8 + 1; 32])).collect();
        Manifest {
            uuid: "0a1b2c3d".parse().unwrap(),
            sha512: "5".repeat(128).parse().unwrap(),
            format: Format::Qcow2,
            size_bytes,
            virtual_size_bytes: 1 << 30,
            chunks,
        }
    }

    #[test]
    fn reads_what_it_wrote() {
        for size in [1, 512, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 7 * CHUNK_BYTES + 3] {
            let manifest = sample(size);
            assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
        }
    }

    #[test]
    fn a_changed_bit_anywhere_is_noticed() {
        let bytes = sample(3 * CHUNK_BYTES).encode();
        for position in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[position] ^= 1;
            assert!(Manifest::decode(&changed).is_err(), "byte {position}");
        }
    }

    /// Peers make their checksums themselves, so every field is judged although the checksum is right.
    #[test]
    fn every_field_is_judged() {
        let sealed = |position: usize, change: &[u8], more: usize| {
            let mut bytes = sample(3 * CHUNK_BYTES).encode();
            bytes.truncate(bytes.len() - HASH_BYTES);
            bytes[position..position + change.len()].copy_from_slice(change);
            bytes.resize(bytes.len() + more, 0);
            let hash = blake3::hash(&bytes);
            bytes.extend_from_slice(hash.as_bytes());
            Manifest::decode(&bytes)
        };
        assert!(sealed(0, &[], 0).is_ok());
        assert_eq!(sealed(0, b"X", 0), Err(ManifestError::Magic));
        let cases: [(usize, &[u8], &str); 9] = [
            (12, &(CHUNK_BYTES as u32 * 2).to_le_bytes(), "chunk size"),
            (16, &0u64.to_le_bytes(), "file size"),
            (16, &(MAX_FILE_BYTES + 1).to_le_bytes(), "file size"),
            (24, &0u64.to_le_bytes(), "virtual size"),
            (24, &(MAX_VIRTUAL_BYTES + 1).to_le_bytes(), "virtual size"),
            (32, &2u64.to_le_bytes(), "format"),
            (40, b"../../..", "image uuid"),
            (112, &4u64.to_le_bytes(), "number of chunks"),
            (112, &u64::MAX.to_le_bytes(), "number of chunks"),
        ];
        for (position, change, field) in cases {
            assert_eq!(sealed(position, change, 0), Err(ManifestError::Field { field }), "{position}");
        }
        assert!(matches!(sealed(0, &[], 1), Err(ManifestError::Length { .. })));
    }

    #[test]
    fn a_file_that_is_too_large_to_be_one_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backing.chunks");
        std::fs::write(&path, b"BIchunks").unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(MAX_MANIFEST_BYTES + 1).unwrap();
        let error = Manifest::read(&path).unwrap_err();
        assert!(matches!(error, AgentError::Manifest { source: ManifestError::Magic, .. }), "{error}");
    }

    #[test]
    fn a_chunk_of_zeros_has_its_length_too() {
        let manifest = sample(3 * CHUNK_BYTES);
        assert!(manifest.accepts(1, &vec![0; CHUNK_BYTES as usize]));
        assert!(!manifest.accepts(1, &[0; 512]));
    }

    #[test]
    fn a_cut_one_is_noticed() {
        let bytes = sample(3 * CHUNK_BYTES).encode();
        for length in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_newer_version_is_named() {
        let mut bytes = sample(1).encode();
        bytes[8] = 2;
        assert_eq!(Manifest::decode(&bytes), Err(ManifestError::Version { found: 2 }));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = Manifest::decode(&bytes);
        }

        /// Behind a valid beginning, and with a valid checksum, so that the later checks are reached.
        #[test]
        fn arbitrary_fields_never_panic(
            position in 8usize..300, value in any::<u64>(), size in 1u64..(4 * CHUNK_BYTES),
        ) {
            let mut bytes = sample(size).encode();
            let end = bytes.len() - HASH_BYTES;
            let position = position.min(end - 8);
            bytes[position..position + 8].copy_from_slice(&value.to_le_bytes());
            let hash = blake3::hash(&bytes[..end]);
            bytes[end..].copy_from_slice(hash.as_bytes());
            let _ = Manifest::decode(&bytes);
        }
    }
}
