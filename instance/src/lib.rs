//! Role: supervises one node's data-plane processes and reports its disks.
//!
//! Level-triggered: an event only says "look again". The processes outlive this role and are adopted by its next life.

mod control;
pub mod decide;
mod disks;
mod engine;
mod limits;
mod processes;
mod replica;
pub mod replica_process;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use api::ids::NodeName;
use api::{BackingImage, Engine, ErrorKind, Node, Replica};
use dataplane::DataplaneError;
use futures::StreamExt;
use kube::ResourceExt;
use serde::de::DeserializeOwned;
use store::{Selector, Store, StoreError, TypedEvent};
use tokio::sync::{Mutex, Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The instance role of one node.
#[derive(Clone)]
pub struct Config {
    pub node: NodeName,
    /// Where replicas listen, on TCP.
    pub ip: IpAddr,
    /// `DIR/nodes/<node>/instance`: records, logs, sockets and mount files.
    pub state_directory: PathBuf,
    /// Our binary, started as `replica` and `engine-holder`.
    pub program: PathBuf,
    pub store: Store,
    /// Two ports for each replica.
    pub ports: RangeInclusive<u16>,
    /// Make the directories of disks that do not exist (simulated nodes). Otherwise a missing one is reported.
    pub create_disks: bool,
}

/// Why a pass over an object, or the role, failed.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("cannot {action}")]
    Io { action: String, source: io::Error },
    #[error("cannot read or write objects")]
    Store {
        #[from]
        source: StoreError,
    },
    #[error("cannot use the node's devices")]
    Dataplane {
        #[from]
        source: DataplaneError,
    },
    #[error("cannot use the files of a replica")]
    Replica {
        #[from]
        source: replica_process::ReplicaError,
    },
    #[error("engine of `{volume}`: {message}")]
    Engine { volume: String, message: String },
}

impl InstanceError {
    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            InstanceError::Io { .. } => ErrorKind::Internal,
            InstanceError::Store { source } => source.kind(),
            InstanceError::Dataplane { source } => source.kind(),
            InstanceError::Replica { source } => source.kind(),
            InstanceError::Engine { .. } => ErrorKind::NotReady,
        }
    }

    fn io(action: impl Into<String>, source: io::Error) -> InstanceError {
        InstanceError::Io { action: action.into(), source }
    }

    fn is_conflict(&self) -> bool {
        matches!(self, InstanceError::Store { source } if source.is_conflict())
    }
}

/// What the passes over all objects of a node share.
struct Shared {
    config: Config,
    /// Ports are chosen by one pass at a time.
    ports: Mutex<()>,
    shutdown: CancellationToken,
}

/// When to look again without an event.
enum Next {
    Gone,
    Again,
    After(Option<Duration>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Replica(String),
    Engine(String),
}

enum Change {
    Look(Key),
    /// Every replica, because an image or a disk changed.
    Replicas,
    Node,
}

/// Runs the role until `shutdown`; the processes that it started go on.
pub async fn run(config: Config, shutdown: CancellationToken) -> Result<(), InstanceError> {
    for directory in ["replicas", "engines"] {
        let path = config.state_directory.join(directory);
        std::fs::create_dir_all(&path).map_err(|e| InstanceError::io(format!("create `{}`", path.display()), e))?;
    }
    let shared = Arc::new(Shared { config, ports: Mutex::new(()), shutdown: shutdown.clone() });
    let tasks = TaskTracker::new();
    let (changes, mut changed) = mpsc::channel(64);
    let node = shared.config.node.to_string();
    let mine = node.clone();
    tasks.spawn(follow::<Replica>(shared.clone(), changes.clone(), move |r| {
        (r.spec.node_id == mine).then(|| Change::Look(Key::Replica(r.name_any())))
    }));
    let mine = node.clone();
    tasks.spawn(follow::<Engine>(shared.clone(), changes.clone(), move |e| {
        (e.spec.node_id == mine).then(|| Change::Look(Key::Engine(e.name_any())))
    }));
    tasks.spawn(follow::<BackingImage>(shared.clone(), changes.clone(), |_| Some(Change::Replicas)));
    tasks.spawn(follow::<Node>(shared.clone(), changes, move |n| (n.name_any() == node).then_some(Change::Node)));
    let node_changed = Arc::new(Notify::new());
    tasks.spawn(disks::drive(shared.clone(), node_changed.clone()));

    let actors: Arc<Mutex<HashMap<Key, Arc<Notify>>>> = Arc::default();
    loop {
        let change = tokio::select! {
            change = changed.recv() => change,
            () = shutdown.cancelled() => break,
        };
        match change {
            Some(Change::Look(key)) => {
                let mut running = actors.lock().await;
                let notify = running.entry(key.clone()).or_insert_with(|| {
                    let notify = Arc::new(Notify::new());
                    tasks.spawn(drive(shared.clone(), key, notify.clone(), actors.clone()));
                    notify
                });
                notify.notify_one();
            }
            Some(Change::Replicas) => look_at_replicas(&*actors.lock().await),
            Some(Change::Node) => {
                node_changed.notify_one();
                look_at_replicas(&*actors.lock().await);
            }
            None => break,
        }
    }
    tasks.close();
    tasks.wait().await;
    Ok(())
}

fn look_at_replicas(actors: &HashMap<Key, Arc<Notify>>) {
    actors.iter().filter(|(key, _)| matches!(key, Key::Replica(_))).for_each(|(_, notify)| notify.notify_one());
}

/// Turns the changes of a kind into looks; a lost stream is taken up again from a list.
async fn follow<T>(
    shared: Arc<Shared>,
    changes: mpsc::Sender<Change>,
    of: impl Fn(&T) -> Option<Change> + Send + 'static,
) where
    T: kube::Resource<DynamicType = ()> + DeserializeOwned + Send + 'static,
    T::Scope: store::Scoped,
{
    let mut failures = 0;
    let store = shared.config.store.clone();
    let work = async {
        loop {
            match store.watch::<T>().await {
                Ok(mut events) => {
                    while let Some(event) = events.next().await {
                        let objects = match event {
                            Ok(TypedEvent::Applied(object) | TypedEvent::Deleted(object)) => vec![object],
                            Ok(TypedEvent::Relist) => store.list::<T>(&Selector::default()).await.unwrap_or_default(),
                            Err(error) => {
                                tracing::warn!(%error, "watch failed, begun anew");
                                break;
                            }
                        };
                        failures = 0;
                        for change in objects.iter().filter_map(&of) {
                            if changes.send(change).await.is_err() {
                                return;
                            }
                        }
                    }
                }
                Err(error) => tracing::warn!(%error, "watch failed, begun anew"),
            }
            failures += 1;
            tokio::time::sleep(limits::RETRY.delay(failures)).await;
        }
    };
    tokio::select! { () = work => {}, () = shared.shutdown.cancelled() => {} }
}

/// Passes over one object until it is gone.
async fn drive(shared: Arc<Shared>, key: Key, notify: Arc<Notify>, actors: Arc<Mutex<HashMap<Key, Arc<Notify>>>>) {
    let mut supervisor = match &key {
        Key::Replica(name) => Supervisor::Replica(replica::Supervisor::new(shared.clone(), name, notify.clone())),
        Key::Engine(name) => Supervisor::Engine(engine::Supervisor::new(shared.clone(), name, notify.clone())),
    };
    let mut failures = 0;
    while !shared.shutdown.is_cancelled() {
        // A pass runs to its end also during a shutdown: what it began is recorded.
        let outcome = match &mut supervisor {
            Supervisor::Replica(s) => s.pass().await,
            Supervisor::Engine(s) => s.pass().await,
        };
        let wait = match outcome {
            Ok(Next::Gone) => {
                // An event that came meanwhile is about a new object of that name.
                let mut running = actors.lock().await;
                if futures::FutureExt::now_or_never(notify.notified()).is_none() {
                    running.remove(&key);
                    return;
                }
                continue;
            }
            Ok(Next::Again) => continue,
            Ok(Next::After(wait)) => {
                failures = 0;
                wait
            }
            Err(error) if error.is_conflict() => continue,
            Err(error) => {
                failures += 1;
                tracing::warn!(?key, error = sentence(&error), failures, "pass failed");
                Some(limits::RETRY.delay(failures))
            }
        };
        let timer = async {
            match wait {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = notify.notified() => {}
            () = timer => {}
            () = shared.shutdown.cancelled() => {}
        }
    }
}

enum Supervisor {
    Replica(replica::Supervisor),
    Engine(engine::Supervisor),
}

/// Looks again when a process ends.
fn notify_at_end(process: runtime::process::ProcessIdentity, notify: Arc<Notify>, shutdown: CancellationToken) {
    tokio::spawn(async move {
        tokio::select! {
            _ = process.wait() => notify.notify_one(),
            () = shutdown.cancelled() => {}
        }
    });
}

/// An error and its causes in one sentence, for statuses and replies.
pub(crate) fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
