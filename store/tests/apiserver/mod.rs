//! A real API server for the tests of one program: `sanity-tests/cluster/apiserver.sh`, which ends when the program does.

#[path = "../../../sanity-tests/cluster/apiserver.rs"]
mod program;

use std::path::Path;
use std::time::Duration;

use backing_image_store::kubernetes::Kubernetes;
use backing_image_store::{Object, ObjectKey, ObjectStore, Preconditions, ResourceType, Selector};
use futures::StreamExt;
use program::ApiServer;
#[allow(unused_imports, reason = "each test program uses its part")]
pub(crate) use program::real;
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

use crate::suite::{at, gadgets, kind, object, set, widgets};

/// The one server; whoever has it has the cluster for himself.
static SERVER: Mutex<Option<Server>> = Mutex::const_new(None);

pub struct Server(ApiServer);

/// The server, empty; `None` where there is none and none is demanded.
pub async fn take() -> Option<MutexGuard<'static, Option<Server>>> {
    let mut server = SERVER.lock().await;
    if server.is_none() {
        *server = Some(Server::begin().await?);
    }
    // As an account of the cluster's own, which admission webhooks that a test left behind are not asked about.
    let group = "system:serviceaccounts:kube-system";
    let store = server.as_ref()?.store_of("system:serviceaccount:kube-system:cleaner", &[group]).await;
    for resource in test_kinds() {
        empty(&store, &resource).await;
    }
    Some(server)
}

/// The kinds that tests make objects of.
fn test_kinds() -> Vec<ResourceType> {
    let images = ResourceType { version: "v1beta2".into(), ..kind(api::names::GROUP, "BackingImage", true) };
    let volumes = ResourceType { version: "v1beta2".into(), ..kind(api::names::GROUP, "Volume", true) };
    vec![gadgets(), widgets(), kind("example.com", "Widget", true), kind("", "ConfigMap", true), images, volumes]
}

impl Server {
    async fn begin() -> Option<Server> {
        let mut server = Server(ApiServer::begin()?);
        install_kinds(&server.store("admin").await, program::root()).await;
        server.ask("collect");
        Some(server)
    }

    /// One of the script's commands.
    pub fn ask(&mut self, command: &str) -> String {
        self.0.ask(command)
    }

    /// The store as that user sees it, with connections of its own.
    pub async fn store(&self, user: &str) -> Kubernetes {
        Kubernetes::new(self.0.client(user).await)
    }

    /// The store as seen by somebody of that name who belongs to these groups and may do everything.
    pub async fn store_of(&self, name: &str, groups: &[&str]) -> Kubernetes {
        Kubernetes::new(self.0.client_of(name, groups).await)
    }
}

/// Our own kinds as they are delivered, and those of the tests.
async fn install_kinds(store: &Kubernetes, root: &Path) {
    let definitions = kind("apiextensions.k8s.io", "CustomResourceDefinition", false);
    let mut all: Vec<Object> = test_kinds().iter().filter(|k| k.group.starts_with("example")).map(definition).collect();
    for file in std::fs::read_dir(root.join("deploy/crds")).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        all.push(object(serde_yaml_ng::from_str(&text).unwrap()));
    }
    assert!(all.len() > 8, "our own are among them");
    for new in all {
        let key = store.create(&definitions, new).await.unwrap().key();
        let mut changes = store.watch(&definitions, None, None).await.unwrap();
        while !is_established(&store.get(&definitions, &key).await.unwrap().unwrap()) {
            tokio::time::timeout(Duration::from_secs(60), changes.next()).await.expect("it is taken up");
        }
    }
    let namespaces = kind("", "Namespace", false);
    for name in ["shop", "attic", "longhorn-system"] {
        store.create(&namespaces, object(json!({"metadata": {"name": name}}))).await.unwrap();
    }
}

fn definition(of: &ResourceType) -> Object {
    let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    object(json!({
        "metadata": {"name": format!("{}.{}", of.plural, of.group)},
        "spec": {
            "group": of.group,
            "scope": if of.namespaced { "Namespaced" } else { "Cluster" },
            "names": {"kind": of.kind, "plural": of.plural},
            "versions": [{
                "name": of.version, "served": true, "storage": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": schema},
            }],
        },
    }))
}

fn is_established(definition: &Object) -> bool {
    let conditions = at(definition, "/status/conditions").as_array().cloned().unwrap_or_default();
    conditions.iter().any(|c| c["type"] == "Established" && c["status"] == "True")
}

/// Removes all objects of a kind that the last test left, whatever holds them.
async fn empty(store: &Kubernetes, resource: &ResourceType) {
    let ours = |o: &Object| o.namespace() != Some("kube-system") && o.namespace() != Some("kube-public");
    let list = store.list(resource, None, &Selector::default()).await.unwrap();
    for object in list.items.into_iter().filter(ours) {
        let key = ObjectKey { namespace: object.namespace().map(str::to_owned), name: object.name().to_owned() };
        if at(&object, "/metadata/finalizers").is_array() {
            let mut free = set(&object, "/metadata/finalizers", Value::Array(vec![]));
            free.0["metadata"].as_object_mut().unwrap().shift_remove("resourceVersion");
            let _ = store.replace(resource, free).await;
        }
        let _ = store.delete(resource, &key, &Preconditions::default()).await;
    }
    let left = store.list(resource, None, &Selector::default()).await.unwrap();
    assert_eq!(left.items.into_iter().filter(ours).count(), 0, "{}", resource.kind);
}
