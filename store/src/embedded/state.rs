//! All objects, and what each write does to them. Pure: no files, no clock, no tasks.
//!
//! Every change has a version of its own, one above the last. A refused operation changes nothing.
//! Objects whose owners are gone are removed in the same step as their last owner, which is the quickest background collection there is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;

use super::expiry;
use crate::{Object, ObjectKey, Preconditions, ResourceType, StoreError, rules};

/// Where an object is. Versions of one kind share their objects.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId {
    pub group: String,
    pub plural: String,
    /// Empty for cluster-scoped kinds.
    pub namespace: String,
    pub name: String,
}

impl ObjectId {
    /// The id of a key; refused when its namespace does not fit the kind.
    pub fn new(resource: &ResourceType, key: &ObjectKey) -> Result<ObjectId, StoreError> {
        rules::check_scope(resource, key)?;
        Ok(ObjectId {
            group: resource.group.clone(),
            plural: resource.plural.clone(),
            namespace: key.namespace.clone().unwrap_or_default(),
            name: key.name.clone(),
        })
    }

    /// Whether it is an object of this kind.
    pub fn is_of(&self, resource: &ResourceType) -> bool {
        self.plural == resource.plural && self.group == resource.group
    }

    /// Its row in the file.
    pub fn to_row(&self) -> String {
        format!("{}/{}/{}/{}", self.group, self.plural, self.namespace, self.name)
    }

    /// The inverse of [`ObjectId::to_row`].
    pub fn from_row(row: &str) -> Option<ObjectId> {
        let mut parts = row.split('/').map(str::to_owned);
        let id =
            ObjectId { group: parts.next()?, plural: parts.next()?, namespace: parts.next()?, name: parts.next()? };
        parts.next().is_none().then_some(id)
    }
}

/// One change.
#[derive(Clone, Debug)]
pub struct Change {
    pub id: ObjectId,
    pub version: u64,
    /// The object after the change, or as it was last.
    pub object: Arc<Object>,
    pub removed: bool,
}

/// One write.
#[derive(Debug)]
pub enum Operation {
    Create { resource: ResourceType, object: Object },
    Replace { resource: ResourceType, object: Object },
    ReplaceStatus { resource: ResourceType, object: Object },
    Delete { resource: ResourceType, key: ObjectKey, preconditions: Preconditions },
}

/// All objects at one version.
#[derive(Clone, Debug, Default)]
pub struct State {
    version: u64,
    objects: BTreeMap<ObjectId, Arc<Object>>,
    uids: BTreeSet<String>,
    /// Owner uid → what it owns.
    dependents: BTreeMap<String, BTreeSet<ObjectId>>,
}

type Outcome = Result<Option<Arc<Object>>, StoreError>;

impl State {
    /// The state that a file holds.
    pub fn restore(version: u64, objects: Vec<(ObjectId, Arc<Object>)>) -> State {
        let mut state = State { version, ..State::default() };
        for (id, object) in objects {
            state.insert(id, object);
        }
        state
    }

    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn get(&self, id: &ObjectId) -> Option<&Arc<Object>> {
        self.objects.get(id)
    }

    /// The objects of a kind, by namespace and name.
    pub fn of_kind(&self, resource: &ResourceType, namespace: Option<&str>) -> impl Iterator<Item = &Arc<Object>> {
        let first = ObjectId {
            group: resource.group.clone(),
            plural: resource.plural.clone(),
            namespace: namespace.unwrap_or_default().to_owned(),
            name: String::new(),
        };
        let namespace = namespace.map(str::to_owned);
        let (group, plural) = (resource.group.clone(), resource.plural.clone());
        self.objects
            .range(first..)
            .take_while(move |(id, _)| {
                id.group == group && id.plural == plural && namespace.as_ref().is_none_or(|n| *n == id.namespace)
            })
            .map(|(_, object)| object)
    }

    /// Objects by `plural.group`.
    pub fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for id in self.objects.keys() {
            let kind = if id.group.is_empty() { id.plural.clone() } else { format!("{}.{}", id.plural, id.group) };
            *counts.entry(kind).or_default() += 1;
        }
        counts
    }

    /// Repeats a change that another copy of this state has made.
    pub fn redo(&mut self, change: &Change) {
        assert!(change.version > self.version, "version {} comes after {}", change.version, self.version);
        self.version = change.version;
        self.forget(&change.id);
        if !change.removed {
            self.insert(change.id.clone(), change.object.clone());
        }
    }

    /// Decides and makes one write: what the caller gets, and every change that it caused.
    pub fn apply(&mut self, operation: Operation, now: Timestamp) -> (Outcome, Vec<Change>) {
        let mut changes = vec![];
        let outcome = match operation {
            Operation::Create { resource, object } => self.create(&resource, object, now, &mut changes),
            Operation::Replace { resource, object } => self.replace(&resource, object, now, &mut changes),
            Operation::ReplaceStatus { resource, object } => self.replace_status(&resource, object, &mut changes),
            Operation::Delete { resource, key, preconditions } => {
                self.delete(&resource, &key, &preconditions, now, &mut changes)
            }
        };
        (outcome, changes)
    }

    /// Removes every object whose owners are all gone.
    pub fn collect_all(&mut self, now: Timestamp) -> Vec<Change> {
        let mut changes = vec![];
        self.collect(self.dependents.values().flatten().cloned().collect(), now, &mut changes);
        changes
    }

    fn create(
        &mut self,
        resource: &ResourceType,
        mut object: Object,
        now: Timestamp,
        changes: &mut Vec<Change>,
    ) -> Outcome {
        rules::check_new(resource, &mut object)?;
        let id = ObjectId::new(resource, &object.key())?;
        if self.objects.contains_key(&id) {
            return Err(StoreError::AlreadyExists { resource: resource.kind.clone(), name: id.name });
        }
        object.0.shift_remove("status");
        let metadata = rules::metadata_mut(&mut object);
        for field in ["deletionTimestamp", "deletionGracePeriodSeconds"] {
            metadata.shift_remove(field);
        }
        metadata.insert("uid".into(), uuid::Uuid::new_v4().to_string().into());
        metadata.insert("creationTimestamp".into(), rules::time(now).into());
        metadata.insert("generation".into(), 1.into());
        let stored = self.put(id.clone(), object, changes);
        self.collect(BTreeSet::from([id]), now, changes);
        self.expire(resource, now, changes);
        Ok(Some(stored))
    }

    /// Removes Kubernetes' events that are too old or too many.
    fn expire(&mut self, resource: &ResourceType, now: Timestamp, changes: &mut Vec<Change>) {
        if !resource.group.is_empty() || resource.plural != "events" {
            return;
        }
        for object in expiry::expired(self.of_kind(resource, None), now) {
            if let Ok(id) = ObjectId::new(resource, &object.key()) {
                self.delete_stored(id, object, now, changes);
            }
        }
    }

    /// The stored object that a new form of it is meant for.
    fn current(&self, resource: &ResourceType, id: &ObjectId, new: &Object) -> Result<Arc<Object>, StoreError> {
        let Some(stored) = self.objects.get(id) else {
            return Err(StoreError::NotFound { resource: resource.kind.clone(), name: id.name.clone() });
        };
        let same = |given: &str, stored: &str| given.is_empty() || given == stored;
        if !same(new.resource_version(), stored.resource_version()) || !same(new.uid(), stored.uid()) {
            return Err(StoreError::Conflict { resource: resource.kind.clone(), name: id.name.clone() });
        }
        Ok(stored.clone())
    }

    fn replace(
        &mut self,
        resource: &ResourceType,
        mut new: Object,
        now: Timestamp,
        changes: &mut Vec<Change>,
    ) -> Outcome {
        rules::check(resource, &mut new)?;
        let id = ObjectId::new(resource, &new.key())?;
        let stored = self.current(resource, &id, &new)?;
        new.0.shift_remove("status");
        if let Some(status) = stored.0.get("status") {
            new.0.insert("status".into(), status.clone());
        }
        if rules::is_being_deleted(&new) && !rules::is_being_deleted(&stored) {
            let reason = "metadata.deletionTimestamp is set by a deletion and by nothing else";
            return Err(rules::invalid(resource, &id.name, reason));
        }
        rules::keep_system_fields(&mut new, &stored);
        if new == *stored {
            return Ok(Some(stored));
        }
        let deleting = rules::is_being_deleted(&stored);
        let finalizers = rules::finalizers(&new);
        if deleting && !finalizers.is_subset(&rules::finalizers(&stored)) {
            let reason = "metadata.finalizers cannot grow while the object is being deleted";
            return Err(rules::invalid(resource, &id.name, reason));
        }
        let gone = deleting && finalizers.is_empty();
        if rules::differs_beyond_metadata(&new, &stored) {
            rules::raise_generation(&mut new);
        }
        if gone {
            return Ok(Some(self.remove(id, new, now, changes)));
        }
        let stored = self.put(id.clone(), new, changes);
        self.collect(BTreeSet::from([id]), now, changes);
        Ok(Some(stored))
    }

    fn replace_status(&mut self, resource: &ResourceType, mut new: Object, changes: &mut Vec<Change>) -> Outcome {
        rules::check(resource, &mut new)?;
        let id = ObjectId::new(resource, &new.key())?;
        let stored = self.current(resource, &id, &new)?;
        let mut object = Object::clone(&stored);
        object.0.shift_remove("status");
        if let Some(status) = new.0.shift_remove("status") {
            object.0.insert("status".into(), status);
        }
        if object == *stored {
            return Ok(Some(stored));
        }
        Ok(Some(self.put(id, object, changes)))
    }

    fn delete(
        &mut self,
        resource: &ResourceType,
        key: &ObjectKey,
        preconditions: &Preconditions,
        now: Timestamp,
        changes: &mut Vec<Change>,
    ) -> Outcome {
        let id = ObjectId::new(resource, key)?;
        let Some(stored) = self.objects.get(&id) else { return Ok(None) };
        let holds = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
        if !holds(&preconditions.uid, stored.uid())
            || !holds(&preconditions.resource_version, stored.resource_version())
        {
            return Err(StoreError::Precondition { resource: resource.kind.clone(), name: id.name });
        }
        Ok(Some(self.delete_stored(id, stored.clone(), now, changes)))
    }

    /// Removes an object, or marks it while it has finalizers.
    fn delete_stored(
        &mut self,
        id: ObjectId,
        stored: Arc<Object>,
        now: Timestamp,
        changes: &mut Vec<Change>,
    ) -> Arc<Object> {
        if rules::finalizers(&stored).is_empty() {
            return self.remove(id, Object::clone(&stored), now, changes);
        }
        if rules::is_being_deleted(&stored) {
            return stored;
        }
        let mut object = Object::clone(&stored);
        let metadata = rules::metadata_mut(&mut object);
        metadata.insert("deletionTimestamp".into(), rules::time(now).into());
        metadata.insert("deletionGracePeriodSeconds".into(), 0.into());
        rules::raise_generation(&mut object);
        self.put(id, object, changes)
    }

    /// Removes the candidates whose owners are all gone, and what they own; unties the others from owners that are gone.
    fn collect(&mut self, mut candidates: BTreeSet<ObjectId>, now: Timestamp, changes: &mut Vec<Change>) {
        while let Some(id) = candidates.pop_first() {
            let Some(stored) = self.objects.get(&id).cloned() else { continue };
            let (alive, gone): (Vec<Value>, Vec<Value>) =
                rules::owner_references(&stored).cloned().partition(|r| self.uids.contains(rules::owner_uid(r)));
            if gone.is_empty() {
                continue;
            }
            if alive.is_empty() {
                // Removal collects what this one owns in turn.
                self.delete_stored(id, stored, now, changes);
            } else {
                let mut object = Object::clone(&stored);
                rules::metadata_mut(&mut object).insert("ownerReferences".into(), alive.into());
                self.put(id, object, changes);
            }
        }
    }

    fn put(&mut self, id: ObjectId, object: Object, changes: &mut Vec<Change>) -> Arc<Object> {
        let object = self.stamp(object);
        self.forget(&id);
        self.insert(id.clone(), object.clone());
        changes.push(Change { id, version: self.version, object: object.clone(), removed: false });
        object
    }

    fn remove(&mut self, id: ObjectId, last: Object, now: Timestamp, changes: &mut Vec<Change>) -> Arc<Object> {
        let object = self.stamp(last);
        self.forget(&id);
        changes.push(Change { id, version: self.version, object: object.clone(), removed: true });
        if let Some(dependents) = self.dependents.get(object.uid()) {
            self.collect(dependents.clone(), now, changes);
        }
        object
    }

    fn stamp(&mut self, mut object: Object) -> Arc<Object> {
        self.version += 1;
        rules::metadata_mut(&mut object).insert("resourceVersion".into(), self.version.to_string().into());
        rules::sort_fields(&mut object);
        Arc::new(object)
    }

    fn insert(&mut self, id: ObjectId, object: Arc<Object>) {
        self.uids.insert(object.uid().to_owned());
        for reference in rules::owner_references(&object) {
            self.dependents.entry(rules::owner_uid(reference).to_owned()).or_default().insert(id.clone());
        }
        self.objects.insert(id, object);
    }

    fn forget(&mut self, id: &ObjectId) {
        let Some(object) = self.objects.remove(id) else { return };
        self.uids.remove(object.uid());
        for reference in rules::owner_references(&object) {
            let uid = rules::owner_uid(reference);
            if let Some(ids) = self.dependents.get_mut(uid) {
                ids.remove(id);
                if ids.is_empty() {
                    self.dependents.remove(uid);
                }
            }
        }
    }
}
