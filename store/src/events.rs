//! Kubernetes events: what a user must know about an object, counted instead of repeated.
//!
//! A [`Recorder`] takes news and never waits; a [`Worker`] writes them, one after another and not too fast, so that neither a store
//! that is away nor a storm of news holds up whoever records. There is one Event for each object, reason and part; the last message
//! stands, and how often it was so. What cannot be written is logged: events are a courtesy.
//! They expire as Kubernetes lets them (an hour by default); the embedded store does the same.

use std::collections::HashMap;
use std::time::Duration;

use api::ErrorKind;
use api::event::News;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{Store, StoreError};

/// News that wait to be taken, and news that wait to be written; more are dropped.
const WAITING: usize = 1000;

/// At most ten writes in a second, whatever happens: an API server has better things to do.
const PACE: Duration = Duration::from_millis(100);

/// What is said again before this is over is counted together.
const REPEAT: Duration = Duration::from_secs(10);

/// News that could not be written for that long because the store is away are forgotten.
const PATIENCE: Duration = Duration::from_secs(600);

/// What waits at the end may be written until then.
const DRAIN: Duration = Duration::from_secs(2);

/// Each collision is another write of the same Event, by a controller that is on its way out.
const ATTEMPTS: u32 = 8;

/// What the newer events API allows.
const MESSAGE_BYTES: usize = 1024;

/// Objects' names are mostly short; those of claims may have 253 bytes, as an Event's name must not.
const NAME_BYTES: usize = 120;

/// Takes news of objects. Cheap to clone.
#[derive(Clone)]
pub struct Recorder {
    component: &'static str,
    sender: mpsc::Sender<Record>,
}

struct Record {
    event: Event,
    since: Option<Timestamp>,
}

impl Recorder {
    /// A recorder and what writes for it; `component` is who users see as the source.
    pub fn new(store: Store, component: &'static str) -> (Recorder, Worker) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Recorder { component, sender }, Worker { store, receiver, waiting: HashMap::new() })
    }

    /// Records that something happened to an object. With `since`: it is so since then, and may have been told before.
    pub fn record<T: Resource<DynamicType = ()>>(&self, about: &T, news: &News, since: Option<Timestamp>) {
        let event = event(self.component, about, news);
        if let Err(mpsc::error::TrySendError::Full(record)) = self.sender.try_send(Record { event, since }) {
            tracing::debug!(event = record.event.metadata.name, "event dropped, too many wait");
        }
    }
}

/// Writes what its [`Recorder`] takes.
pub struct Worker {
    store: Store,
    receiver: mpsc::Receiver<Record>,
    waiting: HashMap<(String, String), Waiting>,
}

/// An Event that is to be written, or was not long ago.
struct Waiting {
    event: Event,
    /// As [`Recorder::record`] has it; `None` once anything of it certainly happened now.
    since: Option<Timestamp>,
    /// Since it was last written.
    count: i32,
    due: Instant,
    taken: Instant,
}

impl Worker {
    /// Writes until `shutdown`, and then what still waits, for a moment.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut free = Instant::now();
        loop {
            let due = self.waiting.values().map(|w| w.due).min();
            tokio::select! {
                () = shutdown.cancelled() => break,
                record = self.receiver.recv() => match record {
                    Some(record) => self.take(record),
                    None => break,
                },
                () = sleep_until(due.unwrap_or(free).max(free)), if due.is_some() => {
                    if self.write_one().await {
                        free = Instant::now() + PACE;
                    }
                }
            }
        }
        while let Ok(record) = self.receiver.try_recv() {
            self.take(record);
        }
        let _ = timeout(DRAIN, async {
            for waiting in self.waiting.values().filter(|w| w.count > 0) {
                if let Err(error) = write(&self.store, waiting).await {
                    return warn!(error = api::error::sentence(&error), "events not recorded at the end");
                }
            }
        })
        .await;
    }

    fn take(&mut self, Record { event, since }: Record) {
        let key = |text: &Option<String>| text.clone().unwrap_or_default();
        let key = (key(&event.metadata.namespace), key(&event.metadata.name));
        let now = Instant::now();
        if let Some(waiting) = self.waiting.get_mut(&key) {
            if waiting.count == 0 {
                (waiting.event, waiting.since, waiting.count, waiting.taken) = (event, since, 1, now);
                return;
            }
            // One that may have been told before is the same one, said twice.
            let is_same = waiting.since.is_some() && since.is_some();
            waiting.count = waiting.count.saturating_add(i32::from(!is_same));
            waiting.since = waiting.since.and(since);
            let first = waiting.event.first_timestamp.take();
            waiting.event = Event { first_timestamp: first, ..event };
            return;
        }
        if self.waiting.len() >= WAITING {
            tracing::debug!(event = key.1, "event dropped, too many wait");
            return;
        }
        self.waiting.insert(key, Waiting { event, since, count: 1, due: now, taken: now });
    }

    /// Writes the Event that is due first, or forgets it; whether the store was asked.
    async fn write_one(&mut self) -> bool {
        let Some((key, waiting)) = self.waiting.iter().min_by_key(|(_, w)| w.due) else { return false };
        let key = key.clone();
        let written = match waiting.count {
            0 => None,
            _ => Some(write(&self.store, waiting).await),
        };
        let Some(waiting) = self.waiting.get_mut(&key) else { return false };
        match &written {
            None => drop(self.waiting.remove(&key)),
            Some(Ok(())) => {
                waiting.count = 0;
                waiting.taken = Instant::now();
                waiting.due = Instant::now() + REPEAT;
            }
            Some(Err(error)) => {
                let (reason, error_text) = (waiting.event.reason.clone(), api::error::sentence(error));
                let is_away = error.kind() == ErrorKind::Unavailable && waiting.taken.elapsed() < PATIENCE;
                if is_away {
                    waiting.due = Instant::now() + REPEAT;
                } else {
                    self.waiting.remove(&key);
                }
                warn!(event = key.1, reason, error = error_text, again = is_away, "event not recorded");
            }
        }
        written.is_some()
    }
}

/// Makes the Event, or counts the one that is there.
async fn write(store: &Store, waiting: &Waiting) -> Result<(), StoreError> {
    let mut new = waiting.event.clone();
    new.count = Some(waiting.count);
    let (namespace, name) =
        (new.metadata.namespace.clone().unwrap_or_default(), new.metadata.name.clone().unwrap_or_default());
    let mut attempt = 1;
    loop {
        let result = match store.create(&new).await {
            Err(StoreError::AlreadyExists { .. }) => match store.get_in::<Event>(&namespace, &name).await? {
                Some(old) if is_told(&old, waiting.since) => return Ok(()),
                Some(old) => store.replace(&counted(old, &new)).await,
                // It expired between the two.
                None if attempt < ATTEMPTS => {
                    attempt += 1;
                    continue;
                }
                None => return Ok(()),
            },
            done => done,
        };
        match result {
            Err(error)
                if attempt < ATTEMPTS && (error.is_conflict() || matches!(error, StoreError::NotFound { .. })) =>
            {
                attempt += 1;
            }
            result => return result.map(drop),
        }
    }
}

/// Whether an Event was written after this began, in the whole seconds that it has.
fn is_told(event: &Event, since: Option<Timestamp>) -> bool {
    let Some(since) = since else { return false };
    event.last_timestamp.as_ref().is_some_and(|last| last.0.as_second() >= since.as_second())
}

fn counted(old: Event, new: &Event) -> Event {
    Event {
        count: Some(old.count.unwrap_or(1).saturating_add(new.count.unwrap_or(1))),
        message: new.message.clone(),
        type_: new.type_.clone(),
        last_timestamp: new.last_timestamp.clone(),
        ..old
    }
}

fn event<T: Resource<DynamicType = ()>>(component: &str, about: &T, news: &News) -> Event {
    let meta = about.meta();
    let uid = meta.uid.clone().unwrap_or_default();
    let name = meta.name.clone().unwrap_or_default();
    let now = Time(Timestamp::now());
    Event {
        metadata: ObjectMeta {
            name: Some(event_name(&name, &uid, news)),
            namespace: Some(meta.namespace.clone().unwrap_or_else(|| "default".into())),
            ..Default::default()
        },
        involved_object: ObjectReference {
            api_version: Some(T::api_version(&()).into_owned()),
            kind: Some(T::kind(&()).into_owned()),
            name: Some(name),
            namespace: meta.namespace.clone(),
            uid: Some(uid),
            ..Default::default()
        },
        type_: Some(news.mood.as_str().into()),
        reason: Some(news.reason.clone()),
        message: Some(shortened(&news.message)),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        source: Some(EventSource { component: Some(component.into()), ..Default::default() }),
        reporting_component: Some(component.into()),
        ..Default::default()
    }
}

/// One name for each object, reason and part, of what a name may have.
fn event_name(object: &str, uid: &str, news: &News) -> String {
    let short: String = uid.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    let object: String = object.chars().take(NAME_BYTES).collect();
    let mut name = format!("{}.{short}.{}", object.trim_end_matches(['-', '.']), news.reason);
    if !news.part.is_empty() {
        name += &format!(".{}", news.part);
    }
    let allowed = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' };
    let name: String = name.chars().map(allowed).take(253).collect();
    name.trim_end_matches(['-', '.']).to_owned()
}

fn shortened(message: &str) -> String {
    if message.len() <= MESSAGE_BYTES {
        return message.to_owned();
    }
    let end = (0..=MESSAGE_BYTES - '…'.len_utf8()).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
    format!("{}…", &message[..end])
}
