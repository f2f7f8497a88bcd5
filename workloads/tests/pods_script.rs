//! What pods do when an API server answers in ways that a real one cannot be brought to at will. The clock is paused.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use backing_image_workloads::pods::{Pods, PodsConfig};
use backing_image_workloads::{WorkloadError, WorkloadSpec, Workloads};
use futures::StreamExt;
use http::{Request, Response};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};

/// More requests than anybody has a reason for; they get no answer.
const TOO_MANY: u32 = 100;

/// An API server that answers by this function of the method, the path and how many requests came before; `None`: never.
async fn open(
    answer: impl Fn(&str, &str, u32) -> Option<(u16, Value)> + Send + Sync + 'static,
) -> (Arc<dyn Workloads>, Arc<AtomicU32>) {
    let (count, answer) = (Arc::new(AtomicU32::new(0)), Arc::new(answer));
    let counted = count.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let number = counted.fetch_add(1, Ordering::SeqCst);
        let answer = answer(request.method().as_str(), &request.uri().to_string(), number);
        async move {
            match answer.filter(|_| number < TOO_MANY) {
                Some((code, Value::Null)) => Ok(Response::builder().status(code).body(Body::empty()).unwrap()),
                Some((code, value)) => {
                    Ok(Response::builder().status(code).body(Body::from(value.to_string().into_bytes())).unwrap())
                }
                None => std::future::pending::<Result<_, std::io::Error>>().await,
            }
        }
    });
    let pods = Pods::open(Client::new(service, "shop"), PodsConfig::new("shop", "i", "agent")).await.unwrap();
    (Arc::new(pods), count)
}

fn pod(name: &str) -> Value {
    let started = WorkloadSpec {
        name: name.into(),
        node: "n".parse().unwrap(),
        labels: Default::default(),
        args: vec![],
        env: Default::default(),
        disk_path: "/".into(),
        ready_ports: vec![],
        owner: None,
    };
    let started = serde_json::to_string(&started).unwrap();
    json!({
        "metadata": {"name": name, "uid": "u", "resourceVersion": "5", "annotations": {"longhorn.io/workload": started}},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

fn list(pods: &[Value]) -> Option<(u16, Value)> {
    Some((200, json!({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": pods})))
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_gets_no_answer_is_begun_again() {
    let (workloads, _) = open(|_, path, number| match path.contains("watch=") {
        true => None,
        false if number == 0 => list(&[]),
        false => list(&[pod("a")]),
    })
    .await;
    let heard = tokio::time::timeout(Duration::from_secs(60), workloads.changes().next()).await;
    assert_eq!(heard.expect("what changed meanwhile is seen"), Some("a".into()));
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_ends_each_watch_is_not_asked_all_the_time() {
    let (_workloads, count) = open(|_, path, _| match path.contains("watch=") {
        true => Some((200, Value::Null)),
        false => list(&[]),
    })
    .await;
    tokio::time::sleep(Duration::from_secs(60)).await; // poll
    let count = count.load(Ordering::SeqCst);
    assert!((5..TOO_MANY / 2).contains(&count), "{count} requests");
}

#[tokio::test(start_paused = true)]
async fn a_deletion_that_is_refused_again_and_again_ends() {
    let conflict = json!({"kind": "Status", "status": "Failure", "code": 409, "reason": "Conflict", "message": "no"});
    let (workloads, count) = open(move |method, path, _| match (method, path.contains("watch=")) {
        ("DELETE", _) => Some((409, conflict.clone())),
        (_, true) => None,
        _ if path.contains("/pods/a") => Some((200, pod("a"))),
        _ => list(&[]),
    })
    .await;
    let error = workloads.remove("a").await.unwrap_err();
    assert!(matches!(error, WorkloadError::Stays { .. }), "{error}");
    let count = count.load(Ordering::SeqCst);
    assert!(count < TOO_MANY / 2, "{count} requests");
}
