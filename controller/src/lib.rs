//! Role: reconcilers, HTTP API, admission webhook.
//!
//! Each reconciler observes, lets the planner decide, and acts. Passes are started by events (objects, workloads, agents) and,
//! as a safety net, by a slow resync; two passes over one object never overlap.

mod admission;
mod agents;
mod cache;
mod concern;
mod data_source;
mod error;
mod events;
#[cfg(test)]
#[path = "../tests/world/agents.rs"]
#[allow(dead_code, reason = "the tests of whole controllers use the rest")]
mod fake_agents;
pub mod http;
mod image;
pub mod leader;
mod limits;
mod manager;
mod metrics;
mod node;
mod queue;
mod teller;
mod turns;
mod volume;
pub mod webhook;
mod world;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::ErrorKind;
use planner::retry::Retry;
use runtime::transport::Security;
use store::Store;
use store::events::Recorder;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use workloads::Workloads;

use crate::agents::Agents;
use crate::cache::Cache;
pub use crate::error::{ControllerError, ReconcileError};
pub use crate::metrics::Metrics;
use crate::queue::{Key, Kind, Queue};
use crate::turns::Turns;

/// Who users see as the source of events.
const COMPONENT: &str = "backing-image-csi-controller";

/// What the controller works with.
#[derive(Clone)]
pub struct Context {
    pub store: Store,
    pub workloads: Arc<dyn Workloads>,
    /// See [`Metrics::register`].
    pub metrics: Metrics,
    /// How agents are reached.
    pub security: Security,
    /// Whether nodes are those of a Kubernetes cluster, which says of each whether it is there.
    pub kubernetes: bool,
    /// `false` from when the reconcilers begin until they watch everything that concerns them.
    pub watching: watch::Sender<bool>,
    /// Another controller may be at work from now on: passes stop where they are. Whoever is alone never cancels it.
    pub deposed: CancellationToken,
}

/// What reconcilers share beside the [`Context`].
pub(crate) struct Shared {
    store: Store,
    /// What is known of the store. Whoever takes something away asks the store itself.
    cache: Arc<Cache>,
    workloads: Arc<dyn Workloads>,
    metrics: Metrics,
    queue: Arc<Queue>,
    agents: Agents,
    /// Attempts by manager; lost at a restart, after which everything is tried at once.
    manager_memory: Mutex<HashMap<String, planner::manager::Memory>>,
    /// When a data source process was asked last, of those that did not answer then.
    source_silence: Mutex<HashMap<String, jiff::Timestamp>>,
    /// Unwanted ends of engines by volume.
    volume_restarts: Mutex<HashMap<String, Retry>>,
    /// Held by whoever adds copies that no replica asks for, from counting to adding.
    replenishing: tokio::sync::Mutex<()>,
    turns: Turns,
    kubernetes: bool,
    deposed: CancellationToken,
}

impl Shared {
    /// Of a controller that has not looked at anything yet.
    fn new(context: Context, tracker: &TaskTracker, shutdown: &CancellationToken) -> Shared {
        let queue = Arc::new(Queue::default());
        let agents = Agents::new(queue.clone(), tracker.clone(), shutdown.clone(), context.security);
        let (cache, store) = Cache::new(&context.store);
        Shared {
            store,
            cache,
            workloads: context.workloads,
            metrics: context.metrics,
            queue,
            agents,
            manager_memory: Mutex::default(),
            source_silence: Mutex::default(),
            volume_restarts: Mutex::default(),
            replenishing: tokio::sync::Mutex::default(),
            turns: Turns::default(),
            kubernetes: context.kubernetes,
            deposed: context.deposed,
        }
    }
}

/// The time in which reconcilers do not watch yet; it also ends with them, since whoever does not lead has nothing to watch.
pub(crate) struct Beginning(watch::Sender<bool>);

impl Beginning {
    fn new(watching: watch::Sender<bool>) -> Beginning {
        watching.send_replace(false);
        Beginning(watching)
    }
}

impl Drop for Beginning {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

/// Runs all reconcilers until `shutdown`. Ends by itself only with an error.
pub async fn run(context: Context, shutdown: CancellationToken) -> Result<(), ControllerError> {
    let _leading = context.metrics.lead();
    let beginning = Beginning::new(context.watching.clone());
    let tracker = TaskTracker::new();
    let shared = Arc::new(Shared::new(context, &tracker, &shutdown));
    node::create_default_settings(&shared.store).await?;
    let (recorder, recording) = Recorder::new(shared.store.clone(), COMPONENT);
    tracker.spawn(recording.run(shutdown.clone()));
    let result = tokio::select! {
        result = events::run(&shared, recorder, beginning) => result,
        () = work(&shared, &tracker) => Ok(()),
        () = shutdown.cancelled() => Ok(()),
    };
    // Followers of agents and passes that were begun.
    shutdown.cancel();
    tracker.close();
    let _ = tokio::time::timeout(limits::DRAIN_TIMEOUT, tracker.wait()).await;
    result
}

async fn work(shared: &Arc<Shared>, tracker: &TaskTracker) {
    let slots = Arc::new(tokio::sync::Semaphore::new(limits::CONCURRENT_PASSES));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let key = shared.queue.next().await;
        let shared = shared.clone();
        tracker.spawn(async move {
            let span = tracing::info_span!("reconcile", kind = key.kind.as_str(), name = %key.name);
            // As if this process had ended in the middle, which every pass must stand.
            let deposed = shared.deposed.clone();
            deposed.run_until_cancelled(pass(&shared, &key).instrument(span)).await;
            drop(slot);
        });
    }
}

async fn pass(shared: &Shared, key: &Key) {
    let started = Instant::now();
    // A slow peer must not hold a slot for ever; what was left undone is observed again.
    let result = match tokio::time::timeout(limits::PASS_TIMEOUT, reconcile(shared, key)).await {
        Ok(result) => result,
        Err(_) => Err(ReconcileError::Timeout),
    };
    shared.metrics.observe_pass(key.kind, started.elapsed(), result.is_ok());
    match result {
        Ok(recheck) => shared.queue.finish(key, recheck),
        Err(error) if error.is_conflict() => {
            tracing::debug!("somebody else was faster, observed again");
            shared.queue.finish(key, Some(Duration::ZERO));
        }
        Err(error) => {
            match error.kind() {
                ErrorKind::Internal => tracing::error!(error = error.chain(), "pass failed"),
                _ => tracing::warn!(error = error.chain(), "pass failed"),
            }
            shared.queue.fail(key);
        }
    }
}

async fn reconcile(shared: &Shared, key: &Key) -> Result<Option<Duration>, ReconcileError> {
    shared.cache.settled().await?;
    match key.kind {
        Kind::Image => image::reconcile(&key.name, shared).await,
        Kind::Manager => manager::reconcile(&key.name, shared).await,
        Kind::DataSource => data_source::reconcile(&key.name, shared).await,
        Kind::Volume => volume::reconcile(&key.name, shared).await,
        Kind::Node => node::reconcile(&key.name, shared).await,
    }
}
