//! A fake instance role for all nodes: replicas and engines that exist as records only.

use std::collections::BTreeMap;

use api::engine::{DesireState, EngineStatus, InstanceState, ReplicaMode};
use api::generations::GENERATIONS_OF_AN_ATTACHMENT;
use api::image::CopyState;
use api::names::FINALIZER;
use api::replica::ReplicaStatus;
use api::{BackingImage, Engine, Replica};
use store::{Selector, Store};

/// Runs until the store ends: after each change of anything, does what instance roles would do.
pub async fn run(store: Store) {
    use futures::StreamExt;
    let replicas = store.watch::<Replica>().await.unwrap().map(drop).boxed();
    let engines = store.watch::<Engine>().await.unwrap().map(drop).boxed();
    let images = store.watch::<BackingImage>().await.unwrap().map(drop).boxed();
    let mut events = futures::stream::select_all([replicas, engines, images]);
    while events.next().await.is_some() {
        // A conflict means that something changed, so another event follows.
        let _ = pass(&store).await;
    }
}

async fn pass(store: &Store) -> Result<(), store::StoreError> {
    let images: Vec<BackingImage> = store.list(&Selector::default()).await?;
    let mut replicas: Vec<Replica> = store.list(&Selector::default()).await?;
    let engines: Vec<Engine> = store.list(&Selector::default()).await?;
    for engine in engines {
        let mut status = engine.status.clone().unwrap_or_default();
        if engine.metadata.deletion_timestamp.is_some() {
            if !engine.spec.node_id.is_empty() {
                let mut engine = engine;
                engine.metadata.finalizers.iter_mut().for_each(|f| f.retain(|f| f != FINALIZER));
                store.replace(&engine).await?;
            }
            continue;
        }
        match (engine.spec.desire_state, status.current_state) {
            (DesireState::Running, InstanceState::Stopped | InstanceState::NotStarted) => {
                let generation = engine.spec.attachment * GENERATIONS_OF_AN_ATTACHMENT + 1;
                let members: Vec<String> = engine.spec.replica_address_map.keys().cloned().collect();
                for replica in replicas.iter_mut().filter(|r| members.contains(r.metadata.name.as_ref().unwrap())) {
                    let status = replica.status.get_or_insert_default();
                    (status.generation, status.generation_members, status.clean) = (generation, members.clone(), false);
                    *replica = store.replace_status(replica).await?;
                }
                status = EngineStatus {
                    current_state: InstanceState::Running,
                    endpoint: "/dev/loop7".into(),
                    started: true,
                    generation,
                    replica_mode_map: members.iter().map(|m| (m.clone(), ReplicaMode::Rw)).collect(),
                    ..Default::default()
                };
            }
            (DesireState::Stopped, InstanceState::Running | InstanceState::Error | InstanceState::NotStarted) => {
                for replica in replicas.iter_mut() {
                    let name = replica.metadata.name.clone().unwrap();
                    if status.replica_mode_map.get(&name) == Some(&ReplicaMode::Rw) {
                        replica.status.get_or_insert_default().clean = true;
                        *replica = store.replace_status(replica).await?;
                    }
                }
                status.current_state = InstanceState::Stopped;
                status.endpoint.clear();
                status.started = false;
            }
            _ => {}
        }
        if engine.status.as_ref() != Some(&status) {
            store.replace_status(&Engine { status: Some(status), ..engine }).await?;
        }
    }
    for replica in replicas {
        if replica.metadata.deletion_timestamp.is_some() {
            let mut replica = replica;
            replica.metadata.finalizers.iter_mut().for_each(|f| f.retain(|f| f != FINALIZER));
            store.replace(&replica).await?;
            continue;
        }
        let mut status: ReplicaStatus = replica.status.clone().unwrap_or_default();
        let copies: BTreeMap<String, CopyState> = images
            .iter()
            .find(|i| i.metadata.name.as_deref() == Some(&replica.spec.backing_image))
            .and_then(|i| i.status.clone())
            .map(|s| s.disk_file_status_map.into_iter().map(|(d, f)| (d, f.state)).collect())
            .unwrap_or_default();
        let has_copy =
            replica.spec.backing_image.is_empty() || copies.get(&replica.spec.disk_id) == Some(&CopyState::Ready);
        status.current_state = match replica.spec.desire_state {
            DesireState::Running if has_copy => InstanceState::Running,
            DesireState::Running => InstanceState::Starting,
            DesireState::Stopped => InstanceState::Stopped,
        };
        (status.ip, status.port) = ("127.0.0.1".into(), 10_000);
        if replica.status.as_ref() != Some(&status) {
            store.replace_status(&Replica { status: Some(status), ..replica }).await?;
        }
    }
    Ok(())
}
