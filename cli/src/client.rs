//! The instance as the command line sees it: a client of its HTTP API.

use std::time::Duration;

use anyhow::Context;
use api::ErrorKind;
use bytes::BytesMut;
use controller::http::registry::Served;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use reqwest::{Method, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use store::{ResourceType, Scoped};

use crate::failure::{Failure, failed, is_of_kind};

/// How long a request that is answered at once may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a change is tried again that collided with somebody else's.
const CONFLICT_RETRIES: u32 = 10;

/// A client of one instance. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    server: String,
    http: reqwest::Client,
}

/// One line of a watch.
#[derive(Clone, Debug)]
pub enum Event {
    Applied(Value),
    Deleted(Value),
    /// Changes were missed: list again.
    Relist,
}

impl Client {
    /// A client of the instance at `server`, e.g. `http://127.0.0.1:9500`.
    pub fn new(server: &str) -> anyhow::Result<Client> {
        let server = server.trim_end_matches('/').to_owned();
        if !server.starts_with("http://") && !server.starts_with("https://") {
            return failed(
                ErrorKind::Invalid,
                format!("`{server}` is not the address of a server; write http://HOST:PORT"),
            );
        }
        // The instance is on this machine; a proxy of the environment is for image sources.
        let mut builder = reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).no_proxy();
        if let Some(config) = crate::roles::security().client_config() {
            builder = builder.tls_backend_preconfigured(config);
        } else if server.starts_with("http://") {
            // On a machine without CA certificates no client could be built otherwise.
            builder = builder.tls_certs_only([]);
        }
        let http = builder.build()?;
        Ok(Client { server, http })
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<Response> {
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) => {
                let hint = if error.is_connect() {
                    "; start it with `backing-image-csi standalone`, or name another by --server or BACKING_IMAGE_CSI_SERVER"
                } else {
                    ""
                };
                let mut cause: &dyn std::error::Error = &error;
                while let Some(inner) = cause.source() {
                    cause = inner;
                }
                let message = format!("cannot reach the instance at {}: {cause}{hint}", self.server);
                return failed(ErrorKind::Unavailable, message);
            }
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let code = response.status();
        let text = response.text().await.unwrap_or_default();
        Err(failure_of(code.as_u16(), &text).into())
    }

    async fn json(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let mut request = self.http.request(method, format!("{}{path}", self.server)).timeout(REQUEST_TIMEOUT);
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = self.send(request).await?;
        response.json().await.context("the instance gave an answer that is not JSON")
    }

    /// One object.
    pub async fn get(&self, resource: &ResourceType, namespace: Option<&str>, name: &str) -> anyhow::Result<Value> {
        self.json(Method::GET, &path(resource, namespace, Some(name)), None).await
    }

    /// One object, `None` when it does not exist.
    pub async fn find(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        name: &str,
    ) -> anyhow::Result<Option<Value>> {
        absent_as_none(self.get(resource, namespace, name).await)
    }

    /// The list object of a kind.
    pub async fn list(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        selector: Option<&str>,
    ) -> anyhow::Result<Value> {
        let query = selector.map(|s| format!("?labelSelector={}", encode(s))).unwrap_or_default();
        self.json(Method::GET, &format!("{}{query}", path(resource, namespace, None)), None).await
    }

    /// The objects of a kind.
    pub async fn items(&self, resource: &ResourceType, namespace: Option<&str>) -> anyhow::Result<Vec<Value>> {
        match self.list(resource, namespace, None).await?["items"].take() {
            Value::Array(items) => Ok(items),
            _ => Ok(vec![]),
        }
    }

    /// Stores a new object.
    pub async fn create(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        object: &Value,
    ) -> anyhow::Result<Value> {
        self.json(Method::POST, &path(resource, namespace, None), Some(object)).await
    }

    /// Replaces everything but the status.
    pub async fn replace(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        name: &str,
        object: &Value,
    ) -> anyhow::Result<Value> {
        self.json(Method::PUT, &path(resource, namespace, Some(name)), Some(object)).await
    }

    /// Changes an object as it is, again after a collision with somebody else's change. `change` may refuse what it sees.
    pub async fn modify<T>(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        name: &str,
        mut change: impl FnMut(&mut Value) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        again(&[ErrorKind::Pending], async || {
            let mut object = self.get(resource, namespace, name).await?;
            let changed = change(&mut object)?;
            Ok(self.replace(resource, namespace, name, &object).await.map(|_| changed))
        })
        .await
    }

    /// Deletes an object; `None` when there was none.
    pub async fn delete(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        name: &str,
    ) -> anyhow::Result<Option<Value>> {
        absent_as_none(self.json(Method::DELETE, &path(resource, namespace, Some(name)), None).await)
    }

    /// Every object as it is, then each change; of one object when `name` is given.
    pub async fn watch(
        &self,
        resource: &ResourceType,
        namespace: Option<&str>,
        name: Option<&str>,
    ) -> anyhow::Result<BoxStream<'static, anyhow::Result<Event>>> {
        let only = name.map(|n| format!("&fieldSelector=metadata.name%3D{}", encode(n))).unwrap_or_default();
        let url = format!("{}{}?watch=true{only}", self.server, path(resource, namespace, None));
        let response = self.send(self.http.get(url)).await?;
        Ok(lines(response)
            .map_ok(|mut line| match line["type"].as_str() {
                Some("DELETED") => Event::Deleted(line["object"].take()),
                Some("ADDED" | "MODIFIED") => Event::Applied(line["object"].take()),
                _ => Event::Relist,
            })
            .boxed())
    }

    /// Looks at one object, as it is and after each change, until `look` has an answer; fails when there is none, and with `gone` when it is
    /// deleted meanwhile.
    pub async fn follow<T, A>(
        &self,
        namespace: &str,
        name: &str,
        gone: &str,
        mut look: impl AsyncFnMut(T) -> anyhow::Result<Option<A>>,
    ) -> anyhow::Result<A>
    where
        T: kube::Resource<DynamicType = ()> + DeserializeOwned,
        T::Scope: Scoped,
    {
        let resource = ResourceType::of::<T>();
        loop {
            let mut events = self.watch(&resource, Some(namespace), Some(name)).await?;
            // Of one that does not exist there would never be an event.
            self.get(&resource, Some(namespace), name).await?;
            while let Some(event) = events.next().await {
                let object = match event? {
                    Event::Applied(object) => serde_json::from_value(object)?,
                    Event::Deleted(_) => return failed(ErrorKind::NotFound, gone.to_owned()),
                    Event::Relist => break,
                };
                if let Some(answer) = look(object).await? {
                    return Ok(answer);
                }
            }
        }
    }

    /// Calls an operation of the standalone mode; it answers with JSON lines.
    pub async fn operate(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<BoxStream<'static, anyhow::Result<Value>>> {
        let response = self.send(self.http.post(format!("{}{path}", self.server)).json(body)).await?;
        Ok(lines(response))
    }
}

/// Reads and writes, both again while the writing, whose outcome is the inner result, fails by a collision: by one of these kinds.
pub async fn again<T>(
    collisions: &[ErrorKind],
    mut attempt: impl AsyncFnMut() -> anyhow::Result<anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let mut tries = 0;
    loop {
        tries += 1;
        match attempt().await? {
            Err(error) if tries <= CONFLICT_RETRIES && collisions.iter().any(|kind| is_of_kind(&error, *kind)) => {}
            written => return written,
        }
    }
}

fn absent_as_none<T>(result: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_of_kind(&error, ErrorKind::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The REST path of a kind or of one object.
fn path(resource: &ResourceType, namespace: Option<&str>, name: Option<&str>) -> String {
    let mut path = if resource.group.is_empty() {
        format!("/api/{}", resource.version)
    } else {
        format!("/apis/{}/{}", resource.group, resource.version)
    };
    if let Some(namespace) = namespace.filter(|_| resource.namespaced) {
        path += &format!("/namespaces/{}", encode(namespace));
    }
    path += &format!("/{}", resource.plural);
    if let Some(name) = name {
        path += &format!("/{}", encode(name));
    }
    path
}

/// Percent encoding of everything that may mean something in a URL.
fn encode(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(b).to_string(),
            _ => format!("%{b:02X}"),
        })
        .collect()
}

/// The failure that a `Status` object tells of.
fn failure_of(code: u16, text: &str) -> Failure {
    let status: Value = serde_json::from_str(text).unwrap_or_default();
    let kind = status["details"]["causes"][0]["reason"].as_str().and_then(ErrorKind::from_name).unwrap_or(match code {
        400 | 422 => ErrorKind::Invalid,
        404 => ErrorKind::NotFound,
        405 | 501 => ErrorKind::Unsupported,
        409 => ErrorKind::Pending,
        _ => ErrorKind::Unavailable,
    });
    let message = match status["message"].as_str() {
        Some(message) => message.to_owned(),
        None => format!("the instance answered with HTTP status {code}"),
    };
    Failure::new(kind, message)
}

/// The JSON lines of an answer.
fn lines(response: Response) -> BoxStream<'static, anyhow::Result<Value>> {
    let body = response.bytes_stream().boxed();
    stream::try_unfold((body, BytesMut::new()), |(mut body, mut buffer)| async move {
        loop {
            if let Some(end) = buffer.iter().position(|b| *b == b'\n') {
                let line = buffer.split_to(end + 1);
                let value = serde_json::from_slice(&line).context("the instance gave a line that is not JSON")?;
                return Ok(Some((value, (body, buffer))));
            }
            match body.next().await {
                Some(Ok(bytes)) => buffer.extend_from_slice(&bytes),
                Some(Err(error)) => {
                    let lost = Failure::new(
                        ErrorKind::Unavailable,
                        "the connection to the instance broke; run the command again",
                    );
                    return Err(anyhow::Error::new(error).context(lost));
                }
                None => return Ok(None),
            }
        }
    })
    .boxed()
}

/// The namespace that a request about a kind goes to: the given one, else ours for kinds of ours, `default` for others.
pub fn namespace_of(served: &Served, given: Option<&str>) -> Option<String> {
    if !served.resource.namespaced {
        return None;
    }
    Some(match given {
        Some(namespace) => namespace.to_owned(),
        None if served.resource.group == api::names::GROUP => api::names::DEFAULT_NAMESPACE.to_owned(),
        None => "default".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_exact_kind_of_a_status() {
        let text = r#"{"kind":"Status","message":"no room","code":507,"details":{"causes":[{"reason":"Exhausted"}]}}"#;
        let failure = failure_of(507, text);
        assert_eq!((failure.kind, failure.message.as_str()), (ErrorKind::Exhausted, "no room"));
        assert_eq!(failure_of(404, "nothing").kind, ErrorKind::NotFound);
    }

    #[test]
    fn paths_are_those_of_kubernetes() {
        let pvc = &controller::http::registry::by_word("pvc").unwrap().resource;
        assert_eq!(path(pvc, Some("default"), Some("a/b")), "/api/v1/namespaces/default/persistentvolumeclaims/a%2Fb");
        let image = &controller::http::registry::by_word("lhbi").unwrap().resource;
        assert_eq!(path(image, None, None), "/apis/longhorn.io/v1beta2/backingimages");
    }
}
