//! Brings the copies of one image in line with its spec.

use std::collections::BTreeSet;
use std::time::Duration;

use api::names::manager_name;
use api::{BackingImage, BackingImageDataSource, BackingImageManager, Replica, Volume};
use jiff::Timestamp;
use planner::image::{Action, Decision, Observed, Replenish, decide, making_of_others};
use store::{Selector, StoreError};

use crate::error::{Doing, ReconcileError};
use crate::queue::Kind;
use crate::turns::Moment;
use crate::{Shared, world};

pub async fn reconcile(name: &str, shared: &Shared) -> Result<Option<Duration>, ReconcileError> {
    let mut began = shared.turns.now();
    let Some(mut observed) = observe(name, shared).await? else {
        call(shared, name, began, &Replenish::default());
        return Ok(None);
    };
    let mut decision = decide(&observed);
    // Passes over several images must not all take the last place below the limit of a node: one counts, and adds, after the other.
    let _turn = if decision.replenish.added.is_empty() {
        None
    } else {
        let turn = shared.replenishing.lock().await;
        began = shared.turns.now();
        let Some(again) = observe(name, shared).await? else { return Ok(None) };
        (decision, observed) = (decide(&again), again);
        Some(turn)
    };
    let replenish = std::mem::take(&mut decision.replenish);
    let result = act(name, &observed, decision, shared).await;
    call(shared, name, began, &replenish);
    result
}

/// Lets those look again whose turn it is to make copies.
fn call(shared: &Shared, name: &str, began: Moment, replenish: &Replenish) {
    for image in shared.turns.pass(name, began, replenish) {
        shared.queue.add(Kind::Image, image);
    }
}

async fn observe(name: &str, shared: &Shared) -> Result<Option<Observed>, ReconcileError> {
    let store = &shared.store;
    let images: Vec<BackingImage> = world::list(store, "list images").await?;
    let Some(image) = images.iter().find(|i| i.metadata.name.as_deref() == Some(name)).cloned() else {
        return Ok(None);
    };
    let replicas: Vec<Replica> = world::list(store, "list replicas").await?;
    let volumes: Vec<Volume> = world::list(store, "list volumes").await?;
    let sources: Vec<BackingImageDataSource> = world::list(store, "list data sources").await?;
    let disks = world::nodes(store).await?.disks;
    let managers: Vec<BackingImageManager> = store.list(&Selector::default()).await.doing("list managers")?;
    Ok(Some(Observed {
        now: Timestamp::now(),
        random: rand::random(),
        making: making_of_others(name, &images, &sources, &replicas, &disks),
        data_source: sources.into_iter().find(|s| s.metadata.name.as_deref() == Some(name)),
        managers,
        loads: planner::disk::loads(&replicas, &images),
        replicas: replicas.into_iter().filter(|r| r.spec.backing_image == name).collect(),
        volumes: volumes.into_iter().filter(|v| v.spec.backing_image == name).filter_map(|v| v.metadata.name).collect(),
        disks,
        settings: world::settings(store).await?,
        image,
    }))
}

/// Returns when to look again: at once when somebody else was faster, since then something else was decided on.
async fn act(
    name: &str,
    observed: &Observed,
    decision: Decision,
    shared: &Shared,
) -> Result<Option<Duration>, ReconcileError> {
    let store = &shared.store;
    let held = |image: &BackingImage| {
        let status = image.status.clone().unwrap_or_default();
        image.spec.disk_file_spec_map.keys().cloned().chain(status.disk_file_status_map.into_keys()).collect()
    };
    let held_before: BTreeSet<String> = held(&observed.image);
    // What is let go stands in no object any more, so that nobody else tells its manager.
    let tell_managers = |image: &BackingImage| {
        let held: BTreeSet<String> = held(image);
        for disk in held_before.difference(&held).filter_map(|disk| disk.parse().ok()) {
            shared.queue.add(Kind::Manager, manager_name(&disk));
        }
    };
    // First, since the uuid must be durable before it is used, and since what is let go must not come from an older look.
    if observed.image.status.as_ref() != Some(&decision.status) {
        let (mut is_current, status) = (true, decision.status);
        let report = |image: &mut BackingImage| {
            is_current = image.metadata.resource_version == observed.image.metadata.resource_version;
            if is_current {
                image.status = Some(status.clone());
            }
        };
        let image = store.modify_status(name, report).await.doing("report the image's status")?;
        if !is_current {
            return Ok(Some(Duration::ZERO));
        }
        tell_managers(&image);
    }
    for action in decision.actions {
        match action {
            Action::AddFinalizer => world::add_finalizer::<BackingImage>(store, name).await?,
            Action::SetCopies(map) => {
                let mut is_current = true;
                let change = |image: &mut BackingImage| {
                    is_current = image.metadata.uid == observed.image.metadata.uid
                        && image.spec.disk_file_spec_map == observed.image.spec.disk_file_spec_map;
                    if is_current {
                        image.spec.disk_file_spec_map.clone_from(&map);
                    }
                };
                let image = store.modify(name, change).await.doing("set the wanted copies")?;
                if !is_current {
                    tracing::info!(image = name, "wanted copies were edited meanwhile");
                    return Ok(Some(Duration::ZERO));
                }
                tracing::info!(image = name, disks = ?map.keys().collect::<Vec<_>>(), "wanted copies changed");
                tell_managers(&image);
            }
            Action::CreateDataSource(source) => match store.create(source.as_ref()).await {
                Ok(_) => tracing::info!(image = name, disk = source.spec.disk_uuid, "data source created"),
                Err(StoreError::AlreadyExists { .. }) => {}
                Err(source) => return Err(ReconcileError::Store { doing: "create the data source", source }),
            },
            Action::SetDataSourceSpec(spec) => {
                store
                    .modify::<BackingImageDataSource>(name, |s| s.spec = (*spec).clone())
                    .await
                    .doing("change the data source")?;
            }
            Action::DeleteDataSource => {
                if let Some(source) = &observed.data_source {
                    world::delete(store, source).await?;
                }
            }
            Action::RemoveFinalizer => {
                world::remove_finalizer::<BackingImage>(store, name).await?;
                tracing::info!(image = name, "image removed");
            }
        }
    }
    Ok(decision.recheck_after)
}
