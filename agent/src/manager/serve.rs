//! Serves ready copies to other managers: manifest and byte ranges (see `peer`); and the probes and metrics of this one.
//!
//! It serves nobody before every file was looked at, so whoever gets an answer meets a manager that is ready.

use std::fs::File;
use std::io;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::stream::{self, Stream, StreamExt};
use runtime::transport::Listener;
use rustix::buffer::spare_capacity;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::registry::{Registry, Sending};
use crate::bandwidth::Share;
use crate::error::{AgentError, blocking};
use crate::layout::ImageKey;
use crate::limits::{CHUNK_BYTES, MAX_SYNCS};
use crate::metrics::{self, Look};

pub(super) async fn serve(listener: Listener, registry: Arc<Registry>, shutdown: CancellationToken) -> io::Result<()> {
    let (_, ready) = tokio::sync::watch::channel(Ok(()));
    let probes = runtime::probes::router(metrics::of_manager(look(&registry)), ready);
    let app = Router::new()
        .route("/v1/copies/{key}/manifest", get(manifest))
        .route("/v1/copies/{key}/data", get(data))
        .with_state(registry)
        .merge(probes);
    axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

fn look(registry: &Arc<Registry>) -> impl Fn() -> Option<Look> + Send + Sync + 'static {
    let registry = Arc::downgrade(registry);
    move || {
        let registry = registry.upgrade()?;
        let copies = registry.all().into_iter().map(|(_, copy)| (copy.state, copy.sending)).collect();
        Some(Look { copies, syncs: MAX_SYNCS.saturating_sub(registry.syncs.available_permits()) })
    }
}

/// An error with its HTTP status.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

impl From<AgentError> for Refusal {
    fn from(error: AgentError) -> Self {
        tracing::error!(error = error.chain(), "cannot serve a peer");
        Refusal(StatusCode::INTERNAL_SERVER_ERROR, error.chain())
    }
}

fn begin(registry: &Arc<Registry>, key: &str) -> Result<(ImageKey, Sending), Refusal> {
    let key: ImageKey = key.parse().map_err(|e| Refusal(StatusCode::BAD_REQUEST, format!("{e}")))?;
    let sending = registry
        .begin_sending(&key, u32::MAX)
        .ok_or_else(|| Refusal(StatusCode::NOT_FOUND, format!("no ready copy of `{key}` is here")))?;
    Ok((key, sending))
}

async fn manifest(State(registry): State<Arc<Registry>>, Path(key): Path<String>) -> Result<Response, Refusal> {
    let (key, _sending) = begin(&registry, &key)?;
    let path = registry.disk.copy(&key).manifest;
    let bytes = blocking(move || std::fs::read(&path).map_err(AgentError::io("read", &path))).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response())
}

async fn data(
    State(registry): State<Arc<Registry>>,
    Path(key): Path<String>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let (key, sending) = begin(&registry, &key)?;
    let path = registry.disk.copy(&key).file;
    let (file, size) = blocking(move || {
        let file = File::open(&path).map_err(AgentError::io("open", &path))?;
        let size = file.metadata().map_err(AgentError::io("look at", &path))?.len();
        Ok((file, size))
    })
    .await?;
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok()).and_then(parse_range);
    let Some((start, end)) = range.filter(|(start, end)| start < end && *end <= size) else {
        return Err(Refusal(
            StatusCode::RANGE_NOT_SATISFIABLE,
            format!("give a `Range: bytes=first-last` within the {size} bytes of the file"),
        ));
    };
    let share = registry.bandwidth.share(key.name.as_str());
    let stop = registry.tasks.clone();
    let body = read(Reading { registry, file: Arc::new(file), position: start, end, share, _sending: sending });
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, (end - start).to_string()),
        (header::CONTENT_RANGE, format!("bytes {start}-{}/{size}", end - 1)),
    ];
    let body = Body::from_stream(body.take_until(stop.cancelled_owned()));
    Ok((StatusCode::PARTIAL_CONTENT, headers, body).into_response())
}

struct Reading {
    registry: Arc<Registry>,
    file: Arc<File>,
    position: u64,
    end: u64,
    share: Share,
    _sending: Sending,
}

fn read(reading: Reading) -> impl Stream<Item = Result<Bytes, AgentError>> {
    stream::unfold(Some(reading), |reading| async move {
        let mut reading = reading?;
        let left = (reading.end - reading.position).min(CHUNK_BYTES);
        if left == 0 {
            return None;
        }
        let length = reading.share.take(left).await;
        // For this piece only: who waits under a limit must not keep others from theirs.
        let turn = reading.registry.peer_reads.acquire().await.expect("the semaphore is never closed");
        let (file, offset) = (reading.file.clone(), reading.position);
        let bytes = blocking(move || {
            // Without zeroing it first.
            let mut bytes = Vec::with_capacity(length as usize);
            while bytes.len() < length as usize {
                let position = offset + bytes.len() as u64;
                let read = rustix::io::pread(&*file, spare_capacity(&mut bytes), position).map_err(io::Error::from);
                if read.map_err(AgentError::io("read", "the copy"))? == 0 {
                    return Err(AgentError::io("read", "the copy")(io::ErrorKind::UnexpectedEof.into()));
                }
            }
            bytes.truncate(length as usize);
            metrics::SENT_BYTES.add(length);
            Ok(Bytes::from(bytes))
        })
        .await;
        drop(turn);
        reading.position += length;
        let next = bytes.is_ok().then_some(reading);
        Some((bytes, next))
    })
}

/// Start and end (exclusive) of `bytes=first-last`.
fn parse_range(text: &str) -> Option<(u64, u64)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse::<u64>().ok()?.checked_add(1)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_one_closed_range() {
        assert_eq!(parse_range("bytes=0-0"), Some((0, 1)));
        assert_eq!(parse_range("bytes=5-9"), Some((5, 10)));
        for bad in ["bytes=5-", "bytes=-5", "bytes=0-1,3-4", "items=0-1", "bytes=0-18446744073709551615"] {
            assert_eq!(parse_range(bad), None, "{bad}");
        }
    }
}
