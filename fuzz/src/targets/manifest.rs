//! Chunk manifests, which come from peers.

use agent::limits::{CHUNK_BYTES, MAX_FILE_BYTES, MAX_VIRTUAL_BYTES};
use agent::manifest::{Manifest, chunk_count};

fn check(bytes: &[u8]) {
    let Ok(manifest) = Manifest::decode(bytes) else { return };
    assert_eq!(manifest.chunks.len() as u64, chunk_count(manifest.size_bytes));
    assert!((1..=MAX_FILE_BYTES).contains(&manifest.size_bytes));
    assert!((1..=MAX_VIRTUAL_BYTES).contains(&manifest.virtual_size_bytes));
    assert!(manifest.data_bytes() <= manifest.size_bytes);
    let last = manifest.range(manifest.chunks.len() as u64 - 1);
    assert!(last.end == manifest.size_bytes && last.start < last.end && last.end - last.start <= CHUNK_BYTES);
    assert!(!manifest.accepts(0, &[]), "no bytes are no chunk");
    assert_eq!(manifest.encode(), bytes, "there is one way to write a manifest");
}

/// [`Manifest::decode`] on bytes as they are, and with the checksum that they should have: else nothing gets behind that check.
pub fn manifest(data: &[u8]) {
    check(data);
    check(&[data, blake3::hash(data).as_bytes()].concat());
}
