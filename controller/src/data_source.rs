//! Starts, follows and ends the process that prepares an image's first file.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use api::ids::ImageName;
use api::image::CopyState;
use api::manager::ManagerState;
use api::names::{data_source_workload_name, manager_name};
use api::{BackingImage, BackingImageDataSource, BackingImageManager};
use jiff::Timestamp;
use planner::data_source::{Action, Observed, bandwidth_limit, decide};
use planner::manager::Attempt;
use planner::retry::sooner;
use planner::workload::State;

use crate::error::{Doing, ReconcileError};
use crate::limits::{LIMIT_RETRY, REFUSED_RETRY};
use crate::queue::Kind;
use crate::{Shared, world};

pub async fn reconcile(name: &str, shared: &Shared) -> Result<Option<Duration>, ReconcileError> {
    let (store, workloads) = (&shared.store, &shared.workloads);
    let Ok(image) = name.parse::<ImageName>() else { return Ok(None) };
    let workload = workloads.get(&data_source_workload_name(&image)).await.doing("look for the data source process")?;
    let known = shared.cache.get::<BackingImageDataSource>(name);
    let source = match known {
        Some(source) => Some(BackingImageDataSource::clone(&source)),
        // That it is not known is not enough to end its process.
        None if workload.is_some() => store.get(name).await.doing("read the data source")?,
        None => None,
    };
    let Some(source) = source else {
        met_silence(shared).remove(name);
        if let Some(workload) = workload {
            // Its object went without it.
            shared.agents.forget(Kind::DataSource, name);
            workloads.remove(&workload.spec.name).await.doing("end the data source process")?;
        }
        return Ok(None);
    };
    let workload = workload.as_ref().map(world::observed);
    let mut report = None;
    if let Some(workload) = workload.as_ref().filter(|w| w.state == State::Running && !w.ip.is_empty()) {
        report = Some(shared.agents.report(&workload.ip).await);
        if report.as_ref().is_some_and(Result::is_ok) {
            shared.agents.follow(Kind::DataSource, name, &workload.ip);
        }
    }
    let taken_over = taken_over(name, &source, shared);
    let is_missed = is_missed(name, &source, shared);
    let disks = shared.cache.nodes().disks.clone();
    let allowed_sources = shared.cache.settings().allowed_sources.clone();
    let image = shared.cache.get::<BackingImage>(name);
    let bandwidth_limit = bandwidth_limit(shared.cache.settings().bandwidth_limit, image.as_deref());
    let mut observed = Observed {
        now: Timestamp::now(),
        met_silence_at: met_silence(shared).get(name).copied(),
        disks,
        workload,
        report,
        taken_over,
        is_missed,
        allowed_sources,
        bandwidth_limit,
        source,
    };
    if decide(&observed).takes_away() {
        let Some(source) = store.get(name).await.doing("read the data source")? else {
            // The watch tells of it sooner.
            return Ok(Some(REFUSED_RETRY));
        };
        let taken_over = match observed.taken_over {
            // That the file is missed is the agent's own word of now, not what was told of it before the transfer.
            Some(CopyState::Failed | CopyState::FailedAndCleanup) => asked(name, &source, shared).await,
            known => known,
        };
        observed = Observed { disks: world::nodes(store).await?.disks, source, taken_over, ..observed };
    }
    let decision = decide(&observed);
    if decision.status.silent_since.is_empty() {
        met_silence(shared).remove(name);
    } else {
        met_silence(shared).insert(name.to_owned(), observed.now);
    }
    if observed.source.status.as_ref() != Some(&decision.status) {
        let status = decision.status;
        store
            .modify_status::<BackingImageDataSource>(name, |s| s.status = Some(status.clone()))
            .await
            .doing("report the data source's status")?;
    }
    let mut recheck = decision.recheck_after;
    for action in decision.actions {
        match action {
            Action::EnsureWorkload(wish) => {
                workloads.ensure(&world::spec(&wish)?).await.doing("start the data source process")?;
                tracing::info!(image = name, node = wish.node, "data source started");
            }
            Action::RemoveWorkload(workload) => {
                shared.agents.forget(Kind::DataSource, name);
                workloads.remove(&workload).await.doing("end the data source process")?;
                // Nobody else says that it is gone.
                shared.queue.add(Kind::DataSource, name);
            }
            Action::LimitBandwidth(limit) => {
                let ip = observed.workload.as_ref().map(|w| w.ip.clone()).unwrap_or_default();
                // It is told again in the next pass.
                if let Err(error) = shared.agents.limit_source(&ip, limit).await {
                    tracing::warn!(image = name, error, "bandwidth of the download cannot be limited");
                    recheck = sooner(recheck, Some(LIMIT_RETRY));
                }
            }
            Action::RemoveFinalizer => world::remove_finalizer::<BackingImageDataSource>(store, name).await?,
        }
    }
    Ok(recheck)
}

/// When processes that did not answer were asked last, by the image.
fn met_silence(shared: &Shared) -> MutexGuard<'_, HashMap<String, Timestamp>> {
    shared.source_silence.lock().unwrap_or_else(|e| e.into_inner())
}

/// What the status of the manager of its disk says of the file.
fn taken_over(name: &str, source: &BackingImageDataSource, shared: &Shared) -> Option<CopyState> {
    let manager = manager_of(source, shared)?;
    let file = manager.status.as_ref()?.backing_image_file_map.get(name).filter(|f| f.uuid == source.spec.uuid)?;
    Some(file.state)
}

/// Whether the agent of its disk did not find the prepared file when it was to take it over.
fn is_missed(name: &str, source: &BackingImageDataSource, shared: &Shared) -> bool {
    let Ok(disk) = source.spec.disk_uuid.parse() else { return false };
    let memory = shared.manager_memory.lock().unwrap_or_else(|e| e.into_inner());
    let attempt = memory.get(&manager_name(&disk)).and_then(|memory| memory.copies.get(name));
    attempt.is_some_and(Attempt::misses_the_prepared_file)
}

/// What the agent of its disk says of the file when it is asked; `None`: it does not answer, which says nothing.
async fn asked(name: &str, source: &BackingImageDataSource, shared: &Shared) -> Option<CopyState> {
    let status = manager_of(source, shared)?.status.clone()?;
    if status.current_state != ManagerState::Running {
        return None;
    }
    let agent = shared.agents.list(&status.ip).await.ok()?;
    let file = agent.files.iter().find(|f| f.name == name && f.uuid == source.spec.uuid);
    Some(file.map_or(CopyState::Failed, |f| f.state))
}

fn manager_of(source: &BackingImageDataSource, shared: &Shared) -> Option<Arc<BackingImageManager>> {
    let disk = source.spec.disk_uuid.parse().ok()?;
    shared.cache.get::<BackingImageManager>(&manager_name(&disk))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manager::tests::{World, data_source};

    #[tokio::test]
    async fn what_is_gone_from_the_store_is_waited_for_until_the_watch_tells_of_it() {
        let world = World::begin(vec![]).await;
        let mut source = data_source("ubuntu", "0a1b2c3d");
        source.metadata.finalizers = Some(vec![api::names::FINALIZER.into()]);
        world.store.create(&source).await.unwrap();
        world.store.delete::<BackingImageDataSource>("ubuntu", &Default::default()).await.unwrap();
        world.hear().await;
        world::remove_finalizer::<BackingImageDataSource>(&world.store, "ubuntu").await.unwrap();
        let recheck = reconcile("ubuntu", &world.shared).await.unwrap();
        assert_eq!(recheck, Some(REFUSED_RETRY), "asked at once it would be asked all the time");
        world.hear().await;
        assert_eq!(reconcile("ubuntu", &world.shared).await.unwrap(), None);
    }
}
