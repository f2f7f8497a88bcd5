//! Objects of one kind by name, and by what else they are looked for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Kept;

/// What objects are found by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Facet {
    Disk(String),
    Image(String),
    Volume(String),
}

/// An object before and after a change; `None`: it was not there, or is gone.
#[derive(Debug)]
pub struct Step<T> {
    pub before: Option<Arc<T>>,
    pub after: Option<Arc<T>>,
}

impl<T> Step<T> {
    /// Both sides, as decisions want them.
    pub fn sides(&self) -> (Option<&T>, Option<&T>) {
        (self.before.as_deref(), self.after.as_deref())
    }

    /// The sides that there are.
    pub fn either(&self) -> impl Iterator<Item = &T> {
        self.before.as_deref().into_iter().chain(self.after.as_deref())
    }
}

pub struct Table<T> {
    objects: BTreeMap<String, Arc<T>>,
    index: BTreeMap<Facet, BTreeSet<String>>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table { objects: BTreeMap::new(), index: BTreeMap::new() }
    }
}

impl<T: Kept> Table<T> {
    pub fn get(&self, name: &str) -> Option<&Arc<T>> {
        self.objects.get(name)
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<T>> {
        self.objects.values()
    }

    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.objects.keys()
    }

    pub fn of(&self, facet: &Facet) -> impl Iterator<Item = &Arc<T>> {
        self.index.get(facet).into_iter().flatten().filter_map(|name| self.objects.get(name))
    }

    /// By what objects are found at present.
    pub fn facets(&self) -> impl Iterator<Item = &Facet> {
        self.index.keys()
    }

    /// Puts an object in or takes it out; nothing when it is the version that is there already.
    pub fn set(&mut self, name: &str, after: Option<Arc<T>>) -> Option<Step<T>> {
        let before = self.objects.get(name).cloned();
        let version = |object: &Arc<T>| object.meta().resource_version.clone();
        let is_same = match (&before, &after) {
            (Some(before), Some(after)) => version(before).is_some() && version(before) == version(after),
            (None, None) => true,
            _ => false,
        };
        if is_same {
            return None;
        }
        for facet in before.iter().flat_map(|object| object.facets()) {
            if let Some(names) = self.index.get_mut(&facet) {
                names.remove(name);
                if names.is_empty() {
                    self.index.remove(&facet);
                }
            }
        }
        for facet in after.iter().flat_map(|object| object.facets()) {
            self.index.entry(facet).or_default().insert(name.to_owned());
        }
        match &after {
            Some(object) => drop(self.objects.insert(name.to_owned(), object.clone())),
            None => drop(self.objects.remove(name)),
        }
        Some(Step { before, after })
    }
}
