//! The HTTP API without a network: paths, verbs and errors as Kubernetes clients expect them.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use backing_image_controller::http::{ApiState, router};
use bytes::Bytes;
use futures::StreamExt;
use runtime::metrics::Metrics;
use serde_json::{Value, json};
use store::Store;
use store::embedded::Embedded;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

const IMAGES: &str = "/apis/longhorn.io/v1beta2/namespaces/longhorn-system/backingimages";

fn api() -> Router {
    let (sender, ready) = tokio::sync::watch::channel(Ok(()));
    // Kept for as long as the process lives: the API only reads it.
    std::mem::forget(sender);
    router(ApiState {
        store: Store::new(Arc::new(Embedded::in_memory()), "longhorn-system"),
        metrics: Metrics::default(),
        ready,
        shutdown: CancellationToken::new(),
    })
}

async fn call(api: &Router, method: &str, path: &str, body: Value) -> (StatusCode, Value) {
    let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
    let request = Request::builder().method(method).uri(path).body(body).unwrap();
    let response = api.clone().oneshot(request).await.unwrap();
    let status = response.status();
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

fn image(name: &str) -> Value {
    json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "BackingImage", "metadata": { "name": name, "labels": { "a": "b" } },
        "spec": { "sourceType": "download", "sourceParameters": { "url": "https://example.com/x.qcow2" } },
    })
}

#[tokio::test]
async fn creates_reads_lists_and_deletes() {
    let api = api();
    let (status, created) = call(&api, "POST", IMAGES, image("one")).await;
    assert_eq!(status, 201, "{created}");
    assert_eq!(created["metadata"]["namespace"], "longhorn-system");
    assert_eq!(created["spec"]["minNumberOfCopies"], 3);
    assert_eq!(created["metadata"]["finalizers"], json!(["longhorn.io"]));
    assert_eq!(call(&api, "POST", IMAGES, image("one")).await.1["reason"], "AlreadyExists");
    let (status, read) = call(&api, "GET", &format!("{IMAGES}/one"), Value::Null).await;
    assert_eq!((status, &read), (StatusCode::OK, &created));
    let (_, list) = call(&api, "GET", &format!("{IMAGES}?labelSelector=a%3Db"), Value::Null).await;
    assert_eq!((list["kind"].as_str(), list["items"].as_array().unwrap().len()), (Some("BackingImageList"), 1));
    let (_, list) = call(&api, "GET", "/apis/longhorn.io/v1beta2/backingimages?labelSelector=a=c", Value::Null).await;
    assert_eq!(list["items"], json!([]));
    let stale = json!({ "preconditions": { "uid": "another" } });
    assert_eq!(call(&api, "DELETE", &format!("{IMAGES}/one"), stale).await.0, 409);
    assert_eq!(call(&api, "DELETE", &format!("{IMAGES}/one"), Value::Null).await.0, 200);
    let (_, deleting) = call(&api, "GET", &format!("{IMAGES}/one"), Value::Null).await;
    assert!(deleting["metadata"]["deletionTimestamp"].is_string());
}

#[tokio::test]
async fn a_stale_change_is_a_conflict_and_status_is_apart() {
    let api = api();
    let (_, created) = call(&api, "POST", IMAGES, image("one")).await;
    let path = format!("{IMAGES}/one");
    let mut changed = created.clone();
    changed["spec"]["minNumberOfCopies"] = 2.into();
    changed["status"] = json!({ "uuid": "12345678" });
    let (status, stored) = call(&api, "PUT", &path, changed.clone()).await;
    assert_eq!(status, 200, "{stored}");
    assert!(stored.get("status").is_none_or(|s| s["uuid"] != "12345678"));
    assert_eq!(call(&api, "PUT", &path, changed.clone()).await.1["reason"], "Conflict");
    changed["metadata"]["resourceVersion"] = stored["metadata"]["resourceVersion"].clone();
    let (status, stored) = call(&api, "PUT", &format!("{path}/status"), changed).await;
    assert_eq!((status, stored["status"]["uuid"].as_str()), (StatusCode::OK, Some("12345678")));
    let (_, patched) = call(&api, "PATCH", &path, json!({ "metadata": { "labels": { "a": null, "c": "d" } } })).await;
    let labels = &patched["metadata"]["labels"];
    assert!(labels["a"].is_null() && labels["c"] == "d", "{labels}");
}

#[tokio::test]
async fn errors_are_status_objects() {
    let api = api();
    let (code, status) = call(&api, "GET", &format!("{IMAGES}/none"), Value::Null).await;
    assert_eq!(
        (code, status["kind"].as_str(), status["reason"].as_str()),
        (StatusCode::NOT_FOUND, Some("Status"), Some("NotFound"))
    );
    let mut wrong = image("one");
    wrong["spec"]["checksum"] = "abc".into();
    let (code, status) = call(&api, "POST", IMAGES, wrong).await;
    assert_eq!(
        (code, status["details"]["causes"][0]["reason"].as_str()),
        (StatusCode::UNPROCESSABLE_ENTITY, Some("Invalid"))
    );
    assert!(status["message"].as_str().unwrap().contains("spec.checksum"), "{status}");
    let mut elsewhere = image("one");
    elsewhere["metadata"]["namespace"] = "other".into();
    assert_eq!(call(&api, "POST", IMAGES, elsewhere).await.0, 400);
    assert_eq!(call(&api, "POST", IMAGES, json!([1])).await.0, 400);
    assert_eq!(call(&api, "PUT", IMAGES, image("one")).await.0, 405);
    assert_eq!(call(&api, "GET", "/api/v1/pods", Value::Null).await.0, 404);
}

#[tokio::test]
async fn an_image_in_use_is_not_deleted() {
    let api = api();
    call(&api, "POST", IMAGES, image("one")).await;
    let volume = json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "Volume", "metadata": { "name": "v" },
        "spec": { "size": "10485760", "backingImage": "one", "numberOfReplicas": 1 },
    });
    let volumes = "/apis/longhorn.io/v1beta2/namespaces/longhorn-system/volumes";
    let (code, answer) = call(&api, "POST", volumes, volume).await;
    assert_eq!(code, 201, "{answer}");
    let (code, status) = call(&api, "DELETE", &format!("{IMAGES}/one"), Value::Null).await;
    assert_eq!((code, status["reason"].as_str()), (StatusCode::FORBIDDEN, Some("Forbidden")));
    let why = "since there are replicas using it: those of volume v; delete volume v first";
    assert!(status["message"].as_str().unwrap().contains(why), "{status}");
}

#[tokio::test]
async fn who_uses_another_image_keeps_none_and_a_replica_whose_volume_is_lost_does() {
    let api = api();
    let folder = "/apis/longhorn.io/v1beta2/namespaces/longhorn-system";
    let volume = json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "Volume", "metadata": { "name": "v" },
        "spec": { "size": "10485760", "backingImage": "one", "numberOfReplicas": 1 },
    });
    let replica = |name: &str, image: &str, volume: &str| {
        json!({
            "apiVersion": "longhorn.io/v1beta2", "kind": "Replica",
            "metadata": { "name": name, "labels": { (api::names::label::BACKING_IMAGE): image } },
            "spec": { "backingImage": image, "volumeName": volume },
        })
    };
    for name in ["one", "two", "three", "four"] {
        call(&api, "POST", IMAGES, image(name)).await;
    }
    assert_eq!(call(&api, "POST", &format!("{folder}/volumes"), volume).await.0, 201);
    for (name, image, volume) in [("r", "three", "gone"), ("s", "four", "")] {
        let (code, answer) = call(&api, "POST", &format!("{folder}/replicas"), replica(name, image, volume)).await;
        assert_eq!(code, 201, "{answer}");
    }
    let delete = async |name: &str| call(&api, "DELETE", &format!("{IMAGES}/{name}"), Value::Null).await;
    let (code, answer) = delete("two").await;
    assert_eq!(code, 200, "nobody uses it: {answer}");
    for (name, user) in
        [("one", "those of volume v;"), ("three", "using it: r; delete volume gone"), ("four", "using it: s")]
    {
        let (code, answer) = delete(name).await;
        assert_eq!(code, 403, "{name}: {answer}");
        let why = answer["message"].as_str().unwrap();
        assert!(why.contains(user) && !why.contains("volume ;"), "{name}: {why}");
    }
}

#[tokio::test]
async fn each_kind_is_checked_when_it_is_written() {
    let api = api();
    let folder = "/apis/longhorn.io/v1beta2/namespaces/longhorn-system";
    let object = |kind: &str, name: &str, more: Value| {
        let mut object = json!({ "apiVersion": "longhorn.io/v1beta2", "kind": kind, "metadata": { "name": name } });
        object.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        object
    };
    let disks = json!({ "spec": { "disks": { "disk-1": { "path": "relative" } } } });
    for (list, object, word) in [
        ("nodes", object("Node", "n", disks), "relative"),
        ("settings", object("Setting", api::setting::REPLENISH_LIMIT, json!({ "value": "many" })), "many"),
    ] {
        let (code, answer) = call(&api, "POST", &format!("{folder}/{list}"), object).await;
        assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY, "{list}: {answer}");
        assert!(answer["message"].as_str().unwrap().contains(word), "{list}: {answer}");
    }
    call(&api, "POST", IMAGES, image("one")).await;
    let one = format!("{IMAGES}/one");
    let (code, answer) = call(&api, "PATCH", &one, json!({ "spec": { "dataEngine": "v2" } })).await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY, "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("dataEngine"), "{answer}");
}

#[tokio::test]
async fn a_volume_grows_by_hand_only_while_nobody_uses_it() {
    let api = api();
    let volume = json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "Volume", "metadata": { "name": "v" },
        "spec": { "size": "10485760", "numberOfReplicas": 1 },
    });
    let volumes = "/apis/longhorn.io/v1beta2/namespaces/longhorn-system/volumes";
    call(&api, "POST", volumes, volume).await;
    let one = format!("{volumes}/v");
    let edit = async |spec: Value| call(&api, "PATCH", &one, json!({ "spec": spec })).await;
    assert_eq!(edit(json!({ "size": "20971520" })).await.0, 200);
    edit(json!({ "nodeID": "n1" })).await;
    let (code, status) = edit(json!({ "size": "31457280" })).await;
    assert_eq!(code, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(status["message"].as_str().unwrap().contains("attached to node `n1`"), "{status}");
    edit(json!({ "nodeID": "" })).await;
    let (_, status) = edit(json!({ "size": "10485760" })).await;
    assert!(status["message"].as_str().unwrap().contains("cannot become smaller"), "{status}");
    // A replica of it, on a disk without room for more.
    let node = json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "Node", "metadata": { "name": "n1" },
        "spec": { "disks": { "d": { "path": "/d" } } },
        "status": { "diskStatus": { "d": { "diskUUID": "u", "storageMaximum": 20971520 } } },
    });
    let replica = json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "Replica", "metadata": { "name": "r" },
        "spec": { "volumeName": "v", "volumeSize": "20971520", "diskID": "u" },
    });
    let (nodes, replicas) = (volumes.replace("volumes", "nodes"), volumes.replace("volumes", "replicas"));
    assert_eq!(call(&api, "POST", &nodes, node.clone()).await.0, 201);
    let status = json!({ "status": node["status"] });
    assert_eq!(call(&api, "PATCH", &format!("{nodes}/n1/status"), status).await.0, 200);
    assert_eq!(call(&api, "POST", &replicas, replica).await.0, 201);
    let (code, status) = edit(json!({ "size": "31457280" })).await;
    assert_eq!(code, StatusCode::INSUFFICIENT_STORAGE, "{status}");
    let text = status["message"].as_str().unwrap();
    assert!(text.contains("d of n1: 10485760 bytes are needed, 0 can still be promised"), "{status}");
}

#[tokio::test]
async fn a_claim_is_changed_as_kubernetes_allows_it() {
    let api = api();
    let claims = "/api/v1/namespaces/default/persistentvolumeclaims";
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": { "name": "c" },
        "spec": { "storageClassName": "fixed", "resources": { "requests": { "storage": "1Gi" } } },
    });
    assert_eq!(call(&api, "POST", claims, claim).await.0, 201);
    for (name, allowed) in [("fixed", false), ("elastic", true)] {
        let class = json!({
            "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": { "name": name },
            "provisioner": "driver.longhorn.io", "allowVolumeExpansion": allowed,
        });
        assert_eq!(call(&api, "POST", "/apis/storage.k8s.io/v1/storageclasses", class).await.0, 201);
    }
    let one = format!("{claims}/c");
    let edit = async |change: Value| call(&api, "PATCH", &one, change).await;
    let size = |size: &str| json!({ "spec": { "resources": { "requests": { "storage": size } } } });
    let refused = async |wanted: &str, why: &str| {
        let (code, status) = edit(size(wanted)).await;
        assert_eq!((code, status["reason"].as_str()), (StatusCode::FORBIDDEN, Some("Forbidden")), "{status}");
        assert!(status["message"].as_str().unwrap().contains(why), "{status}");
    };
    refused("2Gi", "only bound persistent volume claims").await;
    let bound = json!({ "status": { "phase": "Bound", "capacity": { "storage": "1Gi" } } });
    assert_eq!(call(&api, "PATCH", &format!("{one}/status"), bound).await.0, 200);
    refused("2Gi", "the storageclass that provisions the pvc must support resize").await;
    refused("512Mi", "field can not be less than status.capacity").await;
    assert_eq!(edit(json!({ "spec": { "storageClassName": "elastic" } })).await.0, 200);
    assert_eq!(edit(size("2Gi")).await.0, 200);
}

#[tokio::test]
async fn a_watch_tells_every_change_of_what_was_asked_for() {
    let api = api();
    call(&api, "POST", IMAGES, image("one")).await;
    let request =
        Request::get(format!("{IMAGES}?watch=true&fieldSelector=metadata.name%3Done")).body(Body::empty()).unwrap();
    let mut body = api.clone().oneshot(request).await.unwrap().into_body().into_data_stream();
    let mut next =
        async || -> Value { serde_json::from_slice::<Value>(&body.next().await.unwrap().unwrap() as &Bytes).unwrap() };
    let first = next().await;
    assert_eq!((first["type"].as_str(), first["object"]["metadata"]["name"].as_str()), (Some("ADDED"), Some("one")));
    call(&api, "POST", IMAGES, image("two")).await;
    call(&api, "PATCH", &format!("{IMAGES}/one"), json!({ "metadata": { "finalizers": null } })).await;
    assert_eq!(next().await["type"], "MODIFIED");
    call(&api, "DELETE", &format!("{IMAGES}/one"), Value::Null).await;
    assert_eq!(next().await["type"], "DELETED");
}

#[tokio::test]
async fn says_which_kinds_there_are_and_how_it_does() {
    let api = api();
    let (_, groups) = call(&api, "GET", "/apis", Value::Null).await;
    let names: Vec<&str> = groups["groups"].as_array().unwrap().iter().map(|g| g["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["longhorn.io", "storage.k8s.io"]);
    let (_, kinds) = call(&api, "GET", "/api/v1", Value::Null).await;
    assert!(kinds["resources"].as_array().unwrap().iter().any(|r| r["name"] == "persistentvolumeclaims"));
    for probe in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(call(&api, "GET", probe, Value::Null).await.0, 200, "{probe}");
    }
}
