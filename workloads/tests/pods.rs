//! The contract of workloads, run against pods of a real API server; and what only pods promise.
//!
//! The kubelet is one of the tests' own. `make cluster-test` runs this; it needs the programs that `sanity-tests/cluster/build.sh` builds.

#[path = "../../sanity-tests/cluster/apiserver.rs"]
mod apiserver;
mod kubelet;
mod program;
mod suite;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use api::{BackingImageManager, Owner};
use apiserver::{ApiServer, real};
use backing_image_workloads::pods::{Pods, PodsConfig};
use backing_image_workloads::{WorkloadSpec, WorkloadState};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, CustomResourceExt, ResourceExt};
use kubelet::Kubelet;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use suite::{Any, ask, spec, wait_for, wait_until_running};
use tokio::sync::{Mutex, MutexGuard};

const NAMESPACE: &str = "longhorn-system";

/// The one server; whoever has it has the cluster for himself.
static SERVER: Mutex<Option<ApiServer>> = Mutex::const_new(None);

/// An empty cluster with a node that works. The node ends first.
struct Fixture {
    kubelet: Kubelet,
    server: MutexGuard<'static, Option<ApiServer>>,
}

impl Fixture {
    async fn new() -> Option<Fixture> {
        let mut server = SERVER.lock().await;
        if server.is_none() {
            let begun = ApiServer::begin()?;
            let client = begun.client("admin").await;
            create::<Namespace>(Api::all(client.clone()), json!({"metadata": {"name": NAMESPACE}})).await;
            for name in ["default", "agent"] {
                let accounts = Api::<ServiceAccount>::namespaced(client.clone(), NAMESPACE);
                create(accounts, json!({"metadata": {"name": name}})).await;
            }
            create::<Node>(Api::all(client.clone()), json!({"metadata": {"name": "node-1"}})).await;
            *server = Some(begun);
        }
        let client = server.as_ref()?.client("admin").await;
        let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
        for pod in pods.list(&ListParams::default()).await.unwrap() {
            let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
            pods.delete(&pod.name_any(), &now).await.unwrap();
        }
        set_node(&client, "True", "kubelet is posting").await;
        let kubelet = Kubelet::begin(client, NAMESPACE);
        Some(Fixture { kubelet, server })
    }

    async fn client(&self) -> Client {
        self.server.as_ref().unwrap().client("admin").await
    }

    async fn open(&self) -> Any {
        self.open_with("test.local/driver:1").await
    }

    async fn open_with(&self, image: &str) -> Any {
        let config = PodsConfig::new(NAMESPACE, image, "agent");
        Arc::new(Pods::open(self.client().await, config).await.unwrap())
    }

    async fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client().await, NAMESPACE)
    }
}

async fn create<K>(api: Api<K>, object: Value)
where
    K: kube::Resource<DynamicType = ()> + DeserializeOwned + serde::Serialize + Clone + std::fmt::Debug,
{
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
}

async fn set_node(client: &Client, ready: &str, message: &str) {
    let condition = json!({"type": "Ready", "status": ready, "message": message});
    let patch = Patch::Merge(json!({"status": {"conditions": [condition]}}));
    Api::<Node>::all(client.clone()).patch_status("node-1", &PatchParams::default(), &patch).await.unwrap();
}

async fn begin() -> Option<Fixture> {
    Fixture::new().await
}

async fn open(fixture: &Fixture) -> Any {
    fixture.open().await
}

suite::promises!(real);

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn finds_what_runs_after_a_restart() {
    let Some(fixture) = Fixture::new().await else { return };
    let first = fixture.open().await;
    first.ensure(&spec("a", "serve")).await.unwrap();
    let running = wait_until_running(&first, "a").await;
    let pid = ask(&running, "pid").await;
    drop(first);
    let second = fixture.open().await;
    let found = second.list().await.unwrap();
    assert_eq!((found.len(), &found[0].spec, found[0].ip), (1, &spec("a", "serve"), running.ip));
    second.ensure(&spec("a", "serve")).await.unwrap();
    assert_eq!(ask(&running, "pid").await, pid, "undisturbed");
}

/// A pod that somebody else made, with our label and without.
#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn leaves_pods_of_others_alone() {
    let Some(fixture) = Fixture::new().await else { return };
    let workloads = fixture.open().await;
    let pods = fixture.pods().await;
    for labels in [json!({"longhorn.io/managed-by": "longhorn-manager"}), json!({})] {
        // Bound to a node that nobody plays.
        let containers = json!([{"name": "c", "image": "i", "args": ["x"]}]);
        let pod = json!({"metadata": {"name": "theirs", "labels": labels},
            "spec": {"nodeSelector": {"a": "b"}, "serviceAccountName": "agent", "containers": containers}});
        fixture.kubelet.is_cut_off.store(true, Ordering::Relaxed);
        create(pods.clone(), pod).await;
        assert_eq!(workloads.list().await.unwrap().len(), 0);
        assert!(workloads.get("theirs").await.unwrap().is_none());
        let error = workloads.ensure(&spec("theirs", "serve")).await.unwrap_err();
        assert!(error.to_string().contains("did not make"), "{error}");
        let error = workloads.remove("theirs").await.unwrap_err();
        assert!(error.to_string().contains("did not make"), "{error}");
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        pods.delete("theirs", &now).await.unwrap();
    }
}

/// What is left of an upgrade of the driver.
#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn tells_which_pods_are_of_another_image() {
    let Some(fixture) = Fixture::new().await else { return };
    let old = fixture.open().await;
    old.ensure(&spec("a", "serve")).await.unwrap();
    assert!(!wait_until_running(&old, "a").await.is_outdated);
    let new = fixture.open_with("test.local/driver:2").await;
    assert!(new.get("a").await.unwrap().unwrap().is_outdated && new.list().await.unwrap()[0].is_outdated);
    assert!(new.ensure(&spec("a", "serve")).await.unwrap().is_outdated, "it is left alone until somebody removes it");
    new.remove("a").await.unwrap();
    new.ensure(&spec("a", "serve")).await.unwrap();
    assert!(!wait_until_running(&new, "a").await.is_outdated);
    let pod = fixture.pods().await.get("a").await.unwrap();
    assert_eq!(pod.spec.unwrap().containers[0].image.as_deref(), Some("test.local/driver:2"));
}

/// By the garbage collector of the cluster, while nobody of ours does anything.
#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn a_pod_goes_with_its_object() {
    let Some(mut fixture) = Fixture::new().await else { return };
    let client = fixture.client().await;
    let definitions = Api::<CustomResourceDefinition>::all(client.clone());
    definitions.create(&PostParams::default(), &BackingImageManager::crd()).await.unwrap();
    let managers = Api::<BackingImageManager>::namespaced(client, NAMESPACE);
    let new = BackingImageManager::new("a", Default::default());
    let begun = Instant::now();
    let manager = loop {
        match managers.create(&PostParams::default(), &new).await {
            Ok(manager) => break manager,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(30), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await; // poll
    };
    fixture.server.as_mut().unwrap().ask("collect");
    let workloads = fixture.open().await;
    let owned = WorkloadSpec { owner: Owner::of(&manager), ..spec("a", "serve") };
    workloads.ensure(&owned).await.unwrap();
    workloads.ensure(&spec("b", "serve")).await.unwrap();
    let (running, other) = (wait_until_running(&workloads, "a").await, wait_until_running(&workloads, "b").await);
    managers.delete("a", &DeleteParams::default()).await.unwrap();
    let mut changes = workloads.changes();
    let gone = async {
        while workloads.get("a").await.unwrap().is_some() {
            changes.next().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("it goes");
    let address = (running.ip.unwrap(), suite::PORT);
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "and its process with it");
    ask(&other, "pid").await;
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn a_pod_on_a_node_that_does_not_answer_is_unknown_and_stays() {
    let Some(fixture) = Fixture::new().await else { return };
    let workloads = fixture.open().await;
    workloads.ensure(&spec("a", "serve")).await.unwrap();
    wait_until_running(&workloads, "a").await;
    // What the cluster writes when a node falls silent: the node first, then its pods.
    fixture.kubelet.is_cut_off.store(true, Ordering::Relaxed);
    set_node(&fixture.client().await, "Unknown", "kubelet stopped posting").await;
    let conditions = json!([{"type": "Ready", "status": "False"}, {"type": "ContainersReady", "status": "True"}]);
    let patch = Patch::Merge(json!({"status": {"conditions": conditions}}));
    fixture.pods().await.patch_status("a", &PatchParams::default(), &patch).await.unwrap();
    let unknown = wait_for(&workloads, "a", |state| matches!(state, WorkloadState::Unknown { .. })).await;
    let message = "its node is not ready: kubelet stopped posting".to_owned();
    assert_eq!(unknown.state, WorkloadState::Unknown { message });
    // Its end cannot be seen, so it is not said to be gone.
    let removal = tokio::time::timeout(Duration::from_secs(2), workloads.remove("a")).await;
    assert!(removal.is_err(), "{removal:?}");
    assert!(workloads.get("a").await.unwrap().is_some());
    fixture.kubelet.is_cut_off.store(false, Ordering::Relaxed);
    workloads.remove("a").await.unwrap();
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn says_what_a_pod_waits_for_and_who_may_not() {
    let Some(fixture) = Fixture::new().await else { return };
    let workloads = fixture.open().await;
    fixture.kubelet.is_cut_off.store(true, Ordering::Relaxed);
    workloads.ensure(&spec("a", "late")).await.unwrap();
    let waiting = json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}});
    let container =
        json!({"name": "workload", "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": waiting});
    let patch = Patch::Merge(json!({"status": {"phase": "Pending", "containerStatuses": [container]}}));
    fixture.pods().await.patch_status("a", &PatchParams::default(), &patch).await.unwrap();
    let says = |state: &WorkloadState| matches!(state, WorkloadState::Starting { message } if !message.is_empty());
    let message = "ImagePullBackOff: no such image".to_owned();
    assert_eq!(wait_for(&workloads, "a", says).await.state, WorkloadState::Starting { message });
    fixture.kubelet.is_cut_off.store(false, Ordering::Relaxed);

    let stranger = fixture.server.as_ref().unwrap().client("stranger").await;
    let error = Pods::open(stranger, PodsConfig::new(NAMESPACE, "i", "agent")).await.err().unwrap();
    assert_eq!(error.kind(), api::ErrorKind::NotReady);
    assert!(error.to_string().contains(r#"User "stranger" cannot list"#), "{error}");
}
