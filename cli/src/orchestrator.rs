//! The standalone mode's container orchestrator: what Kubernetes and its CSI sidecars do, through the same CSI calls.
//!
//! It provisions claims, attaches and detaches by `VolumeAttachment` objects, stages and publishes volumes when the command line
//! asks. All that it knows stands in the objects of the store, so a restart goes on where it was.

mod api;
mod attachments;
mod capability;
mod claims;
mod clients;
pub mod expansion;
mod mounts;
mod objects;
mod size;
mod target;
mod work;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ::api::event::News;
use kube::Resource;
use store::Store;
use store::events::{Recorder, Worker};
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

pub use api::{Operation, router, streamed};
use clients::Sockets;
pub use clients::{connect, is_transient};
pub use mounts::unescape;

use crate::failure::Failure;

/// Who users see as the source of events.
const COMPONENT: &str = "backing-image-csi-orchestrator";

/// The orchestrator of one instance. Cheap to clone.
#[derive(Clone)]
pub struct Orchestrator {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    driver: String,
    sockets: Sockets,
    /// Staging directories, by node and volume.
    staging: PathBuf,
    /// One operation at a time on each volume.
    locks: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
    recorder: Recorder,
    /// What writes for the recorder; taken by [`Orchestrator::run`].
    recording: Mutex<Option<Worker>>,
    shutdown: CancellationToken,
}

impl Orchestrator {
    /// An orchestrator for the driver whose sockets are in `data/csi`.
    pub fn new(store: Store, driver: &str, data: &Path, shutdown: CancellationToken) -> Orchestrator {
        let (recorder, recording) = Recorder::new(store.clone(), COMPONENT);
        let inner = Inner {
            store,
            recorder,
            recording: Mutex::new(Some(recording)),
            driver: driver.to_owned(),
            sockets: Sockets::new(data.join("csi")),
            staging: data.join("staging"),
            locks: Mutex::default(),
            shutdown,
        };
        Orchestrator { inner: Arc::new(inner) }
    }

    /// Provisions, attaches and detaches until shutdown.
    pub async fn run(&self) {
        let recording = self.inner.recording.lock().unwrap_or_else(|e| e.into_inner()).take();
        let recording = async {
            if let Some(recording) = recording {
                recording.run(self.inner.shutdown.clone()).await;
            }
        };
        tokio::join!(work::run(self), recording);
    }

    /// Records an event about an object.
    fn record<T: Resource<DynamicType = ()>>(&self, about: &T, news: &News) {
        self.inner.recorder.record(about, news, None);
    }

    /// Unmounts and detaches everything; says what it does.
    pub async fn detach_all(&self, say: &(dyn Fn(String) + Sync)) -> Result<(), Failure> {
        mounts::detach_all(self, say).await
    }

    fn store(&self) -> &Store {
        &self.inner.store
    }

    async fn lock(&self, volume: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.inner.locks.lock().unwrap_or_else(|e| e.into_inner());
            locks.entry(volume.to_owned()).or_default().clone()
        };
        lock.lock_owned().await
    }
}
