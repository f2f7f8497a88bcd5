//! Hears what changes: feeds the cache, tells users, asks for passes.

use api::{
    BackingImage, BackingImageDataSource, BackingImageManager, Engine, ErrorKind, Node, Replica, Setting, Volume,
};
use futures::StreamExt;
use futures::stream::{BoxStream, SelectAll};
use k8s_openapi::api::core::v1::{Node as KubernetesNode, Pod};
use store::events::Recorder;
use store::{Object, ResourceType, Store, StoreError, WatchEvent};

use crate::cache::{Cache, Step};
use crate::concern::{self, Concern};
use crate::limits::{RELIST_RETRY, RESYNC};
use crate::queue::Kind;
use crate::teller::Teller;
use crate::{Beginning, ControllerError, Shared, node};

/// The prefix of data source workloads (see [`api::names::data_source_workload_name`]).
const DATA_SOURCE_PREFIX: &str = "backing-image-ds-";

/// What an event is of.
#[derive(Clone, Copy)]
enum About {
    Image,
    Manager,
    DataSource,
    Volume,
    Engine,
    Replica,
    Node,
    Setting,
    KubernetesNode,
    Pod,
}

type Events = SelectAll<BoxStream<'static, Result<(About, WatchEvent), StoreError>>>;

struct Hearer<'a> {
    shared: &'a Shared,
    teller: Teller,
}

/// Turns changes into passes, and into news for users, until the store ends.
pub async fn run(shared: &Shared, recorder: Recorder, beginning: Beginning) -> Result<(), ControllerError> {
    let mut events = Events::new();
    let mut hearer = Hearer { shared, teller: Teller::new(recorder) };
    hearer.begin(&mut events).await?;
    let mut workloads = shared.workloads.changes();
    let mut resync = tokio::time::interval(RESYNC);
    resync.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // Everything was just read.
    resync.tick().await;
    hearer.look_at_all().await;
    drop(beginning);
    loop {
        let done = tokio::select! {
            event = events.next() => match event {
                Some(Ok((about, event))) => hearer.hear(about, event).await,
                Some(Err(source)) => return Err(ControllerError::Watch { what: "the store", source }),
                None => return Ok(()),
            },
            Some(name) = workloads.next() => {
                match name.strip_prefix(DATA_SOURCE_PREFIX) {
                    Some(image) => shared.queue.add(Kind::DataSource, image),
                    None => shared.queue.add(Kind::Manager, name),
                }
                Ok(())
            }
            _ = resync.tick() => hearer.read_all().await,
        };
        if !unless_away(done)? {
            // Passes wait meanwhile, if events are missing.
            resync.reset_after(RELIST_RETRY);
        }
        shared.metrics.observe_queue(shared.queue.len());
    }
}

/// Whether it was done. A store that is away for a while is no reason to end.
fn unless_away(done: Result<(), ControllerError>) -> Result<bool, ControllerError> {
    match done {
        Err(error) if error.kind() == ErrorKind::Unavailable => {
            tracing::warn!(error = crate::error::chain(&error), "what changed is looked at later");
            Ok(false)
        }
        done => done.map(|()| true),
    }
}

impl Hearer<'_> {
    /// Reads everything and follows it from there.
    async fn begin(&mut self, events: &mut Events) -> Result<(), ControllerError> {
        // First, since the others are told with the names of disks.
        self.follow::<Node>(events, About::Node, "nodes").await?;
        self.follow::<Setting>(events, About::Setting, "settings").await?;
        self.follow::<BackingImage>(events, About::Image, "images").await?;
        self.follow::<BackingImageManager>(events, About::Manager, "managers").await?;
        self.follow::<BackingImageDataSource>(events, About::DataSource, "data sources").await?;
        self.follow::<Volume>(events, About::Volume, "volumes").await?;
        self.follow::<Engine>(events, About::Engine, "engines").await?;
        self.follow::<Replica>(events, About::Replica, "replicas").await?;
        if self.shared.kubernetes {
            let store = &self.shared.store;
            let nodes = store.objects().watch(&ResourceType::of::<KubernetesNode>(), None, None).await;
            events.push(of(About::KubernetesNode, nodes.map_err(watching("Kubernetes nodes"))?));
            let pods = store.objects().watch(&ResourceType::of::<Pod>(), Some(store.namespace()), None).await;
            events.push(of(About::Pod, pods.map_err(watching("pods"))?));
        }
        Ok(())
    }

    async fn follow<T: Concern>(
        &mut self,
        events: &mut Events,
        about: About,
        what: &'static str,
    ) -> Result<(), ControllerError> {
        let store: &Store = &self.shared.store;
        let (steps, version) = self.shared.cache.list::<T>(store).await.map_err(watching(what))?;
        let changes = Cache::watch::<T>(store, version).await.map_err(watching(what))?;
        events.push(of(about, changes));
        // No passes yet: not everything is known.
        steps.iter().for_each(|step| self.tell(step));
        Ok(())
    }

    async fn hear(&mut self, about: About, event: WatchEvent) -> Result<(), ControllerError> {
        match about {
            About::Image => self.take::<BackingImage>(event).await,
            About::Manager => self.take::<BackingImageManager>(event).await,
            About::DataSource => self.take::<BackingImageDataSource>(event).await,
            About::Volume => self.take::<Volume>(event).await,
            About::Engine => self.take::<Engine>(event).await,
            About::Replica => self.take::<Replica>(event).await,
            About::Node => self.take::<Node>(event).await,
            About::Setting => self.take::<Setting>(event).await,
            About::KubernetesNode | About::Pod => {
                self.machine(about, event);
                Ok(())
            }
        }
    }

    async fn take<T: Concern>(&mut self, event: WatchEvent) -> Result<(), ControllerError> {
        if matches!(event, WatchEvent::Relist) {
            self.shared.cache.lose::<T>();
            return self.read::<T>().await;
        }
        if let Some(step) = self.shared.cache.hear::<T>(event) {
            self.tell(&step);
            T::concern(&step, self.shared);
        }
        Ok(())
    }

    /// Finds what nobody heard of.
    async fn read<T: Concern>(&mut self) -> Result<(), ControllerError> {
        let (steps, _) = self.shared.cache.list::<T>(&self.shared.store).await.map_err(watching("the store"))?;
        for step in steps {
            self.tell(&step);
            T::concern(&step, self.shared);
        }
        Ok(())
    }

    /// In case an event was lost, and for what no event tells of: reads and looks at everything.
    async fn read_all(&mut self) -> Result<(), ControllerError> {
        self.read::<Node>().await?;
        self.read::<Setting>().await?;
        self.read::<BackingImage>().await?;
        self.read::<BackingImageManager>().await?;
        self.read::<BackingImageDataSource>().await?;
        self.read::<Volume>().await?;
        self.read::<Engine>().await?;
        self.read::<Replica>().await?;
        self.look_at_all().await;
        Ok(())
    }

    async fn look_at_all(&self) {
        concern::all(self.shared);
        // Workloads whose object is gone: their reconciler removes them.
        for workload in self.shared.workloads.list().await.unwrap_or_default() {
            match workload.spec.name.strip_prefix(DATA_SOURCE_PREFIX) {
                Some(image) => self.shared.queue.add(Kind::DataSource, image),
                None => self.shared.queue.add(Kind::Manager, workload.spec.name),
            }
        }
    }

    fn tell<T: Concern>(&mut self, step: &Step<T>) {
        match (&step.before, &step.after) {
            (_, Some(object)) => object.tell(false, &mut self.teller),
            (Some(object), None) => object.tell(true, &mut self.teller),
            (None, None) => {}
        }
    }

    /// What Kubernetes' own mean is told by our Node.
    fn machine(&self, about: About, event: WatchEvent) {
        let queue = &self.shared.queue;
        match event {
            WatchEvent::Applied(object) | WatchEvent::Deleted(object) => match about {
                About::Pod => queue.add(Kind::Node, instance_of(object).unwrap_or_default()),
                _ => queue.add(Kind::Node, object.name()),
            },
            WatchEvent::Relist => concern::nodes(self.shared),
        }
    }
}

/// The node of a pod of the instance role.
fn instance_of(object: Object) -> Option<String> {
    let pod = object.decode::<Pod>().inspect_err(|error| {
        tracing::error!(error = crate::error::chain(error), "object skipped");
    });
    node::of_instance(&pod.ok()?)
}

fn of(about: About, changes: store::WatchStream) -> BoxStream<'static, Result<(About, WatchEvent), StoreError>> {
    changes.map(move |event| Ok((about, event?))).boxed()
}

fn watching(what: &'static str) -> impl FnOnce(StoreError) -> ControllerError {
    move |source| ControllerError::Watch { what, source }
}
