//! The loop: whenever an object changed or a retry is due, every object is looked at, and what needs work gets a task of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::{StorageClass, VolumeAttachment};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use runtime::backoff::Backoff;
use store::{Selector, Store, StoreError};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Orchestrator, attachments, claims};
use crate::failure::Failure;

/// The file system of volumes that say nothing (the provisioner's `--default-fstype`).
pub const DEFAULT_FS_TYPE: &str = "ext4";
/// Retries of claims and deletions.
const SLOW: Backoff = Backoff { initial: Duration::from_secs(1), max: Duration::from_secs(30) };
/// Retries of attachments, whose answers carry progress.
const QUICK: Backoff = Backoff { initial: Duration::from_millis(300), max: Duration::from_secs(3) };
/// Everything is looked at again after this long, whatever the watches say.
const RESYNC: Duration = Duration::from_secs(30);

/// One object that may need work.
#[derive(Clone)]
enum Item {
    Claim(Box<PersistentVolumeClaim>),
    Volume(Box<PersistentVolume>),
    Attachment(Box<VolumeAttachment>),
}

impl Item {
    fn key(&self) -> String {
        match self {
            Item::Claim(c) => format!("claim/{}/{}", c.namespace().unwrap_or_default(), c.name_any()),
            Item::Volume(v) => format!("volume/{}", v.name_any()),
            Item::Attachment(a) => format!("attachment/{}", a.name_any()),
        }
    }

    /// What a failure was about: when this changes, the retry is due at once.
    fn wish(&self, classes: &str) -> String {
        let of = |spec: serde_json::Result<String>, meta: &ObjectMeta| {
            let (uid, deleting) = (meta.uid.as_deref().unwrap_or_default(), meta.deletion_timestamp.is_some());
            format!("{uid} {deleting} {}", spec.unwrap_or_default())
        };
        match self {
            Item::Claim(c) => of(serde_json::to_string(&(&c.spec, &c.metadata.annotations)), &c.metadata) + classes,
            Item::Volume(v) => of(serde_json::to_string(&v.spec), &v.metadata),
            Item::Attachment(a) => of(serde_json::to_string(&a.spec), &a.metadata),
        }
    }

    fn backoff(&self) -> Backoff {
        if matches!(self, Item::Attachment(_)) { QUICK } else { SLOW }
    }
}

struct Retry {
    failures: u32,
    due: Instant,
    wish: String,
}

/// Runs until shutdown; work in progress is dropped then and begun again after a restart.
pub async fn run(orchestrator: &Orchestrator) {
    let shutdown = orchestrator.inner.shutdown.clone();
    let mut changes = changes(orchestrator.store()).await;
    let mut running: BTreeMap<String, String> = BTreeMap::new();
    let mut retries: BTreeMap<String, Retry> = BTreeMap::new();
    let mut tasks: JoinSet<(Item, Result<(), Failure>)> = JoinSet::new();
    loop {
        match observe(orchestrator.store()).await {
            Ok((items, classes)) => {
                let keys: BTreeSet<String> = items.iter().map(Item::key).collect();
                retries.retain(|key, _| keys.contains(key));
                for item in items {
                    let (key, wish) = (item.key(), item.wish(&classes));
                    let early = retries.get(&key).is_some_and(|r| r.wish == wish && r.due > Instant::now());
                    if running.contains_key(&key) || early {
                        continue;
                    }
                    running.insert(key, wish);
                    let failures = retries.get(&item.key()).map_or(0, |r| r.failures);
                    tasks.spawn(work(orchestrator.clone(), item, failures));
                }
            }
            Err(error) => tracing::error!(error = &error as &dyn std::error::Error, "cannot read the objects"),
        }
        let next = retries.values().map(|r| r.due).filter(|d| *d > Instant::now()).min();
        let next = next.unwrap_or(Instant::now() + RESYNC).min(Instant::now() + RESYNC);
        tokio::select! {
            () = shutdown.cancelled() => return,
            change = changes.next() => {
                if change.is_none() {
                    changes = self::changes(orchestrator.store()).await;
                }
                // Several changes at once need one look.
                while let Some(Some(())) = changes.next().now_or_never() {}
            }
            Some(done) = tasks.join_next() => {
                let Ok((item, result)) = done else {
                    tracing::error!("a task of the orchestrator panicked");
                    // Which one is unknown: everything is looked at again.
                    running.clear();
                    continue;
                };
                let key = item.key();
                let wish = running.remove(&key).unwrap_or_default();
                match result {
                    // It may still be listed as work (a claim of another provisioner): look again when it or time changed.
                    Ok(()) => drop(retries.insert(key, Retry { failures: 0, due: Instant::now() + RESYNC, wish })),
                    Err(failure) => {
                        tracing::debug!(item = key, error = %failure, "not done yet");
                        let failures = retries.get(&key).filter(|r| r.wish == wish).map_or(0, |r| r.failures).saturating_add(1);
                        let due = Instant::now() + item.backoff().delay(failures);
                        retries.insert(key, Retry { failures, due, wish });
                    }
                }
            }
            () = tokio::time::sleep_until(next) => {}
        }
    }
}

async fn work(orchestrator: Orchestrator, item: Item, failures: u32) -> (Item, Result<(), Failure>) {
    let result = match &item {
        Item::Claim(claim) => claims::bind(&orchestrator, claim, SLOW.delay(failures + 1)).await,
        Item::Volume(volume) => claims::reclaim(&orchestrator, volume).await,
        Item::Attachment(attachment) => attachments::reconcile(&orchestrator, attachment).await,
    };
    (item, result)
}

/// Everything that needs work, and what stands for everything else that a claim depends on: classes and attachments.
async fn observe(store: &Store) -> Result<(Vec<Item>, String), StoreError> {
    let all: Vec<PersistentVolumeClaim> = store.list_everywhere().await?;
    let volumes: Vec<PersistentVolume> = store.list(&Selector::default()).await?;
    let attachments: Vec<VolumeAttachment> = store.list(&Selector::default()).await?;
    let classes: Vec<StorageClass> = store.list(&Selector::default()).await?;
    let mut stamp = String::new();
    let versions =
        classes.iter().map(|c| &c.metadata.resource_version).chain(attachments.iter().map(|a| &a.metadata.uid));
    for version in versions {
        stamp.push(' ');
        stamp += version.as_deref().unwrap_or_default();
    }
    let mut items = vec![];
    items.extend(volumes.into_iter().filter(|v| claims::needs_reclaim(v, &all)).map(|v| Item::Volume(Box::new(v))));
    items.extend(all.into_iter().filter(claims::needs_work).map(|c| Item::Claim(Box::new(c))));
    items.extend(attachments.into_iter().filter(attachments::needs_work).map(|a| Item::Attachment(Box::new(a))));
    Ok((items, stamp))
}

/// A tick whenever an object of interest changed.
async fn changes(store: &Store) -> BoxStream<'static, ()> {
    let streams = [
        ticks(store.watch_everywhere::<PersistentVolumeClaim>().await),
        ticks(store.watch::<PersistentVolume>().await),
        ticks(store.watch::<VolumeAttachment>().await),
        ticks(store.watch::<StorageClass>().await),
    ];
    stream::select_all(streams).boxed()
}

fn ticks<T: Send + 'static>(
    watch: Result<BoxStream<'static, Result<T, StoreError>>, StoreError>,
) -> BoxStream<'static, ()> {
    match watch {
        Ok(events) => events.map(drop).boxed(),
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "cannot watch the objects");
            stream::empty().boxed()
        }
    }
}
