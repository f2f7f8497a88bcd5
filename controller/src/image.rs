//! Brings the copies of one image in line with its spec.

use std::time::Duration;

use api::{BackingImage, BackingImageDataSource, BackingImageManager, Replica, Volume};
use jiff::Timestamp;
use planner::image::{Action, Decision, Observed, decide};
use store::{Selector, StoreError};

use crate::error::{Doing, ReconcileError};
use crate::{Shared, world};

pub async fn reconcile(name: &str, shared: &Shared) -> Result<Option<Duration>, ReconcileError> {
    let Some(observed) = observe(name, shared).await? else { return Ok(None) };
    let decision = decide(&observed);
    let recheck_after = decision.recheck_after;
    act(name, &observed, decision, shared).await?;
    Ok(recheck_after)
}

async fn observe(name: &str, shared: &Shared) -> Result<Option<Observed>, ReconcileError> {
    let store = &shared.store;
    let images: Vec<BackingImage> = world::list(store, "list images").await?;
    let Some(image) = images.iter().find(|i| i.metadata.name.as_deref() == Some(name)).cloned() else {
        return Ok(None);
    };
    let replicas: Vec<Replica> = world::list(store, "list replicas").await?;
    let volumes: Vec<Volume> = world::list(store, "list volumes").await?;
    let managers: Vec<BackingImageManager> = store.list(&Selector::default()).await.doing("list managers")?;
    Ok(Some(Observed {
        now: Timestamp::now(),
        random: rand::random(),
        data_source: store.get::<BackingImageDataSource>(name).await.doing("read the data source")?,
        managers,
        loads: planner::disk::loads(&replicas, &images),
        replicas: replicas.into_iter().filter(|r| r.spec.backing_image == name).collect(),
        volumes: volumes.into_iter().filter(|v| v.spec.backing_image == name).filter_map(|v| v.metadata.name).collect(),
        disks: world::nodes(store).await?.disks,
        settings: world::settings(store).await?,
        image,
    }))
}

async fn act(name: &str, observed: &Observed, decision: Decision, shared: &Shared) -> Result<(), ReconcileError> {
    let store = &shared.store;
    // First, since the uuid must be durable before it is used.
    if observed.image.status.as_ref() != Some(&decision.status) {
        let status = decision.status;
        store
            .modify_status::<BackingImage>(name, |i| i.status = Some(status.clone()))
            .await
            .doing("report the image's status")?;
    }
    for action in decision.actions {
        match action {
            Action::AddFinalizer => world::add_finalizer::<BackingImage>(store, name).await?,
            Action::SetCopies(map) => {
                tracing::info!(image = name, disks = ?map.keys().collect::<Vec<_>>(), "wanted copies changed");
                store
                    .modify::<BackingImage>(name, |i| i.spec.disk_file_spec_map = map.clone())
                    .await
                    .doing("set the wanted copies")?;
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
    Ok(())
}
