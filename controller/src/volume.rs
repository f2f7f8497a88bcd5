//! Places, attaches, detaches and deletes one volume.

use std::time::Duration;

use api::names::{engine_name, label};
use api::{BackingImage, Engine, Replica, Volume};
use jiff::Timestamp;
use kube::ResourceExt;
use planner::setting::Settings;
use planner::volume::{Action, Decision, Observed, decide};
use store::{Selector, StoreError};

use crate::cache::Facet;
use crate::error::{Doing, ReconcileError};
use crate::{Shared, world};

pub async fn reconcile(name: &str, shared: &Shared) -> Result<Option<Duration>, ReconcileError> {
    let Some(known) = observe(name, shared) else {
        shared.volume_restarts.lock().unwrap_or_else(|e| e.into_inner()).remove(name);
        return Ok(None);
    };
    let decision = decide(&known);
    if decision.is_nothing(&known) {
        return Ok(decision.recheck_after);
    }
    // Which replicas are current decides about data: whatever is done is decided on what the store says now.
    let Some(observed) = observe_anew(known, shared).await? else { return Ok(None) };
    let decision = decide(&observed);
    let recheck_after = decision.recheck_after;
    act(name, &observed, decision, shared).await?;
    Ok(recheck_after)
}

/// From what is known.
fn observe(name: &str, shared: &Shared) -> Option<Observed> {
    let cache = &shared.cache;
    let volume = Volume::clone(&*cache.get(name)?);
    let own = Facet::Volume(name.to_owned());
    let nodes = cache.nodes();
    let restart = shared.volume_restarts.lock().unwrap_or_else(|e| e.into_inner()).get(name).cloned();
    Some(Observed {
        now: Timestamp::now(),
        random: rand::random(),
        engine: cache.of(&own).first().map(|engine| Engine::clone(engine)),
        image: cache.get(&volume.spec.backing_image).map(|image| BackingImage::clone(&image)),
        loads: cache.loads(),
        replicas: cache.of(&own).iter().map(|replica| Replica::clone(replica)).collect(),
        disks: nodes.disks.clone(),
        silent_since: nodes.silent_since.clone(),
        settings: Settings::clone(&cache.settings()),
        restart: restart.unwrap_or_default(),
        volume,
    })
}

/// The same as the store says it now.
async fn observe_anew(known: Observed, shared: &Shared) -> Result<Option<Observed>, ReconcileError> {
    let store = &shared.store;
    let name = known.volume.name_any();
    let Some(volume) = store.get::<Volume>(&name).await.doing("read the volume")? else { return Ok(None) };
    let own = Selector::label(label::LONGHORN_VOLUME, &name);
    let engines: Vec<Engine> = store.list(&own).await.doing("list engines")?;
    let mut replicas: Vec<Replica> = store.list(&own).await.doing("list replicas")?;
    replicas.retain(|replica| replica.spec.volume_name == name);
    // Those without the label, which somebody took off, are its own all the same.
    for known in &known.replicas {
        let known = known.name_any();
        if replicas.iter().all(|replica| replica.name_any() != known) {
            replicas.extend(store.get::<Replica>(&known).await.doing("read a replica")?);
        }
    }
    replicas.sort_by_key(|replica| replica.name_any());
    let image = match volume.spec.backing_image.as_str() {
        "" => None,
        image => store.get(image).await.doing("read the image")?,
    };
    let nodes = world::nodes(store).await?;
    Ok(Some(Observed {
        now: Timestamp::now(),
        engine: engines.into_iter().next(),
        image,
        replicas,
        disks: nodes.disks,
        silent_since: nodes.silent_since,
        volume,
        ..known
    }))
}

async fn act(name: &str, observed: &Observed, decision: Decision, shared: &Shared) -> Result<(), ReconcileError> {
    let store = &shared.store;
    {
        let mut restarts = shared.volume_restarts.lock().unwrap_or_else(|e| e.into_inner());
        if decision.restart == Default::default() {
            restarts.remove(name);
        } else {
            restarts.insert(name.to_owned(), decision.restart);
        }
    }
    if observed.volume.status.as_ref() != Some(&decision.status) {
        let status = decision.status;
        store
            .modify_status::<Volume>(name, |v| v.status = Some(status.clone()))
            .await
            .doing("report the volume's status")?;
    }
    let replica = |name: &str| observed.replicas.iter().find(|r| r.metadata.name.as_deref() == Some(name));
    for action in decision.actions {
        match action {
            Action::AddFinalizer => world::add_finalizer::<Volume>(store, name).await?,
            Action::CreateEngine(engine) => ignore_existing(store.create(engine.as_ref()).await)?,
            Action::CreateReplica(new) => {
                tracing::info!(volume = name, node = new.spec.node_id, disk = new.spec.disk_id, "replica placed");
                ignore_existing(store.create(new.as_ref()).await)?;
            }
            // The version that was decided on goes along: whoever was faster, such as a user who salvages, is heard first.
            Action::SetReplicaSpec { name: replica_name, spec } => {
                let Some(stored) = replica(&replica_name) else { continue };
                if !spec.failed_at.is_empty() && stored.spec.failed_at.is_empty() {
                    tracing::warn!(
                        volume = name,
                        replica = replica_name,
                        reason = spec.failed_reason,
                        "replica failed"
                    );
                }
                let wanted = Replica { spec: *spec, ..stored.clone() };
                store.replace(&wanted).await.doing("change a replica")?;
            }
            Action::SetEngineSpec(spec) => {
                let Some(stored) = &observed.engine else { continue };
                if spec.desire_state != stored.spec.desire_state {
                    tracing::info!(volume = name, node = spec.node_id, wish = ?spec.desire_state, "engine wished");
                }
                let wanted = Engine { spec: *spec, ..stored.clone() };
                store.replace(&wanted).await.doing("change the engine")?;
            }
            Action::DeleteEngine => {
                if let Some(engine) = &observed.engine {
                    world::delete(store, engine).await?;
                }
            }
            Action::DeleteReplica(replica_name) => {
                if let Some(replica) = replica(&replica_name) {
                    world::delete(store, replica).await?;
                }
            }
            Action::ForgetEngine => world::remove_finalizer::<Engine>(store, &engine_name(name)).await?,
            Action::ForgetReplica(replica_name) => world::remove_finalizer::<Replica>(store, &replica_name).await?,
            Action::RemoveFinalizer => {
                world::remove_finalizer::<Volume>(store, name).await?;
                tracing::info!(volume = name, "volume removed");
            }
        }
    }
    Ok(())
}

fn ignore_existing<T>(created: Result<T, StoreError>) -> Result<(), ReconcileError> {
    match created {
        Ok(_) | Err(StoreError::AlreadyExists { .. }) => Ok(()),
        Err(source) => Err(ReconcileError::Store { doing: "create an object", source }),
    }
}
