//! `serve`: a small HTTP server for the files of one directory, with ranges and entity tags. For demonstrations and tests.

use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use clap::Args;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// How much of a file is in memory for each request.
const PIECE: usize = 256 << 10;

/// Serves the files of a directory over HTTP.
#[derive(Args, Debug)]
pub struct Serve {
    directory: PathBuf,
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where to write the address, once it listens.
    #[arg(long)]
    address_file: Option<PathBuf>,
}

/// Runs until a signal.
pub async fn run(Serve { directory, listen, address_file }: Serve) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
    let address = listener.local_addr()?;
    println!("http://{address}");
    if let Some(file) = address_file {
        runtime::files::write_durably(&file, format!("http://{address}\n").as_bytes())?;
    }
    let router = Router::new().fallback(answer).with_state(Arc::new(directory));
    let shutdown = runtime::shutdown::on_signal()?;
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await?;
    Ok(())
}

async fn answer(State(directory): State<Arc<PathBuf>>, method: Method, uri: Uri, headers: HeaderMap) -> Response {
    let name = uri.path().trim_start_matches('/').to_owned();
    if name.split('/').any(|part| part == "..") || !matches!(method, Method::GET | Method::HEAD) {
        return StatusCode::NOT_FOUND.into_response();
    }
    let wanted = headers.get(header::RANGE).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let condition = headers.get(header::IF_RANGE).and_then(|v| v.to_str().ok()).map(str::to_owned);
    match file(&directory.join(name), wanted.as_deref(), condition.as_deref(), method == Method::HEAD) {
        Ok(response) => response,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => StatusCode::NOT_FOUND.into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn file(path: &Path, wanted: Option<&str>, condition: Option<&str>, head: bool) -> std::io::Result<Response> {
    let mut file = std::fs::File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(StatusCode::NOT_FOUND.into_response());
    }
    let size = metadata.len();
    let stamp = metadata.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    let tag = format!("\"{size:x}-{stamp:x}\"");
    let range = wanted.filter(|_| condition.is_none_or(|c| c == tag)).and_then(|w| range_of(w, size));
    let (first, end) = range.unwrap_or((0, size));
    let mut response = Response::builder()
        .status(if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK })
        .header(header::CONTENT_LENGTH, end - first)
        .header(header::ACCEPT_RANGES, "bytes")
        .header(header::ETAG, tag);
    if range.is_some() {
        response = response.header(header::CONTENT_RANGE, format!("bytes {first}-{}/{size}", end - 1));
    }
    if head {
        return Ok(response.body(Body::empty()).unwrap_or_default());
    }
    let (sender, receiver) = mpsc::channel::<std::io::Result<Bytes>>(4);
    tokio::task::spawn_blocking(move || {
        let mut left = end - first;
        if let Err(error) = file.seek(SeekFrom::Start(first)) {
            let _ = sender.blocking_send(Err(error));
            return;
        }
        while left > 0 {
            let mut piece = vec![0; PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
            let result = file.read_exact(&mut piece).map(|()| Bytes::from(piece));
            left -= result.as_ref().map_or(left, |p| p.len() as u64);
            if sender.blocking_send(result).is_err() {
                return;
            }
        }
    });
    Ok(response.body(Body::from_stream(ReceiverStream::new(receiver))).unwrap_or_default())
}

/// `bytes=first-` or `bytes=first-last` within a file, as a half-open range.
fn range_of(text: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.parse().ok()?;
    let end = if last.is_empty() { size } else { last.parse::<u64>().ok()?.checked_add(1)?.min(size) };
    (first < end).then_some((first, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_half_open() {
        assert_eq!(range_of("bytes=2-", 10), Some((2, 10)));
        assert_eq!(range_of("bytes=2-3", 10), Some((2, 4)));
        assert_eq!(range_of("bytes=10-", 10), None);
        assert_eq!(range_of("bytes=-5", 10), None);
    }
}
