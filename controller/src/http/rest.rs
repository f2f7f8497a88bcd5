//! The verbs on objects: get, list, watch, create, replace, merge patch, delete.

use std::collections::BTreeMap;

use axum::extract::{Query, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use rand::Rng;
use serde_json::{Map, Value, json};
use store::{Object, ObjectKey, Preconditions, Selector};

use super::failure::Failure;
use super::path::{self, Route, Target};
use super::{ApiState, discovery, watch};
use api::ErrorKind;

/// How often a change is decided. Each time, somebody else got on; a client that still comes too late is told so, and may ask again.
const ATTEMPTS: u32 = 10;

type Parameters = BTreeMap<String, String>;

/// Answers every request below `/api`, `/apis` and `/version`.
pub async fn serve(
    State(state): State<ApiState>,
    method: Method,
    uri: Uri,
    Query(parameters): Query<Parameters>,
    body: Bytes,
) -> Response {
    let answer = match path::parse(uri.path()) {
        Ok(Route::Discovery(words)) => discovery::describe(&words).map(|value| answer(StatusCode::OK, &value)),
        Ok(Route::Objects(target)) => dispatch(&state, &method, target, &parameters, &body).await,
        Err(failure) => Err(failure),
    };
    answer.unwrap_or_else(IntoResponse::into_response)
}

async fn dispatch(
    state: &ApiState,
    method: &Method,
    target: Target,
    parameters: &Parameters,
    body: &Bytes,
) -> Result<Response, Failure> {
    match (method, target.key()) {
        (&Method::GET, Some(key)) => get(state, &target, &key).await,
        (&Method::GET, None) => list_or_watch(state, &target, parameters).await,
        (&Method::POST, None) => create(state, &target, body).await,
        (&Method::PUT, Some(key)) => replace(state, &target, &key, object_of(body)?).await,
        (&Method::PATCH, Some(key)) => patch(state, &target, &key, object_of(body)?).await,
        (&Method::DELETE, Some(key)) if !target.status => delete(state, &target, &key, body).await,
        _ => Err(Failure::method(format!("{method} is not offered on this path"))),
    }
}

/// Which objects of a list are meant.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub labels: Selector,
    pub name: Option<String>,
}

impl Filter {
    fn of(parameters: &Parameters) -> Result<Filter, Failure> {
        let mut filter = Filter::default();
        for (key, value) in pairs(parameters.get("labelSelector"))? {
            filter.labels.0.insert(key, value);
        }
        for (key, value) in pairs(parameters.get("fieldSelector"))? {
            match key.as_str() {
                "metadata.name" => filter.name = Some(value),
                _ => {
                    return Err(Failure::bad_request(format!(
                        "field selector `{key}` is not offered, only `metadata.name`"
                    )));
                }
            }
        }
        Ok(filter)
    }

    /// Whether an object is meant.
    pub fn matches(&self, object: &Object) -> bool {
        self.labels.matches(object) && self.name.as_deref().is_none_or(|name| name == object.name())
    }
}

fn pairs(text: Option<&String>) -> Result<Vec<(String, String)>, Failure> {
    let text = text.map(String::as_str).unwrap_or_default();
    let one = |part: &str| {
        let (key, value) = part.split_once('=').filter(|(key, _)| !key.contains(['!', '(', ' ']))?;
        Some((key.trim().to_owned(), value.strip_prefix('=').unwrap_or(value).trim().to_owned()))
    };
    text.split(',')
        .filter(|part| !part.trim().is_empty())
        .map(|part| {
            one(part.trim())
                .ok_or_else(|| Failure::bad_request(format!("cannot read selector `{part}`; write `key=value`")))
        })
        .collect()
}

async fn get(state: &ApiState, target: &Target, key: &ObjectKey) -> Result<Response, Failure> {
    let object = read(state, target, key).await?;
    Ok(answer(StatusCode::OK, &Value::Object(object.0)))
}

async fn read(state: &ApiState, target: &Target, key: &ObjectKey) -> Result<Object, Failure> {
    let resource = &target.served.resource;
    let found = state.store.objects().get(resource, key).await?;
    found.ok_or_else(|| {
        let group = if resource.group.is_empty() { String::new() } else { format!(".{}", resource.group) };
        Failure::new(ErrorKind::NotFound, format!("{}{group} \"{}\" not found", resource.plural, key.name))
    })
}

async fn list_or_watch(state: &ApiState, target: &Target, parameters: &Parameters) -> Result<Response, Failure> {
    let resource = &target.served.resource;
    let filter = Filter::of(parameters)?;
    let namespace = target.namespace.as_deref();
    if parameters.get("watch").is_some_and(|w| w == "true" || w == "1") {
        let from = parameters.get("resourceVersion").filter(|v| !v.is_empty() && *v != "0").cloned();
        let events = state.store.objects().watch(resource, namespace, from).await?;
        return Ok(watch::respond(events, filter, state.shutdown.child_token()));
    }
    let list = state.store.objects().list(resource, namespace, &filter.labels).await?;
    let items: Vec<Value> =
        list.items.into_iter().filter(|o| filter.matches(o)).map(|object| Value::Object(object.0)).collect();
    let body = json!({
        "kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(),
        "metadata": { "resourceVersion": list.resource_version }, "items": items,
    });
    Ok(answer(StatusCode::OK, &body))
}

async fn create(state: &ApiState, target: &Target, body: &Bytes) -> Result<Response, Failure> {
    let resource = &target.served.resource;
    let mut object = object_of(body)?;
    identify(target, &mut object)?;
    if object.name().is_empty() {
        let prefix = object.0["metadata"]["generateName"].as_str().unwrap_or_default().to_owned();
        if prefix.is_empty() {
            return Err(Failure::new(ErrorKind::Invalid, format!("a new {} needs `metadata.name`", resource.kind)));
        }
        object.0["metadata"]["name"] = format!("{prefix}{}", suffix()).into();
    }
    let object = state.admission().admit(resource, object, None).await?;
    let created = state.store.objects().create(resource, object).await?;
    Ok(answer(StatusCode::CREATED, &Value::Object(created.0)))
}

/// Five characters that make a generated name unique, from Kubernetes' alphabet without vowels.
fn suffix() -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut random = rand::rng();
    (0..5).map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())])).collect()
}

async fn replace(state: &ApiState, target: &Target, key: &ObjectKey, mut object: Object) -> Result<Response, Failure> {
    let resource = &target.served.resource;
    identify(target, &mut object)?;
    if object.name().is_empty() {
        object.0["metadata"]["name"] = key.name.clone().into();
    }
    if object.name() != key.name {
        return Err(Failure::bad_request(format!("the path names `{}`, the object `{}`", key.name, object.name())));
    }
    let stored = if target.status {
        state.store.objects().replace_status(resource, object).await?
    } else {
        decide_and_replace(state, target, key, object).await?
    };
    Ok(answer(StatusCode::OK, &Value::Object(stored.0)))
}

/// Replaces just that version on which the change was admitted. A change that names none is decided anew when others were faster.
async fn decide_and_replace(
    state: &ApiState,
    target: &Target,
    key: &ObjectKey,
    object: Object,
) -> Result<Object, Failure> {
    let resource = &target.served.resource;
    let mut attempt = 1;
    loop {
        let old = read(state, target, key).await?;
        let mut new = object.clone();
        let rests_on_none = new.resource_version().is_empty();
        if rests_on_none {
            new.0["metadata"]["resourceVersion"] = old.resource_version().into();
        }
        let admitted = state.admission().admit(resource, new, Some(&old)).await?;
        match state.store.objects().replace(resource, admitted).await {
            Err(error) if rests_on_none && error.is_conflict() && attempt < ATTEMPTS => attempt += 1,
            done => return Ok(done?),
        }
    }
}

async fn patch(state: &ApiState, target: &Target, key: &ObjectKey, patch: Object) -> Result<Response, Failure> {
    let mut merged = Value::Object(read(state, target, key).await?.0);
    merge(&mut merged, &Value::Object(patch.0));
    let Value::Object(merged) = merged else {
        return Err(Failure::bad_request("the patch does not leave an object"));
    };
    // The version that was read stays in it: a change in between is a conflict and not lost.
    replace(state, target, key, Object(merged)).await
}

/// RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(fields) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            fields.shift_remove(key);
        } else {
            merge(fields.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

async fn delete(state: &ApiState, target: &Target, key: &ObjectKey, body: &Bytes) -> Result<Response, Failure> {
    let resource = &target.served.resource;
    let mut preconditions = Preconditions::default();
    if !body.is_empty() {
        let options = object_of(body)?;
        let text = |field: &str| options.0.get("preconditions")?.get(field)?.as_str().map(str::to_owned);
        preconditions = Preconditions { uid: text("uid"), resource_version: text("resourceVersion") };
    }
    read(state, target, key).await?;
    state.admission().admit_deletion(resource, key).await?;
    let last = state.store.objects().delete(resource, key, &preconditions).await?;
    let body = match last {
        Some(object) => Value::Object(object.0),
        None => json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success" }),
    };
    Ok(answer(StatusCode::OK, &body))
}

fn object_of(body: &Bytes) -> Result<Object, Failure> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(map)) => Ok(Object(map)),
        Ok(_) => Err(Failure::bad_request("the body is not a JSON object")),
        Err(error) => Err(Failure::bad_request(format!("the body is not JSON: {error}"))),
    }
}

/// Makes sure that an object is of the kind and in the namespace that the path names.
fn identify(target: &Target, object: &mut Object) -> Result<(), Failure> {
    let resource = &target.served.resource;
    for (field, right) in [("apiVersion", resource.api_version()), ("kind", resource.kind.clone())] {
        let given = object.0.get(field).and_then(Value::as_str).unwrap_or(&right);
        if given != right {
            return Err(Failure::bad_request(format!("`{field}` is `{given}`; this path takes `{right}`")));
        }
        object.0.insert(field.into(), right.into());
    }
    let metadata = object.0.entry("metadata").or_insert_with(|| json!({}));
    let Some(metadata) = metadata.as_object_mut() else {
        return Err(Failure::bad_request("`metadata` is not an object"));
    };
    match &target.namespace {
        Some(namespace) => match metadata.get("namespace").and_then(Value::as_str) {
            Some(given) if given != namespace && !given.is_empty() => {
                return Err(Failure::bad_request(format!(
                    "the path names namespace `{namespace}`, the object `{given}`"
                )));
            }
            _ => drop(metadata.insert("namespace".into(), namespace.as_str().into())),
        },
        None if resource.namespaced => {
            return Err(Failure::bad_request(format!("{} live in a namespace; the path names none", resource.plural)));
        }
        None => drop(metadata.shift_remove("namespace")),
    }
    Ok(())
}

fn answer(code: StatusCode, body: &Value) -> Response {
    (code, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merge_patch_removes_by_null() {
        let mut object = json!({ "a": { "b": 1, "c": 2 }, "d": [1] });
        merge(&mut object, &json!({ "a": { "b": null, "x": { "y": 1 } }, "d": [2] }));
        assert_eq!(object, json!({ "a": { "c": 2, "x": { "y": 1 } }, "d": [2] }));
    }

    #[test]
    fn selectors_are_equalities() {
        let text = "a=b,c==d".to_owned();
        assert_eq!(pairs(Some(&text)).unwrap(), [("a".into(), "b".into()), ("c".into(), "d".into())]);
        for bad in ["a!=b", "a in (b)", "a"] {
            assert_eq!(pairs(Some(&bad.to_owned())).unwrap_err().code, 400, "{bad}");
        }
    }
}
