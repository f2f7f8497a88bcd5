//! Rules of Kubernetes metadata: what an object must look like, and which fields are the server's.
//!
//! Both stores ask here before they write, so that one mistake is one sentence, whichever store it is.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::{Object, ObjectKey, ResourceType, StoreError};

/// Bytes of one object as JSON: what the Kubernetes API accepts with etcd's default.
const OBJECT_BYTES: usize = 1_500_000;

pub fn invalid(resource: &ResourceType, name: &str, reason: impl Into<String>) -> StoreError {
    StoreError::Invalid { resource: resource.kind.clone(), name: name.to_owned(), reason: reason.into() }
}

/// A time as Kubernetes writes it: whole seconds, UTC.
pub fn time(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

/// Its metadata, which [`check`] has made sure of.
pub fn metadata_mut(object: &mut Object) -> &mut Map<String, Value> {
    let metadata = object.0.entry("metadata").or_insert_with(|| Map::new().into());
    if !metadata.is_object() {
        *metadata = Map::new().into();
    }
    metadata.as_object_mut().expect("it was made an object above")
}

fn metadata<'a>(object: &'a Object, field: &str) -> Option<&'a Value> {
    object.0.get("metadata")?.get(field)
}

/// Makes a name out of `generateName`.
fn complete_name(object: &mut Object) {
    // Kubernetes' letters: no vowels and no digits that look like them, so that no words come out.
    const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let prefix = metadata(object, "generateName").and_then(Value::as_str).unwrap_or_default();
    if object.name().is_empty() && !prefix.is_empty() {
        let random = uuid::Uuid::new_v4();
        let suffix = random.as_bytes().iter().take(5).map(|byte| LETTERS[usize::from(*byte) % LETTERS.len()] as char);
        let name: String = prefix.chars().chain(suffix).collect();
        metadata_mut(object).insert("name".into(), name.into());
    }
}

/// As [`check`], for an object that is to be made: completes its name, and it has no version yet.
pub fn check_new(resource: &ResourceType, object: &mut Object) -> Result<(), StoreError> {
    complete_name(object);
    check(resource, object)?;
    if !object.resource_version().is_empty() {
        return Err(invalid(resource, object.name(), "metadata.resourceVersion must be absent from a new object"));
    }
    Ok(())
}

/// Refuses a key that does not fit the scope of its kind.
pub fn check_scope(resource: &ResourceType, key: &ObjectKey) -> Result<(), StoreError> {
    let reason = match (resource.namespaced, key.namespace.as_deref().unwrap_or_default()) {
        (true, "") => "this kind lives in namespaces, and none was given".to_owned(),
        (false, namespace) if !namespace.is_empty() => {
            format!("this kind does not live in namespaces, and `{namespace}` was given")
        }
        _ => return Ok(()),
    };
    Err(invalid(resource, &key.name, reason))
}

/// The number of a version to watch from.
pub fn parse_version(resource: &ResourceType, version: &str) -> Result<u64, StoreError> {
    let reason = || format!("`{version}` is not a version to watch from; take the one that a list came with");
    version.parse().map_err(|_| invalid(resource, "", reason()))
}

/// Refuses an object that the Kubernetes API would refuse, whatever its kind; fills `apiVersion` and `kind`.
pub fn check(resource: &ResourceType, object: &mut Object) -> Result<(), StoreError> {
    let name = object.name().to_owned();
    let refuse = |reason: String| Err(invalid(resource, &name, reason));
    for (field, expected) in [("apiVersion", resource.api_version()), ("kind", resource.kind.clone())] {
        match object.0.get(field) {
            None | Some(Value::Null) => {
                object.0.insert(field.into(), expected.into());
            }
            Some(Value::String(given)) if *given == expected => {}
            Some(given) => return refuse(format!("{field} is {given} and must be \"{expected}\"")),
        }
    }
    let Some(fields) = object.0.get_mut("metadata").and_then(Value::as_object_mut) else {
        return refuse("metadata must be an object".into());
    };
    fields.retain(|_, value| !value.is_null());
    for field in ["name", "namespace", "uid", "resourceVersion"] {
        if fields.get(field).is_some_and(|value| !value.is_string()) {
            return refuse(format!("metadata.{field} must be text"));
        }
    }
    if let Err(rule) = check_name(resource, &name) {
        return refuse(format!("metadata.name must be {rule}"));
    }
    if let Some(namespace) = object.namespace().filter(|namespace| !is_dns_label(namespace)) {
        return refuse(format!("metadata.namespace is `{namespace}` and must be {LABEL_RULE}"));
    }
    if let Err(reason) = check_maps(object).and_then(|()| check_lists(object)) {
        return refuse(reason);
    }
    let size_bytes = serde_json::to_vec(&object.0).map_or(usize::MAX, |text| text.len());
    if size_bytes > OBJECT_BYTES {
        return refuse(format!("it has {size_bytes} bytes as JSON, and {OBJECT_BYTES} are the limit"));
    }
    Ok(())
}

const LABEL_RULE: &str = "1 to 63 characters of a-z 0-9 -, with a letter or digit at both ends";

fn is_dns_label(text: &str) -> bool {
    let end = |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = text.as_bytes();
    text.len() <= 63
        && end(bytes.first())
        && end(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

/// DNS subdomain rules; the names of Longhorn's kinds follow its rule for images, which allows `_` and dots anywhere but first.
fn check_name(resource: &ResourceType, name: &str) -> Result<(), &'static str> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let fits = (1..=253).contains(&name.len());
    if resource.group == api::names::GROUP {
        let legal = name.bytes().all(|b| plain(b) || matches!(b, b'-' | b'_' | b'.'));
        if fits && legal && name.bytes().next().is_some_and(plain) {
            return Ok(());
        }
        return Err("1 to 253 characters of a-z 0-9 - _ . that begin with a letter or digit");
    }
    let is_part = |part: &str| {
        let ends = [part.bytes().next(), part.bytes().last()];
        ends.into_iter().all(|end| end.is_some_and(plain)) && part.bytes().all(|b| plain(b) || b == b'-')
    };
    if fits && name.split('.').all(is_part) {
        return Ok(());
    }
    Err("1 to 253 characters of a-z 0-9 - . with a letter or digit at both ends of every part between dots")
}

fn is_label_value(text: &str) -> bool {
    let end = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    text.is_empty()
        || (text.len() <= 63
            && end(bytes.first())
            && end(bytes.last())
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')))
}

fn check_maps(object: &Object) -> Result<(), String> {
    for field in ["labels", "annotations"] {
        let Some(map) = metadata(object, field) else { continue };
        let Some(map) = map.as_object() else { return Err(format!("metadata.{field} must map text to text")) };
        for (key, value) in map {
            let Some(value) = value.as_str() else {
                return Err(format!("metadata.{field} `{key}` is {value} and must be text, in quotes"));
            };
            let key_name = key.rsplit_once('/').map_or(key.as_str(), |(_, name)| name);
            if key_name.is_empty() || !is_label_value(key_name) {
                return Err(format!("metadata.{field} has the illegal key `{key}`"));
            }
            if field == "labels" && !is_label_value(value) {
                return Err(format!(
                    "label `{key}` is `{value}` and must be at most 63 characters of a-z A-Z 0-9 - _ . with a letter or digit at both ends"
                ));
            }
        }
    }
    Ok(())
}

fn check_lists(object: &Object) -> Result<(), String> {
    if let Some(list) = metadata(object, "finalizers")
        && !list.as_array().is_some_and(|list| list.iter().all(|f| f.as_str().is_some_and(|f| !f.is_empty())))
    {
        return Err("metadata.finalizers must be a list of names".into());
    }
    if let Some(list) = metadata(object, "ownerReferences") {
        let whole = |owner: &Value| {
            ["apiVersion", "kind", "name", "uid"]
                .iter()
                .all(|field| owner.get(field).and_then(Value::as_str).is_some_and(|text| !text.is_empty()))
        };
        if !list.as_array().is_some_and(|list| list.iter().all(whole)) {
            return Err("each of metadata.ownerReferences must have apiVersion, kind, name and uid".into());
        }
        let is_controller = |owner: &&Value| owner.get("controller") == Some(&Value::Bool(true));
        if list.as_array().is_some_and(|list| list.iter().filter(is_controller).count() > 1) {
            return Err("of metadata.ownerReferences at most one of them may be the controller".into());
        }
    }
    Ok(())
}

/// Takes from the stored object what only the server sets.
pub fn keep_system_fields(new: &mut Object, stored: &Object) {
    const FIELDS: [&str; 6] = [
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ];
    let fields = metadata_mut(new);
    for field in FIELDS {
        match metadata(stored, field) {
            Some(value) => fields.insert(field.into(), value.clone()),
            None => fields.shift_remove(field),
        };
    }
}

pub fn is_being_deleted(object: &Object) -> bool {
    metadata(object, "deletionTimestamp").is_some()
}

pub fn finalizers(object: &Object) -> BTreeSet<&str> {
    metadata(object, "finalizers").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
}

pub fn owner_references(object: &Object) -> impl Iterator<Item = &Value> {
    metadata(object, "ownerReferences").and_then(Value::as_array).into_iter().flatten()
}

pub fn owner_uid(reference: &Value) -> &str {
    reference.get("uid").and_then(Value::as_str).unwrap_or_default()
}

/// Whether anything but metadata and status differs: what Kubernetes calls a new generation.
pub fn differs_beyond_metadata(new: &Object, stored: &Object) -> bool {
    let wish = |object: &Object| -> usize { object.0.keys().filter(|key| is_wish(key)).count() };
    wish(new) != wish(stored) || new.0.iter().any(|(key, value)| is_wish(key) && stored.0.get(key) != Some(value))
}

fn is_wish(key: &str) -> bool {
    !matches!(key, "metadata" | "status")
}

pub fn raise_generation(object: &mut Object) {
    let generation = metadata(object, "generation").and_then(Value::as_i64).unwrap_or_default();
    metadata_mut(object).insert("generation".into(), (generation + 1).into());
}

/// Sorts every map, so that one content is always the same text (and `apiVersion`, `kind`, `metadata`, `spec`, `status` come in this order).
pub fn sort_fields(object: &mut Object) {
    object.0.sort_keys();
    object.0.values_mut().for_each(sort);
}

fn sort(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.sort_keys();
            map.values_mut().for_each(sort);
        }
        Value::Array(list) => list.iter_mut().for_each(sort),
        _ => {}
    }
}
