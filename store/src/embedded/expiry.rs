//! Which of Kubernetes' events are not kept any longer: an API server forgets them by their age, and there they are bounded by that.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;

use super::limits::{KUBERNETES_EVENT_AGE, KUBERNETES_EVENTS};
use crate::Object;

/// Those that were not changed for too long, and the oldest of too many.
pub fn expired<'a>(events: impl Iterator<Item = &'a Arc<Object>>, now: Timestamp) -> Vec<Arc<Object>> {
    let mut events: Vec<_> = events.map(|event| (last_change(event), event.clone())).collect();
    events.sort_by_key(|(last, _)| *last);
    let too_many = events.len().saturating_sub(KUBERNETES_EVENTS);
    let oldest = now - KUBERNETES_EVENT_AGE;
    let is_expired = |(i, (last, _)): &(usize, (Timestamp, _))| *i < too_many || *last < oldest;
    events.into_iter().enumerate().filter(is_expired).map(|(_, (_, event))| event).collect()
}

/// When it was last counted; a time that cannot be read is long ago.
fn last_change(event: &Object) -> Timestamp {
    let time = |value: Option<&Value>| value.and_then(Value::as_str).and_then(|text| text.parse::<Timestamp>().ok());
    let counted = time(event.0.get("lastTimestamp")).or_else(|| time(event.0.get("eventTime")));
    let created = || time(event.0.get("metadata").and_then(|m| m.get("creationTimestamp")));
    counted.or_else(created).unwrap_or_default()
}
