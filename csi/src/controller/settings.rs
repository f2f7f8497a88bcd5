//! Settings, with their defaults.

use api::{Setting, setting};
use store::Store;
use tracing::warn;

use crate::CsiError;

/// The value of a known setting; one that is not legal counts as its default.
async fn text(store: &Store, name: &'static str) -> Result<String, CsiError> {
    let Some(known) = setting::known(name) else { return Ok(String::new()) };
    match store.get::<Setting>(name).await?.map(|s| s.value) {
        Some(value) if known.accepts(&value) => Ok(value),
        Some(value) => {
            warn!(setting = name, value, default = known.default, "setting is not legal, its default is used");
            Ok(known.default.to_owned())
        }
        None => Ok(known.default.to_owned()),
    }
}

/// The value of a setting that is a whole number.
pub async fn number(store: &Store, name: &'static str) -> Result<u32, CsiError> {
    Ok(text(store, name).await?.parse().unwrap_or_default())
}
