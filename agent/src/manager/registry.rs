//! What a manager knows of its copies, and who is told when it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use api::ErrorKind;
use api::ids::DiskId;
use api::image::CopyState;
use proto::bimrpc::{BackingImageResponse, BackingImageSpec, BackingImageStatus};
use runtime::transport::Security;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::shared_look::SharedLook;
use crate::bandwidth::Bandwidth;
use crate::config_file::FileConfig;
use crate::error::AgentError;
use crate::layout::{Disk, ImageKey};
use crate::limits::{MAX_PEER_READS, MAX_SCRUBS, MAX_SYNCS, MAX_VERIFICATIONS, PROGRESS_INTERVAL};
use crate::survey::Survey;

/// One copy as it is reported.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Copy {
    pub state: CopyState,
    pub size: u64,
    pub virtual_size: u64,
    pub real_size: u64,
    pub expected_checksum: String,
    pub current_checksum: String,
    pub message: String,
    pub progress: u32,
    pub sending: u32,
    pub sender: String,
    pub format: String,
    /// Of the file, when the copy was found or made ready.
    pub modification_time: String,
    /// The kind of failure that `message` tells of.
    pub kind: Option<ErrorKind>,
    pub verified_at: String,
    pub damage: String,
}

impl Copy {
    /// A ready copy.
    pub fn ready(config: &FileConfig) -> Copy {
        Copy {
            state: CopyState::Ready,
            size: config.size,
            virtual_size: config.virtual_size,
            real_size: config.real_size,
            expected_checksum: config.expected_checksum.clone(),
            current_checksum: config.current_checksum.clone(),
            progress: 100,
            format: config.format.clone(),
            modification_time: config.modification_time.clone(),
            verified_at: config.verified_at.clone(),
            damage: config.damage.clone(),
            ..Default::default()
        }
    }

    /// A copy that cannot be used.
    pub fn failed(error: &AgentError) -> Copy {
        let mut copy = Copy::default();
        copy.fail(error);
        copy
    }

    /// The same copy, which cannot be used any more.
    pub fn fail(&mut self, error: &AgentError) {
        self.state = CopyState::Failed;
        self.message = error.chain();
        self.kind = Some(error.kind());
    }

    pub fn response(&self, key: &ImageKey) -> BackingImageResponse {
        BackingImageResponse {
            spec: Some(BackingImageSpec {
                name: key.name.to_string(),
                uuid: key.uuid.to_string(),
                size: signed(self.size),
                checksum: self.expected_checksum.clone(),
                virtual_size: signed(self.virtual_size),
                real_size: signed(self.real_size),
            }),
            status: Some(BackingImageStatus {
                state: self.state.as_str().to_owned(),
                error_msg: self.message.clone(),
                sending_reference: i32::try_from(self.sending).unwrap_or(i32::MAX),
                sender_manager_address: self.sender.clone(),
                progress: i32::try_from(self.progress).unwrap_or(100),
                checksum: self.current_checksum.clone(),
            }),
            format: self.format.clone(),
            error_kind: self.kind.map(|kind| kind.as_str().to_owned()).unwrap_or_default(),
            verified_at: self.verified_at.clone(),
            damage: self.damage.clone(),
        }
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

struct Entry {
    copy: Copy,
    work: Option<Work>,
}

/// A task that works on one copy.
pub(super) struct Work {
    pub cancel: CancellationToken,
    pub task: JoinHandle<()>,
    /// Bytes a second, when it reads a ready copy again.
    pub pace: Option<u64>,
}

/// All copies of one disk.
pub(super) struct Registry {
    pub disk: Disk,
    pub disk_uuid: DiskId,
    pub idle_timeout: Duration,
    pub security: Security,
    pub syncs: Semaphore,
    pub verifications: Semaphore,
    /// Slow readings, apart from the others so that nobody waits for one.
    pub scrubs: Semaphore,
    pub peer_reads: Semaphore,
    /// At what else lies on the disk; `None` of one: the disk is not there, so nothing is known.
    pub looks: SharedLook<Option<Survey>>,
    /// What may be sent.
    pub bandwidth: Bandwidth,
    pub tasks: CancellationToken,
    pub tracker: TaskTracker,
    entries: Mutex<BTreeMap<ImageKey, Entry>>,
    /// One operation on a copy at a time.
    locks: Mutex<BTreeMap<ImageKey, Arc<tokio::sync::Mutex<()>>>>,
    version: watch::Sender<u64>,
    progressed: Notify,
}

impl Registry {
    pub fn new(
        disk: Disk,
        disk_uuid: DiskId,
        idle_timeout: Duration,
        security: Security,
        tasks: CancellationToken,
    ) -> Registry {
        Registry {
            disk,
            disk_uuid,
            idle_timeout,
            security,
            syncs: Semaphore::new(MAX_SYNCS),
            verifications: Semaphore::new(MAX_VERIFICATIONS),
            scrubs: Semaphore::new(MAX_SCRUBS),
            peer_reads: Semaphore::new(MAX_PEER_READS),
            looks: SharedLook::default(),
            bandwidth: Bandwidth::default(),
            tasks,
            tracker: TaskTracker::new(),
            entries: Mutex::default(),
            locks: Mutex::default(),
            version: watch::Sender::new(0),
            progressed: Notify::new(),
        }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<ImageKey, Entry>> {
        self.entries.lock().expect("no holder of the lock panics")
    }

    /// Waits for the turn to change a copy.
    pub async fn lock(&self, key: &ImageKey) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().expect("no holder of the lock panics");
            // Only the map itself knows those; keys come from requests, so they must not pile up.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(key.clone()).or_default().clone()
        };
        lock.lock_owned().await
    }

    pub fn get(&self, key: &ImageKey) -> Option<Copy> {
        self.entries().get(key).map(|entry| entry.copy.clone())
    }

    pub fn all(&self) -> Vec<(ImageKey, Copy)> {
        self.entries().iter().map(|(key, entry)| (key.clone(), entry.copy.clone())).collect()
    }

    /// What each copy is of.
    pub fn keys(&self) -> BTreeSet<ImageKey> {
        self.entries().keys().cloned().collect()
    }

    /// The copies that can be used, in order.
    pub fn ready(&self) -> Vec<ImageKey> {
        let entries = self.entries();
        let is_ready = |entry: &Entry| entry.copy.state == CopyState::Ready;
        entries.iter().filter(|(_, entry)| is_ready(entry)).map(|(key, _)| key.clone()).collect()
    }

    /// Whether a task works on the copy.
    pub fn is_busy(&self, key: &ImageKey) -> bool {
        self.entries().get(key).and_then(|entry| entry.work.as_ref()).is_some_and(|work| !work.task.is_finished())
    }

    /// Sets a copy, keeping how often it is being sent.
    pub fn put(&self, key: &ImageKey, mut copy: Copy) {
        let mut entries = self.entries();
        let entry = entries.entry(key.clone()).or_insert_with(|| Entry { copy: Copy::default(), work: None });
        copy.sending = entry.copy.sending;
        if entry.copy.state != copy.state {
            tracing::info!(
                image = %key, from = entry.copy.state.as_str(), to = copy.state.as_str(), message = copy.message,
                "copy changed"
            );
        }
        entry.copy = copy;
        drop(entries);
        self.changed();
    }

    /// Changes a copy that is there.
    pub fn change(&self, key: &ImageKey, change: impl FnOnce(&mut Copy)) {
        if let Some(entry) = self.entries().get_mut(key) {
            change(&mut entry.copy);
        }
        self.changed();
    }

    /// Changes what is told at most every [`PROGRESS_INTERVAL`].
    pub fn progress(&self, key: &ImageKey, change: impl FnOnce(&mut Copy)) {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(key) else { return };
        let before = entry.copy.clone();
        change(&mut entry.copy);
        let told = entry.copy != before;
        drop(entries);
        if told {
            self.progressed.notify_one();
        }
    }

    /// Starts the task of a copy, which replaces the one before it.
    pub fn start(self: &Arc<Self>, key: &ImageKey, task: impl FnOnce(CancellationToken) -> JoinHandle<()>) {
        self.replace_work(key, None, task);
    }

    /// The same for a task that reads a ready copy again.
    pub fn start_at_pace(
        self: &Arc<Self>,
        key: &ImageKey,
        pace: u64,
        task: impl FnOnce(CancellationToken) -> JoinHandle<()>,
    ) {
        self.replace_work(key, Some(pace), task);
    }

    fn replace_work(
        self: &Arc<Self>,
        key: &ImageKey,
        pace: Option<u64>,
        task: impl FnOnce(CancellationToken) -> JoinHandle<()>,
    ) {
        let cancel = self.tasks.child_token();
        let work = Work { task: task(cancel.clone()), cancel, pace };
        let mut entries = self.entries();
        let former = entries.get_mut(key).and_then(|entry| entry.work.replace(work));
        if let Some(former) = former {
            former.cancel.cancel();
        }
    }

    /// How fast a ready copy is being read again, if it is.
    pub fn pace(&self, key: &ImageKey) -> Option<u64> {
        let entries = self.entries();
        let work = entries.get(key)?.work.as_ref().filter(|work| !work.task.is_finished())?;
        work.pace
    }

    /// Takes the task of a copy, to end it.
    pub fn take_work(&self, key: &ImageKey) -> Option<Work> {
        self.entries().get_mut(key)?.work.take()
    }

    pub fn remove(&self, key: &ImageKey) {
        self.entries().remove(key);
        self.changed();
    }

    /// Counts as a transfer of this copy until it is dropped; `None` unless the copy is ready.
    pub fn begin_sending(self: &Arc<Self>, key: &ImageKey, limit: u32) -> Option<Sending> {
        let mut entries = self.entries();
        let copy = &mut entries.get_mut(key)?.copy;
        if copy.state != CopyState::Ready || copy.sending >= limit {
            return None;
        }
        copy.sending += 1;
        drop(entries);
        self.progressed.notify_one();
        Some(Sending { registry: self.clone(), key: key.clone() })
    }

    /// A number that changes whenever anything does.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    /// Tells of progress, and looks after the files.
    pub fn spawn_background(self: Arc<Self>, recheck_interval: Duration, watch_files: bool) {
        let (ticker, checker) = (self.clone(), self.clone());
        if watch_files {
            self.tracker.spawn(super::watcher::run(self.clone()));
        }
        self.tracker.spawn(async move {
            let work = async {
                loop {
                    ticker.progressed.notified().await;
                    ticker.changed();
                    tokio::time::sleep(PROGRESS_INTERVAL).await;
                }
            };
            ticker.tasks.run_until_cancelled(work).await;
        });
        self.tracker.spawn(async move {
            let work = async {
                loop {
                    tokio::time::sleep(recheck_interval).await;
                    checker.recheck_all().await;
                }
            };
            checker.tasks.run_until_cancelled(work).await;
        });
    }

    /// Waits for the tasks, which were told to end.
    pub async fn close(&self, limit: Duration) {
        self.tracker.close();
        if tokio::time::timeout(limit, self.tracker.wait()).await.is_err() {
            tracing::warn!("tasks did not end in time");
        }
    }
}

/// A transfer of a copy in progress.
pub(super) struct Sending {
    registry: Arc<Registry>,
    key: ImageKey,
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.registry.progress(&self.key, |copy| copy.sending = copy.sending.saturating_sub(1));
    }
}
