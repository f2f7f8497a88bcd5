//! Pods as workloads.
//!
//! Nothing is kept here: each call asks the Kubernetes API, so whoever comes next finds every workload by its label. What a workload
//! was started as stands in an annotation of its pod. Pods without that annotation are none of ours, whatever their labels say.

mod limits;
mod make;
mod state;
mod toleration;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::{Node, Pod, Secret, Toleration};
use kube::api::{Api, DeleteParams, ListParams, PostParams, Preconditions};
use kube::{Client, ResourceExt};
use tokio::time::{Instant, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, info};

use crate::changes::Changes;
use crate::{Workload, WorkloadError, WorkloadSpec, Workloads, check_spec};
pub use make::Resources;
use state::NodeView;
pub use toleration::tolerations;

/// How pods run.
#[derive(Clone, Debug)]
pub struct PodsConfig {
    pub namespace: String,
    /// The image that holds our binary as its entry point.
    pub image: String,
    /// `Always`, `IfNotPresent` or `Never`; without it as Kubernetes decides by the image's tag.
    pub pull_policy: Option<String>,
    /// Names of the secrets to pull the image with.
    pub pull_secrets: Vec<String>,
    /// It needs no rights: its token is not mounted.
    pub service_account: String,
    pub priority_class: Option<String>,
    pub tolerations: Vec<Toleration>,
    pub resources: Resources,
}

impl PodsConfig {
    /// With the usual resources.
    pub fn new(namespace: &str, image: &str, service_account: &str) -> PodsConfig {
        PodsConfig {
            namespace: namespace.to_owned(),
            image: image.to_owned(),
            pull_policy: None,
            pull_secrets: vec![],
            service_account: service_account.to_owned(),
            priority_class: None,
            tolerations: vec![],
            resources: Resources::default(),
        }
    }
}

/// Workloads as pods. Dropping it leaves them running.
pub struct Pods {
    inner: Arc<Inner>,
    _stop: DropGuard,
}

struct Inner {
    config: PodsConfig,
    pods: Api<Pod>,
    nodes: Api<Node>,
    secrets: Api<Secret>,
    changes: Changes,
    /// The names that the watch has seen, for listeners that were too slow.
    names: Mutex<BTreeSet<String>>,
}

/// What was seen of nodes, by name; `None`: that is not known.
type Nodes = BTreeMap<String, Option<NodeView>>;

/// What a call was about, for its error.
#[derive(Clone, Copy)]
struct About<'a> {
    action: &'static str,
    name: &'a str,
}

impl Pods {
    /// Watches the pods of that namespace. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the API does not answer, or does not allow it.
    pub async fn open(client: Client, config: PodsConfig) -> Result<Pods, WorkloadError> {
        let inner = Arc::new(Inner {
            pods: Api::namespaced(client.clone(), &config.namespace),
            secrets: Api::namespaced(client.clone(), &config.namespace),
            nodes: Api::all(client),
            config,
            changes: Changes::default(),
            names: Mutex::default(),
        });
        let begun = watch::begin(&inner).await?;
        let stop = CancellationToken::new();
        let (watched, stopped) = (Arc::downgrade(&inner), stop.clone());
        tokio::spawn(async move { stopped.run_until_cancelled(watch::run(watched, begun)).await });
        Ok(Pods { inner, _stop: stop.drop_guard() })
    }
}

impl Inner {
    fn names(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request.
    async fn ask<T>(
        &self,
        about: About<'_>,
        request: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, WorkloadError> {
        match timeout(limits::REQUEST, request).await {
            Ok(answer) => answer.map_err(|error| failed(about, error)),
            Err(elapsed) => Err(WorkloadError::Unavailable { source: Box::new(elapsed) }),
        }
    }

    async fn pod(&self, name: &str) -> Result<Option<Pod>, WorkloadError> {
        self.ask(About { action: "read", name }, self.pods.get_opt(name)).await
    }

    async fn workload(&self, pod: &Pod, spec: WorkloadSpec) -> Workload {
        self.workload_among(pod, spec, &mut Nodes::new()).await
    }

    /// A pod with what is known of its node, which is asked only where it makes a difference, and once.
    async fn workload_among(&self, pod: &Pod, spec: WorkloadSpec, nodes: &mut Nodes) -> Workload {
        let name = spec.node.as_str();
        let depends = state::depends_on_node(pod);
        if depends && !nodes.contains_key(name) {
            nodes.insert(name.to_owned(), self.node(name).await);
        }
        let node = nodes.get(name).and_then(Option::as_ref).filter(|_| depends);
        let is_outdated = make::is_outdated(pod, &self.config);
        Workload { state: state::of(pod, node), ip: state::ip(pod), spec, is_outdated }
    }

    /// `None` when that is not known, so that the pod alone decides.
    async fn node(&self, name: &str) -> Option<NodeView> {
        match timeout(limits::REQUEST, self.nodes.get_opt(name)).await {
            Ok(Ok(node)) => Some(NodeView::of(node.as_ref())),
            Ok(Err(error)) => {
                debug!(node = name, error = &error as &dyn std::error::Error, "node cannot be read");
                None
            }
            Err(_) => None,
        }
    }

    async fn end(self: &Arc<Self>, name: &str) -> Result<(), WorkloadError> {
        let about = About { action: "end", name };
        let deadline = Instant::now() + limits::REMOVAL;
        let mut changes = self.listen();
        let mut asked = String::new();
        loop {
            let Some(pod) = self.pod(name).await? else { return Ok(()) };
            let Some(spec) = make::spec_of(&pod) else { return Err(foreign(name)) };
            let uid = pod.uid().unwrap_or_default();
            if uid != asked {
                let preconditions = Some(Preconditions { uid: Some(uid.clone()), resource_version: None });
                let grace_period_seconds = Some(limits::STOP_GRACE_SECONDS);
                let options = DeleteParams { grace_period_seconds, preconditions, ..DeleteParams::default() };
                match self.ask(about, async { Ok(self.pods.delete(name, &options).await) }).await? {
                    Ok(_) => {
                        asked = uid;
                        continue;
                    }
                    // Another one took its place, or it went by itself: both are news.
                    Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                    Err(error) => return Err(failed(about, error)),
                }
            }
            if Instant::now() >= deadline {
                let state = self.workload(&pod, spec).await.state;
                return Err(WorkloadError::Stays {
                    name: name.to_owned(),
                    seconds: limits::REMOVAL.as_secs(),
                    reason: state::why_it_stays(&state, &pod),
                });
            }
            // The watch tells at once; looking again is for a watch that was cut off.
            let news = async { while changes.next().await.is_some_and(|n| n != name) {} };
            let _ = timeout(limits::LOOK_AGAIN, news).await;
        }
    }

    fn listen(self: &Arc<Self>) -> BoxStream<'static, String> {
        let inner = Arc::downgrade(self);
        let names = move || inner.upgrade().map_or(vec![], |inner| inner.names().iter().cloned().collect());
        self.changes.listen(names)
    }
}

/// A pod that has the name of a workload and was not made here.
fn foreign(name: &str) -> WorkloadError {
    let reason = "a pod of that name is there that this driver did not make; remove it".to_owned();
    WorkloadError::Invalid { name: name.to_owned(), reason }
}

/// A failed request, as callers know it.
fn failed(About { action, name }: About<'_>, error: kube::Error) -> WorkloadError {
    match error {
        kube::Error::Api(status) if matches!(status.code, 401 | 403) => {
            WorkloadError::Forbidden { action, name: name.to_owned(), reason: status.message.clone() }
        }
        kube::Error::Api(status) if matches!(status.code, 400 | 413 | 422) => {
            WorkloadError::Invalid { name: name.to_owned(), reason: status.message.clone() }
        }
        source => WorkloadError::Unavailable { source: Box::new(source) },
    }
}

#[async_trait]
impl Workloads for Pods {
    async fn ensure(&self, spec: &WorkloadSpec) -> Result<Workload, WorkloadError> {
        check_spec(spec)?;
        let inner = &self.inner;
        let about = About { action: "start", name: &spec.name };
        let pod = make::pod(spec, &inner.config)?;
        if let Some(secret) = make::secret(spec, &inner.config) {
            let about = About { action: "make the secret of", name: &spec.name };
            let made =
                inner.ask(about, async { Ok(inner.secrets.create(&PostParams::default(), &secret).await) }).await?;
            // One of that name holds the same: a revision never changes.
            if let Err(error) = made
                && !matches!(&error, kube::Error::Api(status) if status.code == 409)
            {
                return Err(failed(about, error));
            }
        }
        let created = inner.ask(about, async { Ok(inner.pods.create(&PostParams::default(), &pod).await) }).await?;
        match created {
            Ok(pod) => {
                info!(workload = spec.name, node = %spec.node, "pod created");
                Ok(inner.workload(&pod, spec.clone()).await)
            }
            Err(kube::Error::Api(status)) if status.code == 409 => match inner.pod(&spec.name).await? {
                Some(found) => match make::spec_of(&found) {
                    Some(started) if started.is_same(spec) => Ok(inner.workload(&found, started).await),
                    Some(_) => Err(WorkloadError::Different { name: spec.name.clone() }),
                    None => Err(foreign(&spec.name)),
                },
                // It went in between; whoever wants it asks again.
                None => Err(WorkloadError::Unavailable { source: Box::new(kube::Error::Api(status)) }),
            },
            Err(error) => Err(failed(about, error)),
        }
    }

    async fn get(&self, name: &str) -> Result<Option<Workload>, WorkloadError> {
        let Some(pod) = self.inner.pod(name).await? else { return Ok(None) };
        let Some(spec) = make::spec_of(&pod) else { return Ok(None) };
        Ok(Some(self.inner.workload(&pod, spec).await))
    }

    async fn list(&self) -> Result<Vec<Workload>, WorkloadError> {
        let selection = ListParams::default().labels(&make::selector());
        let about = About { action: "list", name: "*" };
        let pods = self.inner.ask(about, self.inner.pods.list(&selection)).await?;
        let (mut nodes, mut workloads) = (Nodes::new(), vec![]);
        for pod in pods {
            let Some(spec) = make::spec_of(&pod) else { continue };
            workloads.push(self.inner.workload_among(&pod, spec, &mut nodes).await);
        }
        Ok(workloads)
    }

    async fn remove(&self, name: &str) -> Result<(), WorkloadError> {
        self.inner.end(name).await
    }

    fn changes(&self) -> BoxStream<'static, String> {
        self.inner.listen()
    }
}
