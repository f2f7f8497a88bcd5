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

#[cfg(test)]
mod tests {
    use jiff::ToSpan;
    use serde_json::json;

    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T12:00:00Z".parse().unwrap()
    }

    /// An event that began so many seconds ago, as the field of that name says.
    fn event(name: &str, field: &str, seconds_ago: i64) -> Arc<Object> {
        let time = (now() - seconds_ago.seconds()).to_string();
        let mut event = json!({ "metadata": { "name": name, "creationTimestamp": "2020-01-01T00:00:00Z" } });
        match field {
            "creationTimestamp" => event["metadata"][field] = json!(time),
            _ => event[field] = json!(time),
        }
        Arc::new(Object(event.as_object().unwrap().clone()))
    }

    fn names(events: &[Arc<Object>]) -> Vec<String> {
        expired(events.iter(), now()).iter().map(|event| event.name().to_owned()).collect()
    }

    #[test]
    fn an_event_is_kept_for_an_hour_after_it_was_counted_last() {
        let age = i64::try_from(KUBERNETES_EVENT_AGE.as_secs()).unwrap();
        for field in ["lastTimestamp", "eventTime", "creationTimestamp"] {
            let events = [event("young", field, age - 1), event("just", field, age), event("old", field, age + 1)];
            assert_eq!(names(&events), ["old"], "{field}");
        }
        // The last count comes before the first.
        let mut counted = Object::clone(&event("counted", "lastTimestamp", 1));
        counted.0.insert("eventTime".into(), json!("2020-01-01T00:00:00Z"));
        let mut unread = Object::clone(&event("unread", "lastTimestamp", 1));
        unread.0.insert("lastTimestamp".into(), json!("soon"));
        assert_eq!(names(&[Arc::new(counted), Arc::new(unread)]), ["unread"]);
    }

    #[test]
    fn of_too_many_events_the_oldest_go() {
        let many = (0..KUBERNETES_EVENTS + 2).map(|n| {
            // Neither in the order of their names nor of their ages.
            let seconds = (n * 7919) % (KUBERNETES_EVENTS + 2);
            event(&format!("e{seconds}"), "lastTimestamp", i64::try_from(seconds).unwrap())
        });
        let many: Vec<Arc<Object>> = many.collect();
        assert_eq!(names(&many), [format!("e{}", KUBERNETES_EVENTS + 1), format!("e{KUBERNETES_EVENTS}")]);
        assert_eq!(names(&many[2..]), Vec::<String>::new());
    }

    /// Only Kubernetes' events go, and whoever writes one sees to it.
    #[tokio::test]
    async fn an_expired_event_goes_with_the_next_write_of_one() {
        let store = crate::Store::new(Arc::new(crate::embedded::Embedded::in_memory()), "longhorn-system");
        let event = |name: &str, last: Timestamp| {
            let event = json!({
                "metadata": { "name": name, "namespace": "longhorn-system" },
                "involvedObject": {},
                "lastTimestamp": last.to_string(),
            });
            serde_json::from_value::<k8s_openapi::api::core::v1::Event>(event).unwrap()
        };
        let mut setting = api::Setting { value: "1".into(), ..Default::default() };
        setting.metadata.name = Some("old".into());
        setting.metadata.creation_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH));
        store.create(&setting).await.unwrap();
        for (name, last) in [("old", Timestamp::UNIX_EPOCH), ("young", Timestamp::now())] {
            store.create(&event(name, last)).await.unwrap();
        }
        let events: Vec<k8s_openapi::api::core::v1::Event> = store.list(&Default::default()).await.unwrap();
        let names: Vec<_> = events.into_iter().filter_map(|event| event.metadata.name).collect();
        assert_eq!(names, ["young"]);
        assert!(store.get::<api::Setting>("old").await.unwrap().is_some());
    }
}
