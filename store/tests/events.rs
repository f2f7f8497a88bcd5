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
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// A store that counts the requests of events and answers at once, so that a paused clock does not run on; and fails as it is told to.
struct Watched {
    inner: Embedded,
    requests: AtomicU32,
    /// How many of the next requests, of these each, fail.
    away: AtomicU32,
    forbidden: AtomicU32,
    conflicts: AtomicU32,
    expired: AtomicU32,
    /// How many of the next creations are only counted: many events take their time in a store.
    swallowed: AtomicU32,
}

fn takes(left: &AtomicU32) -> bool {
    left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

fn at_once<T>(request: impl Future<Output = T>) -> T {
    futures::executor::block_on(request)
}

impl Watched {
    fn new(away: u32) -> Arc<Watched> {
        let [forbidden, conflicts, expired, swallowed] = [(); 4].map(|()| AtomicU32::new(0));
        let (inner, requests, away) = (Embedded::in_memory(), AtomicU32::new(0), AtomicU32::new(away));
        Arc::new(Watched { inner, requests, away, forbidden, conflicts, expired, swallowed })
    }

    fn ask(&self) -> Result<(), StoreError> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        if takes(&self.away) {
            return Err(StoreError::Unavailable { source: "away".into() });
        }
        let [resource, name, reason] = ["Event", "e", "no"].map(str::to_owned);
        if takes(&self.forbidden) { Err(StoreError::Forbidden { resource, name, reason }) } else { Ok(()) }
    }
}

#[async_trait]
impl ObjectStore for Watched {
    async fn create(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.ask()?;
        tokio::task::yield_now().await;
        if takes(&self.swallowed) {
            return Ok(object);
        }
        at_once(self.inner.create(resource, object))
    }
    async fn get(&self, resource: &ResourceType, key: &ObjectKey) -> Result<Option<Object>, StoreError> {
        self.ask()?;
        if takes(&self.expired) {
            at_once(self.inner.delete(resource, key, &Preconditions::default()))?;
        }
        at_once(self.inner.get(resource, key))
    }
    async fn list(&self, r: &ResourceType, namespace: Option<&str>, s: &Selector) -> Result<ObjectList, StoreError> {
        at_once(self.inner.list(r, namespace, s))
    }
    async fn replace(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.ask()?;
        if takes(&self.conflicts) {
            return Err(StoreError::Conflict { resource: "Event".into(), name: object.name().into() });
        }
        at_once(self.inner.replace(resource, object))
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

/// A worker that writes into it, and what it is told by.
fn working(store: &Arc<Watched>) -> (Recorder, CancellationToken, tokio::task::JoinHandle<()>) {
    let (recorder, worker) = Recorder::new(Store::new(store.clone(), "shop"), "test");
    let stop = CancellationToken::new();
    let running = tokio::spawn(worker.run(stop.clone()));
    (recorder, stop, running)
}

/// How often the one event that there is was so.
async fn count(store: &Arc<Watched>) -> i32 {
    events(store).await.first().and_then(|event| event.count).unwrap_or(0)
}

fn requests(store: &Arc<Watched>) -> u32 {
    store.requests.load(Ordering::SeqCst)
}

/// Lets the paused clock run.
async fn pass(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await; // poll
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

#[tokio::test(start_paused = true)]
async fn news_of_many_objects_are_written_one_after_another() {
    let store = Watched::new(0);
    let (recorder, stop, running) = working(&store);
    for n in 0..100 {
        recorder.record(&suite::subject(&format!("object-{n}")), &News::normal("Ready", ""), None);
    }
    pass(5.05).await;
    assert_eq!(events(&store).await.len(), 51, "ten in a second");
    stop.cancel();
    running.await.unwrap();
    assert_eq!(events(&store).await.len(), 100, "the rest is written at the end");
}

#[tokio::test(start_paused = true)]
async fn news_that_come_again_soon_are_written_together() {
    let store = Watched::new(0);
    let (recorder, stop, running) = working(&store);
    let (about, news) = (suite::subject("a"), News::warning("Failed", "why"));
    recorder.record(&about, &news, None);
    pass(0.5).await;
    assert_eq!((count(&store).await, requests(&store)), (1, 1), "the first one at once");
    for _ in 0..9 {
        recorder.record(&about, &news, None);
        pass(1.0).await;
    }
    assert_eq!((count(&store).await, requests(&store)), (1, 1));
    pass(1.0).await;
    assert_eq!((count(&store).await, requests(&store)), (10, 4), "the rest by one replacement");
    pass(60.0).await;
    recorder.record(&about, &news, None);
    pass(0.5).await;
    assert_eq!((count(&store).await, requests(&store)), (11, 7), "at once again, and nothing was written in between");
    stop.cancel();
    running.await.unwrap();
    assert_eq!((count(&store).await, requests(&store)), (11, 7), "what is written is not written again at the end");
}

#[tokio::test(start_paused = true)]
async fn news_that_a_store_did_not_take_come_once_it_is_back() {
    let store = Watched::new(3);
    let (recorder, _stop, _running) = working(&store);
    recorder.record(&suite::subject("a"), &News::warning("Failed", "first"), None);
    pass(29.0).await;
    assert_eq!((count(&store).await, requests(&store)), (0, 3), "it is not pressed");
    pass(2.0).await;
    assert_eq!((count(&store).await, requests(&store)), (1, 4));
}

#[tokio::test(start_paused = true)]
async fn news_that_nobody_takes_are_forgotten() {
    let store = Watched::new(u32::MAX);
    let (recorder, _stop, _running) = working(&store);
    recorder.record(&suite::subject("a"), &News::warning("Failed", "first"), None);
    pass(590.0).await;
    let before = requests(&store);
    pass(100.0).await;
    let after = requests(&store);
    assert!(before >= 50 && after > before, "{before} {after}");
    pass(1000.0).await;
    assert_eq!(requests(&store), after, "ten minutes are enough");
    // What is refused is refused the next time as well.
    let store = Watched::new(0);
    store.forbidden.store(1, Ordering::SeqCst);
    let (recorder, _stop, _running) = working(&store);
    recorder.record(&suite::subject("a"), &News::warning("Failed", "first"), None);
    pass(100.0).await;
    assert_eq!((count(&store).await, requests(&store)), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_for_long_costs_no_memory() {
    let store = Watched::new(u32::MAX);
    let (recorder, stop, running) = working(&store);
    for n in 0..3000 {
        recorder.record(&suite::subject(&format!("object-{n}")), &News::normal("Ready", ""), None);
        tokio::task::yield_now().await;
    }
    let before = requests(&store);
    store.swallowed.store(u32::MAX, Ordering::SeqCst);
    store.away.store(0, Ordering::SeqCst);
    stop.cancel();
    running.await.unwrap();
    let written = requests(&store) - before;
    assert!((900..=1000).contains(&written), "{written} written");
}

#[tokio::test(start_paused = true)]
async fn an_event_that_somebody_else_changes_or_that_expires_is_counted_all_the_same() {
    let store = Watched::new(0);
    let (recorder, _stop, _running) = working(&store);
    let (about, news) = (suite::subject("a"), News::warning("Failed", "why"));
    recorder.record(&about, &news, None);
    pass(15.0).await;
    store.conflicts.store(1, Ordering::SeqCst);
    recorder.record(&about, &news, None);
    pass(15.0).await;
    assert_eq!(count(&store).await, 2);
    store.expired.store(1, Ordering::SeqCst);
    recorder.record(&about, &news, None);
    pass(15.0).await;
    assert_eq!(count(&store).await, 1, "it is a new one");
}

#[tokio::test(start_paused = true)]
async fn events_of_different_objects_and_reasons_never_mix_and_tell_the_last_mood() {
    let store = Watched::new(0);
    let (recorder, _stop, _running) = working(&store);
    let long = suite::subject(&"c".repeat(250));
    for (about, reason) in
        [(&suite::subject("a"), "Failed"), (&suite::subject("a"), "Failed"), (&long, "One"), (&long, "Two")]
    {
        recorder.record(about, &News::warning(reason, "why"), None);
    }
    pass(15.0).await;
    assert_eq!(events(&store).await.len(), 4, "two objects of one name, and two reasons of a name that is long");
    recorder.record(&long, &News::normal("Two", "all is well"), None);
    pass(15.0).await;
    let two = |e: &&Event| e.reason.as_deref() == Some("Two");
    assert_eq!(events(&store).await.iter().find(two).unwrap().type_.as_deref(), Some("Normal"));
}

#[tokio::test(start_paused = true)]
async fn what_was_told_since_it_began_is_not_told_again() {
    let store = Watched::new(0);
    let (about, news) = (suite::subject("a"), News::warning("Failed", "why"));
    let again = async |since: &[Option<Timestamp>]| {
        let (recorder, _stop, _running) = working(&store);
        since.iter().for_each(|since| recorder.record(&about, &news, *since));
        pass(5.0).await;
        count(&store).await
    };
    let past = Timestamp::now() - SignedDuration::from_secs(60);
    assert_eq!(again(&[Some(past)]).await, 1);
    let last = events(&store).await[0].last_timestamp.clone().unwrap().0.as_second();
    let in_its_second = Timestamp::from_nanosecond(i128::from(last) * 1_000_000_000 + 999_999_999).unwrap();
    assert_eq!(again(&[Some(past)]).await, 1);
    assert_eq!(again(&[Some(in_its_second)]).await, 1, "events have whole seconds");
    // What waits to be written together is one thing when it may be the same one, and certainly happened now when any of it did.
    let (recorder, _stop, _running) = working(&store);
    recorder.record(&about, &news, None);
    pass(1.0).await;
    assert_eq!(count(&store).await, 2);
    let later = Some(Timestamp::now() + SignedDuration::from_secs(60));
    [later, later].iter().for_each(|since| recorder.record(&about, &news, *since));
    pass(12.0).await;
    assert_eq!(count(&store).await, 3);
    [None, Some(past)].iter().for_each(|since| recorder.record(&about, &news, *since));
    pass(12.0).await;
    assert_eq!(count(&store).await, 5);
}

/// A process that saw it end and begin again.
#[tokio::test(start_paused = true)]
async fn what_begins_anew_soon_after_it_was_told_counts() {
    let store = Watched::new(0);
    let (recorder, _stop, _running) = working(&store);
    let (about, news) = (suite::subject("a"), News::warning("Failed", "why"));
    recorder.record(&about, &news, Some(Timestamp::now()));
    pass(1.0).await;
    recorder.record(&about, &news, Some(Timestamp::now() + SignedDuration::from_secs(60)));
    pass(10.0).await;
    assert_eq!(count(&store).await, 2);
}

#[tokio::test(start_paused = true)]
async fn an_event_began_when_the_first_of_its_news_came() {
    let store = Watched::new(0);
    let (recorder, worker) = Recorder::new(Store::new(store.clone(), "shop"), "test");
    let (about, news) = (suite::subject("a"), News::warning("Failed", "why"));
    recorder.record(&about, &news, None);
    let first = Timestamp::now().as_second();
    while Timestamp::now().as_second() == first {
        tokio::task::yield_now().await;
    }
    recorder.record(&about, &news, None);
    drop(recorder);
    worker.run(CancellationToken::new()).await;
    let event = events(&store).await.remove(0);
    let second = |time: Option<Time>| time.unwrap().0.as_second();
    let (began, last) = (second(event.first_timestamp), second(event.last_timestamp));
    assert!(began <= first && last > first, "{began} {first} {last}");
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
