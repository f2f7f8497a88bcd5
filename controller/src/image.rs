//! Brings the copies of one image in line with its spec.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use api::manager::{BackingImageManagerSpec, BackingImageManagerStatus};
use api::names::{label, manager_name};
use api::{BackingImage, BackingImageDataSource, BackingImageManager, Replica, Volume};
use jiff::Timestamp;
use kube::ResourceExt;
use planner::image::{Action, Decision, Observed, Replenish, decide, making_of_others};
use planner::setting::Settings;
use store::{Selector, StoreError};

use crate::cache::Facet;
use crate::error::{Doing, ReconcileError};
use crate::queue::Kind;
use crate::turns::Moment;
use crate::{Shared, world};

pub async fn reconcile(name: &str, shared: &Shared) -> Result<Option<Duration>, ReconcileError> {
    let mut began = shared.turns.now();
    let Some(mut seen) = look(name, shared).await? else {
        call(shared, name, began, &Replenish::default());
        return Ok(None);
    };
    // Passes over several images must not all take the last place below the limit of a node: one counts, and adds, after the other.
    let _turn = if seen.1.replenish.added.is_empty() {
        None
    } else {
        let turn = shared.replenishing.lock().await;
        began = shared.turns.now();
        // What those before have written counts.
        shared.cache.settled().await?;
        let Some(again) = look(name, shared).await? else { return Ok(None) };
        seen = again;
        Some(turn)
    };
    let (observed, mut decision) = seen;
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

/// Decides on what is known; and once more on what the store says, when that would take something away.
async fn look(name: &str, shared: &Shared) -> Result<Option<(Observed, Decision)>, ReconcileError> {
    let Some(observed) = observe(name, shared) else { return Ok(None) };
    let decision = decide(&observed);
    if !decision.takes_away(&observed) {
        return Ok(Some((observed, decision)));
    }
    let anew = observe_anew(observed, shared).await?;
    Ok(anew.map(|observed| {
        let decision = decide(&observed);
        (observed, decision)
    }))
}

/// From what is known.
fn observe(name: &str, shared: &Shared) -> Option<Observed> {
    let cache = &shared.cache;
    let image = BackingImage::clone(&*cache.get(name)?);
    let of_image = Facet::Image(name.to_owned());
    let disks = cache.nodes().disks.clone();
    let (images, sources, replicas) = (cache.all(), cache.all(), cache.all());
    let making = making_of_others(name, each(&images), each(&sources), each(&replicas), &disks);
    Some(Observed {
        now: Timestamp::now(),
        random: rand::random(),
        data_source: cache.get(name).map(|source| BackingImageDataSource::clone(&source)),
        managers: cache.all().iter().map(|manager| about(name, manager)).collect(),
        loads: cache.loads(),
        replicas: cache.of(&of_image).iter().map(|replica| Replica::clone(replica)).collect(),
        volumes: cache.of(&of_image).iter().map(|volume: &Arc<Volume>| volume.name_any()).collect(),
        making,
        disks,
        settings: Settings::clone(&cache.settings()),
        image,
    })
}

fn each<T>(objects: &[Arc<T>]) -> impl Iterator<Item = &T> {
    objects.iter().map(Arc::as_ref)
}

/// The same as the store says it now, in all that keeps a copy. Managers, whom only this controller writes, are known.
async fn observe_anew(known: Observed, shared: &Shared) -> Result<Option<Observed>, ReconcileError> {
    let store = &shared.store;
    let name = known.image.name_any();
    let Some(image) = store.get::<BackingImage>(&name).await.doing("read the image")? else { return Ok(None) };
    let labeled = Selector::label(label::BACKING_IMAGE, &name);
    let mut replicas: Vec<Replica> = store.list(&labeled).await.doing("list replicas")?;
    replicas.retain(|replica| replica.spec.backing_image == name);
    // One without the label, which somebody took off, still lies over its copy.
    let is_new = |known: &Replica| replicas.iter().all(|r| r.metadata.name != known.metadata.name);
    let others: Vec<Replica> = known.replicas.into_iter().filter(is_new).collect();
    replicas.extend(others);
    let volumes: Vec<Volume> = world::list(store, "list volumes").await?;
    Ok(Some(Observed {
        now: Timestamp::now(),
        data_source: store.get(&name).await.doing("read the data source")?,
        replicas,
        volumes: volumes.into_iter().filter(|v| v.spec.backing_image == name).filter_map(|v| v.metadata.name).collect(),
        disks: world::nodes(store).await?.disks,
        settings: world::settings(store).await?,
        image,
        ..known
    }))
}

/// A manager without what it says of other images.
fn about(image: &str, manager: &BackingImageManager) -> BackingImageManager {
    let only = |map: &BTreeMap<String, String>| {
        map.get_key_value(image).map(|(k, v)| (k.clone(), v.clone())).into_iter().collect()
    };
    let spec = BackingImageManagerSpec {
        disk_uuid: manager.spec.disk_uuid.clone(),
        backing_images: only(&manager.spec.backing_images),
        ..Default::default()
    };
    let status = manager.status.as_ref().map(|status| BackingImageManagerStatus {
        current_state: status.current_state,
        backing_image_file_map: status
            .backing_image_file_map
            .get(image)
            .map(|file| (image.to_owned(), file.clone()))
            .into_iter()
            .collect(),
        ..Default::default()
    });
    BackingImageManager { metadata: manager.metadata.clone(), spec, status }
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
