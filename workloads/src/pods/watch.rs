//! Hears of every change of our pods, over the ends of connections.
//!
//! After a watch ended without a version to go on from, all pods are listed again, and all of them count as changed: a name too many
//! costs a look, one too few costs a resync.

use std::collections::BTreeSet;
use std::sync::Weak;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{ListParams, WatchEvent, WatchParams};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::{About, Inner, limits, make};
use crate::WorkloadError;

/// Lists what is there; returns the version to watch from.
pub async fn begin(inner: &Inner) -> Result<String, WorkloadError> {
    let selection = ListParams::default().labels(&make::selector());
    let listed = inner.ask(About { action: "list", name: "*" }, inner.pods.list(&selection)).await?;
    let version = listed.metadata.resource_version.clone().unwrap_or_default();
    let names: BTreeSet<String> = listed.iter().filter(|pod| is_ours(pod)).map(ResourceExt::name_any).collect();
    let before = std::mem::replace(&mut *inner.names(), names.clone());
    before.union(&names).for_each(|name| inner.changes.announce(name));
    Ok(version)
}

/// Follows the changes for as long as there is somebody to tell.
pub async fn run(inner: Weak<Inner>, mut version: String) {
    let mut failures = 0;
    loop {
        sleep(limits::RECONNECT.delay(failures)).await;
        let Some(inner) = inner.upgrade() else { return };
        // Only an event proves that an attempt was good.
        failures += 1;
        if version.is_empty() {
            match begin(&inner).await {
                Ok(found) => version = found,
                Err(error) => {
                    warn!(error = &error as &dyn std::error::Error, "pods cannot be listed; it is tried again");
                    continue;
                }
            }
        }
        if follow(&inner, &mut version).await {
            failures = 0;
        }
    }
}

/// Follows one connection until it ends; whether it brought anything. The version is empty when it is not known any more.
async fn follow(inner: &Inner, version: &mut String) -> bool {
    let selection = WatchParams::default().labels(&make::selector()).timeout(limits::WATCH_SECONDS);
    let watched = inner.ask(About { action: "watch", name: "*" }, inner.pods.watch(&selection, version)).await;
    let mut events = match watched {
        Ok(events) => events.boxed(),
        Err(error) => {
            warn!(error = &error as &dyn std::error::Error, "pods cannot be watched; it is tried again");
            version.clear();
            return false;
        }
    };
    let mut brought = false;
    loop {
        match timeout(limits::SILENCE, events.next()).await {
            Ok(Some(Ok(WatchEvent::Added(pod) | WatchEvent::Modified(pod)))) => {
                *version = pod.resource_version().unwrap_or_default();
                if is_ours(&pod) {
                    inner.names().insert(pod.name_any());
                    inner.changes.announce(&pod.name_any());
                }
            }
            Ok(Some(Ok(WatchEvent::Deleted(pod)))) => {
                *version = pod.resource_version().unwrap_or_default();
                if inner.names().remove(&pod.name_any()) {
                    inner.changes.announce(&pod.name_any());
                }
            }
            Ok(Some(Ok(WatchEvent::Bookmark(mark)))) => *version = mark.metadata.resource_version,
            // The API server ended it as it was asked to.
            Ok(None) => return brought,
            Ok(Some(Ok(WatchEvent::Error(status)))) => {
                debug!(message = %status.message, "watch of the pods failed; they are listed again");
                version.clear();
                return brought;
            }
            Ok(Some(Err(error))) => {
                debug!(error = &error as &dyn std::error::Error, "watch of the pods was cut off");
                version.clear();
                return brought;
            }
            Err(_) => {
                warn!("watch of the pods was silent; it is begun again");
                version.clear();
                return brought;
            }
        }
        brought = true;
    }
}

fn is_ours(pod: &Pod) -> bool {
    make::spec_of(pod).is_some()
}
