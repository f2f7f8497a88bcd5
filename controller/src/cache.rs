//! What the controller knows of the store: every object that decisions are made on, decoded once, as the watches told it last.
//!
//! One task feeds it ([`crate::events`]); passes read it and ask the store for nothing. Three rules make that safe:
//!
//! - No pass decides on something older than what this controller has written or read before: it waits for it ([`Cache::settled`]).
//! - While events of a kind may be missing, every pass waits.
//! - What takes something away is decided once more on what the store says then: a watch may be silent for a while before anybody
//!   knows. This stands in the passes ([`crate::image`], [`crate::manager`], [`crate::volume`], [`crate::data_source`]).

mod table;
mod witness;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use api::{BackingImage, BackingImageDataSource, BackingImageManager, Engine, Node, Replica, Setting, Volume};
use planner::disk::{self, Load, Loads};
use planner::setting::Settings;
use serde::Serialize;
use serde::de::DeserializeOwned;
use store::{Object, ObjectList, ResourceType, Scoped, Selector, Store, StoreError, WatchEvent, WatchStream};
use tokio::sync::watch;
use tokio::time::timeout;

use self::table::Table;
pub use self::table::{Facet, Step};
use self::witness::{Noted, Witness};
use crate::error::ReconcileError;
use crate::limits::CATCH_UP;
use crate::world::Nodes;

/// Objects by kind. Shared by all passes of one controller.
pub struct Cache {
    objects: RwLock<Objects>,
    /// Something was heard.
    heard: watch::Sender<()>,
    noted: Noted,
}

/// All of it, at one moment.
#[derive(Default)]
pub struct Objects {
    nodes: Table<Node>,
    images: Table<BackingImage>,
    managers: Table<BackingImageManager>,
    sources: Table<BackingImageDataSource>,
    volumes: Table<Volume>,
    engines: Table<Engine>,
    replicas: Table<Replica>,
    settings: Table<Setting>,
    loads: Loads,
    places: Arc<Nodes>,
    values: Arc<Settings>,
    progress: BTreeMap<ResourceType, Progress>,
}

/// How far one kind is known.
#[derive(Clone, Copy, Default)]
struct Progress {
    version: u64,
    /// Events may be missing, until it is listed again.
    is_lost: bool,
}

/// A kind that is kept.
pub trait Kept:
    kube::Resource<DynamicType = (), Scope: Scoped> + Serialize + DeserializeOwned + Send + Sync + 'static
{
    fn table(objects: &Objects) -> &Table<Self>;
    fn table_mut(objects: &mut Objects) -> &mut Table<Self>;

    /// What an object is found by, beside its name.
    fn facets(&self) -> Vec<Facet> {
        vec![]
    }

    /// Brings in line what is derived from all objects of the kind.
    fn derive(_objects: &mut Objects, _step: &Step<Self>) {}
}

impl Cache {
    /// An empty one, and the store through which it learns what is written and read.
    pub fn new(store: &Store) -> (Arc<Cache>, Store) {
        let kinds = [
            ResourceType::of::<Node>(),
            ResourceType::of::<BackingImage>(),
            ResourceType::of::<BackingImageManager>(),
            ResourceType::of::<BackingImageDataSource>(),
            ResourceType::of::<Volume>(),
            ResourceType::of::<Engine>(),
            ResourceType::of::<Replica>(),
            ResourceType::of::<Setting>(),
        ];
        let progress = kinds.iter().map(|kind| (kind.clone(), Progress::default())).collect();
        let noted = Noted::of(kinds);
        let witness = Witness::new(store.objects().clone(), noted.clone());
        let objects = RwLock::new(Objects { progress, ..Objects::default() });
        let cache = Cache { objects, heard: watch::Sender::default(), noted };
        (Arc::new(cache), Store::new(Arc::new(witness), store.namespace()))
    }

    fn read(&self) -> RwLockReadGuard<'_, Objects> {
        self.objects.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Objects> {
        self.objects.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The object of that name.
    pub fn get<T: Kept>(&self, name: &str) -> Option<Arc<T>> {
        T::table(&self.read()).get(name).cloned()
    }

    /// Every object of a kind, by name.
    pub fn all<T: Kept>(&self) -> Vec<Arc<T>> {
        T::table(&self.read()).all().cloned().collect()
    }

    /// The objects of a kind that are found by that, by name.
    pub fn of<T: Kept>(&self, facet: &Facet) -> Vec<Arc<T>> {
        T::table(&self.read()).of(facet).cloned().collect()
    }

    /// The disks that images name.
    pub fn disks_of_images(&self) -> Vec<String> {
        let disk = |facet: &Facet| match facet {
            Facet::Disk(disk) => Some(disk.clone()),
            Facet::Image(_) | Facet::Volume(_) => None,
        };
        self.read().images.facets().filter_map(disk).collect()
    }

    /// What is promised on each disk.
    pub fn loads(&self) -> BTreeMap<String, Load> {
        self.read().loads.all()
    }

    /// The nodes and their disks.
    pub fn nodes(&self) -> Arc<Nodes> {
        self.read().places.clone()
    }

    /// The settings.
    pub fn settings(&self) -> Arc<Settings> {
        self.read().values.clone()
    }

    /// Waits until everything is known that this controller has written or read, and nothing is missing.
    pub async fn settled(&self) -> Result<(), ReconcileError> {
        let mut heard = self.heard.subscribe();
        let wanted = self.noted.all();
        let is_known = || {
            let objects = self.read();
            wanted.iter().all(|(kind, version)| {
                objects.progress.get(kind).is_some_and(|known| !known.is_lost && known.version >= *version)
            })
        };
        let wait = async {
            while !is_known() {
                // The sender lives as long as `self`.
                let _ = heard.changed().await;
            }
        };
        timeout(CATCH_UP, wait).await.map_err(|_| ReconcileError::Behind)
    }

    /// Takes a change in; nothing when it was known already, or cannot be read.
    pub fn hear<T: Kept>(&self, event: WatchEvent) -> Option<Step<T>> {
        let (object, is_gone) = match event {
            WatchEvent::Applied(object) => (object, false),
            WatchEvent::Deleted(object) => (object, true),
            WatchEvent::Relist => {
                self.lose::<T>();
                return None;
            }
        };
        let version = object.resource_version().parse().unwrap_or_default();
        let name = object.name().to_owned();
        // One object that cannot be read must not stop the rest: what was known of it last stands.
        let read = if is_gone { Some(None) } else { decoded::<T>(object).map(Some) };
        let mut objects = self.write();
        let progress = objects.progress.entry(ResourceType::of::<T>()).or_default();
        if version <= progress.version {
            return None;
        }
        progress.version = version;
        let step = read.and_then(|object| set(&mut objects, &name, object.map(Arc::new)));
        drop(objects);
        self.heard.send_replace(());
        step
    }

    /// Events of a kind may be missing: nothing is decided until it was listed again.
    pub fn lose<T: Kept>(&self) {
        self.write().progress.entry(ResourceType::of::<T>()).or_default().is_lost = true;
    }

    /// Reads all objects of a kind anew; returns what nobody had heard of, and the changes from then on.
    pub async fn list<T: Kept>(&self, store: &Store) -> Result<(Vec<Step<T>>, String), StoreError> {
        let namespace = <T::Scope as Scoped>::NAMESPACED.then_some(store.namespace());
        let kind = ResourceType::of::<T>();
        let list = store.objects().list(&kind, namespace, &Selector::default()).await?;
        let version = list.resource_version.clone();
        let steps = self.replace(&kind, list);
        self.heard.send_replace(());
        Ok((steps, version))
    }

    fn replace<T: Kept>(&self, kind: &ResourceType, list: ObjectList) -> Vec<Step<T>> {
        let version = list.resource_version.parse().unwrap_or_default();
        // Beside those that cannot be read, which are there all the same.
        let names: Vec<String> = list.items.iter().map(|object| object.name().to_owned()).collect();
        let found: Vec<(String, T)> =
            list.items.into_iter().filter_map(|object| Some((object.name().to_owned(), decoded(object)?))).collect();
        let mut objects = self.write();
        if objects.progress.get(kind).is_some_and(|known| version < known.version) {
            // The store was put back to an older state, in which later versions come once more.
            self.noted.go_back(kind, version);
        }
        objects.progress.insert(kind.clone(), Progress { version, is_lost: false });
        let mut gone: Vec<String> = T::table(&objects).names().cloned().collect();
        gone.retain(|name| names.binary_search(name).is_err() && !names.contains(name));
        let gone = gone.into_iter().map(|name| (name, None));
        let found = found.into_iter().map(|(name, object)| (name, Some(Arc::new(object))));
        gone.chain(found).filter_map(|(name, object)| set(&mut objects, &name, object)).collect()
    }

    /// The changes of a kind after a version.
    pub async fn watch<T: Kept>(store: &Store, version: String) -> Result<WatchStream, StoreError> {
        let namespace = <T::Scope as Scoped>::NAMESPACED.then_some(store.namespace());
        store.objects().watch(&ResourceType::of::<T>(), namespace, Some(version)).await
    }
}

/// Puts one object in or takes it out; nothing when that changes nothing.
fn set<T: Kept>(objects: &mut Objects, name: &str, object: Option<Arc<T>>) -> Option<Step<T>> {
    let step = T::table_mut(objects).set(name, object)?;
    T::derive(objects, &step);
    Some(step)
}

fn decoded<T: DeserializeOwned>(object: Object) -> Option<T> {
    let decoded = object.decode();
    decoded.inspect_err(|error| tracing::error!(error = crate::error::chain(error), "object skipped")).ok()
}

macro_rules! kept {
    ($($kind:ty, $table:ident { $($more:item)* })*) => {
        $(impl Kept for $kind {
            fn table(objects: &Objects) -> &Table<Self> {
                &objects.$table
            }
            fn table_mut(objects: &mut Objects) -> &mut Table<Self> {
                &mut objects.$table
            }
            $($more)*
        })*
    };
}

kept! {
    Node, nodes {
        fn derive(objects: &mut Objects, _: &Step<Self>) {
            let nodes: Vec<Node> = objects.nodes.all().map(|node| Node::clone(node)).collect();
            objects.places = Arc::new(Nodes::of(&nodes));
        }
    }
    BackingImage, images {
        fn facets(&self) -> Vec<Facet> {
            let held = self.status.iter().flat_map(|status| status.disk_file_status_map.keys());
            self.spec.disk_file_spec_map.keys().chain(held).cloned().map(Facet::Disk).collect()
        }
        fn derive(objects: &mut Objects, step: &Step<Self>) {
            objects.loads.take(step.before.iter().flat_map(|image| disk::of_image(image)));
            objects.loads.add(step.after.iter().flat_map(|image| disk::of_image(image)));
        }
    }
    BackingImageManager, managers {}
    BackingImageDataSource, sources {}
    Volume, volumes {
        fn facets(&self) -> Vec<Facet> {
            vec![Facet::Image(self.spec.backing_image.clone())]
        }
    }
    Engine, engines {
        fn facets(&self) -> Vec<Facet> {
            vec![Facet::Volume(self.spec.volume_name.clone())]
        }
    }
    Replica, replicas {
        fn facets(&self) -> Vec<Facet> {
            vec![Facet::Image(self.spec.backing_image.clone()), Facet::Volume(self.spec.volume_name.clone())]
        }
        fn derive(objects: &mut Objects, step: &Step<Self>) {
            objects.loads.take(step.before.iter().filter_map(|replica| disk::of_replica(replica)));
            objects.loads.add(step.after.iter().filter_map(|replica| disk::of_replica(replica)));
        }
    }
    Setting, settings {
        fn derive(objects: &mut Objects, _: &Step<Self>) {
            let settings: Vec<Setting> = objects.settings.all().map(|setting| Setting::clone(setting)).collect();
            objects.values = Arc::new(Settings::of(&settings));
        }
    }
}

#[cfg(test)]
mod tests;
