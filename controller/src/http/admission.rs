//! What is refused or filled in before an object is stored on behalf of a user.
//!
//! The rules are those of Longhorn's webhooks (LF 3). Our own controllers write to the store directly and are not checked here.

use api::names::{self, label};
use api::{BackingImage, Replica, Volume};
use kube::ResourceExt;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use store::{Object, ObjectKey, ResourceType, Selector, Store};

use super::failure::Failure;
use api::ErrorKind;

/// Fills in defaults of a new object.
pub fn complete(resource: &ResourceType, object: &mut Object) {
    // The finalizer makes sure that the files of an image go before its object does.
    if resource.kind == "BackingImage" && resource.group == names::GROUP {
        let metadata = object.0.entry("metadata").or_insert_with(|| json!({}));
        let Some(metadata) = metadata.as_object_mut() else { return };
        let finalizers = metadata.entry("finalizers").or_insert_with(|| json!([]));
        if let Some(list) = finalizers.as_array_mut()
            && !list.iter().any(|f| f == names::FINALIZER)
        {
            list.push(names::FINALIZER.into());
        }
    }
}

/// Refuses an object that can never work. `old` is what it replaces.
pub fn check(resource: &ResourceType, new: &Object, old: Option<&Object>) -> Result<(), Failure> {
    if resource.group != names::GROUP {
        return Ok(());
    }
    match resource.kind.as_str() {
        "BackingImage" => parsed::<BackingImage>(resource, new, old),
        "BackingImageManager" => parsed::<api::BackingImageManager>(resource, new, old),
        "BackingImageDataSource" => parsed::<api::BackingImageDataSource>(resource, new, old),
        "Volume" => parsed::<Volume>(resource, new, old),
        "Engine" => parsed::<api::Engine>(resource, new, old),
        "Replica" => parsed::<Replica>(resource, new, old),
        "Node" => parsed::<api::Node>(resource, new, old),
        "Setting" => parsed::<api::Setting>(resource, new, old),
        _ => Ok(()),
    }
}

fn parsed<T: DeserializeOwned>(resource: &ResourceType, new: &Object, _old: Option<&Object>) -> Result<(), Failure> {
    serde_json::from_value::<T>(Value::Object(new.0.clone())).map(drop).map_err(|error| {
        Failure::new(ErrorKind::Invalid, format!("{} `{}` is invalid: {error}", resource.kind, new.name()))
    })
}

/// Refuses a deletion that would take something away from somebody.
pub async fn check_deletion(store: &Store, resource: &ResourceType, key: &ObjectKey) -> Result<(), Failure> {
    if resource.kind != "BackingImage" || resource.group != names::GROUP {
        return Ok(());
    }
    let replicas: Vec<Replica> = store.list(&Selector::label(label::BACKING_IMAGE, &key.name)).await?;
    let volumes: Vec<Volume> = store.list(&Selector::default()).await?;
    let mut users: Vec<String> = replicas.into_iter().map(|r| r.spec.volume_name).collect();
    users.extend(volumes.into_iter().filter(|v| v.spec.backing_image == key.name).map(|v| v.name_any()));
    users.sort();
    users.dedup();
    if users.is_empty() {
        return Ok(());
    }
    Err(Failure::forbidden(format!(
        "cannot delete backing image `{}` since there are replicas using it, of {} `{}`; delete {} first",
        key.name,
        if users.len() == 1 { "volume" } else { "volumes" },
        users.join("`, `"),
        if users.len() == 1 { "that volume" } else { "those volumes" },
    )))
}
