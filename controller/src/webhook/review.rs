//! AdmissionReview, version `admission.k8s.io/v1`: a question of the API server, and our answer.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use k8s_openapi::ByteString;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use store::{Object, ObjectKey};

use super::patch;
use crate::Metrics;
use crate::admission::Admission;
use crate::http::failure::Failure;
use crate::http::registry;
use crate::limits::REVIEW_TIMEOUT;
use api::ErrorKind;

/// What answers rest on.
#[derive(Clone)]
pub struct Reviews {
    pub admission: Admission,
    pub metrics: Metrics,
}

#[derive(Deserialize)]
struct Review {
    request: Request,
}

/// The part of a question that matters.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    kind: Kind,
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    operation: String,
    #[serde(default)]
    sub_resource: String,
    #[serde(default)]
    object: Option<Map<String, Value>>,
    #[serde(default)]
    old_object: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
struct Kind {
    group: String,
    version: String,
    kind: String,
}

/// Fills in defaults.
pub async fn mutate(State(reviews): State<Reviews>, body: Bytes) -> Response {
    answer(&reviews, &body, true).await
}

/// Says whether an object may be stored, or deleted.
pub async fn validate(State(reviews): State<Reviews>, body: Bytes) -> Response {
    answer(&reviews, &body, false).await
}

async fn answer(reviews: &Reviews, body: &Bytes, fills_in: bool) -> Response {
    let request = match serde_json::from_slice::<Review>(body) {
        Ok(review) => review.request,
        Err(error) => {
            let sentence = format!("this is no AdmissionReview of admission.k8s.io/v1: {error}");
            return (StatusCode::BAD_REQUEST, sentence).into_response();
        }
    };
    let verdict = match tokio::time::timeout(REVIEW_TIMEOUT, judge(&reviews.admission, &request)).await {
        Ok(verdict) => verdict,
        Err(_) => Err(Failure::new(
            ErrorKind::Unavailable,
            format!("{} `{}` could not be checked in time; try again", request.kind.kind, request.name),
        )),
    };
    reviews.metrics.observe_review(&request.operation, verdict.is_ok());
    let mut response = json!({ "uid": request.uid, "allowed": verdict.is_ok() });
    match verdict {
        Ok(Some(admitted)) if fills_in => {
            let given = Value::Object(request.object.unwrap_or_default());
            let patch = patch::between(&given, &Value::Object(admitted.0));
            if !patch.is_empty() {
                response["patchType"] = "JSONPatch".into();
                let bytes = Value::Array(patch).to_string().into_bytes();
                response["patch"] = serde_json::to_value(ByteString(bytes)).expect("bytes are text in base64");
            }
        }
        Ok(_) => {}
        Err(failure) => {
            tracing::info!(kind = request.kind.kind, name = request.name, reason = failure.message, "change refused");
            response["status"] = failure.to_status();
        }
    }
    Json(json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response }))
        .into_response()
}

/// The object as it is to be stored (none: nothing is stored), or why not.
async fn judge(admission: &Admission, request: &Request) -> Result<Option<Object>, Failure> {
    let Request { kind, name, namespace, operation, sub_resource, object, old_object, .. } = request;
    let api_version =
        if kind.group.is_empty() { kind.version.clone() } else { format!("{}/{}", kind.group, kind.version) };
    // What is not ours is nothing to us, also when a configuration sends it.
    let Some(served) = registry::by_manifest(&api_version, &kind.kind).filter(|_| sub_resource.is_empty()) else {
        return Ok(None);
    };
    let (object, old) = (object.clone().map(Object), old_object.clone().map(Object));
    match (operation.as_str(), object) {
        ("CREATE", Some(mut object)) => {
            let generated = stand_in(&mut object);
            let mut admitted = admission.admit(&served.resource, object, None).await?;
            if generated && let Some(metadata) = admitted.0.get_mut("metadata").and_then(Value::as_object_mut) {
                metadata.shift_remove("name");
            }
            Ok(Some(admitted))
        }
        ("UPDATE", Some(object)) => Ok(Some(admission.admit(&served.resource, object, old.as_ref()).await?)),
        ("DELETE", _) => {
            let key = ObjectKey { namespace: Some(namespace.clone()), name: name.clone() };
            admission.admit_deletion(&served.resource, &key).await.map(|()| None)
        }
        _ => Ok(None),
    }
}

/// Gives an object whose name the API server is going to make up one of that form for the time being; whether it did.
fn stand_in(object: &mut Object) -> bool {
    if !object.name().is_empty() {
        return false;
    }
    let Some(metadata) = object.0.get_mut("metadata").and_then(Value::as_object_mut) else { return false };
    let Some(prefix) = metadata.get("generateName").and_then(Value::as_str) else { return false };
    let name = format!("{prefix}00000");
    metadata.insert("name".into(), name.into());
    true
}
