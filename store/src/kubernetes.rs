//! Objects in the Kubernetes API.
//!
//! The API server is the judge; what it would refuse in every kind is refused before it is asked, in the words of the embedded store
//! ([`rules`]). A write is one request, a replacement without a version and a deletion take two. Lists come in pages.
//! Watches go on over the ends of their connections, which the API server makes every few minutes ([`watch`]).

mod address;
mod failure;
mod heard;
mod limits;
mod watch;

use async_trait::async_trait;
use http::Method;
use kube::Client;
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use crate::{
    Object, ObjectKey, ObjectList, ObjectStore, Preconditions, ResourceType, Selector, StoreError, WatchStream, rules,
};
use failure::Failed;
pub use heard::Heard;

/// The objects of one cluster. Cheap to clone.
#[derive(Clone)]
pub struct Kubernetes {
    client: Client,
    heard: Heard,
}

impl Kubernetes {
    /// What that client reaches. Its connections and credentials are the client's.
    pub fn new(client: Client) -> Kubernetes {
        Kubernetes { client, heard: Heard::begin() }
    }

    /// When the API server last said something.
    pub fn heard(&self) -> Heard {
        self.heard.clone()
    }

    /// Replaces an object or its status. One without a version is written over whatever is there now.
    async fn put(&self, resource: &ResourceType, mut object: Object, status: &str) -> Result<Object, StoreError> {
        rules::check(resource, &mut object)?;
        let key = object.key();
        let url = format!("{}{status}", address::of_object(resource, &key)?);
        let has_version = !object.resource_version().is_empty();
        let mut tries = 0;
        loop {
            if !has_version {
                let current = self.get(resource, &key).await?.ok_or_else(|| absent(resource, &key))?;
                if !object.uid().is_empty() && object.uid() != current.uid() {
                    return Err(StoreError::Conflict { resource: resource.kind.clone(), name: key.name });
                }
                let metadata = rules::metadata_mut(&mut object);
                metadata.insert("resourceVersion".into(), current.resource_version().into());
            }
            tries += 1;
            match self.request(Method::PUT, &url, Some(&object.0)).await {
                Ok(written) => return Ok(received(resource, written)),
                Err(failed) if !has_version && failed.is_conflict() && tries < limits::ATTEMPTS => {}
                Err(failed) => return Err(failed.about(resource, &key.name)),
            }
        }
    }

    /// One try to delete what is there now; `None` when that was replaced in between.
    async fn delete_once(
        &self,
        resource: &ResourceType,
        key: &ObjectKey,
        preconditions: &Preconditions,
    ) -> Result<Option<Option<Object>>, StoreError> {
        // The answer to a deletion is the object, or no more than that it is gone; so it is read before.
        let Some(last) = self.get(resource, key).await? else { return Ok(Some(None)) };
        let mut wanted = json!({"uid": preconditions.uid.as_deref().unwrap_or(last.uid())});
        if let Some(version) = &preconditions.resource_version {
            wanted["resourceVersion"] = version.as_str().into();
        }
        let options = json!({
            "apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background", "preconditions": wanted,
        });
        let url = address::of_object(resource, key)?;
        match self.request(Method::DELETE, &url, options.as_object()).await {
            Ok(answer) if answer.get("kind").and_then(Value::as_str) == Some("Status") => Ok(Some(Some(last))),
            Ok(object) => Ok(Some(Some(received(resource, object)))),
            Err(failed) if failed.is_absence(&key.name) => Ok(Some(None)),
            Err(failed) if failed.is_conflict() => Ok(None),
            Err(failed) => Err(failed.about(resource, &key.name)),
        }
    }

    /// One page of a list: its items, and the version and the token of the next page, if there is one.
    async fn page(&self, query: &Query<'_>, token: &str) -> Result<Page, Failed> {
        let Query { resource, namespace, selector, limit } = query;
        let mut url = format!("{}?limit={limit}", address::of_kind(resource, *namespace));
        if !selector.0.is_empty() {
            url += &format!("&labelSelector={}", address::selection(selector));
        }
        if !token.is_empty() {
            url += &format!("&continue={}", address::escape(token));
        }
        let mut answer = Value::Object(self.request(Method::GET, &url, None).await?);
        let text = |field: &str| answer["metadata"][field].as_str().unwrap_or_default().to_owned();
        let (version, token) = (text("resourceVersion"), text("continue"));
        let items = match answer["items"].take() {
            Value::Array(items) => items,
            _ => vec![],
        };
        let object = |item: Value| match item {
            Value::Object(map) => Some(received(resource, map)),
            _ => None,
        };
        Ok(Page { items: items.into_iter().filter_map(object).collect(), version, token })
    }

    /// One request whose answer is a JSON object.
    async fn request(
        &self,
        method: Method,
        url: &str,
        body: Option<&Map<String, Value>>,
    ) -> Result<Map<String, Value>, Failed> {
        let mut request = http::Request::builder().method(method).uri(url);
        if body.is_some() {
            request = request.header(http::header::CONTENT_TYPE, "application/json");
        }
        let body = body.map(serde_json::to_vec).transpose().map_err(kube::Error::SerdeError)?.unwrap_or_default();
        let request = request.body(body).map_err(kube::Error::HttpError)?;
        match timeout(limits::REQUEST, self.client.request(request)).await {
            Ok(answer) => {
                let answer = answer.map_err(Failed::from);
                if answer.as_ref().err().is_none_or(Failed::is_judgment) {
                    self.heard.now();
                }
                answer
            }
            Err(_) => Err(Failed::Silent),
        }
    }
}

/// Which objects to list.
struct Query<'a> {
    resource: &'a ResourceType,
    namespace: Option<&'a str>,
    selector: &'a Selector,
    limit: u32,
}

struct Page {
    items: Vec<Object>,
    /// The same on all pages of a list.
    version: String,
    /// Where the next page begins; empty on the last one.
    token: String,
}

fn absent(resource: &ResourceType, key: &ObjectKey) -> StoreError {
    StoreError::NotFound { resource: resource.kind.clone(), name: key.name.clone() }
}

/// An object as the store shows it: with its kind, which items of lists lack; without `managedFields`, which nobody reads here and
/// which are often most of it (the API server keeps them when they are absent from a write); with its fields in order.
fn received(resource: &ResourceType, map: Map<String, Value>) -> Object {
    let mut object = Object(map);
    object.0.insert("apiVersion".into(), resource.api_version().into());
    object.0.insert("kind".into(), resource.kind.clone().into());
    rules::metadata_mut(&mut object).shift_remove("managedFields");
    rules::sort_fields(&mut object);
    object
}

#[async_trait]
impl ObjectStore for Kubernetes {
    async fn create(&self, resource: &ResourceType, mut object: Object) -> Result<Object, StoreError> {
        rules::check_new(resource, &mut object)?;
        let key = object.key();
        let url = address::of_creation(resource, &key)?;
        match self.request(Method::POST, &url, Some(&object.0)).await {
            Ok(created) => Ok(received(resource, created)),
            Err(failed) => Err(failed.about(resource, &key.name)),
        }
    }

    async fn get(&self, resource: &ResourceType, key: &ObjectKey) -> Result<Option<Object>, StoreError> {
        match self.request(Method::GET, &address::of_object(resource, key)?, None).await {
            Ok(object) => Ok(Some(received(resource, object))),
            Err(failed) if failed.is_absence(&key.name) => Ok(None),
            Err(failed) => Err(failed.about(resource, &key.name)),
        }
    }

    async fn list(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        selector: &Selector,
    ) -> Result<ObjectList, StoreError> {
        let query = Query { resource, namespace, selector, limit: limits::PAGE };
        let mut tries = 1;
        let (mut items, mut token) = (vec![], String::new());
        loop {
            match self.page(&query, &token).await {
                Ok(page) => {
                    items.extend(page.items);
                    token = page.token;
                    if token.is_empty() {
                        // The API server's order is that of its keys, in which namespace `a-b` stands before `a`.
                        items.sort_by_cached_key(Object::key);
                        return Ok(ObjectList { items, resource_version: page.version });
                    }
                }
                // The snapshot that the pages are of was forgotten meanwhile.
                Err(failed) if failed.is_unknown_version() && tries < limits::ATTEMPTS => {
                    (items, token) = (vec![], String::new());
                    tries += 1;
                }
                Err(failed) => return Err(failed.about(resource, "")),
            }
        }
    }

    async fn replace(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.put(resource, object, "").await
    }

    async fn replace_status(&self, resource: &ResourceType, object: Object) -> Result<Object, StoreError> {
        self.put(resource, object, "/status").await
    }

    async fn delete(
        &self,
        resource: &ResourceType,
        key: &ObjectKey,
        preconditions: &Preconditions,
    ) -> Result<Option<Object>, StoreError> {
        let mut tries = 1;
        loop {
            match self.delete_once(resource, key, preconditions).await? {
                Some(deleted) => return Ok(deleted),
                // Without a wish of the caller's it was only another one than the one that was read.
                None if preconditions.is_empty() && tries < limits::ATTEMPTS => tries += 1,
                None => {
                    return Err(StoreError::Precondition { resource: resource.kind.clone(), name: key.name.clone() });
                }
            }
        }
    }

    async fn watch(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        from: Option<String>,
    ) -> Result<WatchStream, StoreError> {
        watch::begin(self.clone(), resource.clone(), namespace.map(str::to_owned), from).await
    }
}
