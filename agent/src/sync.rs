//! A further copy of an image, from any number of peers at once, verified chunk by chunk.
//!
//! The manifest of a ready peer says what is right. Chunks that are on this disk already and match (from an interrupted
//! sync, or in a damaged copy) are kept; holes stay holes; the rest is fetched in small ranges by workers that take from one
//! queue, so a fast peer does more. A chunk that does not match is fetched from another peer; a peer that keeps failing is
//! dropped. Since every chunk is verified, no pass over the whole file is needed at the end.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use api::ErrorKind;
use api::ids::Sha512Digest;
use tokio_util::sync::CancellationToken;

use crate::config_file::FileConfig;
use crate::direct::DirectFile;
use crate::durable;
use crate::error::{AgentError, blocking, chain};
use crate::layout::{FileSet, ImageKey};
use crate::limits::{CHUNK_BYTES, MAX_PEERS};
use crate::manifest::{Manifest, ManifestError};
use crate::peer::Peer;
use crate::seal::seal;
use crate::sparse;
use crate::verify::{make_manifest, read_chunk};

mod fetch;

/// What to receive.
#[derive(Clone, Debug)]
pub struct Pull {
    pub key: ImageKey,
    pub files: FileSet,
    pub peers: Vec<Peer>,
    /// Size that the copy must have, when known.
    pub size_bytes: Option<u64>,
    /// SHA-512 that the copy must have, when known.
    pub sha512: Option<Sha512Digest>,
    /// Written into `backing.cfg`.
    pub expected_checksum: String,
}

/// Where a sync stands.
#[derive(Clone, Debug)]
pub enum Step {
    /// The manifest is known.
    Begun(Arc<Manifest>),
    /// Percent of the bytes that are data.
    Progress(u32),
}

pub(crate) type Report = Arc<dyn Fn(Step) + Send + Sync>;

/// Receives a copy. On failure the partial file stays for the next try, except when the disk is full.
pub(crate) async fn pull(what: Pull, report: Report, cancel: CancellationToken) -> Result<FileConfig, AgentError> {
    let mut what = what;
    what.peers.truncate(MAX_PEERS);
    let offers = tokio::select! {
        found = offers(&what) => found?,
        () = cancel.cancelled() => return Err(AgentError::Cancelled),
    };
    // When peers contradict each other one of them is wrong, and only the SHA-512 tells which.
    let is_disputed = offers.len() > 1;
    let mut reasons = vec![];
    for (manifest, peers) in offers {
        let addresses = peers.iter().map(|peer| peer.address().to_string()).collect::<Vec<_>>().join(",");
        match receive(&what, manifest, peers, is_disputed, &report, &cancel).await {
            Err(error) if error.kind() == ErrorKind::Exhausted => return make_room(&what.files).and(Err(error)),
            Err(error) if is_disputed && !matches!(error, AgentError::Cancelled) => {
                tracing::warn!(image = %what.key, peers = addresses, error = error.chain(), "peers cannot help");
                reasons.push(format!("{addresses}: {}", error.chain()));
            }
            done => return done,
        }
    }
    Err(AgentError::NoPeer { reasons: reasons.join("; ") })
}

/// Receives the file that a manifest describes, from peers that have this manifest.
async fn receive(
    what: &Pull,
    manifest: Manifest,
    peers: Vec<Peer>,
    is_disputed: bool,
    report: &Report,
    cancel: &CancellationToken,
) -> Result<FileConfig, AgentError> {
    let manifest = Arc::new(manifest);
    report(Step::Begun(manifest.clone()));
    let (files, wanted, stop) = (what.files.clone(), manifest.clone(), cancel.clone());
    let (file, missing) = blocking(move || prepare(&files, &wanted, &stop)).await?;
    let file = Arc::new(DirectFile::new(file, &what.files.partial));
    if !missing.is_empty() {
        let missing_bytes = manifest.bytes_of(missing.iter().copied());
        tracing::info!(image = %what.key, peers = peers.len(), missing_bytes, "fetching chunks");
        fetch::all(what, peers, &manifest, &file, missing, report, cancel).await?;
    }
    let (files, expected, stop) = (what.files.clone(), what.expected_checksum.clone(), cancel.clone());
    blocking(move || {
        if is_disputed {
            let made =
                make_manifest(file.file(), &files.partial, &manifest.uuid, Some(manifest.format), &stop, &|_| ())?;
            if made.sha512 != manifest.sha512 {
                return Err(AgentError::Checksum {
                    expected: manifest.sha512.to_string(),
                    actual: made.sha512.to_string(),
                    note: ": the manifest of these peers does not describe the file that it names".into(),
                });
            }
        }
        seal(file.file(), &files.partial, &files, &manifest, &expected)
    })
    .await
}

/// A part would keep a disk full that has no room for the rest. The manifest of a file that is not there goes with it.
fn make_room(files: &FileSet) -> Result<(), AgentError> {
    durable::remove_file(&files.partial)?;
    if !files.file.exists() {
        durable::remove_file(&files.manifest)?;
    }
    Ok(())
}

/// Asks all peers for the manifest: those that fit the request, in the order of the peers, each with the peers that have it.
async fn offers(what: &Pull) -> Result<Vec<(Manifest, Vec<Peer>)>, AgentError> {
    let answers = futures::future::join_all(what.peers.iter().map(|peer| peer.manifest(&what.key))).await;
    let mut offers: Vec<(Manifest, Vec<Peer>)> = vec![];
    let mut reasons = vec![];
    for (peer, answer) in what.peers.iter().zip(answers) {
        let fitting = answer.map_err(|error| chain(&error));
        match fitting.and_then(|manifest| check(what, &manifest).map(|()| manifest).map_err(|error| error.to_string()))
        {
            Ok(manifest) => match offers.iter_mut().find(|(other, _)| *other == manifest) {
                Some((_, peers)) => peers.push(peer.clone()),
                None => offers.push((manifest, vec![peer.clone()])),
            },
            Err(problem) => {
                tracing::warn!(image = %what.key, peer = %peer.address(), problem, "peer cannot help");
                reasons.push(format!("{}: {problem}", peer.address()));
            }
        }
    }
    if offers.is_empty() {
        return Err(AgentError::NoPeer { reasons: reasons.join("; ") });
    }
    if offers.len() > 1 {
        tracing::warn!(image = %what.key, manifests = offers.len(), "peers contradict each other; the SHA-512 will tell");
    }
    Ok(offers)
}

fn check(what: &Pull, manifest: &Manifest) -> Result<(), ManifestError> {
    let other = |name: &str, found: String, expected: String| {
        Err(ManifestError::Other { found: format!("{name} {found}"), expected })
    };
    if manifest.uuid != what.key.uuid {
        return other("the image with uuid", manifest.uuid.to_string(), what.key.uuid.to_string());
    }
    if let Some(size) = what.size_bytes.filter(|size| *size != manifest.size_bytes) {
        return other("a file of size", manifest.size_bytes.to_string(), size.to_string());
    }
    if let Some(sha512) = what.sha512.as_ref().filter(|digest| **digest != manifest.sha512) {
        return other("a file with SHA-512", manifest.sha512.to_string(), sha512.to_string());
    }
    Ok(())
}

/// Opens the partial file, keeps what is right in it, takes good chunks over from a damaged copy, makes the holes, and takes
/// room for the rest. Returns the chunks to fetch.
fn prepare(files: &FileSet, manifest: &Manifest, cancel: &CancellationToken) -> Result<(File, Vec<u64>), AgentError> {
    let partial = &files.partial;
    durable::create_dir(partial.parent().unwrap_or(Path::new("/")))?;
    let resumed = partial.exists();
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(partial)
        .map_err(AgentError::io("open", partial))?;
    file.set_len(manifest.size_bytes).map_err(AgentError::io("set the length of", partial))?;
    let damaged = File::open(&files.file).ok();

    let mut missing = vec![];
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    for chunk in 0..manifest.chunks.len() as u64 {
        if cancel.is_cancelled() {
            return Err(AgentError::Cancelled);
        }
        let range = manifest.range(chunk);
        if manifest.chunks[chunk as usize].is_none() {
            if resumed {
                sparse::punch_hole(&file, range.start, range.end - range.start)
                    .map_err(AgentError::io("make a hole in", partial))?;
            }
            continue;
        }
        if resumed
            && read_chunk(&file, partial, manifest, chunk, &mut buffer)?.is_some_and(|b| manifest.accepts(chunk, b))
        {
            continue;
        }
        if let Some(damaged) = &damaged
            // A chunk that cannot be read from a damaged copy is as bad as a wrong one.
            && let Ok(Some(bytes)) = read_chunk(damaged, &files.file, manifest, chunk, &mut buffer)
            && manifest.accepts(chunk, bytes)
        {
            sparse::write_at(&file, range.start, bytes, true).map_err(AgentError::io("write", partial))?;
            continue;
        }
        missing.push(chunk);
    }
    reserve(&file, partial, manifest, &missing)?;
    Ok((file, missing))
}

fn reserve(file: &File, path: &Path, manifest: &Manifest, missing: &[u64]) -> Result<(), AgentError> {
    let needed_bytes = manifest.bytes_of(missing.iter().copied());
    for run in runs(missing, usize::MAX) {
        let (start, end) = (manifest.range(run.start).start, manifest.range(run.end - 1).end);
        let is_reserved = sparse::reserve(file, path, start, end - start).map_err(|error| match error {
            AgentError::NoSpace { path, free_bytes, .. } => AgentError::NoSpace { path, free_bytes, needed_bytes },
            other => other,
        })?;
        if !is_reserved {
            return sparse::check_free(path, needed_bytes);
        }
    }
    Ok(())
}

/// Neighboring chunks as ranges of at most so many.
fn runs(chunks: &[u64], limit: usize) -> Vec<std::ops::Range<u64>> {
    let mut runs: Vec<std::ops::Range<u64>> = vec![];
    for chunk in chunks {
        match runs.last_mut() {
            Some(run) if run.end == *chunk && run.end - run.start < limit as u64 => run.end += 1,
            _ => runs.push(*chunk..chunk + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_prepared_for_what_was_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let key = ImageKey::parse("parrot", "0a1b2c3d").unwrap();
        let files = crate::layout::Disk::new(folder.path()).copy(&key);
        let manifest = Manifest {
            uuid: key.uuid,
            sha512: "a".repeat(128).parse().unwrap(),
            format: crate::config_file::Format::Raw,
            size_bytes: CHUNK_BYTES,
            virtual_size_bytes: CHUNK_BYTES,
            chunks: vec![None],
        };
        let cancel = CancellationToken::new();
        assert!(prepare(&files, &manifest, &cancel).is_ok());
        cancel.cancel();
        assert!(matches!(prepare(&files, &manifest, &cancel), Err(AgentError::Cancelled)));
    }

    #[test]
    fn neighbors_are_fetched_together_up_to_the_limit() {
        assert_eq!(runs(&[], 8), []);
        assert_eq!(runs(&[0, 1, 2, 5, 7, 8], 8), [0..3, 5..6, 7..9]);
        assert_eq!(runs(&[0, 1, 2, 3, 4], 2), [0..2, 2..4, 4..5]);
    }
}
