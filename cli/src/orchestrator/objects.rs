//! Reading and changing Kubernetes' own objects in the store.

use ::api::ErrorKind;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use store::{Scoped, Store, StoreError};

use crate::failure::Failure;

/// How often a change is tried again that collided with somebody else's.
const CONFLICT_RETRIES: u32 = 20;

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        Failure::new(error.kind(), error.to_string())
    }
}

/// Reads an object again, wherever it lives.
pub async fn read<T>(store: &Store, object: &T) -> Result<Option<T>, StoreError>
where
    T: Resource<DynamicType = ()> + DeserializeOwned,
    T::Scope: Scoped,
{
    match object.namespace() {
        Some(namespace) => store.get_in(&namespace, &object.name_any()).await,
        None => store.get(&object.name_any()).await,
    }
}

/// Which part of an object a change is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Metadata and spec.
    Main,
    Status,
}

/// Changes an object; a collision reads it again and repeats the change. `None` when the object is gone or another one of its name.
///
/// `change` says whether anything is to be written.
pub async fn update<T>(
    store: &Store,
    object: &T,
    part: Part,
    change: impl Fn(&mut T) -> bool,
) -> Result<Option<T>, Failure>
where
    T: Resource<DynamicType = ()> + Serialize + DeserializeOwned + Clone,
    T::Scope: Scoped,
{
    let uid = object.meta().uid.clone();
    for _ in 0..CONFLICT_RETRIES {
        let Some(mut current) = read(store, object).await? else { return Ok(None) };
        if uid.is_some() && current.meta().uid != uid {
            return Ok(None);
        }
        if !change(&mut current) {
            return Ok(Some(current));
        }
        let written = match part {
            Part::Main => store.replace(&current).await,
            Part::Status => store.replace_status(&current).await,
        };
        match written {
            Ok(stored) => return Ok(Some(stored)),
            Err(error) if error.is_conflict() => {}
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
    Err(Failure::new(ErrorKind::Pending, format!("`{}` is changed by others all the time", object.name_any())))
}

/// What a claim says of itself.
pub struct Said<'a> {
    pub r#type: &'a str,
    pub is: bool,
    pub reason: &'a str,
    pub message: &'a str,
}

/// Puts a condition into a claim in place of its own type and `others`; since when it is so is kept.
pub fn set_condition(claim: &mut PersistentVolumeClaim, said: &Said<'_>, others: &[&str]) {
    let now = Time(Timestamp::now());
    let list = claim.status.get_or_insert_default().conditions.get_or_insert_default();
    let since = list.iter().find(|c| c.type_ == said.r#type).and_then(|c| c.last_transition_time.clone());
    list.retain(|c| c.type_ != said.r#type && !others.contains(&c.type_.as_str()));
    list.push(PersistentVolumeClaimCondition {
        type_: said.r#type.to_owned(),
        status: if said.is { "True" } else { "False" }.to_owned(),
        reason: Some(said.reason.to_owned()).filter(|r| !r.is_empty()),
        message: Some(said.message.to_owned()),
        last_transition_time: Some(since.unwrap_or_else(|| now.clone())),
        last_probe_time: Some(now),
    });
}

/// Adds a finalizer; whether it was missing.
pub fn add_finalizer<T: Resource<DynamicType = ()>>(object: &mut T, finalizer: &str) -> bool {
    let list = object.meta_mut().finalizers.get_or_insert_default();
    let missing = !list.iter().any(|f| f == finalizer);
    if missing {
        list.push(finalizer.to_owned());
    }
    missing
}

/// Removes a finalizer; whether it was there.
pub fn remove_finalizer<T: Resource<DynamicType = ()>>(object: &mut T, finalizer: &str) -> bool {
    let Some(list) = &mut object.meta_mut().finalizers else { return false };
    let before = list.len();
    list.retain(|f| f != finalizer);
    list.len() != before
}

/// Whether an object is being deleted.
pub fn is_deleting<T: Resource<DynamicType = ()>>(object: &T) -> bool {
    object.meta().deletion_timestamp.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_of_a_claim_takes_the_place_of_others_and_keeps_its_time() {
        let mut claim = PersistentVolumeClaim::default();
        let mut say = |r#type, message, others: &[&str]| {
            set_condition(&mut claim, &Said { r#type, is: true, reason: "", message }, others);
            claim.status.clone().unwrap().conditions.unwrap()
        };
        say("Provisioned", "no class", &[]);
        let first = say("Resizing", "it is attached", &["FileSystemResizePending"]);
        let again = say("Resizing", "no room", &["FileSystemResizePending"]);
        let types = |list: &[PersistentVolumeClaimCondition]| list.iter().map(|c| c.type_.clone()).collect::<Vec<_>>();
        assert_eq!(types(&again), ["Provisioned", "Resizing"]);
        assert_eq!(again[1].message.as_deref(), Some("no room"));
        assert_eq!(again[1].last_transition_time, first[1].last_transition_time);
        let done = say("FileSystemResizePending", "mount it", &["Resizing"]);
        assert_eq!(types(&done), ["Provisioned", "FileSystemResizePending"]);
        assert_eq!((done[1].reason.as_deref(), done[1].status.as_str()), (None, "True"));
    }
}
