//! A real API server for the tests of one program: `sanity-tests/cluster/apiserver.sh`, which ends when the program does.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use backing_image_store::kubernetes::Kubernetes;
use backing_image_store::{Object, ObjectKey, ObjectStore, Preconditions, ResourceType, Selector};
use futures::StreamExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

use crate::suite::{at, gadgets, kind, object, set, widgets};

/// The one server; whoever has it has the cluster for himself.
static SERVER: Mutex<Option<Server>> = Mutex::const_new(None);

pub struct Server {
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    folder: PathBuf,
    _script: Child,
}

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
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut script = Command::new(root.join("sanity-tests/cluster/apiserver.sh"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash is there");
        let (commands, answers) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
        let mut server = Server { commands, answers: BufReader::new(answers), folder: PathBuf::new(), _script: script };
        let Some(ready) = server.answer() else {
            let missing = "there is no kube-apiserver to test with: run sanity-tests/cluster/build.sh kube (its words stand above)";
            assert!(std::env::var_os("REQUIRE_REAL").is_none(), "{missing}");
            // Past the test harness, which keeps to itself what a test prints that passes.
            std::io::stderr().write_all(format!("SKIPPED, nothing was tested: {missing}\n").as_bytes()).unwrap();
            return None;
        };
        server.folder = ready.strip_prefix("ready ").expect("it says where").into();
        let store = server.store("admin").await;
        install_kinds(&store, root).await;
        server.ask("collect");
        Some(server)
    }

    fn answer(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line).unwrap();
        (read > 0).then(|| line.trim().to_owned())
    }

    /// One of the script's commands.
    pub fn ask(&mut self, command: &str) -> String {
        writeln!(self.commands, "{command}").unwrap();
        self.answer().expect("the script goes on")
    }

    /// The store as that user sees it, with connections of its own.
    pub async fn store(&self, user: &str) -> Kubernetes {
        let file = Kubeconfig::read_from(self.folder.join(format!("{user}.kubeconfig"))).unwrap();
        connect(file).await
    }

    /// The store as seen by somebody of that name who belongs to these groups and may do everything.
    pub async fn store_of(&self, name: &str, groups: &[&str]) -> Kubernetes {
        let mut file = Kubeconfig::read_from(self.folder.join("admin.kubeconfig")).unwrap();
        let info = file.auth_infos[0].auth_info.as_mut().unwrap();
        info.impersonate = Some(name.to_owned());
        info.impersonate_groups = Some(["system:masters"].iter().chain(groups).map(|g| (*g).to_owned()).collect());
        connect(file).await
    }
}

async fn connect(file: Kubeconfig) -> Kubernetes {
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
    Kubernetes::new(kube::Client::try_from(config).unwrap())
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
