//! What pods do when an API server answers in ways that a real one cannot be brought to at will. The clock is paused.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use backing_image_workloads::pods::{Pods, PodsConfig};
use backing_image_workloads::{WorkloadError, WorkloadSpec, Workloads};
use futures::StreamExt;
use futures::stream;
use http::{Request, Response};
use kube::Client;
use serde_json::{Value, json};

/// More requests than anybody has a reason for; they get no answer.
const TOO_MANY: u32 = 100;

/// One request.
struct Asked {
    method: String,
    path: String,
    body: String,
    /// How many came before.
    number: u32,
}

impl Asked {
    fn is_watch(&self) -> bool {
        self.path.contains("watch=")
    }
}

enum Answer {
    Json(u16, Value),
    /// The lines of a watch, which ends then.
    Lines(Vec<Value>),
    /// A watch on which nothing comes.
    SilentWatch,
    Nothing,
}
use Answer::*;

/// Pods over an API server that answers like this, and how often it was asked.
async fn open(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> (Arc<dyn Workloads>, Arc<AtomicU32>) {
    let (count, answer) = (Arc::new(AtomicU32::new(0)), Arc::new(answer));
    let counted = count.clone();
    let service = tower::service_fn(move |request: Request<kube::client::Body>| {
        let (number, answer) = (counted.fetch_add(1, Ordering::SeqCst), answer.clone());
        async move {
            let (head, body) = request.into_parts();
            let body = to_bytes(Body::new(body), 1 << 20).await.unwrap();
            let body = String::from_utf8(body.to_vec()).unwrap();
            let asked = Asked { method: head.method.to_string(), path: head.uri.to_string(), body, number };
            let answer = if number < TOO_MANY { answer(&asked) } else { Nothing };
            let (code, body) = match answer {
                Json(code, value) => (code, Body::from(value.to_string())),
                Lines(lines) => (200, Body::from(lines.iter().map(|line| format!("{line}\n")).collect::<String>())),
                SilentWatch => (200, Body::from_stream(stream::pending::<Result<String, std::io::Error>>())),
                Nothing => std::future::pending().await,
            };
            Ok::<_, std::io::Error>(Response::builder().status(code).body(body).unwrap())
        }
    });
    let pods = Pods::open(Client::new(service, "shop"), PodsConfig::new("shop", "i", "agent")).await.unwrap();
    (Arc::new(pods), count)
}

fn spec(name: &str) -> WorkloadSpec {
    WorkloadSpec {
        name: name.into(),
        node: "n".parse().unwrap(),
        labels: Default::default(),
        args: vec![],
        env: Default::default(),
        disk_path: "/".into(),
        ready_ports: vec![],
        owner: None,
        secrets: Default::default(),
        revision: String::new(),
    }
}

fn pod(name: &str, uid: &str) -> Value {
    let started = serde_json::to_string(&spec(name)).unwrap();
    json!({
        "metadata": {"name": name, "uid": uid, "resourceVersion": "5", "annotations": {"longhorn.io/workload": started}},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn list(pods: &[Value]) -> Answer {
    Json(200, json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": pods}))
}

fn failure(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason})
}

/// Whatever becomes of the first watch, what changed meanwhile is seen by another look.
async fn is_seen_after(first_watch: impl Fn() -> Answer + Send + Sync + 'static) {
    let (workloads, _) = open(move |asked| match asked.is_watch() {
        true => first_watch(),
        false if asked.number == 0 => list(&[]),
        false => list(&[pod("a", "u")]),
    })
    .await;
    let heard = tokio::time::timeout(Duration::from_secs(400), workloads.changes().next()).await;
    assert_eq!(heard.expect("what changed meanwhile is seen"), Some("a".into()));
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_gets_no_answer_is_begun_again() {
    is_seen_after(|| Nothing).await;
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_falls_silent_is_begun_again() {
    is_seen_after(|| SilentWatch).await;
}

#[tokio::test(start_paused = true)]
async fn a_version_that_is_forgotten_makes_it_list_again() {
    is_seen_after(|| Lines(vec![json!({"type": "ERROR", "object": failure(410, "Expired")})])).await;
    is_seen_after(|| Json(410, failure(410, "Expired"))).await;
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_ends_each_watch_is_not_asked_all_the_time() {
    let (_workloads, count) = open(|asked| if asked.is_watch() { Lines(vec![]) } else { list(&[]) }).await;
    tokio::time::sleep(Duration::from_secs(60)).await; // poll
    let count = count.load(Ordering::SeqCst);
    assert!((5..TOO_MANY / 2).contains(&count), "{count} requests");
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_is_refused_again_and_again_ends() {
    let (workloads, count) = open(|asked| match asked.method.as_str() {
        "DELETE" => Json(409, failure(409, "Conflict")),
        _ if asked.is_watch() => SilentWatch,
        _ if asked.path.contains("/pods/a") => Json(200, pod("a", "u")),
        _ => list(&[]),
    })
    .await;
    let error = workloads.remove("a").await.unwrap_err();
    assert!(matches!(error, WorkloadError::Stays { .. }), "{error}");
    let count = count.load(Ordering::SeqCst);
    assert!(count < TOO_MANY / 2, "{count} requests");
}

/// Only the pod that was looked at is ended, and what took its place meanwhile only after another look.
#[tokio::test(start_paused = true)]
async fn a_deletion_names_the_pod_that_it_means() {
    let ended = Arc::new(Mutex::new(vec![]));
    let seen = ended.clone();
    let (workloads, _) = open(move |asked| {
        let mut ended = seen.lock().unwrap();
        let uid = ["u", "v"].get(ended.len());
        match asked.method.as_str() {
            "DELETE" => {
                ended.push(serde_json::from_str::<Value>(&asked.body).unwrap()["preconditions"]["uid"].clone());
                match ended.len() {
                    1 => Json(409, failure(409, "Conflict")),
                    _ => Json(200, pod("a", "v")),
                }
            }
            _ if asked.is_watch() => SilentWatch,
            _ if asked.path.contains("/pods/a") => match uid {
                Some(uid) => Json(200, pod("a", uid)),
                None => Json(404, failure(404, "NotFound")),
            },
            _ => list(&[]),
        }
    })
    .await;
    workloads.remove("a").await.unwrap();
    assert_eq!(*ended.lock().unwrap(), ["u", "v"]);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_has_its_kind() {
    for (code, kind) in [
        (422, api::ErrorKind::Invalid),
        (400, api::ErrorKind::Invalid),
        (403, api::ErrorKind::NotReady),
        (401, api::ErrorKind::NotReady),
        (500, api::ErrorKind::Unavailable),
    ] {
        let (workloads, _) = open(move |asked| match asked.method.as_str() {
            "POST" => Json(code, failure(code, "because")),
            _ if asked.is_watch() => SilentWatch,
            _ => list(&[]),
        })
        .await;
        let error = workloads.ensure(&spec("a")).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{code}: {error}");
        assert!(api::error::sentence(&error).contains("because"), "{}", api::error::sentence(&error));
    }
}
