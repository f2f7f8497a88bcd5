//! Dynamic objects: JSON with Kubernetes metadata.

use std::collections::BTreeMap;

use kube::Resource;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::StoreError;

/// A whole object: `apiVersion`, `kind`, `metadata`, and the rest.
#[derive(Clone, Debug, PartialEq)]
pub struct Object(pub Map<String, Value>);

impl Object {
    fn metadata(&self) -> Option<&Map<String, Value>> {
        self.0.get("metadata")?.as_object()
    }

    fn text(&self, field: &str) -> &str {
        self.metadata().and_then(|m| m.get(field)).and_then(Value::as_str).unwrap_or_default()
    }

    /// `metadata.name`, or the empty string.
    pub fn name(&self) -> &str {
        self.text("name")
    }

    /// `metadata.namespace`, or `None` when cluster scoped.
    pub fn namespace(&self) -> Option<&str> {
        Some(self.text("namespace")).filter(|n| !n.is_empty())
    }

    /// Its key.
    pub fn key(&self) -> ObjectKey {
        ObjectKey { namespace: self.namespace().map(str::to_owned), name: self.name().to_owned() }
    }

    /// `metadata.resourceVersion`, or the empty string.
    pub fn resource_version(&self) -> &str {
        self.text("resourceVersion")
    }

    /// `metadata.uid`, or the empty string.
    pub fn uid(&self) -> &str {
        self.text("uid")
    }

    /// The object as a value of its type.
    pub fn decode<T: DeserializeOwned>(self) -> Result<T, StoreError> {
        let resource = self.0.get("kind").and_then(Value::as_str).unwrap_or("object").to_owned();
        let name = self.name().to_owned();
        serde_json::from_value(Value::Object(self.0)).map_err(|source| StoreError::Corrupt { resource, name, source })
    }

    /// The labels.
    pub fn labels(&self) -> BTreeMap<&str, &str> {
        let labels = self.metadata().and_then(|m| m.get("labels")).and_then(Value::as_object);
        labels.into_iter().flatten().filter_map(|(k, v)| Some((k.as_str(), v.as_str()?))).collect()
    }
}

/// Which kind of object: what a REST path needs to know.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceType {
    /// Empty for the core group.
    pub group: String,
    pub version: String,
    pub kind: String,
    pub plural: String,
    pub namespaced: bool,
}

impl ResourceType {
    /// The type of a typed resource.
    pub fn of<T>() -> ResourceType
    where
        T: Resource<DynamicType = ()>,
        T::Scope: Scoped,
    {
        ResourceType {
            group: T::group(&()).into_owned(),
            version: T::version(&()).into_owned(),
            kind: T::kind(&()).into_owned(),
            plural: T::plural(&()).into_owned(),
            namespaced: T::Scope::NAMESPACED,
        }
    }

    /// `group/version`, or `version` for the core group.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }
}

/// Whether a scope of `kube` has namespaces.
pub trait Scoped {
    const NAMESPACED: bool;
}
impl Scoped for kube::core::NamespaceResourceScope {
    const NAMESPACED: bool = true;
}
impl Scoped for kube::core::ClusterResourceScope {
    const NAMESPACED: bool = false;
}

/// Where an object is within its kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// `None` for cluster-scoped kinds.
    pub namespace: Option<String>,
    pub name: String,
}

/// Labels that an object must all have; the empty selector matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(pub BTreeMap<String, String>);

impl Selector {
    /// Matches objects with this label.
    pub fn label(key: &str, value: &str) -> Selector {
        Selector(BTreeMap::from([(key.to_owned(), value.to_owned())]))
    }

    /// Whether an object has all labels.
    pub fn matches(&self, object: &Object) -> bool {
        let labels = object.labels();
        self.0.iter().all(|(k, v)| labels.get(k.as_str()) == Some(&v.as_str()))
    }
}

/// A list, consistent at its version.
#[derive(Clone, Debug)]
pub struct ObjectList {
    pub items: Vec<Object>,
    pub resource_version: String,
}

/// One change.
#[derive(Clone, Debug)]
pub enum WatchEvent {
    /// Created or changed.
    Applied(Object),
    /// Removed; the object as it was last.
    Deleted(Object),
    /// Events may be missing from before this point: list again.
    Relist,
}
