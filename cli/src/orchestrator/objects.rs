//! Reading and changing Kubernetes' own objects in the store.

use ::api::ErrorKind;
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
