//! Settings whose default in standalone mode is another one than in a cluster.

use anyhow::Context;
use api::{Setting, setting};
use store::{Store, StoreError};

/// The user of a standalone instance is at home on its machine, so his images may come from there. A cluster's nodes are not their users'.
const OWN_MACHINE: &str = "127.0.0.0/8,::1";

/// Stores them when they are absent, before anybody reads them.
pub async fn ensure(store: &Store) -> anyhow::Result<()> {
    let mut setting = Setting { value: OWN_MACHINE.into(), ..Default::default() };
    setting.metadata.name = Some(setting::ALLOWED_SOURCE_ADDRESSES.into());
    match store.create(&setting).await {
        // As the user left it.
        Ok(_) | Err(StoreError::AlreadyExists { .. }) => Ok(()),
        Err(error) => Err(error).context("cannot store the default settings"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use store::embedded::Embedded;

    use super::*;

    #[tokio::test]
    async fn own_machine_is_allowed_until_the_user_says_otherwise() {
        let store = Store::new(Arc::new(Embedded::in_memory()), "longhorn-system");
        let value = async || store.get::<Setting>(setting::ALLOWED_SOURCE_ADDRESSES).await.unwrap().unwrap().value;
        ensure(&store).await.unwrap();
        assert_eq!(value().await, OWN_MACHINE);
        assert!(setting::known(setting::ALLOWED_SOURCE_ADDRESSES).unwrap().accepts(OWN_MACHINE));
        store.modify::<Setting>(setting::ALLOWED_SOURCE_ADDRESSES, |s| s.value.clear()).await.unwrap();
        ensure(&store).await.unwrap();
        assert_eq!(value().await, "");
    }
}
