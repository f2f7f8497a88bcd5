//! Keeps the agent of one disk running while there is work, and tells it what to do with each file.

mod removal;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use api::image::CopyState;
use api::manager::{FileInfo, ManagerState};
use api::names::{MANAGER_PORT, manager_name};
use api::{BackingImage, BackingImageDataSource, BackingImageManager, Replica};
use jiff::Timestamp;
use kube::ResourceExt;
use planner::concern;
use planner::manager::orphans::Remains;
use planner::manager::{Action, Agent, Decision, Memory, Observed, decide};
use planner::retry::sooner;
use planner::workload::State;
use proto::bimrpc::{RemoveRemainsRequest, VerifyRequest};

use self::removal::{is_to_be_replaced, may_go, remove_orphan};
use crate::cache::{Cache, Facet};
use crate::error::{Doing, ReconcileError};
use crate::limits::{LIMIT_RETRY, REFUSED_RETRY};
use crate::queue::Kind;
use crate::{Shared, world};

pub async fn reconcile(name: &str, shared: &Shared) -> Result<Option<Duration>, ReconcileError> {
    let mut observed = observe(name, shared).await?;
    let mut decision = decide(&observed);
    if decision.takes_away() {
        // That an object or a disk is not known is not enough to end an agent or to forget what lies there, and what users switched off
        // may not be known either.
        observed.manager = shared.store.get(name).await.doing("read the manager")?;
        observed.disks = world::nodes(&shared.store).await?.disks;
        observed.removes_orphans = world::settings(&shared.store).await?.removes_orphans;
        decision = decide(&observed);
    }
    act(name, &observed, decision, shared).await
}

async fn observe(name: &str, shared: &Shared) -> Result<Observed, ReconcileError> {
    let cache = &shared.cache;
    let disks = cache.nodes().disks.clone();
    let manager: Option<Arc<BackingImageManager>> = cache.get(name);
    let is_ours = |id: &String| id.parse().is_ok_and(|id| manager_name(&id) == name);
    let disk_id = manager
        .as_ref()
        .map(|m| m.spec.disk_uuid.clone())
        .or_else(|| disks.list.iter().map(|d| d.id.clone()).find(is_ours))
        .or_else(|| cache.disks_of_images().into_iter().find(is_ours))
        .unwrap_or_default();
    let workload = shared.workloads.get(name).await.doing("look for the agent of the disk")?;
    let workload = workload.as_ref().map(world::observed);
    let mut agent = None;
    if let Some(workload) = workload.as_ref().filter(|w| w.state == State::Running && !w.ip.is_empty()) {
        agent = Some(shared.agents.list(&workload.ip).await);
        if agent.as_ref().is_some_and(Result::is_ok) && manager.is_some() {
            shared.agents.follow(Kind::Manager, name, &workload.ip);
        }
    }
    let answer = agent.as_ref().and_then(|agent| agent.as_ref().ok());
    let names = images(&disk_id, manager.as_deref(), answer, cache);
    let images = names.iter().filter_map(|name| Some((name.clone(), cache.get::<BackingImage>(name)?))).collect();
    let replicas = replicas(&disk_id, manager.as_deref(), answer, &images, cache);
    let sources = names.iter().filter_map(|name| cache.get::<BackingImageDataSource>(name));
    let settings = cache.settings();
    let memory = shared.manager_memory.lock().unwrap_or_else(|e| e.into_inner()).get(name).cloned();
    Ok(Observed {
        now: Timestamp::now(),
        name: name.to_owned(),
        peers: peers(name, &cache.all(), &images),
        disk_id,
        disks,
        manager: manager.map(|manager| BackingImageManager::clone(&manager)),
        workload,
        agent,
        scrub_interval: settings.scrub_interval,
        removes_orphans: settings.removes_orphans,
        bandwidth_limit: settings.bandwidth_limit,
        data_sources: sources.map(|source| (source.name_any(), BackingImageDataSource::clone(&source))).collect(),
        images: images.values().map(|image| BackingImage::clone(image)).collect(),
        replicas,
        memory: memory.unwrap_or_default(),
    })
}

/// The names of the images that this disk is about: those that have a place here, those that it holds, and those of which something was
/// found.
fn images(disk: &str, manager: Option<&BackingImageManager>, agent: Option<&Agent>, cache: &Cache) -> BTreeSet<String> {
    let placed = cache.of::<BackingImage>(&Facet::Disk(disk.to_owned()));
    let held = manager.into_iter().flat_map(concern::held);
    let files = agent.into_iter().flat_map(|agent| agent.files.iter().map(|file| &file.name));
    let remains = agent.into_iter().flat_map(|agent| agent.remains.iter().flatten().map(|found| &found.image));
    let placed = placed.iter().map(|image| image.name_any());
    placed.chain(held.chain(files).chain(remains).cloned()).collect()
}

/// The replicas on this disk that are of images whose copy here may be nobody's: one that is recorded or was found, and is not what the
/// image of that name has here.
fn replicas(
    disk: &str,
    manager: Option<&BackingImageManager>,
    agent: Option<&Agent>,
    images: &BTreeMap<String, Arc<BackingImage>>,
    cache: &Cache,
) -> Vec<Replica> {
    let uuid = |name: &String| images.get(name).and_then(|image| image.status.as_ref()).map(|status| &status.uuid);
    let is_recorded = |file: &&FileInfo| manager.is_some_and(|m| m.spec.records(&file.name, &file.uuid));
    let recorded = manager.into_iter().flat_map(|manager| &manager.spec.backing_images);
    let former = recorded.filter(|(name, of)| uuid(name) != Some(*of)).map(|(name, _)| name);
    let found = agent.into_iter().flat_map(|agent| &agent.files);
    let strays = found.filter(|file| !is_recorded(file)).map(|file| &file.name);
    let names: BTreeSet<&String> = former.chain(strays).collect();
    let of_images = names.into_iter().flat_map(|name| cache.of::<Replica>(&Facet::Image(name.clone())));
    of_images.filter(|replica| replica.spec.disk_id == disk).map(|replica| Replica::clone(&replica)).collect()
}

/// Image name → addresses of the other agents that have a ready copy of it.
fn peers(
    name: &str,
    managers: &[Arc<BackingImageManager>],
    images: &BTreeMap<String, Arc<BackingImage>>,
) -> BTreeMap<String, Vec<String>> {
    let mut peers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for manager in managers.iter().filter(|m| m.metadata.name.as_deref() != Some(name)) {
        let Some(status) = manager.status.as_ref().filter(|s| s.current_state == ManagerState::Running) else {
            continue;
        };
        for (image_name, image) in images {
            let Some(known) = &image.status else { continue };
            // The image's own verdict counts too: a copy that differs is no source.
            let is_good =
                known.disk_file_status_map.get(&manager.spec.disk_uuid).is_none_or(|f| f.state == CopyState::Ready);
            let file = status.backing_image_file_map.get(image_name);
            if is_good && file.is_some_and(|f| f.uuid == known.uuid && f.state == CopyState::Ready) {
                peers.entry(image_name.clone()).or_default().push(format!("{}:{MANAGER_PORT}", status.ip));
            }
        }
    }
    peers
}

async fn act(
    name: &str,
    observed: &Observed,
    decision: Decision,
    shared: &Shared,
) -> Result<Option<Duration>, ReconcileError> {
    let store = &shared.store;
    let ip = observed.workload.as_ref().map(|w| w.ip.clone()).unwrap_or_default();
    tell_orphans(name, observed, &decision);
    remember(name, shared, |memory| *memory = decision.memory.clone());
    let stored = observed.manager.as_ref();
    if stored.is_some_and(|m| m.status.as_ref() != Some(&decision.status)) {
        let status = decision.status;
        store
            .modify_status::<BackingImageManager>(name, |m| m.status = Some(status.clone()))
            .await
            .doing("report the manager's status")?;
    }
    // Entries whose files stay: nothing is forgotten on a disk.
    let mut kept = BTreeMap::new();
    let mut undeleted = None;
    let mut recheck = decision.recheck_after;
    for action in decision.actions {
        match action {
            Action::Create(manager) => {
                store.create(manager.as_ref()).await.doing("create the manager")?;
            }
            Action::SetSpec(mut spec) => {
                spec.backing_images.append(&mut kept);
                store
                    .modify::<BackingImageManager>(name, |m| m.spec = (*spec).clone())
                    .await
                    .doing("change the manager")?;
            }
            Action::EnsureWorkload(wish) => {
                let started = shared.workloads.ensure(&world::spec(&wish)?).await;
                if let Err(error) = &started {
                    let why = crate::error::chain(error);
                    remember(name, shared, |memory| memory.restart = memory.restart.failed(observed.now, why.clone()));
                }
                started.doing("start the agent of the disk")?;
                tracing::info!(manager = name, node = wish.node, "agent started");
            }
            Action::RemoveWorkload => {
                shared.agents.forget(Kind::Manager, name);
                shared.workloads.remove(name).await.doing("end the agent of the disk")?;
                // Nobody else says that it is gone.
                shared.queue.add(Kind::Manager, name);
            }
            Action::DeleteFile { image, uuid } => {
                // The status, which no longer tells of this copy, was written before: who wants it again from here on makes it anew.
                let removed = if !may_go(&image, &uuid, observed, shared).await? {
                    recheck = sooner(recheck, Some(REFUSED_RETRY));
                    false
                } else if let Err(error) = shared.agents.delete_file(&ip, &image, &uuid).await {
                    // Other images of this disk need not wait for that.
                    undeleted = undeleted.or(Some(error));
                    false
                } else {
                    tracing::info!(image, manager = name, "copy removed");
                    true
                };
                if !removed && stored.is_some_and(|m| m.spec.records(&image, &uuid)) {
                    kept.insert(image, uuid);
                }
            }
            Action::ReplaceFile { image, uuid } => {
                if !is_to_be_replaced(&image, &uuid, observed, shared).await? {
                    // What follows would get it anew.
                    return Ok(sooner(recheck, Some(REFUSED_RETRY)));
                }
                let only_the_copy =
                    RemoveRemainsRequest { name: image.clone(), uuid, is_preparation: false, mark: String::new() };
                if let Err(error) = shared.agents.remove_remains(&ip, only_the_copy).await {
                    return refused(name, &image, &error, observed.now, shared);
                }
                tracing::info!(image, manager = name, "copy that is none of its image removed");
            }
            Action::FetchFile { file, from } => {
                tracing::info!(image = file.image, manager = name, from, "copy fetched");
                let asked = shared.agents.fetch_file(&ip, &file, from.as_deref()).await;
                if let Err(error) = asked {
                    return refused(name, &file.image, &error, observed.now, shared);
                }
            }
            Action::SyncFile { file, from } => {
                tracing::info!(image = file.image, manager = name, from = from.join(","), "copy synced");
                let asked = shared.agents.sync_file(&ip, &file, &from).await;
                if let Err(error) = asked {
                    return refused(name, &file.image, &error, observed.now, shared);
                }
            }
            Action::VerifyFile { image, uuid, requested_at, bytes_per_second } => {
                let bytes_per_second = i64::try_from(bytes_per_second).unwrap_or(0);
                let request = VerifyRequest { name: image.clone(), uuid, requested_at, bytes_per_second };
                // It is asked again in the next pass; nothing else waits for it.
                if let Err(error) = shared.agents.verify_file(&ip, request).await {
                    tracing::warn!(image, manager = name, error = error.chain(), "copy cannot be verified");
                }
            }
            Action::LimitBandwidth(wish) => {
                // It is told again in the next pass; nothing else waits for it.
                if let Err(error) = shared.agents.limit_bandwidth(&ip, wish).await {
                    tracing::warn!(manager = name, error = error.chain(), "bandwidth cannot be limited");
                    recheck = sooner(recheck, Some(LIMIT_RETRY));
                }
            }
            Action::RemoveOrphan { place, image, uuid, mark } => {
                let found = Remains { place, image, uuid, size: 0, mark, is_mixed: false };
                remove_orphan(name, &ip, found, observed, shared).await?;
            }
            Action::Remove => {
                if let Some(manager) = stored {
                    if manager.metadata.deletion_timestamp.is_none() {
                        world::delete(store, manager).await?;
                    }
                    world::remove_finalizer::<BackingImageManager>(store, name).await?;
                    tracing::info!(manager = name, "manager removed");
                }
            }
        }
    }
    undeleted.map_or(Ok(recheck), Err)
}

/// The log hears of an orphan before it is removed.
fn tell_orphans(name: &str, observed: &Observed, decision: &Decision) {
    for (path, orphan) in &decision.status.orphans {
        if !observed.memory.orphans.contains_key(path) {
            tracing::warn!(path, manager = name, size_bytes = orphan.size, why = orphan.message, "orphan found");
        }
    }
}

fn said(error: &ReconcileError) -> String {
    match error {
        ReconcileError::Agent { source, .. } => source.message().to_owned(),
        other => other.chain(),
    }
}

fn remember(name: &str, shared: &Shared, change: impl FnOnce(&mut Memory)) {
    let mut all = shared.manager_memory.lock().unwrap_or_else(|e| e.into_inner());
    let memory = all.entry(name.to_owned()).or_default();
    change(memory);
    if *memory == Memory::default() {
        all.remove(name);
    }
    shared.metrics.observe_orphans(all.values().map(|memory| memory.orphans.len()).sum());
}

/// The agent refused a request: that is a failed attempt at this copy, shown and tried again after its own back-off.
fn refused(
    name: &str,
    image: &str,
    error: &ReconcileError,
    now: Timestamp,
    shared: &Shared,
) -> Result<Option<Duration>, ReconcileError> {
    let why = said(error);
    tracing::warn!(image, manager = name, error = why, "copy refused");
    remember(name, shared, |memory| {
        let attempt = memory.copies.entry(image.to_owned()).or_default();
        attempt.retry = attempt.retry.failed(now, why);
        attempt.kind = Some(error.kind());
        attempt.is_running = false;
    });
    // At once: the next pass reports it.
    Ok(Some(Duration::ZERO))
}

#[cfg(test)]
pub(crate) mod tests;
