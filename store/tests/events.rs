//! Events harm nobody: a storm of news, a store that is away, and years of operation.

mod suite;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use api::event::News;
use async_trait::async_trait;
use backing_image_store::embedded::Embedded;
use backing_image_store::events::Recorder;
use backing_image_store::{
    Object, ObjectKey, ObjectList, ObjectStore, Preconditions, ResourceType, Selector, Store, StoreError, WatchStream,
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Event;
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// A store that counts the requests of events, and is away at first.
struct Watched {
    inner: Embedded,
    requests: AtomicU32,
    away: AtomicU32,
}

impl Watched {
    fn new(away: u32) -> Arc<Watched> {
        Arc::new(Watched { inner: Embedded::in_memory(), requests: AtomicU32::new(0), away: AtomicU32::new(away) })
    }

    fn ask(&self) -> Result<(), StoreError> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        match self.away.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Err(StoreError::Unavailable { source: "away".into() }),
            Err(_) => Ok(()),
        }
    }
}

#[async_trait]
impl ObjectStore for Watched {
    async fn create(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.ask()?;
        self.inner.create(resource, object).await
    }
    async fn get(&self, resource: &ResourceType, key: &ObjectKey) -> Result<Option<Object>, StoreError> {
        self.ask()?;
        self.inner.get(resource, key).await
    }
    async fn list(&self, r: &ResourceType, namespace: Option<&str>, s: &Selector) -> Result<ObjectList, StoreError> {
        self.inner.list(r, namespace, s).await
    }
    async fn replace(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.ask()?;
        self.inner.replace(resource, object).await
    }
    async fn replace_status(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.inner.replace_status(resource, object).await
    }
    async fn delete(&self, r: &ResourceType, k: &ObjectKey, p: &Preconditions) -> Result<Option<Object>, StoreError> {
        self.inner.delete(r, k, p).await
    }
    async fn watch(&self, r: &ResourceType, ns: Option<&str>, from: Option<String>) -> Result<WatchStream, StoreError> {
        self.inner.watch(r, ns, from).await
    }
}

async fn events(store: &Arc<Watched>) -> Vec<Event> {
    Store::new(store.clone(), "shop").list(&Selector::default()).await.unwrap()
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while !holds().await {
        assert!(std::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await; // poll
    }
}

#[tokio::test]
async fn a_storm_of_news_costs_a_handful_of_writes_and_none_is_miscounted() {
    let store = Watched::new(0);
    let (recorder, worker) = Recorder::new(Store::new(store.clone(), "shop"), "test");
    let stop = CancellationToken::new();
    let working = tokio::spawn(worker.run(stop.clone()));
    let about = suite::subject("a");
    for n in 0..500 {
        recorder.record(&about, &News::warning("Failed", format!("time {n}")), None);
        tokio::task::yield_now().await;
    }
    until("written", async || !events(&store).await.is_empty()).await;
    stop.cancel();
    working.await.unwrap();
    let events = events(&store).await;
    assert_eq!((events.len(), events[0].count, events[0].message.as_deref()), (1, Some(500), Some("time 499")));
    let requests = store.requests.load(Ordering::SeqCst);
    assert!(requests <= 4, "{requests} requests");
}

#[tokio::test]
async fn news_of_many_objects_are_written_one_after_another() {
    let store = Watched::new(0);
    let (recorder, worker) = Recorder::new(Store::new(store.clone(), "shop"), "test");
    let stop = CancellationToken::new();
    let working = tokio::spawn(worker.run(stop.clone()));
    let begin = std::time::Instant::now();
    for n in 0..100 {
        recorder.record(&suite::subject(&format!("object-{n}")), &News::normal("Ready", ""), None);
    }
    until("some are written", async || events(&store).await.len() > 5).await;
    let (written, took) = (events(&store).await.len(), begin.elapsed());
    assert!(written < 10 + (took.as_millis() / 50) as usize, "{written} events after {took:?}");
    stop.cancel();
    working.await.unwrap();
    assert_eq!(events(&store).await.len(), 100, "the rest is written at the end");
}

#[tokio::test(start_paused = true)]
async fn news_that_a_store_did_not_take_come_once_it_is_back() {
    let store = Watched::new(3);
    let (recorder, worker) = Recorder::new(Store::new(store.clone(), "shop"), "test");
    let working = tokio::spawn(worker.run(CancellationToken::new()));
    recorder.record(&suite::subject("a"), &News::warning("Failed", "first"), None);
    until("written once the store is back", async || !events(&store).await.is_empty()).await;
    assert_eq!(store.requests.load(Ordering::SeqCst), 4);
    working.abort();
}

#[tokio::test]
async fn more_news_than_there_is_room_for_hold_nobody_up() {
    let store = Watched::new(0);
    // Nobody takes anything yet.
    let (recorder, worker) = Recorder::new(Store::new(store.clone(), "shop"), "test");
    for n in 0..3000 {
        recorder.record(&suite::subject(&format!("object-{n}")), &News::normal("Ready", ""), None);
    }
    drop(recorder);
    worker.run(CancellationToken::new()).await;
    let written = events(&store).await.len();
    assert!((1..=1000).contains(&written), "{written} events");
}

#[tokio::test]
async fn the_embedded_store_keeps_the_newest_thousand_events_of_an_hour() {
    let store = Embedded::in_memory();
    let events = ResourceType::of::<Event>();
    let event = |name: String, age_seconds: i64| {
        let last = (Timestamp::now() - SignedDuration::from_secs(age_seconds)).to_string();
        suite::object(json!({"metadata": {"name": name, "namespace": "shop"}, "lastTimestamp": last}))
    };
    let names = async || -> Vec<String> {
        let list = store.list(&events, None, &Selector::default()).await.unwrap();
        list.items.iter().map(|o| o.name().to_owned()).collect()
    };
    for n in 0..5 {
        store.create(&events, event(format!("old-{n}"), 3590 + 20 * n)).await.unwrap();
    }
    assert_eq!(names().await, ["old-0"], "what is older than an hour goes with the next one that comes");
    for n in 0..1005 {
        store.create(&events, event(format!("new-{n:04}"), 2000 - n)).await.unwrap();
    }
    let names = names().await;
    assert_eq!((names.len(), names[0].as_str(), names[999].as_str()), (1000, "new-0005", "new-1004"));
    // Other kinds are nobody's business.
    let widgets = suite::widgets();
    store
        .create(
            &widgets,
            suite::object(
                json!({"metadata": {"name": "w", "namespace": "shop"}, "lastTimestamp": "2020-01-01T00:00:00Z"}),
            ),
        )
        .await
        .unwrap();
    store.create(&events, event("last".into(), 0)).await.unwrap();
    assert!(store.get(&widgets, &suite::key("w")).await.unwrap().is_some());
}
