//! Kubernetes events: what a user must know about an object, counted instead of repeated.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::{Resource, ResourceExt};
use store::Store;

use super::objects::{self, Part};

/// Whether an event is good or bad news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Normal,
    Warning,
}

/// Records an event about an object. A failure to do so is only logged: events are a courtesy.
pub async fn record<T: Resource<DynamicType = ()>>(store: &Store, about: &T, mood: Mood, reason: &str, message: &str) {
    let namespace = about.namespace().unwrap_or_else(|| "default".into());
    let uid = about.uid().unwrap_or_default();
    // One event for each object and reason; the last message stands.
    let short: String = uid.chars().filter(|c| c.is_ascii_hexdigit()).take(16).collect();
    let name = format!("{}.{short}.{}", about.name_any(), reason.to_ascii_lowercase());
    let now = Time(Timestamp::now());
    let event = Event {
        metadata: ObjectMeta { name: Some(name), namespace: Some(namespace), ..Default::default() },
        involved_object: ObjectReference {
            api_version: Some(T::api_version(&()).into_owned()),
            kind: Some(T::kind(&()).into_owned()),
            name: about.meta().name.clone(),
            namespace: about.namespace(),
            uid: Some(uid),
            ..Default::default()
        },
        type_: Some(if mood == Mood::Normal { "Normal" } else { "Warning" }.into()),
        reason: Some(reason.into()),
        message: Some(message.into()),
        count: Some(1),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now.clone()),
        source: Some(EventSource { component: Some("backing-image-csi".into()), ..Default::default() }),
        ..Default::default()
    };
    let updated = objects::update(store, &event, Part::Main, |old| {
        old.count = Some(old.count.unwrap_or(1).saturating_add(1));
        old.message = Some(message.into());
        old.last_timestamp = Some(now.clone());
        true
    })
    .await;
    let result = match updated {
        Ok(Some(_)) => Ok(()),
        Ok(None) => store.create(&event).await.map(drop).map_err(Into::into),
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        tracing::warn!(error = &error as &dyn std::error::Error, reason, "event not recorded");
    }
}
