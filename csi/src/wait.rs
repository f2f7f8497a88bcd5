//! Waiting for an object to become what a call needs: by watch, within the call's deadline.

use futures::StreamExt;
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use store::{Store, StoreError, TypedEvent};

use crate::deadline::Deadline;

/// How a wait ended.
#[derive(Debug)]
pub enum Outcome<T, R> {
    /// With what was waited for.
    Reached(R),
    /// Too late; the object as it was last, `None` when it was not there.
    Late(Option<T>),
}

/// Waits until `check` sees what it wants of the object with a name. It is called with the object as it is now, then at each change.
pub async fn until<T, R>(
    store: &Store,
    name: &str,
    deadline: &Deadline,
    mut check: impl FnMut(Option<&T>) -> Option<R>,
) -> Result<Outcome<T, R>, StoreError>
where
    T: Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope> + DeserializeOwned + Send + 'static,
{
    // The watch begins before the first look, so that no change falls between them.
    let mut events = store.watch::<T>().await?;
    let mut last = store.get::<T>(name).await?;
    loop {
        if let Some(reached) = check(last.as_ref()) {
            return Ok(Outcome::Reached(reached));
        }
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = deadline.passed() => return Ok(Outcome::Late(last)),
            };
            let ours =
                |object: &T| object.name_any() == name && object.namespace().as_deref() == Some(store.namespace());
            match event {
                None => return Err(StoreError::Unavailable { source: "the watch ended".into() }),
                Some(event) => match event? {
                    // Read again instead of trusting the event: the first ones may be older than the first look.
                    TypedEvent::Applied(object) | TypedEvent::Deleted(object) if !ours(&object) => continue,
                    TypedEvent::Applied(_) | TypedEvent::Deleted(_) | TypedEvent::Relist => {
                        last = store.get::<T>(name).await?;
                        break;
                    }
                },
            }
        }
    }
}
