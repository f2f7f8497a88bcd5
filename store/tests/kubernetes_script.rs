//! What the Kubernetes store does when an API server answers in ways that a real one cannot be brought to at will.
//!
//! The API server is a list of requests and their answers; a request that is not the next one fails the test. The clock is paused.

mod suite;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use backing_image_store::kubernetes::Kubernetes;
use backing_image_store::{ObjectStore, Preconditions, Selector, StoreError};
use futures::{StreamExt, stream};
use http::{Request, Response};
use serde_json::{Value, json};
use suite::{brief, brief_events, next, widget, widgets};
use tokio::time::Instant;

/// What comes back for one request.
enum Answer {
    Json(u16, Value),
    /// Events, after which the connection ends.
    Events(Vec<Value>),
    /// Events, after which nothing comes any more.
    EventsThenSilence(Vec<Value>),
    /// Nothing ever.
    Silence,
    CutOff,
}
use Answer::*;

/// The requests that are to come, each as the parts that its line must contain.
#[derive(Clone)]
struct Script(Arc<Mutex<VecDeque<(&'static str, Answer)>>>);

impl Script {
    fn play(steps: Vec<(&'static str, Answer)>) -> (Kubernetes, Script) {
        let script = Script(Arc::new(Mutex::new(steps.into())));
        let answering = script.clone();
        let service = tower::service_fn(move |request: Request<kube::client::Body>| {
            let answer = answering.next(&format!("{} {}", request.method(), request.uri()));
            async move { answer.into_response().await }
        });
        (Kubernetes::new(kube::Client::new(service, "shop")), script)
    }

    fn next(&self, request: &str) -> Answer {
        let step = self.0.lock().unwrap().pop_front();
        let Some((parts, answer)) = step else { panic!("nothing more was expected: {request}") };
        assert!(parts.split(' ').all(|part| request.contains(part)), "{request} is not {parts}");
        answer
    }

    fn is_played(&self) -> bool {
        self.0.lock().unwrap().is_empty()
    }
}

impl Answer {
    async fn into_response(self) -> Result<Response<Body>, std::io::Error> {
        let (code, body) = match self {
            Json(code, value) => (code, Body::from(value.to_string())),
            Events(events) => (200, Body::from_stream(stream::iter(lines(events)))),
            EventsThenSilence(events) => (200, Body::from_stream(stream::iter(lines(events)).chain(stream::pending()))),
            Silence => std::future::pending().await,
            CutOff => return Err(std::io::Error::other("connection refused")),
        };
        Ok(Response::builder().status(code).body(body).unwrap())
    }
}

fn lines(events: Vec<Value>) -> Vec<Result<Bytes, Infallible>> {
    events.into_iter().map(|event| Ok(format!("{event}\n").into())).collect()
}

fn at_version(name: &str, size: i64, version: u64) -> Value {
    let mut object = widget(name, size).0;
    object["metadata"]["resourceVersion"] = version.to_string().into();
    object.into()
}

fn list(version: u64, items: Vec<Value>) -> Answer {
    Json(200, json!({"metadata": {"resourceVersion": version.to_string()}, "items": items}))
}

fn page(version: u64, next: &str, items: Vec<Value>) -> Answer {
    let metadata = json!({"resourceVersion": version.to_string(), "continue": next});
    Json(200, json!({"metadata": metadata, "items": items}))
}

fn event(kind: &str, object: Value) -> Value {
    json!({"type": kind, "object": object})
}

fn bookmark(version: u64) -> Value {
    event(
        "BOOKMARK",
        json!({"kind": "Widget", "apiVersion": "example.org/v1", "metadata": {"resourceVersion": version.to_string()}}),
    )
}

fn failure(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason})
}

#[tokio::test(start_paused = true)]
async fn a_watch_goes_on_from_the_last_bookmark() {
    let (store, script) = Script::play(vec![
        ("GET limit=500", list(5, vec![at_version("a", 1, 3)])),
        ("GET limit=1", list(5, vec![])),
        ("GET watch=true resourceVersion=5 allowWatchBookmarks=true", Events(vec![bookmark(40)])),
        ("GET limit=1", list(45, vec![])),
        ("GET watch=true resourceVersion=40", EventsThenSilence(vec![event("ADDED", at_version("b", 2, 41))])),
    ]);
    let mut watch = store.watch(&widgets(), None, None).await.unwrap();
    let began = Instant::now();
    assert_eq!(brief_events(&mut watch, 2).await, ["+a 1", "+b 2"]);
    assert_eq!(began.elapsed(), Duration::ZERO, "the end of a good connection is not waited for");
    assert!(script.is_played());
}

/// Whoever lists after `relist` must not miss what comes between: the version to go on from is taken before.
#[tokio::test(start_paused = true)]
async fn a_forgotten_version_is_told_of_once_the_new_one_is_known() {
    for gone in [Events(vec![event("ERROR", failure(410, "Expired"))]), Json(410, failure(410, "Expired"))] {
        let (store, script) = Script::play(vec![
            ("GET limit=1", list(90, vec![])),
            ("GET watch=true resourceVersion=5", gone),
            ("GET limit=1", list(91, vec![])),
            ("GET watch=true resourceVersion=91", EventsThenSilence(vec![event("MODIFIED", at_version("a", 2, 92))])),
        ]);
        let mut watch = store.watch(&widgets(), None, Some("5".into())).await.unwrap();
        assert_eq!(brief(&next(&mut watch).await), "relist");
        assert!(script.is_played(), "version 91 was taken before");
        assert_eq!(brief(&next(&mut watch).await), "+a 2");
    }
}

/// After a restore from a backup the versions that were seen are not there any more, and the API server would wait for them.
#[tokio::test(start_paused = true)]
async fn a_cluster_that_went_back_in_time_is_noticed() {
    let (store, script) = Script::play(vec![
        ("GET limit=1", list(50, vec![])),
        ("GET watch=true resourceVersion=50", Events(vec![event("DELETED", at_version("a", 1, 60))])),
        ("GET limit=1", list(20, vec![])),
        ("GET watch=true resourceVersion=20", EventsThenSilence(vec![event("ADDED", at_version("a", 1, 21))])),
    ]);
    let mut watch = store.watch(&widgets(), None, Some("50".into())).await.unwrap();
    assert_eq!(brief_events(&mut watch, 3).await, ["-a", "relist", "+a 1"]);
    assert!(script.is_played());
}

#[tokio::test(start_paused = true)]
async fn a_silent_connection_is_replaced() {
    let (store, script) = Script::play(vec![
        ("GET limit=1", list(5, vec![])),
        ("GET watch=true resourceVersion=5", EventsThenSilence(vec![bookmark(7)])),
        ("GET limit=1", list(9, vec![])),
        ("GET watch=true resourceVersion=7", EventsThenSilence(vec![event("ADDED", at_version("a", 1, 8))])),
    ]);
    let mut watch = store.watch(&widgets(), None, Some("5".into())).await.unwrap();
    let began = Instant::now();
    let event = tokio::time::timeout(Duration::from_secs(300), watch.next()).await.expect("it does not wait for ever");
    assert_eq!(brief(&event.unwrap().unwrap()), "+a 1");
    assert!(
        (60..=200).contains(&began.elapsed().as_secs()),
        "longer than between two bookmarks: {:?}",
        began.elapsed()
    );
    assert!(script.is_played());
}

/// An API server that accepts and closes, refuses, or is away is not asked without a pause, and not given up.
#[tokio::test(start_paused = true)]
async fn attempts_that_bring_nothing_are_spaced() {
    let mut steps = vec![("GET limit=1", list(5, vec![])), ("GET watch=true", Events(vec![]))];
    for n in 0..30 {
        match n % 5 {
            0 => steps.push(("GET limit=1", CutOff)),
            1 => steps.push(("GET limit=1", Json(503, failure(503, "ServiceUnavailable")))),
            2 => steps.push(("GET limit=1", Json(403, failure(403, "Forbidden")))),
            3 => steps.extend([("GET limit=1", list(5, vec![])), ("GET watch=true", Events(vec![]))]),
            _ => steps.extend([
                ("GET limit=1", list(5, vec![])),
                ("GET watch=true", Events(vec![event("ERROR", failure(500, "InternalError"))])),
            ]),
        }
    }
    steps.push(("GET limit=1", list(6, vec![])));
    steps.push(("GET watch=true resourceVersion=5", EventsThenSilence(vec![event("ADDED", at_version("a", 1, 6))])));
    let (store, script) = Script::play(steps);
    let mut watch = store.watch(&widgets(), None, Some("5".into())).await.unwrap();
    let began = Instant::now();
    let event = tokio::time::timeout(Duration::from_secs(3600), watch.next()).await.expect("it is never given up");
    assert_eq!(brief(&event.unwrap().unwrap()), "+a 1");
    let each = began.elapsed().as_secs() / 30;
    assert!((5..=10).contains(&each), "{:?} for 30 attempts", began.elapsed());
    assert!(script.is_played());
}

/// The pages of what was there at the beginning may outlive the API server's memory of that moment.
#[tokio::test(start_paused = true)]
async fn a_reader_that_is_too_slow_for_the_first_pages_lists_again() {
    let (store, script) = Script::play(vec![
        ("GET limit=500", page(5, "more", vec![at_version("a", 1, 3)])),
        ("GET limit=500 continue=more", CutOff),
        ("GET limit=500 continue=more", page(5, "yet", vec![at_version("b", 2, 4)])),
        ("GET limit=500 continue=yet", Json(410, failure(410, "Expired"))),
        ("GET limit=1", list(70, vec![])),
        ("GET watch=true resourceVersion=70", EventsThenSilence(vec![event("ADDED", at_version("c", 3, 71))])),
    ]);
    let mut watch = store.watch(&widgets(), None, None).await.unwrap();
    assert_eq!(brief_events(&mut watch, 4).await, ["+a 1", "+b 2", "relist", "+c 3"]);
    assert!(script.is_played());
}

#[tokio::test(start_paused = true)]
async fn a_list_whose_moment_is_forgotten_begins_anew() {
    let (store, script) = Script::play(vec![
        ("GET limit=500 labelSelector=x%3Dy", page(5, "more", vec![at_version("a", 1, 3)])),
        ("GET limit=500 labelSelector=x%3Dy continue=more", Json(410, failure(410, "Expired"))),
        ("GET limit=500", page(8, "more", vec![at_version("b", 2, 4)])),
        ("GET limit=500 continue=more", page(8, "", vec![at_version("a", 3, 6)])),
    ]);
    let list = store.list(&widgets(), None, &Selector::label("x", "y")).await.unwrap();
    let names: Vec<&str> = list.items.iter().map(|o| o.name()).collect();
    assert_eq!((names, list.resource_version.as_str()), (vec!["a", "b"], "8"));
    assert!(script.is_played());
}

#[tokio::test(start_paused = true)]
async fn a_request_without_an_answer_ends() {
    let (store, _) = Script::play(vec![("GET", Silence)]);
    let began = Instant::now();
    let error = store.get(&widgets(), &suite::key("a")).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error}");
    assert!(began.elapsed() <= Duration::from_secs(30));
    let sentence = api::error::sentence(&error);
    assert!(sentence.contains("did not answer within 30 s"), "{sentence}");
}

/// Between reading and deleting, the object was replaced by another one of its name.
#[tokio::test(start_paused = true)]
async fn a_deletion_takes_what_is_there() {
    let with_uid = |uid: &str| {
        let mut object = at_version("a", 1, 3);
        object["metadata"]["uid"] = uid.into();
        object
    };
    let gone = json!({"kind": "Status", "apiVersion": "v1", "status": "Success"});
    let steps = || {
        vec![
            ("GET /widgets/a", Json(200, with_uid("first"))),
            ("DELETE /widgets/a", Json(409, failure(409, "Conflict"))),
            ("GET /widgets/a", Json(200, with_uid("second"))),
            ("DELETE /widgets/a", Json(200, gone.clone())),
        ]
    };
    let (store, script) = Script::play(steps());
    let deleted = store.delete(&widgets(), &suite::key("a"), &Preconditions::default()).await.unwrap().unwrap();
    assert_eq!(deleted.uid(), "second");
    assert!(script.is_played());
    // Unless the caller meant the first one.
    let (store, _) = Script::play(steps());
    let first = Preconditions { uid: Some("first".into()), resource_version: None };
    let error = store.delete(&widgets(), &suite::key("a"), &first).await.unwrap_err();
    assert!(matches!(error, StoreError::Precondition { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_replacement_without_a_version_follows_the_others() {
    let (store, script) = Script::play(vec![
        ("GET", Json(200, at_version("a", 1, 3))),
        ("PUT", Json(409, failure(409, "Conflict"))),
        ("GET", Json(200, at_version("a", 2, 4))),
        ("PUT", Json(200, at_version("a", 5, 5))),
        // With a version the caller observes again.
        ("PUT", Json(409, failure(409, "Conflict"))),
    ]);
    let written = store.replace(&widgets(), widget("a", 5)).await.unwrap();
    assert_eq!(written.resource_version(), "5");
    assert!(store.replace(&widgets(), written).await.unwrap_err().is_conflict());
    assert!(script.is_played());
}

/// Without a version whatever is there is written over, but not another object of that name.
#[tokio::test(start_paused = true)]
async fn a_replacement_of_another_object_is_a_conflict_at_once() {
    let mut there = at_version("a", 1, 3);
    there["metadata"]["uid"] = "second".into();
    let (store, script) = Script::play(vec![("GET", Json(200, there))]);
    let meant = suite::set(&widget("a", 2), "/metadata/uid", "first");
    assert!(store.replace(&widgets(), meant).await.unwrap_err().is_conflict());
    assert!(script.is_played());
}

#[tokio::test(start_paused = true)]
async fn the_api_server_was_heard_when_it_answered_or_a_watch_brought_something() {
    let second = Duration::from_secs(1);
    let not_mine = event("ERROR", failure(500, "InternalError"));
    let (store, script) = Script::play(vec![
        ("GET /a", Json(404, failure(404, "NotFound"))),
        ("GET /a", Json(503, failure(503, "ServiceUnavailable"))),
        ("GET /a", Json(401, failure(401, "Unauthorized"))),
        ("GET /a", Json(429, failure(429, "TooManyRequests"))),
        ("GET /a", CutOff),
        ("GET /a", Silence),
        ("GET /a", Json(200, at_version("a", 1, 3))),
        ("GET limit=1", list(5, vec![])),
        ("GET watch=true resourceVersion=5", EventsThenSilence(vec![bookmark(6), not_mine])),
        ("GET limit=1", Silence),
    ]);
    let heard = store.heard();
    let get = async || {
        tokio::time::sleep(second).await; // poll
        store.get(&widgets(), &suite::key("a")).await
    };
    assert!(get().await.is_err(), "a kind that it does not know");
    assert_eq!(heard.elapsed(), Duration::ZERO, "it judged");
    for what in ["without its own store", "without knowing us", "without time for us", "cut off", "silent"] {
        assert!(get().await.is_err(), "{what}");
        assert!(heard.elapsed() >= second, "{what}");
    }
    get().await.unwrap();
    assert_eq!(heard.elapsed(), Duration::ZERO);
    let mut watch = store.watch(&widgets(), None, Some("5".into())).await.unwrap();
    tokio::time::sleep(second).await; // poll
    // The bookmark is read, then an error, which is no sign of health; then it tries again in vain.
    let nothing = tokio::time::timeout(10 * second, next(&mut watch)).await;
    assert!(nothing.is_err() && script.is_played());
    assert_eq!(heard.elapsed(), 10 * second);
}
