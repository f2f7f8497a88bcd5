//! The loop of the role: what to look at, and when.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use api::engine::InstanceState;
use api::error::sentence;
use api::ids::NodeName;
use api::{BackingImage, Condition, Engine, Node, Replica};
use dataplane::loop_device::Owner;
use futures::StreamExt;
use futures::stream::BoxStream;
use jiff::Timestamp;
use runtime::process::ProcessIdentity;
use runtime::queue::Queue;
use runtime::transport::Security;
use store::{Selector, Store, StoreError, TypedEvent};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, debug, info_span, warn};

use crate::claims::Claim;
use crate::disk_calls::DiskCalls;
use crate::endings::Endings;
use crate::engine_progress::Progress;
use crate::error::InstanceError;
use crate::first_pass::FirstPass;
use crate::limits::{DISK_ANSWER, ENGINE_SILENCE_LIMIT, FIRST_PASS, HOLDER_LIMIT, RESYNC, RETRY, WORKERS};
use crate::metrics::Metrics;
use crate::processes::Processes;
use crate::{clock, disk_watch, disks, engines, kernel, replicas};

/// One node.
#[derive(Clone)]
pub struct Config {
    pub node: NodeName,
    /// Where its replicas listen.
    pub ip: IpAddr,
    /// Its working place (`DIR/nodes/<node>/instance`): process records, logs, engine sockets and mount files.
    pub directory: PathBuf,
    /// Our own binary.
    pub program: PathBuf,
    pub store: Store,
    /// Disk directories are made when absent (standalone mode); otherwise an absent one is reported.
    pub create_disks: bool,
    /// Whether disks, tags and zone come from the Kubernetes node of the same name ([`crate::discovery`]).
    pub discover: bool,
    /// The user and group that agents run as, where it is not ours: they get what they write.
    pub disk_owner: Option<u32>,
    pub engines: EngineOptions,
    /// How its replicas listen and its engines connect. They are told the directory of the certificates.
    pub security: Security,
    /// See [`Metrics::register`].
    pub metrics: Metrics,
    /// Told `true` once every disk and replica that was there at the start has had a pass.
    pub ready: watch::Sender<bool>,
}

/// How engines are kept alive.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Whether an engine that died may be replaced under its users, where the kernel can do that.
    pub replace: bool,
    /// How long requests wait for a working engine before they fail.
    pub holder_limit: Duration,
    /// After how long without an answer an engine is killed and replaced.
    pub silence_limit: Duration,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions { replace: true, holder_limit: HOLDER_LIMIT, silence_limit: ENGINE_SILENCE_LIMIT }
    }
}

/// What the role looks at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    Replica(String),
    Engine(String),
    Disks,
}

/// What every pass can use.
pub struct Role {
    pub config: Config,
    pub replicas: Processes,
    pub engines: Processes,
    pub queue: Queue<Key>,
    first_pass: FirstPass,
    pub tasks: TaskTracker,
    pub cancelled: CancellationToken,
    pub disk_calls: DiskCalls,
    pub endings: Endings,
    /// One port is given at a time.
    pub ports: tokio::sync::Mutex<()>,
    /// The mark of this node on its loop devices.
    pub loops: Owner,
    /// Whether engines of this node can be replaced under their users; for the Node object.
    pub engine_replacement: Condition,
    state: Mutex<State>,
}

/// What was seen in events; lost at a restart and made anew by the first events.
#[derive(Default)]
pub struct State {
    /// Replicas and engines by what makes them interesting: image and volume.
    replicas: BTreeMap<String, (String, String)>,
    engines: BTreeMap<String, String>,
    /// Pid and start time of processes whose end is waited for.
    watched: BTreeSet<(u32, u64)>,
    /// The last status of each engine on this node.
    pub engine_status: BTreeMap<String, proto::engine::Status>,
    /// Engines that are there and do not answer, and since when.
    pub engine_silence: BTreeMap<String, Timestamp>,
    /// Whether the engines that answer get anywhere.
    pub engine_progress: BTreeMap<String, Progress>,
    pub followed: BTreeSet<String>,
    /// What is shown of the replicas and engines of this node.
    pub shown: BTreeMap<Key, Shown>,
    /// Size and free room by disk.
    pub disks: BTreeMap<String, (u64, u64)>,
    /// Path and reserved bytes of the disks that this node shall have.
    pub disk_specs: BTreeMap<String, (String, u64)>,
    /// The disks of the other nodes.
    pub claims: BTreeMap<String, Vec<Claim>>,
    /// Whether all of them have been read.
    pub knows_claims: bool,
    /// The clock of this machine was set, and that is still told.
    pub clock_step: Option<clock::Step>,
}

/// What metrics tell of a replica or an engine.
pub struct Shown {
    pub state: InstanceState,
    pub has_device: bool,
}

impl Role {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Looks at `key` again when this process ends.
    pub fn watch_end(self: &Arc<Self>, identity: &ProcessIdentity, key: Key) {
        let id = (identity.pid, identity.start_ticks);
        if !self.state().watched.insert(id) {
            return;
        }
        let (role, identity) = (self.clone(), identity.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = role.cancelled.cancelled() => {}
                ended = identity.wait() => {
                    if let Err(error) = ended {
                        warn!(pid = identity.pid, %error, "cannot watch a process");
                    }
                    role.state().watched.remove(&id);
                    role.queue.add(key);
                }
            }
        });
    }
}

/// Runs the role until it is cancelled. Processes stay.
///
/// # Errors
/// `Invalid` when its certificates are in no directory.
pub async fn run(config: Config, cancelled: CancellationToken) -> Result<(), InstanceError> {
    if !config.security.is_plain() && config.security.directory().is_none() {
        return Err(InstanceError::NoCertificateFiles);
    }
    let open = |kind: &str| {
        let path = config.directory.join(kind);
        Processes::open(path.clone()).map_err(|source| InstanceError::File { action: "open", path, source })
    };
    let (replicas, engines) = (open("replicas")?, open("engines")?);
    let loops = Owner::of(&config.directory)
        .map_err(|source| InstanceError::Device { action: "recognize block devices".into(), source })?;
    let engine_replacement = kernel::engine_replacement(&config).await;
    let role = Arc::new(Role {
        replicas,
        engines,
        queue: Queue::new(RETRY),
        first_pass: FirstPass::new(config.ready.clone()),
        tasks: TaskTracker::new(),
        cancelled: cancelled.child_token(),
        disk_calls: DiskCalls::new(DISK_ANSWER),
        endings: Endings::default(),
        ports: tokio::sync::Mutex::new(()),
        loops,
        engine_replacement,
        state: Mutex::default(),
        config,
    });
    role.config.metrics.look_at(&role);
    role.adopt().await?;
    role.tasks.spawn(role.clone().end_first_pass());
    for _ in 0..WORKERS {
        let role = role.clone();
        role.tasks.clone().spawn(async move { role.work().await });
    }
    role.tasks.spawn(disk_watch::run(role.clone()));
    role.tasks.spawn(clock::run(role.clone()));
    let result = tokio::select! {
        () = role.cancelled.cancelled() => Ok(()),
        failed = role.clone().follow_store() => failed,
    };
    role.cancelled.cancel();
    role.tasks.close();
    role.tasks.wait().await;
    result
}

impl Role {
    /// The disks, every replica of this node, and every process that was recorded get a pass, also one whose object is gone.
    async fn adopt(&self) -> Result<(), InstanceError> {
        let names = |p: &Processes, root: &str| {
            let path = self.config.directory.join(root);
            p.names().map_err(|source| InstanceError::File { action: "list", path, source })
        };
        let ours: Vec<Replica> = self.config.store.list(&Selector::default()).await?;
        let ours = ours.into_iter().filter(|replica| self.is_ours(&replica.spec.node_id));
        let replicas = names(&self.replicas, "replicas")?.into_iter().chain(ours.filter_map(|r| r.metadata.name));
        let first: BTreeSet<Key> = replicas.map(Key::Replica).chain([Key::Disks]).collect();
        self.first_pass.begin(first.clone());
        first.into_iter().for_each(|key| self.queue.add(key));
        for name in names(&self.engines, "engines")? {
            self.queue.add(Key::Engine(name));
        }
        Ok(())
    }

    async fn end_first_pass(self: Arc<Self>) {
        let limit = tokio::time::sleep(FIRST_PASS);
        if self.cancelled.run_until_cancelled(limit).await.is_some() {
            let left = self.first_pass.give_up();
            if left > 0 {
                warn!(replicas = left, "a first look takes long; this node counts as ready without it");
            }
        }
    }

    async fn work(self: Arc<Self>) {
        loop {
            let key = tokio::select! {
                () = self.cancelled.cancelled() => return,
                key = self.queue.next() => key,
            };
            let span = info_span!("pass", node = %self.config.node, ?key);
            let passed = self.pass(&key).instrument(span.clone()).await;
            let _entered = span.enter();
            self.first_pass.ended(&key, passed.is_ok());
            match passed {
                Ok(recheck) => self.queue.finish(&key, Some(recheck.unwrap_or(RESYNC))),
                Err(InstanceError::Store(e)) if e.is_conflict() => {
                    debug!("somebody else was faster");
                    self.queue.fail(&key);
                }
                Err(error) => {
                    warn!(error = %sentence(&error), "pass failed");
                    self.queue.fail(&key);
                }
            }
        }
    }

    async fn pass(self: &Arc<Self>, key: &Key) -> Result<Option<Duration>, InstanceError> {
        match key {
            Key::Replica(name) => replicas::reconcile(self, name).await,
            Key::Engine(name) => engines::reconcile(self, name).await,
            Key::Disks => {
                let clock = self.state().clock_step.map(|step| step.condition(self.config.node.as_str()));
                self.know_claims().await?;
                let elsewhere: Vec<Claim> = self.state().claims.values().flatten().cloned().collect();
                disks::reconcile(&self.config, &self.disk_calls, &self.engine_replacement, clock, &elsewhere).await
            }
        }
    }

    /// Reads what the other nodes say of their disks, the first time: events come later.
    async fn know_claims(self: &Arc<Self>) -> Result<(), InstanceError> {
        if !self.state().knows_claims {
            let nodes = self.config.store.list::<Node>(&Selector::default()).await?;
            let others =
                nodes.iter().map(|node| (node.metadata.name.clone().unwrap_or_default(), Claim::of_node(node)));
            let others = others.filter(|(name, _)| !self.is_ours(name)).collect();
            let mut state = self.state();
            (state.claims, state.knows_claims) = (others, true);
        }
        Ok(())
    }

    async fn follow_store(self: Arc<Self>) -> Result<(), InstanceError> {
        let store = self.config.store.clone();
        let mut replicas: Events<Replica> = store.watch().await?;
        let mut engines: Events<Engine> = store.watch().await?;
        let mut images: Events<BackingImage> = store.watch().await?;
        let mut nodes: Events<Node> = store.watch().await?;
        loop {
            tokio::select! {
                Some(event) = replicas.next() => self.on_replica(event?),
                Some(event) = engines.next() => self.on_engine(event?),
                Some(event) = images.next() => self.on_image(event?),
                Some(event) = nodes.next() => self.on_node(event?),
                else => return Ok(()),
            }
        }
    }

    fn is_ours(&self, node: &str) -> bool {
        node == self.config.node.as_str()
    }

    fn on_replica(self: &Arc<Self>, event: TypedEvent<Replica>) {
        match event {
            TypedEvent::Applied(replica) => {
                let name = replica.metadata.name.unwrap_or_default();
                let known = self.state().replicas.contains_key(&name);
                if self.is_ours(&replica.spec.node_id) {
                    let about = (replica.spec.backing_image, replica.spec.volume_name);
                    let shown = Shown { state: replica.status.unwrap_or_default().current_state, has_device: false };
                    let mut state = self.state();
                    state.replicas.insert(name.clone(), about);
                    state.shown.insert(Key::Replica(name.clone()), shown);
                } else if !known {
                    return;
                }
                self.queue.add(Key::Replica(name));
            }
            TypedEvent::Deleted(replica) => {
                let name = replica.metadata.name.unwrap_or_default();
                let mut state = self.state();
                state.shown.remove(&Key::Replica(name.clone()));
                if state.replicas.remove(&name).is_some() {
                    self.queue.add(Key::Replica(name));
                }
            }
            TypedEvent::Relist => self.look_at_everything(),
        }
    }

    fn on_engine(self: &Arc<Self>, event: TypedEvent<Engine>) {
        let (engine, is_gone) = match event {
            TypedEvent::Applied(engine) => (engine, false),
            TypedEvent::Deleted(engine) => (engine, true),
            TypedEvent::Relist => return self.look_at_everything(),
        };
        let name = engine.metadata.name.unwrap_or_default();
        // An engine raises generations in the records of its replicas, wherever it runs.
        let mut state = self.state();
        let volume = &engine.spec.volume_name;
        for replica in state.replicas.iter().filter(|(_, (_, v))| v == volume).map(|(n, _)| n.clone()) {
            self.queue.add(Key::Replica(replica));
        }
        state.shown.remove(&Key::Engine(name.clone()));
        if self.is_ours(&engine.spec.node_id) {
            let status = engine.status.unwrap_or_default();
            if !is_gone {
                let shown = Shown { state: status.current_state, has_device: !status.endpoint.is_empty() };
                state.shown.insert(Key::Engine(name.clone()), shown);
            }
            state.engines.insert(name.clone(), engine.spec.volume_name);
        } else if state.engines.remove(&name).is_none() {
            return;
        }
        self.queue.add(Key::Engine(name));
    }

    fn on_image(self: &Arc<Self>, event: TypedEvent<BackingImage>) {
        let image = match event {
            TypedEvent::Applied(image) | TypedEvent::Deleted(image) => image.metadata.name.unwrap_or_default(),
            TypedEvent::Relist => return self.look_at_everything(),
        };
        for (name, _) in self.state().replicas.iter().filter(|(_, (i, _))| *i == image) {
            self.queue.add(Key::Replica(name.clone()));
        }
    }

    fn on_node(self: &Arc<Self>, event: TypedEvent<Node>) {
        let (node, is_gone) = match event {
            TypedEvent::Applied(node) => (node, false),
            TypedEvent::Deleted(node) => (node, true),
            TypedEvent::Relist => return self.look_at_everything(),
        };
        let name = node.metadata.name.clone().unwrap_or_default();
        let mut state = self.state();
        if self.is_ours(&name) {
            let seen = node.status.unwrap_or_default().disk_status.into_iter();
            let wished = node.spec.disks.into_iter();
            state.disks = seen.map(|(name, disk)| (name, (disk.storage_maximum, disk.storage_available))).collect();
            state.disk_specs = wished.map(|(name, disk)| (name, (disk.path, disk.storage_reserved))).collect();
        } else {
            let claims = if is_gone { vec![] } else { Claim::of_node(&node) };
            if state.claims.insert(name, claims.clone()).is_some_and(|before| before == claims) {
                return;
            }
        }
        self.queue.add(Key::Disks);
    }

    /// Events were lost: every object that is known gets a pass, and the lists are read anew for those that are not.
    fn look_at_everything(self: &Arc<Self>) {
        let role = self.clone();
        self.tasks.spawn(async move {
            let everything = Selector::default();
            let (Ok(replicas), Ok(engines)) = (
                role.config.store.list::<Replica>(&everything).await,
                role.config.store.list::<Engine>(&everything).await,
            ) else {
                return warn!("events were lost and the store does not answer; the next resync heals it");
            };
            replicas.into_iter().for_each(|replica| role.on_replica(TypedEvent::Applied(replica)));
            engines.into_iter().for_each(|engine| role.on_engine(TypedEvent::Applied(engine)));
        });
        let mut state = self.state();
        state.knows_claims = false;
        for name in state.replicas.keys() {
            self.queue.add(Key::Replica(name.clone()));
        }
        for name in state.engines.keys() {
            self.queue.add(Key::Engine(name.clone()));
        }
        self.queue.add(Key::Disks);
    }
}

type Events<T> = BoxStream<'static, Result<TypedEvent<T>, StoreError>>;
