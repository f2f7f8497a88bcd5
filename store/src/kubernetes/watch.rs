//! Changes of objects, over the ends of connections.
//!
//! A watch remembers the last version that it saw, kept fresh by bookmarks, and asks for what came after it. When the API server
//! does not know that version any more (or not yet: its state was put back to an older one), it takes the present version first, then
//! says [`WatchEvent::Relist`] and goes on from that version: whoever lists after `Relist` misses nothing.
//! A connection on which nothing comes, not even a bookmark, is replaced: it may have died without a word.
//!
//! Nothing is read ahead of the reader but one page or one event; a reader that is slow slows the API server down, which ends the watch.

use std::collections::VecDeque;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use kube::api::WatchEvent as Change;
use serde_json::{Map, Value};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::failure::{Failed, is_unknown_version};
use super::{Kubernetes, Query, address, limits, received};
use crate::{Object, ResourceType, Selector, StoreError, WatchEvent, WatchStream, rules};

type Changes = BoxStream<'static, Result<Change<Map<String, Value>>, kube::Error>>;

struct Watch {
    api: Kubernetes,
    resource: ResourceType,
    namespace: Option<String>,
    /// The last version that was seen; empty when what came since is lost.
    version: String,
    source: Source,
    /// What is still to be said.
    waiting: VecDeque<WatchEvent>,
    /// Attempts in a row that brought nothing.
    failures: u32,
}

/// Where the next events come from.
enum Source {
    /// What was there at the beginning, from this page on.
    Existing {
        token: String,
    },
    Connection(Changes),
    Nothing,
}

/// Begins a watch; what is there already comes first when no version is given.
///
/// # Errors
/// When the API server refuses the first requests or does not answer them. Later failures are repeated until they pass.
pub async fn begin(
    api: Kubernetes,
    resource: ResourceType,
    namespace: Option<String>,
    from: Option<String>,
) -> Result<WatchStream, StoreError> {
    if let Some(version) = &from {
        rules::parse_version(&resource, version)?;
    }
    let (source, waiting) = (Source::Nothing, VecDeque::new());
    let mut watch =
        Watch { api, resource, namespace, version: from.clone().unwrap_or_default(), source, waiting, failures: 0 };
    let begun = match from {
        None => watch.begin_with_existing().await,
        Some(_) => watch.connect().await,
    };
    begun.map_err(|failed| failed.about(&watch.resource, ""))?;
    Ok(stream::unfold(watch, |mut watch| async move { Some((Ok(watch.next().await), watch)) }).boxed())
}

impl Watch {
    /// The next change, however long it takes.
    async fn next(&mut self) -> WatchEvent {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return event;
            }
            match std::mem::replace(&mut self.source, Source::Nothing) {
                Source::Connection(connection) => self.listen(connection).await,
                Source::Existing { token } => self.go_on(&token).await,
                Source::Nothing => self.go_on("").await,
            }
        }
    }

    /// Takes one event from the connection, and keeps it when it is still good.
    async fn listen(&mut self, mut connection: Changes) {
        let change = match timeout(limits::SILENCE, connection.next()).await {
            Ok(Some(Ok(change))) => change,
            // The API server ended it as it was asked to.
            Ok(None) => return,
            Ok(Some(Err(error))) => return debug!(kind = %self.resource.kind, %error, "watch was cut off"),
            Err(_) => return warn!(kind = %self.resource.kind, "watch was silent; it is begun again"),
        };
        match change {
            Change::Added(object) | Change::Modified(object) => self.say(object, WatchEvent::Applied),
            Change::Deleted(object) => self.say(object, WatchEvent::Deleted),
            Change::Bookmark(mark) => self.version = mark.metadata.resource_version,
            Change::Error(status) if is_unknown_version(&status) => return self.version.clear(),
            Change::Error(status) => {
                return warn!(kind = %self.resource.kind, message = %status.message, "watch failed; it is begun again");
            }
        }
        self.failures = 0;
        self.api.heard.now();
        self.source = Source::Connection(connection);
    }

    fn say(&mut self, object: Map<String, Value>, event: impl Fn(Object) -> WatchEvent) {
        let object = received(&self.resource, object);
        self.version = object.resource_version().to_owned();
        self.waiting.push_back(event(object));
    }

    /// Goes on with a page of what was there, or with a new connection; waits when the last attempts brought nothing.
    async fn go_on(&mut self, token: &str) {
        sleep(limits::RECONNECT.delay(self.failures)).await;
        // Only an event proves that an attempt was good: a connection may be accepted and closed again.
        self.failures = self.failures.saturating_add(1);
        let done = if token.is_empty() { self.connect().await } else { self.list(token).await };
        let Err(failed) = done else { return };
        if failed.is_unknown_version() {
            self.version.clear();
        } else if !token.is_empty() {
            self.source = Source::Existing { token: token.to_owned() };
        }
        let error = &failed as &dyn std::error::Error;
        warn!(kind = %self.resource.kind, error, "cannot watch; it is tried again");
    }

    /// Takes the first page, and connects when it is the last one too, so that a refusal is known at once.
    async fn begin_with_existing(&mut self) -> Result<(), Failed> {
        self.list("").await?;
        if matches!(self.source, Source::Nothing) { self.connect().await } else { Ok(()) }
    }

    /// Takes a page of what is there.
    async fn list(&mut self, token: &str) -> Result<(), Failed> {
        let page = self.page(token, limits::PAGE).await?;
        self.waiting.extend(page.items.into_iter().map(WatchEvent::Applied));
        self.version = page.version;
        self.source = if page.token.is_empty() { Source::Nothing } else { Source::Existing { token: page.token } };
        self.failures = 0;
        Ok(())
    }

    /// Asks for the changes after the last version. When they are lost, says so and asks for those from now on.
    async fn connect(&mut self) -> Result<(), Failed> {
        // The API server would wait in silence for a version that is not there yet.
        let now = self.page("", 1).await?.version;
        if self.version.is_empty() || is_later(&self.version, &now) {
            self.version = now;
            self.waiting.push_back(WatchEvent::Relist);
        }
        let (path, version) =
            (address::of_kind(&self.resource, self.namespace.as_deref()), address::escape(&self.version));
        let seconds = limits::WATCH_SECONDS;
        let query = format!("watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={version}");
        let request = http::Request::get(format!("{path}?{query}")).body(vec![]).map_err(kube::Error::HttpError)?;
        let changes = timeout(limits::REQUEST, self.api.client.request_events(request)).await;
        match changes.map_err(|_| Failed::Silent)? {
            Ok(changes) => self.source = Source::Connection(changes.boxed()),
            Err(error) => {
                let failed = Failed::from(error);
                if !failed.is_unknown_version() {
                    return Err(failed);
                }
                // The next attempt says it.
                self.version.clear();
            }
        }
        Ok(())
    }

    async fn page(&mut self, token: &str, limit: u32) -> Result<super::Page, Failed> {
        let (resource, namespace) = (&self.resource, self.namespace.as_deref());
        self.api.page(&Query { resource, namespace, selector: &Selector::default(), limit }, token).await
    }
}

/// Whether a version is after another one. Versions are numbers that grow, in every API server there is.
fn is_later(version: &str, other: &str) -> bool {
    matches!((version.parse::<u64>(), other.parse::<u64>()), (Ok(version), Ok(other)) if version > other)
}
