//! Several candidates, a store that can be cut off from each of them, and a clock that stands still unless all wait.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use api::ErrorKind;
use async_trait::async_trait;
use store::embedded::Embedded;
use store::{Object, ObjectKey, ObjectList, ObjectStore, Preconditions, ResourceType, Selector, WatchStream};
use tokio::task::JoinHandle;

use super::*;
use crate::ControllerError;

/// How a candidate's way to the store is.
#[derive(Clone, Copy)]
enum Way {
    Open = 0,
    Silent = 1,
    Refused = 2,
    /// Requests arrive, answers do not come back.
    Deaf = 3,
}

/// The store as one candidate reaches it.
struct Link {
    store: Arc<Embedded>,
    way: AtomicU8,
}

impl Link {
    fn set(&self, way: Way) {
        self.way.store(way as u8, Ordering::SeqCst);
    }

    async fn reach<T>(&self, request: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        match self.way.load(Ordering::SeqCst) {
            0 => at_once(request),
            2 => Err(StoreError::Unavailable { source: "refused".into() }),
            3 => {
                let _ = at_once(request);
                std::future::pending().await
            }
            _ => std::future::pending().await,
        }
    }
}

/// The store answers from a thread of its own, and while everything waits for it the paused clock must not run on.
fn at_once<T>(request: impl Future<Output = T>) -> T {
    futures::executor::block_on(request)
}

#[async_trait]
impl ObjectStore for Link {
    async fn create(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.reach(self.store.create(resource, object)).await
    }
    async fn get(&self, resource: &ResourceType, key: &ObjectKey) -> Result<Option<Object>, StoreError> {
        // A deaf one has read in time; it is its writes whose answers are lost.
        if self.way.load(Ordering::SeqCst) == Way::Deaf as u8 {
            return at_once(self.store.get(resource, key));
        }
        self.reach(self.store.get(resource, key)).await
    }
    async fn list(&self, r: &ResourceType, namespace: Option<&str>, s: &Selector) -> Result<ObjectList, StoreError> {
        self.reach(self.store.list(r, namespace, s)).await
    }
    async fn replace(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.reach(self.store.replace(resource, object)).await
    }
    async fn replace_status(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.reach(self.store.replace_status(resource, object)).await
    }
    async fn delete(&self, r: &ResourceType, key: &ObjectKey, p: &Preconditions) -> Result<Option<Object>, StoreError> {
        self.reach(self.store.delete(r, key, p)).await
    }
    async fn watch(&self, r: &ResourceType, n: Option<&str>, from: Option<String>) -> Result<WatchStream, StoreError> {
        self.reach(self.store.watch(r, n, from)).await
    }
}

/// What happened when, in milliseconds since the start.
type Story = Arc<Mutex<Vec<(u128, String)>>>;

struct World {
    store: Arc<Embedded>,
    start: Instant,
    story: Story,
}

struct Running {
    link: Arc<Link>,
    shutdown: CancellationToken,
    ended: JoinHandle<Result<(), ControllerError>>,
}

impl World {
    fn new() -> World {
        World { store: Arc::new(Embedded::in_memory()), start: Instant::now(), story: Story::default() }
    }

    fn store(&self) -> Store {
        let link = Link { store: self.store.clone(), way: AtomicU8::new(0) };
        Store::new(Arc::new(link), "longhorn-system")
    }

    /// A candidate whose work heeds the request to end, or does not.
    fn candidate(&self, name: &str, heeds: bool) -> Running {
        let link = Arc::new(Link { store: self.store.clone(), way: AtomicU8::new(0) });
        let store = Store::new(link.clone(), "longhorn-system");
        let candidate = Candidate { store, identity: name.to_owned(), timing: Timing::default() };
        let (story, start, name, shutdown) =
            (self.story.clone(), self.start, name.to_owned(), CancellationToken::new());
        let stop = shutdown.clone();
        let ended = tokio::spawn(async move {
            let work = |term: Term| {
                let note = Note { story: story.clone(), start, name: name.clone() };
                async move {
                    note.say("leads");
                    let _stopped = &note;
                    term.ending.cancelled().await;
                    note.say("is asked to end");
                    if !heeds {
                        std::future::pending::<()>().await;
                    }
                    Ok(())
                }
            };
            candidate.run(&stop, work).await
        });
        Running { link, shutdown, ended }
    }

    /// Waits until the story says so; returns when that was.
    async fn when(&self, text: &str) -> u128 {
        let said = async {
            loop {
                let found = self.story.lock().unwrap().iter().find(|(_, said)| said == text).map(|(at, _)| *at);
                if let Some(at) = found {
                    return at;
                }
                sleep(Duration::from_millis(50)).await; // poll
            }
        };
        let waited = timeout(Duration::from_secs(120), said).await;
        waited.unwrap_or_else(|_| panic!("not `{text}` but {:?}", self.story.lock().unwrap()))
    }

    fn said(&self, text: &str) -> usize {
        self.story.lock().unwrap().iter().filter(|(_, said)| said.contains(text)).count()
    }
}

/// Tells of the work, also of its end, however it ends.
struct Note {
    story: Story,
    start: Instant,
    name: String,
}

impl Note {
    fn say(&self, what: &str) {
        self.story.lock().unwrap().push((self.start.elapsed().as_millis(), format!("{} {what}", self.name)));
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        self.say("has stopped");
    }
}

#[tokio::test(start_paused = true)]
async fn one_of_many_leads_and_keeps_leading() {
    let world = World::new();
    let candidates: Vec<Running> = ["a", "b", "c"].map(|name| world.candidate(name, true)).into();
    sleep(Duration::from_secs(300)).await;
    assert_eq!((world.said("leads"), world.said("stopped")), (1, 0));
    let lease: Lease = world.store().get(LEASE).await.unwrap().unwrap();
    assert_eq!(lease.spec.unwrap().lease_transitions, Some(0));
    candidates.iter().for_each(|c| c.shutdown.cancel());
    for candidate in candidates {
        candidate.ended.await.unwrap().unwrap();
    }
    assert_eq!((world.said("leads"), world.said("stopped")), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn an_orderly_end_hands_over_without_a_wait() {
    let world = World::new();
    let first = world.candidate("a", true);
    world.when("a leads").await;
    let _second = world.candidate("b", true);
    sleep(Duration::from_secs(30)).await;
    first.shutdown.cancel();
    first.ended.await.unwrap().unwrap();
    let (stopped, taken) = (world.when("a has stopped").await, world.when("b leads").await);
    assert!(stopped <= taken && taken - stopped <= 2_100, "{stopped} {taken}");
}

/// However the leader is cut off, whether its work heeds or not, it has stopped before another one begins, and one does begin.
#[tokio::test(start_paused = true)]
async fn a_leader_that_is_cut_off_has_stopped_before_another_begins() {
    for way in [Way::Silent, Way::Refused, Way::Deaf] {
        for heeds in [true, false] {
            // At different moments between two renewals.
            for moment_millis in [0, 1_300] {
                let world = World::new();
                let first = world.candidate("a", heeds);
                world.when("a leads").await;
                let _second = world.candidate("b", true);
                sleep(Duration::from_millis(20_000 + moment_millis)).await;
                first.link.set(way);
                let cut = world.start.elapsed().as_millis();
                let (asked, stopped) = (world.when("a is asked to end").await, world.when("a has stopped").await);
                let taken = world.when("b leads").await;
                let all = format!(
                    "way {} heeds {heeds}: cut {cut}, asked {asked}, stopped {stopped}, taken {taken}",
                    way as u8
                );
                // Who ended in order may still give the lease back; who did not is cut off with room to spare.
                let spare = if heeds { 0 } else { 500 };
                assert!(asked <= stopped && stopped + spare <= taken, "{all}");
                assert!(taken - cut <= 25_000, "{all}");
                // It comes back as one of the others.
                first.link.set(Way::Open);
                sleep(Duration::from_secs(60)).await;
                assert_eq!((world.said("a leads"), world.said("b has stopped")), (1, 0), "{all}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_short_outage_changes_nothing() {
    let world = World::new();
    let first = world.candidate("a", true);
    world.when("a leads").await;
    let _second = world.candidate("b", true);
    for way in [Way::Silent, Way::Refused] {
        sleep(Duration::from_secs(20)).await;
        first.link.set(way);
        sleep(Duration::from_secs(5)).await;
        first.link.set(Way::Open);
    }
    sleep(Duration::from_secs(60)).await;
    assert_eq!((world.said("leads"), world.said("asked")), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn who_sees_that_another_one_has_the_lease_stops_at_once() {
    let world = World::new();
    let _first = world.candidate("a", false);
    world.when("a leads").await;
    let steal = |lease: &mut Lease| lease.spec.get_or_insert_default().holder_identity = Some("thief".into());
    world.store().modify::<Lease>(LEASE, steal).await.unwrap();
    let stolen = world.start.elapsed().as_millis();
    assert!(world.when("a has stopped").await - stolen <= 2_100);
}

/// Somebody removed the lease, and its holder does not hear of it.
#[tokio::test(start_paused = true)]
async fn a_lease_that_was_removed_may_still_be_believed_in() {
    let world = World::new();
    let first = world.candidate("a", true);
    world.when("a leads").await;
    let _second = world.candidate("b", true);
    sleep(Duration::from_secs(20)).await;
    first.link.set(Way::Silent);
    world.store().delete::<Lease>(LEASE, &Preconditions::default()).await.unwrap();
    let (stopped, taken) = (world.when("a has stopped").await, world.when("b leads").await);
    assert!(stopped <= taken, "{stopped} {taken}");
}

/// What stands in the lease of times is for people: clocks of machines differ.
#[tokio::test(start_paused = true)]
async fn a_lease_from_another_time_counts_from_when_it_was_seen() {
    for time in ["1999-01-01T00:00:00Z", "2999-01-01T00:00:00Z"] {
        let world = World::new();
        let mut lease = Lease::default();
        lease.metadata.name = Some(LEASE.into());
        lease.spec = Some(LeaseSpec {
            holder_identity: Some("gone".into()),
            lease_duration_seconds: Some(20),
            renew_time: Some(MicroTime(time.parse().unwrap())),
            ..LeaseSpec::default()
        });
        world.store().create(&lease).await.unwrap();
        let _second = world.candidate("b", true);
        let taken = world.when("b leads").await;
        assert!((20_000..24_000).contains(&taken), "{time}: {taken}");
    }
}

#[tokio::test(start_paused = true)]
async fn work_that_fails_ends_the_candidate_and_frees_the_lease() {
    let world = World::new();
    let candidate = Candidate { store: world.store(), identity: "a".into(), timing: Timing::default() };
    let failing = |_: Term| async {
        let source = StoreError::Unavailable { source: "broken".into() };
        Err::<(), _>(ControllerError::Settings { source })
    };
    let error = candidate.run(&CancellationToken::new(), failing).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let _second = world.candidate("b", true);
    assert!(world.when("b leads").await <= 200);
}
