//! A kubelet in short: pods of a namespace as processes of this machine, each with a loopback address of its own.
//!
//! It does what ours depend on: `$(POD_IP)`, readiness by the probe's port, the end of a container with the last lines of its log, and
//! deletion, which is complete only when the kubelet says so. Images, mounts and limits it does not know; `sanity-tests/` has real ones.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Container, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, WatchEvent, WatchParams};
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
    let mut next_address = 0;
    let mut version = "0".to_owned();
    loop {
        let Ok(events) = pods.watch(&WatchParams::default(), &version).await else {
            tokio::time::sleep(Duration::from_millis(50)).await; // poll
            continue;
        };
        let mut events = events.boxed();
        while let Some(Ok(event)) = events.next().await {
            let (WatchEvent::Added(pod) | WatchEvent::Modified(pod) | WatchEvent::Deleted(pod)) = event else {
                continue;
            };
            version = pod.resource_version().unwrap_or_default();
            let token = deletions.entry(pod.uid().unwrap()).or_insert_with(|| {
                next_address += 1;
                let token = CancellationToken::new();
                tasks.spawn(live(pods.clone(), pod.clone(), next_address, token.clone(), is_cut_off.clone()));
                token
            });
            if pod.metadata.deletion_timestamp.is_some() {
                token.cancel();
            }
        }
    }
}

/// From the first sight of a pod to its removal.
async fn live(pods: Api<Pod>, pod: Pod, number: u8, deleted: CancellationToken, is_cut_off: Arc<AtomicBool>) {
    let container = pod.spec.as_ref().unwrap().containers[0].clone();
    let ip = Ipv4Addr::new(127, 201, (std::process::id() % 256) as u8, number);
    let report = async |status: Value| {
        if !is_cut_off.load(Ordering::Relaxed) {
            // The pod may be gone.
            let _ = pods
                .patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Merge(json!({"status": status})))
                .await;
        }
    };
    let mut process = command(&container, ip).spawn().unwrap();
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

fn command(container: &Container, ip: Ipv4Addr) -> Command {
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
            _ => variable.value.clone().unwrap_or_default(),
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
