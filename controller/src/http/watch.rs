//! Watches: one JSON object a line, `ADDED`, `MODIFIED`, `DELETED`, and `ERROR` with code 410 when changes were missed.
//!
//! The store does not tell a new object from a changed one, so the first event of an object within one watch is `ADDED`.

use std::collections::BTreeSet;
use std::convert::Infallible;

use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use store::{Object, WatchEvent, WatchStream};
use tokio_util::sync::CancellationToken;

use super::failure::Failure;
use super::rest::Filter;

/// The answer to a watch.
pub fn respond(events: WatchStream, filter: Filter, shutdown: CancellationToken) -> Response {
    let translation = Translation { filter, seen: BTreeSet::new(), ended: false };
    let lines = stream::unfold((events, translation), |(mut events, mut translation)| async move {
        if translation.ended {
            return None;
        }
        let event = events.next().await?;
        let line = translation.line(event.map_err(Failure::from));
        Some((line, (events, translation)))
    });
    let body = lines
        .take_until(shutdown.cancelled_owned())
        .filter_map(async |line| line)
        .map(|line| Ok::<_, Infallible>(Bytes::from(line)));
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(body)).into_response()
}

struct Translation {
    filter: Filter,
    /// Objects that the client knows, by uid.
    seen: BTreeSet<String>,
    ended: bool,
}

impl Translation {
    fn line(&mut self, event: Result<WatchEvent, Failure>) -> Option<String> {
        let (r#type, object) = match event {
            Ok(WatchEvent::Applied(object)) => (self.applied(&object)?, Value::Object(object.0)),
            Ok(WatchEvent::Deleted(object)) => {
                let known = self.seen.remove(object.uid());
                if !known && !self.filter.matches(&object) {
                    return None;
                }
                ("DELETED", Value::Object(object.0))
            }
            Ok(WatchEvent::Relist) => return Some(self.end(&Failure::expired())),
            Err(failure) => return Some(self.end(&failure)),
        };
        Some(format!("{}\n", json!({ "type": r#type, "object": object })))
    }

    fn applied(&mut self, object: &Object) -> Option<&'static str> {
        if self.filter.matches(object) {
            let new = self.seen.insert(object.uid().to_owned());
            return Some(if new { "ADDED" } else { "MODIFIED" });
        }
        // It matched before: for this client it is gone.
        self.seen.remove(object.uid()).then_some("DELETED")
    }

    fn end(&mut self, failure: &Failure) -> String {
        self.ended = true;
        format!("{}\n", json!({ "type": "ERROR", "object": failure.to_status() }))
    }
}
