//! Reading ready copies again to find silent damage, and repair of damage where it lies.
//!
//! A copy stays ready while it is read, and it is used meanwhile. What is found bad is written right in place: replicas over the
//! copy have the file open, and see the right bytes at once. A torn repair leaves what was there before, a bad chunk.

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::image::CopyState;
use jiff::Timestamp;
use rustix::fs::{Advice, fadvise};
use tokio_util::sync::CancellationToken;

use super::adopt::{changed_at, forget_time};
use super::registry::{Copy, Registry};
use crate::config_file::FileConfig;
use crate::error::{AgentError, blocking, chain};
use crate::layout::{FileSet, ImageKey};
use crate::limits::{CHUNK_BYTES, MAX_REPAIRED_CHUNKS};
use crate::manifest::Manifest;
use crate::peer::{Peer, PeerError};
use crate::seal::describe;
use crate::sparse;
use crate::sync::{Pull, Step};
use crate::verify::read_chunk;

/// A copy that is changed while it is read is read again, so often at the most.
const READINGS: u32 = 5;

/// A slow reading looks this often whether it shall end.
const PAUSE_STEP: Duration = Duration::from_millis(50);

/// How to read a copy again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Verification {
    /// The wish that it answers.
    pub requested_at: Option<Timestamp>,
    /// `u64::MAX`: as fast as the disk can.
    pub bytes_per_second: u64,
}

impl Verification {
    /// At once, because of something that was seen here.
    pub const FAST: Verification = Verification { requested_at: None, bytes_per_second: u64::MAX };

    pub fn parse(requested_at: &str, bytes_per_second: i64) -> Result<Verification, AgentError> {
        let requested_at = match requested_at {
            "" => None,
            text => Some(text.parse().map_err(|_| AgentError::Invalid {
                message: format!("`requested_at` is `{text}`: give a time like 2026-01-02T03:04:05Z"),
            })?),
        };
        let bytes_per_second = match bytes_per_second {
            0 => u64::MAX,
            n => u64::try_from(n)
                .map_err(|_| AgentError::Invalid { message: format!("`bytes_per_second` is {n}: give 0 or more") })?,
        };
        Ok(Verification { requested_at, bytes_per_second })
    }

    fn is_slow(&self) -> bool {
        self.bytes_per_second != u64::MAX
    }

    /// Waits as long as one chunk takes at this speed.
    fn pause(&self, cancel: &CancellationToken) {
        if self.is_slow() {
            let end = Instant::now() + Duration::from_secs_f64(CHUNK_BYTES as f64 / self.bytes_per_second as f64);
            while let Some(rest) = end.checked_duration_since(Instant::now()).filter(|_| !cancel.is_cancelled()) {
                std::thread::sleep(rest.min(PAUSE_STEP));
            }
        }
    }
}

impl Registry {
    /// Begins to read a ready copy and to compare it with its manifest.
    pub async fn verify(self: &Arc<Self>, key: ImageKey, wish: Verification) -> Result<Copy, AgentError> {
        let _turn = self.lock(&key).await;
        let copy = self.known(&key)?;
        if copy.state != CopyState::Ready {
            let message = format!("`{key}` is `{}`: only a ready copy can be verified", copy.state.as_str());
            return Err(AgentError::NotReady { message });
        }
        if self.pace(&key).is_some_and(|pace| pace >= wish.bytes_per_second) {
            return Ok(copy);
        }
        let (registry, own) = (self.clone(), key.clone());
        self.start_at_pace(&key, wish.bytes_per_second, |cancel| {
            self.tracker.clone().spawn(async move {
                let slots = if wish.is_slow() { &registry.scrubs } else { &registry.verifications };
                let turn = tokio::select! {
                    turn = slots.acquire() => turn,
                    () = cancel.cancelled() => return,
                };
                let Ok(_turn) = turn else { return };
                registry.verify_now(&own, wish, &cancel).await;
            })
        });
        Ok(copy)
    }

    async fn verify_now(self: &Arc<Self>, key: &ImageKey, wish: Verification, cancel: &CancellationToken) {
        for _ in 0..READINGS {
            let began = wish.requested_at.into_iter().chain([Timestamp::now()]).max().unwrap_or_default();
            let (files, stop, own) = (self.disk.copy(key), cancel.clone(), key.clone());
            let verdict = blocking(move || read_again(&files, &own, began, &stop, &|| wish.pause(&stop))).await;
            match verdict {
                Ok(Some(config)) => {
                    tracing::info!(image = %key, "copy verified");
                    return self.change(key, |copy| {
                        copy.verified_at = config.verified_at;
                        copy.damage = config.damage;
                    });
                }
                Ok(None) => {
                    tracing::warn!(image = %key, "copy was changed while it was verified");
                    // Another time is judged there. Where it was put back, what was read tells nothing: once more.
                    self.recheck(key).await;
                    if self.get(key).is_none_or(|copy| copy.state != CopyState::Ready) {
                        return;
                    }
                }
                Err(AgentError::Cancelled) => return,
                Err(error) => {
                    tracing::error!(image = %key, error = error.chain(), "copy is damaged");
                    return self.change(key, |copy| copy.fail(&error));
                }
            }
        }
    }

    /// Writes the right bytes over the bad chunks of a copy, from peers. `None`: this copy cannot be repaired where it lies.
    pub async fn repair(
        &self,
        what: &Pull,
        report: &(dyn Fn(Step) + Send + Sync),
        cancel: &CancellationToken,
    ) -> Option<Result<FileConfig, AgentError>> {
        let (files, key, stop) = (what.files.clone(), what.key.clone(), cancel.clone());
        let found = blocking(move || find_damage(&files, &key, &stop)).await;
        let (file, manifest, config, bad) = match found {
            Ok(Some(found)) => found,
            Ok(None) => return None,
            Err(AgentError::Cancelled) => return Some(Err(AgentError::Cancelled)),
            Err(error) => {
                tracing::warn!(image = %what.key, error = error.chain(), "copy cannot be repaired, it is made anew");
                return None;
            }
        };
        let fits = what.size_bytes.is_none_or(|size| size == manifest.size_bytes)
            && what.sha512.as_ref().is_none_or(|sha512| *sha512 == manifest.sha512);
        if !fits || bad.len() > MAX_REPAIRED_CHUNKS {
            return None;
        }
        let (file, manifest) = (Arc::new(file), Arc::new(manifest));
        report(Step::Begun(manifest.clone()));
        let mut givers = vec![];
        for chunk in &bad {
            match give(what, &manifest, &file, *chunk, cancel).await {
                Ok(ControlFlow::Continue(giver)) if givers.contains(&giver) => {}
                Ok(ControlFlow::Continue(giver)) => givers.push(giver),
                // A disk that cannot even be written to here may have another place for the file.
                Ok(ControlFlow::Break(())) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
        let (files, total) = (what.files.clone(), manifest.chunks.len());
        let now = Timestamp::now();
        let damage = bad.first().map(|first| {
            format!(
                "at {now:.0} {} of {total} chunks differed from the manifest, the first was chunk {first}; repaired from {}",
                bad.len(),
                givers.join(", ")
            )
        });
        let done = blocking(move || {
            file.set_permissions(PermissionsExt::from_mode(0o444))
                .map_err(AgentError::io("make read-only", &files.file))?;
            file.sync_all().map_err(AgentError::io("sync", &files.file))?;
            let config = FileConfig {
                verified_at: format!("{now:.0}"),
                damage: damage.unwrap_or(config.damage),
                ..describe(&file, &files.file, &manifest, &config.expected_checksum)?
            };
            config.write(&files.config)?;
            Ok(config)
        });
        let done = done.await;
        if let Ok(config) = &done {
            tracing::warn!(image = %what.key, damage = config.damage, "copy repaired");
        }
        Some(done)
    }
}

/// Reads a ready copy, with a pause after each chunk; records when it was right. `None`: it changed meanwhile.
fn read_again(
    files: &FileSet,
    key: &ImageKey,
    began: Timestamp,
    cancel: &CancellationToken,
    pause: &dyn Fn(),
) -> Result<Option<FileConfig>, AgentError> {
    let Some(manifest) = Manifest::read(&files.manifest)?.filter(|manifest| manifest.uuid == key.uuid) else {
        return Err(AgentError::NotFound { message: format!("the manifest `{}` is gone", files.manifest.display()) });
    };
    let file = File::open(&files.file).map_err(AgentError::io("open", &files.file))?;
    let metadata = file.metadata().map_err(AgentError::io("look at", &files.file))?;
    let bad = bad_chunks(&file, &files.file, &manifest, cancel, pause)?;
    let after = file.metadata().map_err(AgentError::io("look at", &files.file))?;
    let Some(config) = FileConfig::read(&files.config).filter(|config| config.matches(&after)) else { return Ok(None) };
    if changed_at(&metadata) != changed_at(&after) {
        return Ok(None);
    }
    if let Some(first) = bad.first() {
        forget_time(files, config);
        return Err(AgentError::Damaged { bad: bad.len() as u64, total: manifest.chunks.len() as u64, first: *first });
    }
    let config = FileConfig { verified_at: began.to_string(), ..config };
    config.write(&files.config)?;
    Ok(Some(config))
}

/// Opens a damaged copy to write to it, and finds what is wrong. `None` when it is not sure what it should be.
#[expect(clippy::type_complexity, reason = "four things that are found together, used once")]
fn find_damage(
    files: &FileSet,
    key: &ImageKey,
    cancel: &CancellationToken,
) -> Result<Option<(File, Manifest, FileConfig, Vec<u64>)>, AgentError> {
    if !files.file.exists() || files.partial.exists() {
        return Ok(None);
    }
    let Some(manifest) = Manifest::read(&files.manifest)?.filter(|manifest| manifest.uuid == key.uuid) else {
        return Ok(None);
    };
    let config = FileConfig::read(&files.config).unwrap_or_default();
    let file = File::options().read(true).write(true).open(&files.file).map_err(AgentError::io("open", &files.file))?;
    if file.metadata().map_err(AgentError::io("look at", &files.file))?.len() != manifest.size_bytes {
        return Ok(None);
    }
    let bad = bad_chunks(&file, &files.file, &manifest, cancel, &|| ())?;
    Ok(Some((file, manifest, config, bad)))
}

/// The chunks whose bytes on the disk, not those in memory, are wrong. One that cannot be read is wrong.
fn bad_chunks(
    file: &File,
    path: &Path,
    manifest: &Manifest,
    cancel: &CancellationToken,
    pause: &dyn Fn(),
) -> Result<Vec<u64>, AgentError> {
    let mut bad = vec![];
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    for chunk in 0..manifest.chunks.len() as u64 {
        if cancel.is_cancelled() {
            return Err(AgentError::Cancelled);
        }
        let range = manifest.range(chunk);
        // Where that is not possible the bytes may come from memory.
        let _ = fadvise(file, range.start, std::num::NonZeroU64::new(CHUNK_BYTES), Advice::DontNeed);
        let bytes = read_chunk(file, path, manifest, chunk, &mut buffer);
        if !matches!(bytes, Ok(Some(bytes)) if manifest.accepts(chunk, bytes)) {
            crate::metrics::BAD_CHUNKS.add(1);
            bad.push(chunk);
        }
        pause();
    }
    Ok(bad)
}

/// Writes one chunk as the first peer gives it that has it right; returns who that was, or that it cannot be written.
async fn give(
    what: &Pull,
    manifest: &Arc<Manifest>,
    file: &Arc<File>,
    chunk: u64,
    cancel: &CancellationToken,
) -> Result<ControlFlow<(), String>, AgentError> {
    let range = manifest.range(chunk);
    let mut reasons = vec![];
    for peer in &what.peers {
        let asked = ask(peer, &what.key, range.clone());
        let Some(answer) = cancel.run_until_cancelled(asked).await else { return Err(AgentError::Cancelled) };
        let problem = match answer {
            Ok(bytes) if manifest.accepts(chunk, &bytes) => {
                let (file, start) = (file.clone(), range.start);
                let written = blocking(move || {
                    sparse::write_at(&file, start, &bytes, true).map_err(AgentError::io("write", "the copy"))
                });
                return Ok(match written.await {
                    Ok(()) => ControlFlow::Continue(peer.address().to_string()),
                    Err(error) => {
                        tracing::warn!(image = %what.key, chunk, error = error.chain(), "chunk cannot be repaired");
                        ControlFlow::Break(())
                    }
                });
            }
            Ok(_) => "it has the wrong BLAKE3 hash there too".to_owned(),
            Err(problem) => chain(&problem),
        };
        reasons.push(format!("{}: {problem}", peer.address()));
    }
    if manifest.chunks[chunk as usize].is_none() {
        // Zeros need nobody.
        let (file, length) = (file.clone(), range.end - range.start);
        blocking(move || {
            sparse::punch_hole(&file, range.start, length).map_err(AgentError::io("make a hole in", "the copy"))
        })
        .await?;
        return Ok(ControlFlow::Continue("its manifest".to_owned()));
    }
    Err(AgentError::ChunkBadEverywhere { chunk, peers: reasons.join("; ") })
}

async fn ask(peer: &Peer, key: &ImageKey, range: Range<u64>) -> Result<Vec<u8>, PeerError> {
    let mut connection = peer.connect().await?;
    // Ends the reading when nobody waits for it any more.
    let _hang_up = connection.hang_up()?;
    let key = key.clone();
    let work = blocking(move || {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        Ok(connection.ask(&key, &range).and_then(|()| connection.read_exact(&mut bytes)).map(|()| bytes))
    });
    work.await.map_err(|error| PeerError::Transfer(chain(&error)))?
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::super::tests::{key, sealed, touch};
    use super::*;

    #[test]
    fn a_copy_that_changes_while_it_is_read_is_neither_right_nor_damaged() {
        let (_folder, files) = sealed();
        let cancel = CancellationToken::new();
        let read = |pause: &dyn Fn()| read_again(&files, &key(), Timestamp::now(), &cancel, pause);
        let recorded = files.file.metadata().unwrap().modified().unwrap();
        assert!(read(&|| touch(&files, SystemTime::now())).unwrap().is_none());
        assert!(read(&|| ()).unwrap().is_none(), "it is not the file that was recorded");
        // As it was recorded in the end only: nobody knows what the first bytes were.
        assert!(read(&|| touch(&files, recorded)).unwrap().is_none());
        assert!(read(&|| ()).unwrap().is_some_and(|config| !config.verified_at.is_empty()));
        assert!(matches!(read(&|| cancel.cancel()), Err(AgentError::Cancelled)));
    }
}
