//! The HTTP face of a data source (LF 5.2), with its probes and metrics: it is ready when it answers.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use api::image::CopyState;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::stream::{self, Stream, StreamExt};
use runtime::transport::Listener;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::FileStatus;
use crate::bandwidth::Limit;
use crate::limits::PROGRESS_INTERVAL;

#[derive(Clone)]
struct Face {
    status: Arc<watch::Sender<FileStatus>>,
    limit: Arc<Limit>,
    shutdown: CancellationToken,
}

#[derive(Deserialize)]
struct ReadQuery {
    watch: Option<String>,
}

#[derive(Deserialize)]
struct ActionQuery {
    action: Option<String>,
    #[serde(rename = "bytesPerSecond")]
    bytes_per_second: Option<u64>,
}

pub(super) async fn serve(
    listener: Listener,
    status: Arc<watch::Sender<FileStatus>>,
    limit: Arc<Limit>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let face = Face { status, limit, shutdown: shutdown.clone() };
    let (_, ready) = watch::channel(Ok(()));
    let probes = runtime::probes::router(crate::metrics::of_data_source(), ready);
    let app = Router::new().route("/v1/file", get(read).post(act)).with_state(face).merge(probes);
    axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

async fn read(State(face): State<Face>, Query(query): Query<ReadQuery>) -> Response {
    if query.watch.as_deref() != Some("true") {
        return Json(face.status.borrow().clone()).into_response();
    }
    let lines = changes(face.status.subscribe()).map(|status| {
        let mut line = serde_json::to_vec(&status).expect("a status is plain data");
        line.push(b'\n');
        Ok::<_, Infallible>(Bytes::from(line))
    });
    let body = Body::from_stream(lines.take_until(face.shutdown.cancelled_owned()));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// The status now, and after each change. What differs in progress only is sent at most every [`PROGRESS_INTERVAL`].
fn changes(receiver: watch::Receiver<FileStatus>) -> impl Stream<Item = FileStatus> {
    stream::unfold((receiver, None::<(FileStatus, Instant)>), |(mut receiver, last)| async move {
        if let Some((last, at)) = last {
            receiver.changed().await.ok()?;
            let news = receiver.wait_for(|now| !last.differs_in_progress_only(now));
            let _ = timeout_at(at + PROGRESS_INTERVAL, news).await;
        }
        let now = receiver.borrow_and_update().clone();
        Some((now.clone(), (receiver, Some((now, Instant::now())))))
    })
}

async fn act(State(face): State<Face>, Query(query): Query<ActionQuery>) -> Response {
    match query.action.as_deref() {
        Some("transfer") => transfer(&face),
        Some("limit") => limit(&face, query.bytes_per_second),
        Some("upload") => refuse(
            StatusCode::NOT_IMPLEMENTED,
            "uploads are not supported yet: serve the file over HTTP and use the source type `download`",
        ),
        other => refuse(
            StatusCode::BAD_REQUEST,
            &format!(
                "the action `{}` is unknown: `transfer` and `limit` are those there are",
                other.unwrap_or_default()
            ),
        ),
    }
}

/// The file is taken over by somebody else from here on. Asked twice, it answers the same.
fn transfer(face: &Face) -> Response {
    let mut answer = None;
    face.status.send_if_modified(|status| {
        let changed = status.state == CopyState::ReadyForTransfer;
        if changed {
            status.state = CopyState::Ready;
        }
        answer = Some(status.clone());
        changed
    });
    let status = answer.expect("the closure always runs");
    if status.state == CopyState::Ready {
        return Json(status).into_response();
    }
    let message = format!(
        "the file is `{}`, not `ready-for-transfer`{}{}",
        status.state.as_str(),
        if status.message.is_empty() { "" } else { ": " },
        status.message
    );
    refuse(StatusCode::CONFLICT, &message)
}

/// So much is downloaded at most from here on.
fn limit(face: &Face, bytes_per_second: Option<u64>) -> Response {
    let Some(limit) = bytes_per_second.filter(|limit| api::bandwidth::is_possible(*limit)) else {
        return refuse(StatusCode::BAD_REQUEST, &format!("give `bytesPerSecond`, {}", api::bandwidth::RULE));
    };
    face.limit.set(limit);
    face.status.send_modify(|status| status.bandwidth_limit = limit);
    tracing::info!(bytes_per_second = limit, "bandwidth limited");
    Json(face.status.borrow().clone()).into_response()
}

fn refuse(code: StatusCode, message: &str) -> Response {
    (code, Json(json!({ "error": message }))).into_response()
}
