//! Nodes report themselves; the controller only sees to the settings that everybody reads.

use planner::setting::Settings;
use store::{Selector, Store, StoreError};

use crate::ControllerError;

/// Stores each known setting that is missing, with its default, so that users find what there is to set.
pub async fn create_default_settings(store: &Store) -> Result<(), ControllerError> {
    let stored = store.list(&Selector::default()).await.map_err(|source| ControllerError::Settings { source })?;
    for setting in Settings::missing(&stored) {
        match store.create(&setting).await {
            // Another controller was faster.
            Ok(_) | Err(StoreError::AlreadyExists { .. }) => {}
            Err(source) => return Err(ControllerError::Settings { source }),
        }
    }
    Ok(())
}
