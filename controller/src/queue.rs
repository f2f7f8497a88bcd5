//! The work queue of the controller: one key for each object.

use std::ops::Deref;

use runtime::backoff::Backoff;

use crate::limits::{FIRST_RETRY, RESYNC};

/// Which reconciler is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Image,
    Manager,
    DataSource,
    Volume,
    Node,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Image, Kind::Manager, Kind::DataSource, Kind::Volume];

    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Image => "image",
            Kind::Manager => "manager",
            Kind::DataSource => "data_source",
            Kind::Volume => "volume",
            Kind::Node => "node",
        }
    }
}

/// One object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub kind: Kind,
    pub name: String,
}

/// Objects to reconcile.
pub struct Queue(runtime::queue::Queue<Key>);

impl Default for Queue {
    fn default() -> Self {
        Queue(runtime::queue::Queue::new(Backoff { initial: FIRST_RETRY, max: RESYNC }))
    }
}

impl Queue {
    /// Asks for a pass over an object as soon as possible; an empty name is nobody.
    pub fn add(&self, kind: Kind, name: impl Into<String>) {
        let key = Key { kind, name: name.into() };
        if !key.name.is_empty() {
            self.0.add(key);
        }
    }
}

impl Deref for Queue {
    type Target = runtime::queue::Queue<Key>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}
