//! Which change concerns whom.

use std::collections::{BTreeSet, HashMap};

use api::names::manager_name;
use api::{
    BackingImage, BackingImageDataSource, BackingImageManager, Engine, ErrorKind, Node, Replica, Setting, Volume,
};
use futures::StreamExt;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::{Node as KubernetesNode, Pod};
use serde::de::DeserializeOwned;
use store::events::Recorder;
use store::{Scoped, Store, StoreError, TypedEvent};

use crate::limits::RESYNC;
use crate::queue::{Kind, Queue};
use crate::teller::Teller;
use crate::{Beginning, ControllerError, Shared, node};

/// The prefix of data source workloads (see [`api::names::data_source_workload_name`]).
const DATA_SOURCE_PREFIX: &str = "backing-image-ds-";

enum Event {
    Image(BackingImage),
    Manager(BackingImageManager),
    DataSource(BackingImageDataSource),
    Volume(Volume),
    Engine(Engine),
    Replica(Replica),
    Node(Node),
    KubernetesNode(Box<KubernetesNode>),
    Pod(Box<Pod>),
    /// A setting changed, or events were lost: everything is looked at.
    Everything,
}

/// What was seen last, to tell what a change is about.
#[derive(Default)]
struct Known {
    /// Free bytes change all the time; only what decides about eligibility makes everybody look.
    nodes: HashMap<String, String>,
    /// The images of each manager.
    held: HashMap<String, BTreeSet<String>>,
}

/// Turns changes into passes, and into news for users, until the store ends.
pub async fn run(shared: &Shared, recorder: Recorder, beginning: Beginning) -> Result<(), ControllerError> {
    let store = &shared.store;
    let mut events = futures::stream::select_all([
        watch::<Node>(store, "nodes", Event::Node).await?,
        watch::<BackingImage>(store, "images", Event::Image).await?,
        watch::<BackingImageManager>(store, "managers", Event::Manager).await?,
        watch::<BackingImageDataSource>(store, "data sources", Event::DataSource).await?,
        watch::<Volume>(store, "volumes", Event::Volume).await?,
        watch::<Engine>(store, "engines", Event::Engine).await?,
        watch::<Replica>(store, "replicas", Event::Replica).await?,
        watch::<Setting>(store, "settings", |_| Event::Everything).await?,
    ]);
    if shared.kubernetes {
        events.push(
            watch::<KubernetesNode>(store, "Kubernetes nodes", |node| Event::KubernetesNode(Box::new(node))).await?,
        );
        events.push(watch::<Pod>(store, "pods", |pod| Event::Pod(Box::new(pod))).await?);
    }
    let mut workloads = shared.workloads.changes();
    let mut resync = tokio::time::interval(RESYNC);
    resync.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut known = Known::default();
    let mut teller = Teller::new(recorder, list(store).await?);
    drop(beginning);
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(Ok((Event::Everything, _))) => unless_away(everything(shared, Some(&mut teller)).await)?,
                Some(Ok((event, is_gone))) => {
                    tell(&mut teller, &event, is_gone);
                    unless_away(concern(shared, event, &mut known).await)?;
                }
                Some(Err(source)) => return Err(ControllerError::Watch { what: "the store", source }),
                None => return Ok(()),
            },
            Some(name) = workloads.next() => match name.strip_prefix(DATA_SOURCE_PREFIX) {
                Some(image) => shared.queue.add(Kind::DataSource, image),
                None => shared.queue.add(Kind::Manager, name),
            },
            _ = resync.tick() => unless_away(everything(shared, None).await)?,
        }
        shared.metrics.observe_queue(shared.queue.len());
    }
}

/// A store that is away for a while is no reason to end: the resync comes to what was missed.
fn unless_away(done: Result<(), ControllerError>) -> Result<(), ControllerError> {
    match done {
        Err(error) if error.kind() == ErrorKind::Unavailable => {
            tracing::warn!(error = crate::error::chain(&error), "what changed is looked at later");
            Ok(())
        }
        done => done,
    }
}

/// Changes, each with whether the object is gone.
async fn watch<T>(
    store: &Store,
    what: &'static str,
    wrap: fn(T) -> Event,
) -> Result<BoxStream<'static, Result<(Event, bool), StoreError>>, ControllerError>
where
    T: kube::Resource<DynamicType = ()> + DeserializeOwned + Send + 'static,
    T::Scope: Scoped,
{
    let events = store.watch::<T>().await.map_err(|source| ControllerError::Watch { what, source })?;
    let events = events.filter_map(move |event| async move {
        match event {
            Ok(TypedEvent::Applied(object)) => Some(Ok((wrap(object), false))),
            Ok(TypedEvent::Deleted(object)) => Some(Ok((wrap(object), true))),
            Ok(TypedEvent::Relist) => Some(Ok((Event::Everything, false))),
            // One object that cannot be read must not stop the rest.
            Err(error @ StoreError::Corrupt { .. }) => {
                tracing::error!(error = crate::error::chain(&error), "object skipped");
                None
            }
            Err(error) => Some(Err(error)),
        }
    });
    Ok(events.boxed())
}

fn tell(teller: &mut Teller, event: &Event, is_gone: bool) {
    match event {
        Event::Image(image) => teller.image(image, is_gone),
        Event::Manager(manager) => teller.manager(manager, is_gone),
        Event::DataSource(source) => teller.data_source(source, is_gone),
        Event::Volume(volume) => teller.volume(volume, is_gone),
        Event::Engine(engine) => teller.engine(engine, is_gone),
        Event::Replica(replica) => teller.replica(replica, is_gone),
        Event::Node(node) => teller.node(node, is_gone),
        // What Kubernetes' own mean is told by our Node.
        Event::KubernetesNode(_) | Event::Pod(_) | Event::Everything => {}
    }
}

async fn concern(shared: &Shared, event: Event, known: &mut Known) -> Result<(), ControllerError> {
    let queue = &shared.queue;
    match event {
        Event::Image(image) => {
            let name = image.metadata.name.clone().unwrap_or_default();
            queue.add(Kind::Image, &name);
            queue.add(Kind::DataSource, &name);
            let status = image.status.unwrap_or_default();
            let disks = image.spec.disk_file_spec_map.keys().chain(status.disk_file_status_map.keys());
            disks.for_each(|disk| add_manager(queue, disk));
            let volumes: Vec<Volume> = list(&shared.store).await?;
            for volume in volumes.into_iter().filter(|v| v.spec.backing_image == name) {
                queue.add(Kind::Volume, volume.metadata.name.unwrap_or_default());
            }
        }
        Event::Manager(manager) => {
            let name = manager.metadata.name.unwrap_or_default();
            queue.add(Kind::Manager, &name);
            let held = manager.status.unwrap_or_default().backing_image_file_map;
            let images: BTreeSet<String> = manager.spec.backing_images.into_keys().chain(held.into_keys()).collect();
            // An image that it holds no more waits for just that.
            let before = known.held.insert(name, images.clone()).unwrap_or_default();
            before.union(&images).for_each(|image| queue.add(Kind::Image, image));
        }
        Event::DataSource(source) => {
            let name = source.metadata.name.unwrap_or_default();
            queue.add(Kind::DataSource, &name);
            queue.add(Kind::Image, &name);
            add_manager(queue, &source.spec.disk_uuid);
        }
        Event::Volume(volume) => {
            queue.add(Kind::Volume, volume.metadata.name.unwrap_or_default());
            queue.add(Kind::Image, volume.spec.backing_image);
        }
        Event::Engine(engine) => queue.add(Kind::Volume, engine.spec.volume_name),
        Event::Replica(replica) => {
            queue.add(Kind::Volume, replica.spec.volume_name);
            queue.add(Kind::Image, replica.spec.backing_image);
        }
        Event::Node(node) => {
            let name = node.metadata.name.clone().unwrap_or_default();
            let essence = essence(node);
            if known.nodes.get(&name) != Some(&essence) {
                known.nodes.insert(name, essence);
                everything(shared, None).await?;
            }
        }
        Event::KubernetesNode(node) => queue.add(Kind::Node, node.metadata.name.unwrap_or_default()),
        Event::Pod(pod) => queue.add(Kind::Node, node::of_instance(&pod).unwrap_or_default()),
        Event::Everything => everything(shared, None).await?,
    }
    Ok(())
}

fn add_manager(queue: &Queue, disk: &str) {
    if let Ok(disk) = disk.parse() {
        queue.add(Kind::Manager, manager_name(&disk));
    }
}

/// A node without what changes all the time.
fn essence(node: Node) -> String {
    let mut status = node.status.unwrap_or_default();
    for disk in status.disk_status.values_mut() {
        // Whole GiB: more room may be what somebody waits for.
        disk.storage_available >>= 30;
        disk.conditions.iter_mut().for_each(|c| c.last_probe_time.clear());
        // It matters to who removes something, and is read afresh then.
        disk.images_under_replicas = None;
    }
    status.conditions.iter_mut().for_each(|c| c.last_probe_time.clear());
    let deleted = node.metadata.deletion_timestamp.is_some();
    serde_json::to_string(&(&node.metadata.uid, &node.spec, &status, deleted)).unwrap_or_default()
}

/// Asks for a pass over everything. After lost events (`teller`), what nobody heard of is told as well.
async fn everything(shared: &Shared, teller: Option<&mut Teller>) -> Result<(), ControllerError> {
    let (store, queue) = (&shared.store, &shared.queue);
    let nodes: Vec<Node> = list(store).await?;
    let images: Vec<BackingImage> = list(store).await?;
    let managers: Vec<BackingImageManager> = list(store).await?;
    let sources: Vec<BackingImageDataSource> = list(store).await?;
    let volumes: Vec<Volume> = list(store).await?;
    if let Some(teller) = teller {
        nodes.iter().for_each(|node| teller.node(node, false));
        images.iter().for_each(|image| teller.image(image, false));
        managers.iter().for_each(|manager| teller.manager(manager, false));
        sources.iter().for_each(|source| teller.data_source(source, false));
        volumes.iter().for_each(|volume| teller.volume(volume, false));
        list(store).await?.iter().for_each(|engine| teller.engine(engine, false));
        list(store).await?.iter().for_each(|replica| teller.replica(replica, false));
    }
    for image in images {
        queue.add(Kind::Image, image.metadata.name.unwrap_or_default());
        image.spec.disk_file_spec_map.keys().for_each(|disk| add_manager(queue, disk));
    }
    managers.into_iter().for_each(|manager| queue.add(Kind::Manager, manager.metadata.name.unwrap_or_default()));
    sources.into_iter().for_each(|source| queue.add(Kind::DataSource, source.metadata.name.unwrap_or_default()));
    // What an image left behind is looked after by the agent of its disk.
    let disks = nodes.iter().filter_map(|node| node.status.as_ref()).flat_map(|status| status.disk_status.values());
    disks.filter(|disk| disk.holds_image_files).for_each(|disk| add_manager(queue, &disk.disk_uuid));
    nodes.into_iter().for_each(|node| queue.add(Kind::Node, node.metadata.name.unwrap_or_default()));
    volumes.into_iter().for_each(|volume| queue.add(Kind::Volume, volume.metadata.name.unwrap_or_default()));
    // Workloads whose object is gone: their reconciler removes them.
    for workload in shared.workloads.list().await.unwrap_or_default() {
        match workload.spec.name.strip_prefix(DATA_SOURCE_PREFIX) {
            Some(image) => queue.add(Kind::DataSource, image),
            None => queue.add(Kind::Manager, workload.spec.name),
        }
    }
    Ok(())
}

async fn list<T>(store: &Store) -> Result<Vec<T>, ControllerError>
where
    T: kube::Resource<DynamicType = ()> + DeserializeOwned,
    T::Scope: Scoped,
{
    let listed = store.list(&store::Selector::default()).await;
    listed.map_err(|source| ControllerError::Watch { what: "the store", source })
}
