//! News of objects as Kubernetes events, as `kubectl describe` looks for them.

use api::Setting;
use api::event::News;
use backing_image_store::Store;
use backing_image_store::events::Recorder;
use jiff::{Timestamp, ToSpan};
use k8s_openapi::api::core::v1::Event;
use tokio_util::sync::CancellationToken;

use super::*;

/// An object that news can be about; it need not be stored.
pub fn subject(name: &str) -> Setting {
    let uid = uuid::Uuid::new_v4().to_string();
    serde_json::from_value(json!({"metadata": {"name": name, "namespace": "shop", "uid": uid}})).unwrap()
}

/// Writes what was recorded, and returns the events of an object by their names.
pub async fn events_of(store: &Any, about: &Setting, record: impl FnOnce(&Recorder)) -> Vec<Event> {
    let store = Store::new(store.clone(), "shop");
    let (recorder, worker) = Recorder::new(store.clone(), "backing-image-csi-test");
    record(&recorder);
    // The worker ends with its last recorder, once everything is written.
    drop(recorder);
    worker.run(CancellationToken::new()).await;
    let all: Vec<Event> = store.list(&Default::default()).await.unwrap();
    all.into_iter().filter(|e| e.involved_object.uid == about.metadata.uid).collect()
}

pub async fn counts_news_of_one_reason_and_part_in_one_event(store: Any) {
    let about = subject("a");
    let failed = |why: &str| News::warning("CopyFailed", why).of_part("Disk_1");
    let events = events_of(&store, &about, |recorder| {
        recorder.record(&about, &failed("refused"), None);
        recorder.record(&about, &failed("timed out"), None);
        recorder.record(&about, &News::warning("CopyFailed", "full").of_part("disk-2"), None);
        recorder.record(&about, &News::normal("Ready", "2 of 3"), None);
    })
    .await;
    let brief = |events: &[Event]| -> Vec<(Option<String>, Option<String>, Option<i32>)> {
        events.iter().map(|e| (e.reason.clone(), e.message.clone(), e.count)).collect()
    };
    let said = |reason: &str, message: &str, count| (Some(reason.to_owned()), Some(message.to_owned()), Some(count));
    let before = [said("CopyFailed", "timed out", 2), said("CopyFailed", "full", 1), said("Ready", "2 of 3", 1)];
    assert_eq!(brief(&events), before);
    let first = &events[0];
    assert_eq!(first.type_.as_deref(), Some("Warning"));
    assert_eq!(events[2].type_.as_deref(), Some("Normal"));
    assert_eq!(first.reporting_component.as_deref(), Some("backing-image-csi-test"));
    assert_eq!(first.source.as_ref().unwrap().component.as_deref(), Some("backing-image-csi-test"));
    let of = &first.involved_object;
    let of = [&of.api_version, &of.kind, &of.namespace, &of.name].map(|text| text.clone().unwrap_or_default());
    assert_eq!(of, ["longhorn.io/v1beta2", "Setting", "shop", "a"]);

    // Another process counts on; what is so since a time counts only when nobody recorded it since.
    let events = events_of(&store, &about, |recorder| {
        recorder.record(&about, &failed("again"), None);
        recorder.record(&about, &News::normal("Ready", "3 of 3"), Some(Timestamp::now() - 1.minute()));
        recorder.record(
            &about,
            &News::warning("CopyFailed", "later").of_part("disk-2"),
            Some(Timestamp::now() + 1.minute()),
        );
    })
    .await;
    let after = [said("CopyFailed", "again", 3), said("CopyFailed", "later", 2), said("Ready", "2 of 3", 1)];
    assert_eq!(brief(&events), after);
    let long = events_of(&store, &subject("b"), |_| {}).await;
    assert!(long.is_empty(), "nothing of others");

    // Whatever an object is called and however much there is to say.
    let about = subject(&"c.".repeat(120));
    let events = events_of(&store, &about, |recorder| recorder.record(&about, &failed(&"ä".repeat(1000)), None)).await;
    assert_eq!(events.len(), 1);
    assert!(events[0].message.as_ref().unwrap().ends_with("ä…"));
}
