//! What can be asked of a manager: receive, take over, send, delete. Each can be asked again.

use std::fs::File;
use std::sync::Arc;

use api::ids::Sha512Digest;
use api::image::CopyState;
use proto::bimrpc::BackingImageSpec;
use runtime::transport::Security;

use super::registry::{Copy, Registry};
use crate::config_file::FileConfig;
use crate::data_source::FileStatus;
use crate::error::{AgentError, blocking, chain};
use crate::layout::ImageKey;
use crate::limits::{DATA_SOURCE_TIMEOUT, MAX_SENDS_PER_COPY};
use crate::manifest::Manifest;
use crate::peer::Peer;
use crate::seal::seal;
use crate::survey::{Place, Survey};
use crate::sync::{Pull, Step, pull};
use crate::{durable, http_client, ssync, survey};

/// What a request says about a copy, checked.
pub(super) struct Wanted {
    pub key: ImageKey,
    pub size_bytes: Option<u64>,
    pub sha512: Option<Sha512Digest>,
}

impl Wanted {
    pub fn parse(spec: Option<BackingImageSpec>) -> Result<Wanted, AgentError> {
        let spec = spec.ok_or_else(|| AgentError::Invalid { message: "the request has no `spec`".into() })?;
        let size_bytes = u64::try_from(spec.size).map_err(|_| AgentError::Invalid {
            message: format!("`size` is {}: give 0 or the size in bytes", spec.size),
        })?;
        let sha512 = match spec.checksum.as_str() {
            "" => None,
            text => {
                Some(text.parse().map_err(|e: api::ids::InvalidId| AgentError::Invalid { message: e.to_string() })?)
            }
        };
        Ok(Wanted {
            key: ImageKey::parse(&spec.name, &spec.uuid)?,
            size_bytes: Some(size_bytes).filter(|size| *size != 0),
            sha512,
        })
    }

    fn expected_checksum(&self) -> String {
        self.sha512.as_ref().map(ToString::to_string).unwrap_or_default()
    }

    fn check(&self, size_bytes: u64, sha512: &str, what: &str) -> Result<(), AgentError> {
        if let Some(size) = self.size_bytes.filter(|size| *size != size_bytes) {
            let message = format!("{what} of `{}` has {size_bytes} bytes, but {size} are wanted", self.key);
            return Err(AgentError::Incompatible { message });
        }
        if let Some(wanted) = self.sha512.as_ref().filter(|wanted| wanted.as_str() != sha512) {
            let message = format!("{what} of `{}` has SHA-512 {sha512}, but {wanted} is wanted", self.key);
            return Err(AgentError::Incompatible { message });
        }
        Ok(())
    }
}

impl Registry {
    /// Makes sure that the disk still is where it was: below an empty mount point nothing must be written, and nothing is gone.
    pub(super) async fn on_disk(&self) -> Result<(), AgentError> {
        let (disk, wanted) = (self.disk.clone(), self.disk_uuid.clone());
        blocking(move || match disk.read_uuid()? {
            found if found == wanted => Ok(()),
            found => {
                let problem = format!("it holds disk `{found}` now, not `{wanted}`");
                Err(AgentError::DiskConfig { path: disk.root().into(), problem })
            }
        })
        .await
    }

    /// Starts to receive a copy, unless it is there or on its way.
    pub async fn sync(self: &Arc<Self>, wanted: Wanted, from: &str) -> Result<Copy, AgentError> {
        let peers = Peer::parse_list(from, self.idle_timeout, &self.security)?;
        let key = wanted.key.clone();
        let _turn = self.lock(&key).await;
        self.on_disk().await?;
        if let Some(copy) = self.get(&key) {
            if copy.state == CopyState::Ready {
                wanted.check(copy.size, &copy.current_checksum, "the copy")?;
                return Ok(copy);
            }
            if self.is_busy(&key) {
                return Ok(copy);
            }
        }
        // A whole file that nobody told this manager about.
        if self.get(&key).is_none() && self.adopt(&key).await? {
            let copy = self.get(&key).unwrap_or_default();
            if copy.state == CopyState::Ready {
                wanted.check(copy.size, &copy.current_checksum, "the copy")?;
            }
            if copy.state != CopyState::Failed {
                return Ok(copy);
            }
        }
        let sender = peers.iter().map(|peer| peer.address().to_string()).collect::<Vec<_>>().join(",");
        let copy = Copy {
            state: CopyState::Pending,
            size: wanted.size_bytes.unwrap_or(0),
            expected_checksum: wanted.expected_checksum(),
            sender,
            ..Default::default()
        };
        self.put(&key, copy);
        let what = Pull {
            key: key.clone(),
            files: self.disk.copy(&key),
            peers,
            size_bytes: wanted.size_bytes,
            expected_checksum: wanted.expected_checksum(),
            sha512: wanted.sha512,
        };
        let (registry, own) = (self.clone(), key.clone());
        self.start(&key, |cancel| {
            self.tracker.clone().spawn(async move {
                let turn = tokio::select! {
                    turn = registry.syncs.acquire() => turn,
                    () = cancel.cancelled() => return,
                };
                let Ok(_turn) = turn else { return };
                registry.change(&own, |copy| copy.state = CopyState::Starting);
                if let Err(error) = registry.on_disk().await {
                    return registry.change(&own, |copy| copy.fail(&error));
                }
                let (reporter, of) = (registry.clone(), own.clone());
                let report = Arc::new(move |step| report(&reporter, &of, step));
                let done = match registry.repair(&what, &*report, &cancel).await {
                    Some(repaired) => repaired,
                    None => pull(what, report, cancel).await,
                };
                match done {
                    Ok(config) => registry.put(&own, Copy::ready(&config)),
                    Err(AgentError::Cancelled) => {}
                    Err(error) => {
                        tracing::error!(image = %own, error = error.chain(), "sync failed");
                        registry.change(&own, |copy| copy.fail(&error));
                    }
                }
            })
        });
        Ok(self.get(&key).unwrap_or_default())
    }

    /// Takes a finished file over from the data source of this disk; without one, what lies on the disk.
    pub async fn fetch(self: &Arc<Self>, wanted: Wanted, data_source: &str) -> Result<Copy, AgentError> {
        let key = wanted.key.clone();
        let _turn = self.lock(&key).await;
        self.on_disk().await?;
        if let Some(copy) = self.get(&key).filter(|copy| copy.state == CopyState::Ready) {
            wanted.check(copy.size, &copy.current_checksum, "the copy")?;
            return Ok(copy);
        }
        if self.is_busy(&key) {
            let message = format!("the copy of `{key}` is being received or verified: ask again when that has ended");
            return Err(AgentError::NotReady { message });
        }
        if !data_source.is_empty() && self.take_over(&wanted, data_source).await? {
            return Ok(self.get(&key).unwrap_or_default());
        }
        if !self.adopt(&key).await? {
            let message = format!("there is no file of `{key}` on this disk: prepare it by a data source, or sync it");
            return Err(AgentError::NotFound { message });
        }
        let copy = self.get(&key).unwrap_or_default();
        if copy.state == CopyState::Ready {
            wanted.check(copy.size, &copy.current_checksum, "the copy")?;
        }
        Ok(copy)
    }

    /// Renames the file of a data source into place; `false` when it lies there no more, since an earlier call did it.
    async fn take_over(self: &Arc<Self>, wanted: &Wanted, data_source: &str) -> Result<bool, AgentError> {
        let key = &wanted.key;
        let source = self.disk.source(key);
        // Judged before the data source is asked to let go, so that a refusal leaves everything as it was.
        let files = source.clone();
        let uuid = key.uuid.clone();
        let found = blocking(move || {
            let Ok(metadata) = files.file.metadata() else { return Ok(None) };
            let config = FileConfig::read(&files.config).filter(|config| config.matches(&metadata));
            let manifest = Manifest::read(&files.manifest)?.filter(|manifest| {
                manifest.uuid == uuid
                    && config.as_ref().is_some_and(|config| {
                        config.current_checksum == manifest.sha512.as_str() && config.size == manifest.size_bytes
                    })
            });
            Ok(manifest.map(|manifest| (config.unwrap_or_default(), manifest)))
        })
        .await?;
        let status = ask_data_source(data_source, reqwest::Method::GET, "", &self.security).await?;
        if status.uuid != key.uuid.as_str() {
            let message =
                format!("the data source at `{data_source}` works on uuid `{}`, not `{}`", status.uuid, key.uuid);
            return Err(AgentError::NotReady { message });
        }
        if !matches!(status.state, CopyState::ReadyForTransfer | CopyState::Ready) {
            let message = format!(
                "the data source at `{data_source}` is `{}`, not `ready-for-transfer`: {}",
                status.state.as_str(),
                status.message
            );
            return Err(AgentError::NotReady { message });
        }
        let Some((config, manifest)) = found else {
            if self.disk.copy(key).file.exists() {
                return Ok(false);
            }
            let message = format!(
                "`{}` is missing, or is not what its `.cfg` and `.chunks` say: does the data source at `{data_source}` work on this disk?",
                source.file.display()
            );
            // The one refusal of this kind: whoever asks has it prepared again.
            return Err(AgentError::NotFound { message });
        };
        wanted.check(manifest.size_bytes, manifest.sha512.as_str(), "the prepared file")?;
        // What fails here leaves the file to the data source.
        let directory = self.disk.image_dir(key);
        blocking(move || durable::create_dir(&directory)).await?;
        ask_data_source(data_source, reqwest::Method::POST, "?action=transfer", &self.security).await?;

        let target = self.disk.copy(key);
        let expected = if wanted.sha512.is_some() { wanted.expected_checksum() } else { config.expected_checksum };
        let sealed = blocking(move || {
            let file = File::open(&source.file).map_err(AgentError::io("open", &source.file))?;
            let sealed = seal(&file, &source.file, &target, &manifest, &expected)?;
            source.remove()?;
            durable::remove_file(&target.partial)?;
            durable::sync_parent(&source.file)?;
            Ok(sealed)
        })
        .await?;
        self.put(key, Copy::ready(&sealed));
        Ok(true)
    }

    /// Starts to send a copy to a receiver that speaks ssync.
    pub async fn send(self: &Arc<Self>, key: ImageKey, to: &str) -> Result<(), AgentError> {
        let to = to.trim().to_owned();
        if to.is_empty() {
            return Err(AgentError::Invalid { message: "`to_address` is empty: give the receiver's `ip:port`".into() });
        }
        let copy = self.known(&key)?;
        let sending = self.begin_sending(&key, MAX_SENDS_PER_COPY).ok_or_else(|| AgentError::NotReady {
            message: format!(
                "`{key}` is `{}` and has {} transfers running: it must be `ready`, with fewer than {MAX_SENDS_PER_COPY}",
                copy.state.as_str(),
                copy.sending
            ),
        })?;
        let (registry, files) = (self.clone(), self.disk.copy(&key));
        self.tracker.spawn(async move {
            let _sending = sending;
            let share = registry.bandwidth.share(key.name.as_str());
            let sending = ssync::send(&files, &to, registry.idle_timeout, &registry.security, &share);
            let sent = registry.tasks.run_until_cancelled(sending).await;
            match sent {
                Some(Err(error)) => tracing::error!(image = %key, to, error = error.chain(), "sending failed"),
                Some(Ok(())) => tracing::info!(image = %key, to, "copy sent"),
                None => {}
            }
        });
        Ok(())
    }

    /// Removes a copy and everything temporary of it.
    pub async fn delete(self: &Arc<Self>, key: ImageKey) -> Result<(), AgentError> {
        let _turn = self.lock(&key).await;
        self.on_disk().await?;
        if let Some(work) = self.take_work(&key) {
            work.cancel.cancel();
            // A panic of the task was its own end; what counts is that it writes no more.
            let _ = work.task.await;
        }
        let (disk, own) = (self.disk.clone(), key.clone());
        blocking(move || disk.remove_image(&own)).await?;
        self.remove(&key);
        tracing::info!(image = %key, "copy deleted");
        Ok(())
    }

    /// Removes what an image left in one of the directories, and nothing else. Whoever asks has made sure that no image needs it.
    pub async fn remove_remains(self: &Arc<Self>, key: ImageKey, place: Place, mark: &str) -> Result<(), AgentError> {
        let _turn = self.lock(&key).await;
        self.on_disk().await?;
        let is_copy = place == Place::Copies;
        let copy = self.get(&key).filter(|_| is_copy);
        if is_copy && (self.is_busy(&key) || copy.as_ref().is_some_and(|copy| copy.sending > 0)) {
            let message = format!("the copy of `{key}` is being received, verified or sent");
            return Err(AgentError::NotReady { message });
        }
        // Whoever asks decided on what it was when it was told.
        if copy.is_some() && !mark.is_empty() {
            let message = format!("what was found of `{key}` is a copy of this disk by now");
            return Err(AgentError::NotReady { message });
        }
        let mark = copy.is_none().then(|| mark.to_owned());
        let (disk, own) = (self.disk.clone(), key.clone());
        blocking(move || survey::remove(&disk, place, &own, mark.as_deref())).await?;
        if is_copy {
            self.remove(&key);
        }
        tracing::info!(image = %key, is_copy, "orphan removed");
        Ok(())
    }

    /// What lies on the disk besides the copies; `None`: the disk is not there, so nothing is known.
    pub async fn survey(self: &Arc<Self>) -> Option<Survey> {
        let registry = self.clone();
        let look = async move { registry.tasks.run_until_cancelled(registry.look_through()).await.flatten() };
        self.looks.take(&self.tracker, look).await.flatten()
    }

    async fn look_through(&self) -> Option<Survey> {
        let (disk, known) = (self.disk.clone(), self.keys());
        self.on_disk().await.ok()?;
        let found = blocking(move || survey::survey(&disk, &|key| known.contains(key))).await;
        // It may have gone in between, and an empty place would look like a disk on which nothing lies.
        self.on_disk().await.ok()?;
        found.inspect_err(|error| tracing::warn!(error = error.chain(), "the disk cannot be looked through")).ok()
    }

    /// A copy that this manager knows.
    pub fn known(&self, key: &ImageKey) -> Result<Copy, AgentError> {
        self.get(key).ok_or_else(|| AgentError::NotFound {
            message: format!("disk `{}` has no copy of `{key}`", self.disk_uuid),
        })
    }
}

fn report(registry: &Registry, key: &ImageKey, step: Step) {
    match step {
        Step::Begun(manifest) => registry.change(key, |copy| {
            copy.state = CopyState::InProgress;
            copy.size = manifest.size_bytes;
            copy.virtual_size = manifest.virtual_size_bytes;
            copy.format = manifest.format.as_str().to_owned();
            copy.current_checksum.clear();
        }),
        Step::Progress(percent) => registry.progress(key, |copy| copy.progress = percent),
    }
}

async fn ask_data_source(
    address: &str,
    method: reqwest::Method,
    query: &str,
    security: &Security,
) -> Result<FileStatus, AgentError> {
    let unavailable = |problem: String| AgentError::Unavailable {
        message: format!("the data source at `{address}` cannot be asked: {problem}"),
    };
    let client =
        http_client::internal(security).timeout(DATA_SOURCE_TIMEOUT).build().map_err(|e| unavailable(chain(&e)))?;
    let response = client
        .request(method, format!("{}://{address}/v1/file{query}", security.scheme()))
        .send()
        .await
        .map_err(|e| unavailable(chain(&e.without_url())))?;
    let status = response.status();
    let text = response.text().await.map_err(|e| unavailable(chain(&e.without_url())))?;
    if !status.is_success() {
        let message = format!("the data source at `{address}` answered {status}: {text}");
        return Err(AgentError::NotReady { message });
    }
    serde_json::from_str(&text).map_err(|e| unavailable(format!("its answer is not the expected JSON ({e})")))
}
