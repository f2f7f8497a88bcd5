//! A kubelet in short: pods of a namespace as processes of this machine, each with a loopback address of its own.
//!
//! It does what ours depend on: `$(POD_IP)`, readiness by the probe's port, the end of a container with the last lines of its log, and
//! deletion, which is complete only when the kubelet says so. Images, mounts and limits it does not know; `sanity-tests/` has real ones.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, WatchEvent, WatchParams};
use kube::{Client, ResourceExt};
use runtime::process::ProcessIdentity;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Works until it is dropped; its processes end with it.
pub struct Kubelet {
    /// While it is set nothing is reported and nothing is ended, as on a node that is cut off.
    pub is_cut_off: Arc<AtomicBool>,
    _stop: DropGuard,
}

impl Kubelet {
    pub fn begin(client: Client, namespace: &str) -> Kubelet {
        let stop = CancellationToken::new();
        let is_cut_off = Arc::new(AtomicBool::new(false));
        let pods = Api::namespaced(client, namespace);
        tokio::spawn(stop.clone().run_until_cancelled_owned(work(pods, is_cut_off.clone())));
        Kubelet { is_cut_off, _stop: stop.drop_guard() }
    }
}

async fn work(pods: Api<Pod>, is_cut_off: Arc<AtomicBool>) {
    let mut tasks = JoinSet::new();
    let mut deletions: BTreeMap<String, CancellationToken> = BTreeMap::new();
    let mut see = |pod: Pod, is_gone: bool| {
        if is_gone && !deletions.contains_key(&pod.uid().unwrap()) {
            return;
        }
        let token = deletions.entry(pod.uid().unwrap()).or_insert_with(|| {
            let token = CancellationToken::new();
            tasks.spawn(live(pods.clone(), pod.clone(), token.clone(), is_cut_off.clone()));
            token
        });
        if is_gone || pod.metadata.deletion_timestamp.is_some() {
            token.cancel();
        }
    };
    loop {
        if let Err(error) = follow(&pods, &mut see).await {
            eprintln!("the kubelet cannot watch: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await; // poll
        }
    }
}

/// What is there, and what comes after it until the connection ends. An API server over an old etcd refuses to watch from version 0.
async fn follow(pods: &Api<Pod>, see: &mut impl FnMut(Pod, bool)) -> Result<(), kube::Error> {
    let listed = pods.list(&ListParams::default()).await?;
    let version = listed.metadata.resource_version.clone().unwrap();
    listed.into_iter().for_each(|pod| see(pod, false));
    let mut events = pods.watch(&WatchParams::default(), &version).await?.boxed();
    while let Some(event) = events.next().await {
        match event? {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => see(pod, false),
            WatchEvent::Deleted(pod) => see(pod, true),
            WatchEvent::Bookmark(_) => {}
            WatchEvent::Error(status) => return Err(kube::Error::Api(status)),
        }
    }
    Ok(())
}

/// Addresses are not used twice: the process of a former test may not have ended yet.
fn next_address() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    Ipv4Addr::new(127, 201, (std::process::id() % 256) as u8, NEXT.fetch_add(1, Ordering::Relaxed))
}

/// From the first sight of a pod to its removal.
async fn live(pods: Api<Pod>, pod: Pod, deleted: CancellationToken, is_cut_off: Arc<AtomicBool>) {
    let container = pod.spec.as_ref().unwrap().containers[0].clone();
    let ip = next_address();
    let report = async |status: Value| {
        if !is_cut_off.load(Ordering::Relaxed) {
            let patch = Patch::Merge(json!({"status": status}));
            let told = pods.patch_status(&pod.name_any(), &PatchParams::default(), &patch).await;
            let is_gone = matches!(&told, Err(kube::Error::Api(status)) if status.code == 404);
            assert!(told.is_ok() || is_gone, "{told:?}");
        }
    };
    let secrets = secrets(Api::namespaced(pods.clone().into_client(), &pod.namespace().unwrap()), &container).await;
    let mut process = command(&container, ip, &secrets).spawn().unwrap();
    report(status(ip, "Running", "False", json!({"running": {}}))).await;
    let identity = ProcessIdentity::of(process.id().unwrap()).unwrap();
    let output = {
        let stdout = process.stdout.take().unwrap();
        tokio::spawn(async move {
            let mut text = String::new();
            let mut stdout = stdout;
            let _ = tokio::io::AsyncReadExt::read_to_string(&mut stdout, &mut text).await;
            text
        })
    };
    let ready = async {
        let port = container.ports.as_ref().unwrap()[0].container_port as u16;
        while TcpStream::connect((ip, port)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await; // poll
        }
        report(status(ip, "Running", "True", json!({"running": {}}))).await;
        std::future::pending::<()>().await
    };
    let ended = tokio::select! {
        ended = process.wait() => Some(ended.unwrap()),
        () = ready => None,
        () = deleted.cancelled() => None,
    };
    if let Some(ended) = ended {
        let log = output.await.unwrap_or_default();
        let code = ended.code().unwrap_or(137);
        let mut end = json!({"exitCode": code, "reason": if code == 0 { "Completed" } else { "Error" }});
        if code != 0 {
            end["message"] = log.into();
        }
        end["signal"] = ended.signal().unwrap_or(0).into();
        report(status(ip, "Failed", "False", json!({"terminated": end}))).await;
        deleted.cancelled().await;
    }
    while is_cut_off.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(10)).await; // poll
    }
    identity.terminate(Duration::from_secs(5)).await.unwrap();
    let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
    let _ = pods.delete(&pod.name_any(), &now).await;
}

/// The values of environment variables that refer to Secrets.
async fn secrets(api: Api<Secret>, container: &Container) -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    for variable in container.env.iter().flatten() {
        let Some(key) = variable.value_from.as_ref().and_then(|source| source.secret_key_ref.as_ref()) else {
            continue;
        };
        let secret = api.get(&key.name).await.unwrap();
        let value = secret.data.unwrap()[&key.key].0.clone();
        values.insert(variable.name.clone(), String::from_utf8(value).unwrap());
    }
    values
}

fn command(container: &Container, ip: Ipv4Addr, secrets: &BTreeMap<String, String>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let args = container.args.iter().flatten().map(|arg| arg.replace("$(POD_IP)", &ip.to_string()));
    // Both streams into one pipe, as a container's log has them.
    let quoted = args.map(|arg| format!("'{arg}'")).collect::<Vec<_>>().join(" ");
    let line = format!("exec '{}' {quoted} 2>&1", command.as_std().get_program().display());
    command = Command::new("/bin/sh");
    command.args(["-c", &line]).stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    for variable in container.env.iter().flatten() {
        let field = variable.value_from.as_ref().and_then(|source| source.field_ref.as_ref());
        let value = match field {
            Some(field) if field.field_path == "status.podIP" => ip.to_string(),
            _ => secrets.get(&variable.name).or(variable.value.as_ref()).cloned().unwrap_or_default(),
        };
        command.env(&variable.name, value);
    }
    command
}

fn status(ip: Ipv4Addr, phase: &str, ready: &str, state: Value) -> Value {
    let condition = |name: &str| json!({"type": name, "status": ready, "lastTransitionTime": null});
    json!({
        "phase": phase, "podIP": ip, "podIPs": [{"ip": ip}],
        "conditions": [condition("Ready"), condition("ContainersReady")],
        "containerStatuses": [{
            "name": "workload", "image": "i", "imageID": "", "restartCount": 0, "ready": ready == "True",
            "started": ready == "True", "state": state,
        }],
    })
}
