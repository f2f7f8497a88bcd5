//! The typed face of a store.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use kube::Resource;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::object::Scoped;
use crate::{Object, ObjectKey, ObjectStore, Preconditions, ResourceType, Selector, StoreError, WatchEvent};

/// How often [`Store::modify`] tries. Each failed attempt means that somebody else's write succeeded, so this is never reached
/// unless two writers fight over an object.
const ATTEMPTS: u32 = 32;

/// Objects by type. Cheap to clone. Namespaced kinds of ours live in [`Store::namespace`].
#[derive(Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    namespace: Arc<str>,
}

/// One change of a typed object.
#[derive(Clone, Debug)]
pub enum TypedEvent<T> {
    Applied(T),
    Deleted(T),
    /// Events may be missing: list again.
    Relist,
}

impl Store {
    /// A typed face whose own objects live in `namespace`.
    pub fn new(objects: Arc<dyn ObjectStore>, namespace: &str) -> Store {
        Store { objects, namespace: namespace.into() }
    }

    /// The dynamic face, for kinds that are known only at run time.
    pub fn objects(&self) -> &Arc<dyn ObjectStore> {
        &self.objects
    }

    /// The namespace of our own objects (`longhorn-system`).
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    fn key<T>(&self, name: &str) -> ObjectKey
    where
        T: Resource<DynamicType = ()>,
        T::Scope: Scoped,
    {
        ObjectKey { namespace: T::Scope::NAMESPACED.then(|| self.namespace.to_string()), name: name.to_owned() }
    }

    fn encode<T>(&self, object: &T) -> Result<Object, StoreError>
    where
        T: Resource<DynamicType = ()> + Serialize,
        T::Scope: Scoped,
    {
        let resource = ResourceType::of::<T>();
        let invalid = |reason: String| StoreError::Invalid {
            resource: resource.kind.clone(),
            name: object.meta().name.clone().unwrap_or_default(),
            reason,
        };
        let Value::Object(mut map) = serde_json::to_value(object).map_err(|e| invalid(e.to_string()))? else {
            return Err(invalid("it is not a JSON object".into()));
        };
        map.insert("apiVersion".into(), resource.api_version().into());
        map.insert("kind".into(), resource.kind.clone().into());
        if T::Scope::NAMESPACED && object.meta().namespace.is_none() {
            map["metadata"]["namespace"] = self.namespace.as_ref().into();
        }
        Ok(Object(map))
    }

    /// Stores a new object, in [`Store::namespace`] unless it says another.
    pub async fn create<T>(&self, object: &T) -> Result<T, StoreError>
    where
        T: Resource<DynamicType = ()> + Serialize + DeserializeOwned,
        T::Scope: Scoped,
    {
        decode(self.objects.create(&ResourceType::of::<T>(), self.encode(object)?).await?)
    }

    /// The object of that name in [`Store::namespace`].
    pub async fn get<T>(&self, name: &str) -> Result<Option<T>, StoreError>
    where
        T: Resource<DynamicType = ()> + DeserializeOwned,
        T::Scope: Scoped,
    {
        self.objects.get(&ResourceType::of::<T>(), &self.key::<T>(name)).await?.map(decode).transpose()
    }

    /// The object of that name in another namespace.
    pub async fn get_in<T>(&self, namespace: &str, name: &str) -> Result<Option<T>, StoreError>
    where
        T: Resource<DynamicType = ()> + DeserializeOwned,
        T::Scope: Scoped,
    {
        let key = ObjectKey { namespace: Some(namespace.to_owned()), name: name.to_owned() };
        self.objects.get(&ResourceType::of::<T>(), &key).await?.map(decode).transpose()
    }

    /// All objects in [`Store::namespace`] (all objects, for cluster-scoped kinds) that the selector matches.
    pub async fn list<T>(&self, selector: &Selector) -> Result<Vec<T>, StoreError>
    where
        T: Resource<DynamicType = ()> + DeserializeOwned,
        T::Scope: Scoped,
    {
        let namespace = T::Scope::NAMESPACED.then_some(self.namespace());
        let list = self.objects.list(&ResourceType::of::<T>(), namespace, selector).await?;
        list.items.into_iter().map(decode).collect()
    }

    /// All objects of all namespaces.
    pub async fn list_everywhere<T>(&self) -> Result<Vec<T>, StoreError>
    where
        T: Resource<DynamicType = ()> + DeserializeOwned,
        T::Scope: Scoped,
    {
        let list = self.objects.list(&ResourceType::of::<T>(), None, &Selector::default()).await?;
        list.items.into_iter().map(decode).collect()
    }

    /// Replaces everything but the status; a conflict when it was changed since it was read.
    pub async fn replace<T>(&self, object: &T) -> Result<T, StoreError>
    where
        T: Resource<DynamicType = ()> + Serialize + DeserializeOwned,
        T::Scope: Scoped,
    {
        decode(self.objects.replace(&ResourceType::of::<T>(), self.encode(object)?).await?)
    }

    /// Replaces the status only; a conflict when the object was changed since it was read.
    pub async fn replace_status<T>(&self, object: &T) -> Result<T, StoreError>
    where
        T: Resource<DynamicType = ()> + Serialize + DeserializeOwned,
        T::Scope: Scoped,
    {
        decode(self.objects.replace_status(&ResourceType::of::<T>(), self.encode(object)?).await?)
    }

    /// Reads, changes and replaces an object, again and again while somebody else is faster. `change` must be repeatable.
    ///
    /// Everything but the status is written; a change that changes nothing writes nothing.
    pub async fn modify<T>(&self, name: &str, mut change: impl FnMut(&mut T) + Send) -> Result<T, StoreError>
    where
        T: Resource<DynamicType = ()> + Serialize + DeserializeOwned + Send + Sync,
        T::Scope: Scoped,
    {
        let mut attempt = 1;
        loop {
            let mut object = self.get_existing::<T>(name).await?;
            change(&mut object);
            match self.replace(&object).await {
                Err(error) if error.is_conflict() && attempt < ATTEMPTS => give_way(attempt).await,
                done => return done,
            }
            attempt += 1;
        }
    }

    /// As [`Store::modify`], but writes only the status.
    pub async fn modify_status<T>(&self, name: &str, mut change: impl FnMut(&mut T) + Send) -> Result<T, StoreError>
    where
        T: Resource<DynamicType = ()> + Serialize + DeserializeOwned + Send + Sync,
        T::Scope: Scoped,
    {
        let mut attempt = 1;
        loop {
            let mut object = self.get_existing::<T>(name).await?;
            change(&mut object);
            match self.replace_status(&object).await {
                Err(error) if error.is_conflict() && attempt < ATTEMPTS => give_way(attempt).await,
                done => return done,
            }
            attempt += 1;
        }
    }

    async fn get_existing<T>(&self, name: &str) -> Result<T, StoreError>
    where
        T: Resource<DynamicType = ()> + DeserializeOwned,
        T::Scope: Scoped,
    {
        let absent = || StoreError::NotFound { resource: T::kind(&()).into_owned(), name: name.to_owned() };
        self.get(name).await?.ok_or_else(absent)
    }

    /// Deletes the object of that name in [`Store::namespace`]; `None` when there was none.
    pub async fn delete<T>(&self, name: &str, preconditions: &Preconditions) -> Result<Option<T>, StoreError>
    where
        T: Resource<DynamicType = ()> + DeserializeOwned,
        T::Scope: Scoped,
    {
        self.objects
            .delete(&ResourceType::of::<T>(), &self.key::<T>(name), preconditions)
            .await?
            .map(decode)
            .transpose()
    }

    /// Every object of the kind in [`Store::namespace`] (every object, for cluster-scoped kinds), first as it is, then each change.
    pub async fn watch<T>(&self) -> Result<BoxStream<'static, Result<TypedEvent<T>, StoreError>>, StoreError>
    where
        T: Resource<DynamicType = ()> + DeserializeOwned + Send + 'static,
        T::Scope: Scoped,
    {
        self.watch_in(T::Scope::NAMESPACED.then_some(self.namespace())).await
    }

    /// As [`Store::watch`], in all namespaces.
    pub async fn watch_everywhere<T>(&self) -> Result<BoxStream<'static, Result<TypedEvent<T>, StoreError>>, StoreError>
    where
        T: Resource<DynamicType = ()> + DeserializeOwned + Send + 'static,
        T::Scope: Scoped,
    {
        self.watch_in(None).await
    }

    async fn watch_in<T>(
        &self,
        namespace: Option<&str>,
    ) -> Result<BoxStream<'static, Result<TypedEvent<T>, StoreError>>, StoreError>
    where
        T: Resource<DynamicType = ()> + DeserializeOwned + Send + 'static,
        T::Scope: Scoped,
    {
        let events = self.objects.watch(&ResourceType::of::<T>(), namespace, None).await?;
        let typed = events.and_then(|event| async move {
            Ok(match event {
                WatchEvent::Applied(object) => TypedEvent::Applied(decode(object)?),
                WatchEvent::Deleted(object) => TypedEvent::Deleted(decode(object)?),
                WatchEvent::Relist => TypedEvent::Relist,
            })
        });
        Ok(typed.boxed())
    }
}

/// Waits a moment, longer after more failures and never as long as others do, so that writers of one object do not run in step.
async fn give_way(failures: u32) {
    let limit_micros = 500_u64 << failures.min(7);
    let random = uuid::Uuid::new_v4().as_u64_pair().1;
    tokio::time::sleep(Duration::from_micros(random % limit_micros)).await;
}

fn decode<T: DeserializeOwned>(object: Object) -> Result<T, StoreError> {
    object.decode()
}
