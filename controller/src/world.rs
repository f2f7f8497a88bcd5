//! What several reconcilers read and write.

use std::collections::BTreeMap;

use api::names::FINALIZER;
use api::names::condition::READY;
use api::{Node, condition};
use jiff::Timestamp;
use planner::disk::Disks;
use planner::setting::Settings;
use planner::workload;
use serde::Serialize;
use serde::de::DeserializeOwned;
use store::{Preconditions, Scoped, Selector, Store, StoreError};
use workloads::{Workload, WorkloadSpec, WorkloadState};

use crate::error::{Doing, ReconcileError};

/// The nodes, as disks and as times since when one is silent.
#[derive(Default)]
pub struct Nodes {
    pub disks: Disks,
    pub silent_since: BTreeMap<String, Timestamp>,
}

impl Nodes {
    /// What nodes report.
    pub fn of(nodes: &[Node]) -> Nodes {
        let silent = nodes.iter().filter_map(|node| {
            let ready = condition::find(&node.status.as_ref()?.conditions, READY).filter(|c| !c.is_true())?;
            Some((node.metadata.name.clone()?, planner::retry::parse(&ready.last_transition_time)?))
        });
        Nodes { silent_since: silent.collect(), disks: Disks::of(nodes) }
    }
}

/// All nodes, as the store has them now.
pub async fn nodes(store: &Store) -> Result<Nodes, ReconcileError> {
    Ok(Nodes::of(&list(store, "list nodes").await?))
}

/// All settings, as the store has them now.
pub async fn settings(store: &Store) -> Result<Settings, ReconcileError> {
    Ok(Settings::of(&list(store, "list settings").await?))
}

/// All objects of a kind, as the store has them now.
pub async fn list<T>(store: &Store, doing: &'static str) -> Result<Vec<T>, ReconcileError>
where
    T: kube::Resource<DynamicType = ()> + DeserializeOwned,
    T::Scope: Scoped,
{
    store.list(&Selector::default()).await.doing(doing)
}

/// Takes our finalizer off an object; the store removes it then, if it is being deleted.
pub async fn remove_finalizer<T>(store: &Store, name: &str) -> Result<(), ReconcileError>
where
    T: kube::Resource<DynamicType = ()> + Serialize + DeserializeOwned + Send + Sync,
    T::Scope: Scoped,
{
    let removed = store
        .modify::<T>(name, |o| o.meta_mut().finalizers.iter_mut().for_each(|f| f.retain(|f| f != FINALIZER)))
        .await;
    match removed {
        Ok(_) | Err(StoreError::NotFound { .. }) => Ok(()),
        Err(source) => Err(ReconcileError::Store { doing: "remove the finalizer", source }),
    }
}

/// Puts our finalizer on an object.
pub async fn add_finalizer<T>(store: &Store, name: &str) -> Result<(), ReconcileError>
where
    T: kube::Resource<DynamicType = ()> + Serialize + DeserializeOwned + Send + Sync,
    T::Scope: Scoped,
{
    let add = |o: &mut T| {
        let finalizers = o.meta_mut().finalizers.get_or_insert_default();
        if !finalizers.iter().any(|f| f == FINALIZER) {
            finalizers.push(FINALIZER.into());
        }
    };
    store.modify::<T>(name, add).await.map(drop).doing("add the finalizer")
}

/// Asks for the deletion of an object, if it is still the one that was observed.
pub async fn delete<T>(store: &Store, observed: &T) -> Result<(), ReconcileError>
where
    T: kube::Resource<DynamicType = ()> + DeserializeOwned,
    T::Scope: Scoped,
{
    let meta = observed.meta();
    let preconditions = Preconditions { uid: meta.uid.clone(), resource_version: None };
    let name = meta.name.clone().unwrap_or_default();
    store.delete::<T>(&name, &preconditions).await.map(drop).doing("delete an object")
}

/// A workload as decisions see it.
pub fn observed(workload: &Workload) -> workload::Workload {
    let spec = &workload.spec;
    workload::Workload {
        wish: workload::Wish {
            name: spec.name.clone(),
            node: spec.node.to_string(),
            labels: spec.labels.clone(),
            args: spec.args.clone(),
            disk_path: spec.disk_path.display().to_string(),
            ready_ports: spec.ready_ports.clone(),
            owner: spec.owner.clone(),
            secrets: spec.secrets.clone(),
            revision: spec.revision.clone(),
        },
        state: match &workload.state {
            WorkloadState::Starting { message } => workload::State::Starting(message.clone()),
            WorkloadState::Running => workload::State::Running,
            WorkloadState::Failed { message } => workload::State::Failed(message.clone()),
            WorkloadState::Unknown { message } => workload::State::Unknown(message.clone()),
        },
        ip: workload.ip.map(|ip| ip.to_string()).unwrap_or_default(),
        is_outdated: workload.is_outdated,
    }
}

/// A decided workload as the `workloads` room wants it.
pub fn spec(wish: &workload::Wish) -> Result<WorkloadSpec, ReconcileError> {
    let node = wish.node.parse().map_err(|_| ReconcileError::Name { what: "node name", text: wish.node.clone() })?;
    Ok(WorkloadSpec {
        name: wish.name.clone(),
        node,
        labels: wish.labels.clone(),
        args: wish.args.clone(),
        env: BTreeMap::new(),
        disk_path: wish.disk_path.clone().into(),
        ready_ports: wish.ready_ports.clone(),
        owner: wish.owner.clone(),
        secrets: wish.secrets.clone(),
        revision: wish.revision.clone(),
    })
}
