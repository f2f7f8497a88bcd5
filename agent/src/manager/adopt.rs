//! What lies on the disk: taken as it is when it is unchanged, verified when it is not.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::SystemTime;

use api::ErrorKind;
use api::image::CopyState;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::registry::{Copy, Registry};
use crate::config_file::{FileConfig, Format};
use crate::error::{AgentError, blocking};
use crate::layout::{FileSet, ImageKey};
use crate::manifest::Manifest;
use crate::seal::describe;
use crate::verify;

/// What was found of a copy.
pub(super) enum Found {
    /// No whole file, perhaps a part of one.
    Nothing,
    /// Size, time and manifest are as recorded.
    Unchanged(FileConfig),
    /// It must be read to know.
    Doubtful(Doubt),
    /// It cannot be used.
    Useless(AgentError),
}

/// What a file can be verified against.
#[derive(Clone)]
pub(super) struct Doubt {
    config: FileConfig,
    /// `None`: only the recorded SHA-512 can tell (a file of Longhorn's, or a lost manifest).
    manifest: Option<Manifest>,
}

/// Looks at the files of a copy without reading the copy.
pub(super) fn look(files: &FileSet, key: &ImageKey) -> Result<Found, AgentError> {
    let metadata = match files.file.metadata() {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(source) => return Err(AgentError::Io { doing: "look at", path: files.file.clone(), source }),
    };
    let config = FileConfig::read(&files.config).filter(|config| config.uuid == key.uuid.as_str());
    let manifest = match Manifest::read(&files.manifest) {
        Ok(manifest) => manifest.filter(|manifest| manifest.uuid == key.uuid),
        Err(error) => {
            tracing::warn!(image = %key, error = error.chain(), "manifest lost");
            None
        }
    };
    Ok(match (config, manifest) {
        (Some(config), Some(manifest))
            if config.matches(&metadata)
                && config.current_checksum == manifest.sha512.as_str()
                && config.size == manifest.size_bytes
                && config.format == manifest.format.as_str() =>
        {
            Found::Unchanged(config)
        }
        (config, Some(manifest)) => {
            Found::Doubtful(Doubt { config: config.unwrap_or_default(), manifest: Some(manifest) })
        }
        (Some(config), None) if !config.current_checksum.is_empty() || !config.expected_checksum.is_empty() => {
            Found::Doubtful(Doubt { config, manifest: None })
        }
        (_, None) => Found::Useless(AgentError::NotReady {
            message: "neither `backing.cfg` nor `backing.chunks` says what this file should be: \
                      delete the copy, or sync it again"
                .into(),
        }),
    })
}

impl Doubt {
    fn copy(&self) -> Copy {
        Copy {
            state: CopyState::Unknown,
            message: "the file was changed or has no manifest; it is being verified".into(),
            sending: 0,
            progress: 0,
            ..Copy::ready(&self.config)
        }
    }

    /// Reads the whole file, and records it afresh when it is right.
    fn verify(
        self,
        files: &FileSet,
        key: &ImageKey,
        cancel: &CancellationToken,
        progress: &dyn Fn(u32),
    ) -> Result<FileConfig, AgentError> {
        let config = self.config.clone();
        self.judge(files, key, cancel, progress).inspect_err(|error| {
            if error.kind() == ErrorKind::Corrupt {
                forget_time(files, config);
            }
        })
    }

    fn judge(
        self,
        files: &FileSet,
        key: &ImageKey,
        cancel: &CancellationToken,
        progress: &dyn Fn(u32),
    ) -> Result<FileConfig, AgentError> {
        let file = File::open(&files.file).map_err(AgentError::io("open", &files.file))?;
        let before = file.metadata().map_err(AgentError::io("look at", &files.file))?;
        let manifest = match self.manifest {
            Some(manifest) => {
                let mut bad = verify::bad_chunks(&file, &files.file, &manifest, cancel, progress)?;
                let total = manifest.chunks.len() as u64;
                if bad.is_empty() && before.len() != manifest.size_bytes {
                    // Bytes were added after the last chunk.
                    bad.push(total - 1);
                }
                if let Some(first) = bad.first() {
                    return Err(AgentError::Damaged { bad: bad.len() as u64, total, first: *first });
                }
                manifest
            }
            None => {
                let recorded = Format::from_name(&self.config.format);
                let made = verify::make_manifest(&file, &files.file, &key.uuid, recorded, cancel, progress)?;
                for expected in [&self.config.current_checksum, &self.config.expected_checksum] {
                    if !expected.is_empty() && *expected != made.sha512.as_str() {
                        return Err(AgentError::Checksum {
                            expected: expected.clone(),
                            actual: made.sha512.to_string(),
                            note: ": the file has changed and there is no manifest to repair it by, sync it again"
                                .into(),
                        });
                    }
                }
                made.write(&files.manifest)?;
                made
            }
        };
        let config = FileConfig {
            verified_at: format!("{:.0}", Timestamp::now()),
            damage: self.config.damage.clone(),
            ..describe(&file, &files.file, &manifest, &self.config.expected_checksum)?
        };
        let after = file.metadata().map_err(AgentError::io("look at", &files.file))?;
        if changed_at(&before) != changed_at(&after) {
            return Err(AgentError::NotReady { message: "the file was changed while it was verified".into() });
        }
        if !files.manifest.exists() {
            // It was lost while the file was read.
            manifest.write(&files.manifest)?;
        }
        config.write(&files.config)?;
        Ok(config)
    }
}

/// Records that the file is damaged: without a time it is not taken for unchanged any more, whoever looks at it next, also when
/// somebody has put its time back. Where that cannot be written, on a full disk, the file's own time says so.
pub(super) fn forget_time(files: &FileSet, config: FileConfig) {
    let Err(error) = (FileConfig { modification_time: String::new(), ..config }).write(&files.config) else { return };
    let touched = File::open(&files.file).and_then(|file| file.set_modified(SystemTime::UNIX_EPOCH));
    let touched = touched.err().map(|error| error.to_string());
    tracing::error!(error = error.chain(), touched, "that a copy is damaged cannot be recorded");
}

/// When a file's content or description was changed last, as the kernel keeps it: nobody can put that back.
pub(super) fn changed_at(metadata: &Metadata) -> (i64, i64) {
    (metadata.ctime(), metadata.ctime_nsec())
}

impl Registry {
    /// Adopts everything on the disk; a copy that cannot even be looked at fails alone.
    pub async fn adopt_all(self: &Arc<Self>) -> Result<(), AgentError> {
        let disk = self.disk.clone();
        for key in blocking(move || disk.list_images()).await? {
            if let Err(error) = self.adopt(&key).await {
                tracing::error!(image = %key, error = error.chain(), "copy cannot be looked at");
                self.put(&key, Copy::failed(&error));
            }
        }
        Ok(())
    }

    /// Adopts one copy; returns whether there is one.
    pub async fn adopt(self: &Arc<Self>, key: &ImageKey) -> Result<bool, AgentError> {
        let (files, own) = (self.disk.copy(key), key.clone());
        match blocking(move || look(&files, &own)).await? {
            Found::Nothing => return Ok(false),
            Found::Unchanged(config) => self.put(key, Copy::ready(&config)),
            Found::Useless(error) => self.put(key, Copy::failed(&error)),
            Found::Doubtful(doubt) => self.start_verification(key, doubt),
        }
        Ok(true)
    }

    /// Adopts a ready copy once more, because what describes it was touched.
    pub async fn adopt_again(self: &Arc<Self>, key: &ImageKey) {
        let _turn = self.lock(key).await;
        if self.get(key).is_some_and(|copy| copy.state == CopyState::Ready) {
            // Without a file there is nothing to adopt; a look finds that.
            if let Err(error) = self.adopt(key).await {
                self.put(key, Copy::failed(&error));
            }
        }
    }

    fn start_verification(self: &Arc<Self>, key: &ImageKey, doubt: Doubt) {
        self.put(key, doubt.copy());
        let (registry, own) = (self.clone(), key.clone());
        self.start(key, |cancel| {
            self.tracker.clone().spawn(async move {
                let turn = tokio::select! {
                    turn = registry.verifications.acquire() => turn,
                    () = cancel.cancelled() => return,
                };
                let Ok(_turn) = turn else { return };
                let files = registry.disk.copy(&own);
                let (reporter, of, stop) = (registry.clone(), own.clone(), cancel.clone());
                let result = blocking(move || {
                    let progress = |percent| reporter.progress(&of, |copy| copy.progress = percent);
                    doubt.verify(&files, &of, &stop, &progress)
                })
                .await;
                match result {
                    Ok(config) => registry.put(&own, Copy::ready(&config)),
                    Err(AgentError::Cancelled) => {}
                    Err(error) => {
                        tracing::error!(image = %own, error = error.chain(), "copy is damaged");
                        registry.change(&own, |copy| copy.fail(&error));
                    }
                }
            })
        });
    }

    /// Looks whether ready copies are still what they were.
    pub async fn recheck_all(self: &Arc<Self>) {
        for (key, _) in self.all() {
            self.recheck(&key).await;
        }
    }

    /// Looks whether a ready copy is still what it was.
    pub async fn recheck(self: &Arc<Self>, key: &ImageKey) {
        if self.get(key).is_none_or(|copy| copy.state != CopyState::Ready) {
            return;
        }
        let _turn = self.lock(key).await;
        let Some(copy) = self.get(key).filter(|copy| copy.state == CopyState::Ready) else { return };
        let files = self.disk.copy(key);
        let (path, of) = (files.clone(), copy.clone());
        let same = blocking(move || match path.file.metadata() {
            Ok(metadata) => Ok(Some(
                metadata.len() == of.size
                    && crate::config_file::modification_time(&metadata) == of.modification_time
                    && path.config.exists()
                    && path.manifest.exists(),
            )),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(AgentError::Io { doing: "look at", path: path.file, source }),
        })
        .await;
        match same {
            Ok(Some(true)) => {}
            // Of an empty mount point nothing is to be learned; its node says that the disk is away.
            _ if self.on_disk().await.is_err() => {}
            Ok(Some(false)) => {
                tracing::warn!(image = %key, "copy was changed from outside");
                if let Err(error) = self.adopt(key).await {
                    self.put(key, Copy::failed(&error));
                }
            }
            Ok(None) => {
                let message = "the file is gone from the disk: sync the copy again".into();
                self.put(key, Copy::failed(&AgentError::NotFound { message }));
            }
            Err(error) => self.put(key, Copy::failed(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::super::tests::{key, sealed, touch};
    use super::*;

    #[test]
    fn a_file_that_was_found_damaged_is_not_taken_for_good_when_its_time_is_put_back() {
        for has_manifest in [true, false] {
            let (_folder, files) = sealed();
            let time = files.file.metadata().unwrap().modified().unwrap();
            let file = File::options().write(true).open(&files.file).unwrap();
            file.write_all_at(b"damage", 5).unwrap();
            touch(&files, SystemTime::UNIX_EPOCH);
            if !has_manifest {
                std::fs::remove_file(&files.manifest).unwrap();
            }
            let judged = || {
                let Found::Doubtful(doubt) = look(&files, &key()).unwrap() else { panic!("it is taken for good") };
                doubt.verify(&files, &key(), &CancellationToken::new(), &|_| ())
            };
            assert_eq!(judged().unwrap_err().kind(), ErrorKind::Corrupt);
            touch(&files, time);
            assert_eq!(judged().unwrap_err().kind(), ErrorKind::Corrupt, "with a manifest: {has_manifest}");
        }
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_not_ready() {
        let (_folder, files) = sealed();
        touch(&files, SystemTime::UNIX_EPOCH);
        let judged = |cancel: &CancellationToken, progress: &dyn Fn(u32)| {
            let Found::Doubtful(doubt) = look(&files, &key()).unwrap() else { panic!("its time is another one") };
            doubt.verify(&files, &key(), cancel, progress)
        };
        let cancel = CancellationToken::new();
        let error = judged(&cancel, &|_| touch(&files, SystemTime::now())).unwrap_err();
        assert!(error.to_string().contains("was changed while it was verified"), "{error}");
        cancel.cancel();
        assert!(matches!(judged(&cancel, &|_| ()), Err(AgentError::Cancelled)));
        std::fs::remove_file(&files.manifest).unwrap();
        assert!(matches!(judged(&cancel, &|_| ()), Err(AgentError::Cancelled)));
        assert!(judged(&CancellationToken::new(), &|_| ()).is_ok());
    }
}
