//! A change that rests on no version is decided on what is there when it is written, whatever happens in between.

mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use axum::Router;
use axum::body::Body;
use axum::http::Request;
use backing_image_controller::http::{ApiState, router};
use serde_json::{Value, json};
use store::embedded::Embedded;
use store::{ObjectStore, Store, StoreError};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use world::before::{Before, Call, Hook};

const IMAGES: &str = "/apis/longhorn.io/v1beta2/namespaces/longhorn-system/backingimages";

/// Somebody else's write that comes right before the next ones of the API.
struct Busy {
    /// How many writes are still to be overtaken.
    ahead: AtomicUsize,
    /// What the first one that overtakes writes into the status.
    status: Value,
}

#[async_trait]
impl Hook for Busy {
    /// Another status each time, so that each is another version.
    async fn before(&self, call: Call<'_>, inner: &Embedded) -> Result<(), StoreError> {
        let Call::Replace(resource, object) = call else { return Ok(()) };
        let take = |left: usize| left.checked_sub(1);
        let Ok(left) = self.ahead.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) else { return Ok(()) };
        let mut object = inner.get(resource, &object.key()).await?.expect("it is there");
        let mut status = self.status.clone();
        status["size"] = left.into();
        object.0.insert("status".into(), status);
        inner.replace_status(resource, object).await.map(drop)
    }
}

fn api(ahead: usize, status: Value) -> Router {
    let (_sender, ready) = tokio::sync::watch::channel(Ok(()));
    let busy = Before { inner: Embedded::in_memory(), hook: Busy { ahead: ahead.into(), status } };
    let store = Store::new(Arc::new(busy), "longhorn-system");
    router(ApiState { store, metrics: Default::default(), ready, shutdown: CancellationToken::new() })
}

async fn call(api: &Router, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let request = Request::builder().method(method).uri(path).body(Body::from(body.to_string())).unwrap();
    let response = api.clone().oneshot(request).await.unwrap();
    let code = response.status().as_u16();
    let bytes = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (code, serde_json::from_slice(&bytes).unwrap())
}

/// What becomes of a change of the address and the minimum of copies while others write.
async fn change(ahead: usize, status: Value, version: bool) -> (u16, Value, Value) {
    let api = api(ahead, status);
    let path = format!("{IMAGES}/one");
    let spec = |file: &str, copies: u32| {
        let parameters = json!({ "url": format!("https://example.com/{file}") });
        json!({ "sourceType": "download", "sourceParameters": parameters, "minNumberOfCopies": copies })
    };
    let (code, created) =
        call(&api, "POST", IMAGES, &json!({ "metadata": { "name": "one" }, "spec": spec("a", 3) })).await;
    assert_eq!(code, 201, "{created}");
    let mut new = created;
    new["spec"] = spec("b", 1);
    if !version {
        new["metadata"].as_object_mut().unwrap().shift_remove("resourceVersion");
    }
    let (code, said) = call(&api, "PUT", &path, &new).await;
    (code, said, call(&api, "GET", &path, &Value::Null).await.1)
}

#[tokio::test]
async fn what_rests_on_no_version_is_decided_on_what_is_there() {
    // A copy became ready meanwhile: its source is settled now.
    let ready = json!({ "checksum": "a".repeat(128) });
    let (code, said, stored) = change(1, ready.clone(), false).await;
    assert_eq!(code, 422, "{said}");
    assert!(said["message"].as_str().unwrap().contains("it cannot be changed any more"), "{said}");
    assert_eq!(stored["spec"]["sourceParameters"]["url"], "https://example.com/a");

    // What others write is no obstacle where it forbids nothing, and is kept.
    let (code, said, stored) = change(5, json!({ "uuid": "12345678" }), false).await;
    assert_eq!(code, 200, "{said}");
    assert_eq!((&stored["spec"]["minNumberOfCopies"], &stored["status"]["uuid"]), (&json!(1), &json!("12345678")));

    // Whoever names a version is told that it is not the last one; and nobody waits for ever.
    for (ahead, version) in [(1, true), (1000, false)] {
        let (code, said, stored) = change(ahead, json!({ "uuid": "12345678" }), version).await;
        assert_eq!((code, said["reason"].as_str()), (409, Some("Conflict")), "{said}");
        assert_eq!(stored["spec"]["minNumberOfCopies"], 3);
    }
}
